"""Which recipe of fine-tuning sees most for its time? See instrument.sh, recipe.md.

    python -m data.results.instrument [FILE]                # the table
    python -m data.results.instrument [FILE] --todo 0 1 2   # what is missing for these seeds
    glue.py ... --jsonl | python -m data.results.instrument [FILE] --keep RUN

FILE (default: instrument.jsonl in this folder) has a line for each score, and for each pretraining.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from data.files import UserError, run_script, write_atomic
from data.runs import read_log
from data.tasks import PRIMARY

HERE = Path(__file__).parent
RECIPES = [(20_000, 1), (5000, 3)]  # training rows, epochs
# The third, 20 000 rows and three epochs, was run by gate.sh: bfloat16, on another machine, at the
# rates of glue.py. A fine-tuning of it takes three times what one epoch takes.
GATE = (20_000, 3)
RATES = {False: (1e-3, 5e-4, 2e-3), True: (5e-4, 2.5e-4, 1e-3)}  # of random weights?
SEEDS = 3  # of fine-tuning, at the best rates


def read(path):
    """-> ({(recipe, of random weights?): {rate: {(pretraining, fine-tuning seed): {task:
    (accuracy, seconds)}}}}, [seconds of the pretrainings])."""
    cells, pretrainings = {}, {}
    lines = path.read_text().splitlines() if path.exists() else []
    for line in (HERE / "scores.jsonl").read_text().splitlines():
        if '"study": "gate"' in line and ("random-10000-" in line or "random weights" in line):
            lines.append(line)
    for e in map(json.loads, lines):
        arm, _, seed = e["run"].rpartition("-")
        if "pretraining" in e:
            pretrainings[e["run"]] = e["pretraining"]
            continue
        recipe = e.get("recipe") or {"max_train": GATE[0], "epochs": GATE[1], "lr": 0.0}
        key = (recipe["max_train"], recipe["epochs"]), arm == "random weights"
        cell = cells.setdefault(key, {}).setdefault(recipe["lr"], {}).setdefault(
            (int(seed), e["seed"]), {})
        part = "matched" if e["task"] == "MNLI" else "accuracy"
        cell[e["task"]] = e["parts"][part], e["seconds"]
    for rates in cells.values():
        for rate, found in rates.items():
            rates[rate] = {key: cell for key, cell in found.items() if len(cell) == len(PRIMARY)}
    return cells, list(pretrainings.values())


def mean(cell, which=0):
    return statistics.fmean(values[which] for values in cell.values())


def best_rate(cells, recipe, of_weights):
    """The rate that is best for seed 0; None before all were tried."""
    tried = {rate: found[0, 0] for rate, found in cells.get((recipe, of_weights), {}).items()
             if (0, 0) in found}
    if recipe != GATE and not set(RATES[of_weights]) <= tried.keys():
        return None
    return max(tried, key=lambda rate: mean(tried[rate]), default=None)


def todo(cells, seeds):
    """Yield (seed, rate of the run, of random weights, rows, epochs, fine-tuning seeds). The rates
    are - before seed 0 has chosen them."""
    for recipe in RECIPES:
        rates = {of: cells.get((recipe, of), {}) for of in (False, True)}
        best = [best_rate(cells, recipe, of) for of in (False, True)]
        for pair in zip(RATES[False], RATES[True]) if 0 in seeds and None in best else ():
            if any((0, 0) not in rates[of].get(rate, {}) for of, rate in enumerate(pair)):
                yield 0, *pair, *recipe, 1
        for seed in seeds:
            if any((seed, fine) not in rates[of].get(rate, {})
                   for of, rate in enumerate(best) for fine in range(SEEDS)):
                yield seed, *(rate or "-" for rate in best), *recipe, SEEDS


def keep(run, path):
    """Add what is new of stdin, lines of glue.py --jsonl, and the seconds of the pretraining."""
    pretraining = {"run": run.name, "pretraining": read_log(run)[-1]["seconds"]}
    there = path.read_text().splitlines() if path.exists() else []
    for e in [pretraining, *map(json.loads, sys.stdin)]:
        if "correct" in e:
            e["correct"] = f"{int('0' + e['correct'], 2):x}"  # as in quality.jsonl
        if (line := json.dumps(e)) not in there:
            there.append(line)
    write_atomic(path, "".join(f"{line}\n" for line in there).encode())


def print_table(cells, pretrainings):
    if not pretrainings:
        raise UserError("nothing is scored yet: bash data/results/instrument.sh")
    P = statistics.fmean(pretrainings) / 60
    print(f"P: {P:.1f} minutes of pretraining, without evaluations\n")
    print("| rows, epochs | rates | gain of each seed | gain | s_pre | s_fine | c | cost, n = 1 |"
          f" n = 2 | n = 3 |\n{'|---' * 10}|")
    for recipe in (*RECIPES, GATE):
        best = [best_rate(cells, recipe, of) for of in (False, True)]
        if None in best:
            continue
        ours, theirs = (cells[recipe, bool(of)][rate] for of, rate in enumerate(best))
        gains = {}
        for seed, fine in sorted(ours.keys() & theirs.keys()):
            gain = mean(ours[seed, fine]) - mean(theirs[seed, fine])
            gains.setdefault(seed, []).append(gain)
        n = min(map(len, gains.values()))
        if n < 2 or len(gains) < 2:
            continue
        fine = statistics.fmean(statistics.variance(values) for values in gains.values())
        seeds = [statistics.fmean(values) for values in gains.values()]
        gain, pre = statistics.fmean(seeds), max(0.0, statistics.variance(seeds) - fine / n)
        one_epoch = cells[(recipe[0], 1), False] if recipe == GATE else {0: ours}
        minutes = [len(PRIMARY) * mean(cell, 1) / 60 for found in one_epoch.values()
                   for cell in found.values()]
        c = statistics.fmean(minutes) * (3 if recipe == GATE else 1)
        costs = [f"{(P + n * c) * (pre + fine / n) / gain**2:.3f}" for n in (1, 2, 3)]
        each = ", ".join(f"{gain:.2f}" for gain in seeds)
        print(f"| {recipe[0]}, {recipe[1]} | {best[0]:g}, {best[1]:g} | {each} | {gain:.2f} | "
              f"{pre**0.5:.2f} | {fine**0.5:.2f} | {c:.1f} | {' | '.join(costs)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=HERE / "instrument.jsonl")
    parser.add_argument("--todo", type=int, nargs="+", metavar="SEED")
    parser.add_argument("--keep", type=Path, metavar="RUN")
    args = parser.parse_args()
    if args.keep:
        return keep(args.keep, args.file)
    cells, pretrainings = read(args.file)
    if args.todo:
        lines = list(todo(cells, args.todo))
        if lines and "-" in lines[0]:
            raise UserError("seed 0 chooses the rates: give it first")
        for line in lines:
            print(*line)
    else:
        print_table(cells, pretrainings)


if __name__ == "__main__":
    run_script(main)
