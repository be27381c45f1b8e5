"""Which recipe of fine-tuning sees most for its time? See instrument.sh.

    python -m data.results.instrument RUNS       # the folder that instrument.sh has filled
"""

import json
import statistics
import sys
from pathlib import Path

from data.tasks import PRIMARY


def read_cells(runs):
    """-> {(recipe, rate, of random weights?): {(pretraining, fine-tuning seed): {task: (accuracy,
    seconds)}}}, of seeds that have all four tasks. A recipe is (training rows, epochs)."""
    found = {}
    for entry in map(json.loads, (runs / "scores.jsonl").read_text().splitlines()):
        recipe, (run, _, seed) = entry["recipe"], entry["run"].rpartition("-")
        if entry["task"] in PRIMARY and not recipe["freeze"]:
            key = (recipe["max_train"], recipe["epochs"]), recipe["lr"], run == "random weights"
            cell = found.setdefault(key, {}).setdefault((int(seed), entry["seed"]), {})
            part = "matched" if entry["task"] == "MNLI" else "accuracy"
            cell[entry["task"]] = entry["parts"][part], entry["seconds"]
    return {key: {seeds: cell for seeds, cell in cells.items() if len(cell) == len(PRIMARY)}
            for key, cells in found.items()}


def mean(cell, which=0):
    return statistics.fmean(values[which] for values in cell.values())


def best_rate(cells, recipe, of_weights):
    """The seeds' cells at the rate that is best with fine-tuning seed 0."""
    rates = {key[1]: found for key, found in cells.items()
             if key[0] == recipe and key[2] == of_weights}
    first = {rate: statistics.fmean(mean(cell) for (_, fine), cell in found.items() if not fine)
             for rate, found in rates.items()}
    print(recipe, "random weights" if of_weights else "random",
          ", ".join(f"{rate}: {value:.2f}" for rate, value in sorted(first.items())))
    return rates[max(first, key=first.get)]


def main():
    runs = Path(sys.argv[1])
    cells = read_cells(runs)
    last = [json.loads((runs / f"random-{seed}/log.jsonl").read_text().splitlines()[-1])
            for seed in range(3)]
    P = statistics.fmean(line["seconds"] for line in last) / 60
    print(f"P: {P:.1f} minutes of pretraining, without evaluations")
    for recipe in sorted({key[0] for key in cells}):
        ours, theirs = (best_rate(cells, recipe, of_weights) for of_weights in (False, True))
        gains = {}
        for seed, fine in sorted(ours.keys() & theirs.keys()):
            gain = mean(ours[seed, fine]) - mean(theirs[seed, fine])
            gains.setdefault(seed, []).append(gain)
        n = min(map(len, gains.values()))
        if n < 2 or len(gains) < 2:
            print(recipe, "has one fine-tuning seed at its best rates: score the others there")
            continue
        fine = statistics.fmean(statistics.variance(values) for values in gains.values())
        seeds = [statistics.fmean(values) for values in gains.values()]
        gain, pre = statistics.fmean(seeds), max(0.0, statistics.variance(seeds) - fine / n)
        c = statistics.fmean(mean(cell, 1) * len(cell) for cell in ours.values()) / 60
        costs = ", ".join(f"n {n}: {(P + n * c) * (pre + fine / n) / gain**2:.3f}"
                          for n in (1, 2, 3))
        print(recipe, f"gain {gain:.2f}, s_pre {pre**0.5:.2f}, s_fine {fine**0.5:.2f}, c {c:.1f} "
              f"minutes; {costs}")


if __name__ == "__main__":
    main()
