"""When does a model leave the plateau? The table and the pictures of the runs of exit.sh.

    python -m data.results.exit                # prints the tables, writes the pictures
    python -m data.results.exit --keep RUN --to onset.jsonl     # adds a finished run to that file

The exit is where the held-out loss crosses 0.9 x unigram entropy - 0.1 nats for good (plan.md).
"""

import argparse
import fcntl
import json
import math
import statistics
import subprocess
from pathlib import Path

from data.confidence import paired
from data.files import UserError, run_script, write_atomic
from data.plot import draw_curves, draw_differences
from data.runs import WITHOUT_CONTEXT, read_config, read_log

HERE = Path(__file__).parent
LINES = HERE / "exit.jsonl"
MARGIN = 0.1  # nats below what a model without context can reach
CONTRASTS = ("high", "static", "distill")  # fixed in plan.md; Holm's correction over these
SEEDS = range(10, 19)  # theirs; seeds 0 to 2 chose the text and the budget


def keep(run, path):
    """Add the losses and context gains of a finished run to a .jsonl file, as one line."""
    config, flags = read_config(run), read_config(run)["flags"]
    entry = {"run": run.name, "arm": run.name.rpartition("-")[0], "seed": flags["seed"],
             "steps": flags["steps"], "corpus_tokens": flags["corpus_tokens"],
             "batch_tokens": flags["batch_size"] * flags["seq_len"],
             "unigram_entropy": round(config["unigram_entropy"], 4), "flops": config["flops"],
             "teacher_flops": config["teacher_flops"],
             **{name: config["starts"][0][name] for name in ("machine", "dtype", "torch", "date")}}
    entry["commit"] = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, text=True,
                                     capture_output=True).stdout.strip()
    lines = [line for line in read_log(run) if "val_loss" in line]
    entry["finished"] = (run / "model.pt").exists()  # or it diverged
    entry["loss"] = [[line["step"], round(line["val_loss"], 3)] for line in lines]
    entry["context_gain"] = [[line["step"], round(line["context_gain"], 4)] for line in lines]
    with open(path, "a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)  # two runs may end at the same time
        f.write(json.dumps(entry) + "\n")


def exit_step(run):
    """The step, interpolated, from which on no evaluation is above the bound; None: not yet."""
    bound = WITHOUT_CONTEXT * run["unigram_entropy"] - MARGIN
    above = [i for i, (_, loss) in enumerate(run["loss"]) if not loss <= bound]
    if not run.get("finished", True) or above[-1] == len(run["loss"]) - 1:
        return None
    (s0, l0), (s1, l1) = run["loss"][above[-1]:above[-1] + 2]
    return s0 + (s1 - s0) * (l0 - bound) / (l0 - l1)


def holm(p):
    """{name: p} -> {name: p corrected for the number of tests} (Holm 1979)."""
    corrected, largest = {}, 0.0
    for i, name in enumerate(sorted(p, key=p.get)):
        largest = max(largest, min(1.0, (len(p) - i) * p[name]))
        corrected[name] = largest
    return corrected


def print_text(runs):
    """Random masking on the three texts: in which epoch was each left?"""
    print("| text, tokens | exits, steps | epochs of the text by then |\n|---|---|---|")
    for arm in sorted({run["arm"] for run in runs}, key=lambda arm: int(arm.split("-")[1])):
        found = [(exit_step(run), run) for run in runs if run["arm"] == arm]
        epochs = [f"{step * run['batch_tokens'] / run['corpus_tokens']:.1f}" if step else "-"
                  for step, run in found]
        print(f"| {int(arm.split('-')[1]):,} |", ", ".join(
            f"{step:.0f}" if step else "not left" for step, _ in found), "|", ", ".join(epochs),
            "|")


def print_learned(runs):
    """BERT as published: single runs and no test (plan.md)."""
    print("\n| learned positions, arm | seed | exit, million tokens | lowest loss | at, million "
          "tokens |\n|---|---|---|---|---|")
    for run in sorted(runs, key=lambda run: (run["arm"], run["seed"])):
        millions = run["batch_tokens"] / 1e6
        step, (at, lowest) = exit_step(run), min(run["loss"], key=lambda point: point[1])
        print(f"| {run['arm'].removeprefix('learned-')} | {run['seed']} |",
              f"{step * millions:.1f}" if step else f"not left in {run['steps'] * millions:.0f}",
              f"| {lowest:.2f} | {at * millions:.1f} |")


def print_arms(arms):
    """Print the table of {arm: {seed: run}} -> {arm: its paired log ratio to random masking}."""
    # A run that has not left by the end of its budget counts as the budget, and is named.
    exits = {arm: {seed: exit_step(run) or run["steps"] for seed, run in sorted(by_seed.items())}
             for arm, by_seed in arms.items()}
    logs = {arm: {seed: math.log(step) for seed, step in steps.items()}
            for arm, steps in exits.items()}
    ratios = {}
    for arm in arms.keys() - {"random"}:
        seeds = SEEDS if arm in CONTRASTS else arms[arm]
        pairs = {seed: logs[arm][seed] for seed in seeds if seed in logs[arm]}
        # No difference of the fixed contrasts is looked at before all their seeds are there.
        if arm not in CONTRASTS or len(pairs) == len(SEEDS):
            ratios[arm] = paired(pairs, logs["random"])
            ratios[arm]["each"] = [pairs[s] - logs["random"][s] for s in ratios[arm]["seeds"]]
    corrected = holm({arm: ratios[arm]["p_t"] for arm in CONTRASTS if arm in ratios}) if all(
        arm in ratios for arm in CONTRASTS) else {}
    for arm in CONTRASTS:
        if arm not in ratios:
            there = len(set(SEEDS) & arms.get(arm, {}).keys())
            print(f"\n{arm}: {there} of its {len(SEEDS)} seeds "
                  "are there; no difference is shown before all are")
    print("\n| arm | seeds | exit, steps: median (range) | over random [95 %] | p of t, Holm | "
          "sign flip (smallest) | not left | FLOPs |\n|---|---|---|---|---|---|---|---|")
    cost = statistics.mean(run["flops"] for run in arms["random"].values())
    shown = [arm for arm in arms if arm in ratios or arm not in CONTRASTS]
    for arm in sorted(shown, key=lambda arm: statistics.median(exits[arm].values())):
        steps, ratio = sorted(exits[arm].values()), ratios.get(arm)
        cells = [arm, str(len(steps)),
                 f"{statistics.median(steps):.0f} ({steps[0]:.0f} to {steps[-1]:.0f})"]
        if ratio and ratio["low"] is not None:
            cells += [f"{math.exp(ratio['difference']):.2f} [{math.exp(ratio['low']):.2f}, "
                      f"{math.exp(ratio['high']):.2f}]",
                      "-" if arm not in corrected else
                      f"{corrected[arm]:.4f}" if corrected[arm] >= 1e-4 else "< 0.0001",
                      f"{ratio['p_sign_flip']:.3f} ({ratio['p_smallest']:.3f})"]
        else:
            cells += ["-", "-", "-"]
        stuck = [str(seed) for seed, run in arms[arm].items() if exit_step(run) is None]
        spent = statistics.mean(run["flops"] for run in arms[arm].values()) / cost
        print("|", " | ".join([*cells, ", ".join(stuck) or "-", f"{spent:.2f}"]), "|")
    return ratios


def draw(arms, ratios):
    """Write the curves of all arms, the same shifted by their exits, and the ratios."""
    title = "held-out loss (nats)"
    bound = next(WITHOUT_CONTEXT * r["unigram_entropy"] - MARGIN for r in arms["random"].values())
    arms = dict(sorted(arms.items(), key=lambda item: statistics.median(  # one colour in both
        exit_step(run) or math.inf for run in item[1].values())))
    curves = {arm: [[tuple(point) for point in run["loss"] if point[1] < 20]
                    for run in by_seed.values()] for arm, by_seed in arms.items()}
    write_atomic(HERE / "exit-curves.svg", draw_curves(
        curves, {"exit": bound}, title, "training steps", 1).encode())
    shifted = {}
    for arm, by_seed in arms.items():  # 0 is the exit; a multiple of 25, as the others have it
        for run in by_seed.values():
            if exit_step(run):
                at = 25 * round(exit_step(run) / 25)
                shifted.setdefault(arm, []).append([(s - at, loss) for s, loss in run["loss"]])
    write_atomic(HERE / "exit-shifted.svg", draw_curves(
        shifted, {"exit": bound}, title, "training steps after the exit", 1).encode())
    rows = [(arm, *(nats / math.log(2) for nats in (r["difference"], r["low"], r["high"],
                                                    *r["each"])))
            for arm, r in sorted(ratios.items(), key=lambda item: item[1]["difference"])
            if r["low"] is not None]
    write_atomic(HERE / "exit-ratios.svg", draw_differences(
        [("exit time over that of random masking: mean, 95 % interval, every seed", rows)],
        "halvings (-1, -2) and doublings (+1, +2) of the time on the plateau",
        lambda doublings: f"{2**doublings:.2f}").encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="RUN", help="add a finished run to a file")
    parser.add_argument("--to", default="onset.jsonl", help="that file (default onset.jsonl)")
    args = parser.parse_args()
    if args.keep:
        return keep(args.keep, HERE / args.to)
    if not LINES.exists():
        raise UserError("nothing has run yet:  CORPUS=FILE bash data/results/exit.sh text")
    runs = [json.loads(line) for line in LINES.read_text().splitlines()]
    print_text([run for run in runs if run["arm"].startswith("text-")])
    if learned := [run for run in runs if run["arm"].startswith("learned-")]:
        print_learned(learned)
    arms = {}
    for run in runs:
        if not run["arm"].startswith(("text-", "learned-")):
            arms.setdefault(run["arm"], {})[run["seed"]] = run
    if "random" not in arms:
        return
    ratios = print_arms(arms)
    if all(arm in ratios for arm in CONTRASTS):
        draw(arms, ratios)


if __name__ == "__main__":
    run_script(main)
