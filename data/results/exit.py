"""When does a model leave the plateau, and when does it begin to use context? See plan.md, exit.md.

    python -m data.results.exit                # prints the tables, writes the pictures
    python -m data.results.exit --keep RUN --to onset.jsonl     # adds a finished run to that file

An endpoint is a function of a run, which is a line of such a file, to a step; None: it has none.
"""

import argparse
import fcntl
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.confidence import paired
from data.files import run_script, write_atomic
from data.plot import draw_curves
from data.results.differences import draw_differences
from data.runs import read_config, read_log

HERE = Path(__file__).parent
# The share of the unigram entropy below which a loss takes context. A tenth of the tokens to
# predict is shown as it is: a model that copies those is below the entropy, but it still has all of
# it at [MASK] (0.8 of them) and where another token stands (0.1).
WITHOUT_CONTEXT = 0.9
MARGIN = 0.1  # nats below what a model without context can reach (plan.md, first part)
LEVEL, ROW = 0.25, 4  # nats of context gain, in so many successive evaluations (second part)
WHERE = ("machine", "dtype", "torch")  # in these, two runs that are compared must agree


def keep(run, path):
    """Add the losses and context gains of a finished run to a .jsonl file, as one line."""
    config = read_config(run)
    flags, start = config["flags"], config["starts"][0]
    entry = {"run": run.name, "arm": run.name.rpartition("-")[0], "seed": flags["seed"],
             "steps": flags["steps"], "corpus_tokens": flags["corpus_tokens"],
             "batch_tokens": flags["batch_size"] * flags["seq_len"],
             "unigram_entropy": round(config["unigram_entropy"], 4), "flops": config["flops"],
             "teacher_flops": config["teacher_flops"],
             **{name: start[name] for name in (*WHERE, "date")}, "commit": start["commit"][:7]
             + "-dirty" * start["commit"].endswith("-dirty")}
    lines = [line for line in read_log(run) if "val_loss" in line]
    entry["finished"] = (run / "model.pt").exists()  # or it diverged
    entry["loss"] = [[line["step"], round(line["val_loss"], 3)] for line in lines]
    entry["context_gain"] = [[line["step"], round(line["context_gain"], 4)] for line in lines]
    with open(path, "a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)  # two runs may end at the same time
        f.write(json.dumps(entry) + "\n")


# --------------------------------------------------------------------------------------------------
# endpoints


def crossing(before, after, level):
    """The step at which the line between two evaluations (step, value) crosses a level."""
    (s0, y0), (s1, y1) = before, after
    return s0 + (s1 - s0) * (level - y0) / (y1 - y0)


def exit_bound(run):
    """0.9 x unigram entropy - 0.1 nats."""
    return WITHOUT_CONTEXT * run["unigram_entropy"] - MARGIN


def exit_step(run):
    """The step at which the held-out loss crosses the bound for good."""
    points, bound = run["loss"], exit_bound(run)
    last = max(i for i, (_, loss) in enumerate(points) if not loss <= bound)
    if not run.get("finished", True) or last == len(points) - 1:
        return None
    return crossing(points[last], points[last + 1], bound)


def onset(run, level=LEVEL):
    """The step at which the context gain crosses `level`: before the first of four successive
    evaluations above it. (The evaluation at step 0 is of random weights, and never above.)"""
    points = run["context_gain"]
    for i in range(1, len(points) - ROW + 1):
        if all(gain > level for _, gain in points[i:i + ROW]):
            return crossing(points[i - 1], points[i], level)


@dataclass
class Part:
    """A part of plan.md: the runs of NAME.jsonl, what is asked of them, what was fixed before."""

    name: str
    endpoint: Callable
    curve: tuple  # the key of a run that is drawn, and its title
    seeds: range  # of the arms that were fixed: those tested and those shown
    tested: tuple  # Holm's correction is over these
    shown: tuple = ()  # with an interval and no test; arms that are not named are exploratory
    limit: float = 1.0  # an arm has no test if a larger share of its runs is without the step
    beside: tuple = ()  # of (title, another endpoint of the same runs)
    bound: Callable | None = None  # run -> nats, a line in the picture of curves


PARTS = [
    Part("exit", exit_step, ("loss", "held-out loss (nats)"), range(10, 19),
         ("high", "static", "distill"), bound=exit_bound),
    Part("onset", onset, ("context_gain", f"context gain (nats); an onset is at {LEVEL}"),
         range(30, 39), ("high", "distill", "small-static"), shown=("distill-control",),
         limit=1 / 3, beside=(("onset at 0.1 nats", partial(onset, level=0.1)),
                              ("at 0.5 nats", partial(onset, level=0.5)), ("exit", exit_step))),
]


def read_runs(part):
    """-> {arm: {seed: run}}, in the order of their medians, and a list of runs without a test."""
    path, arms, single = HERE / f"{part.name}.jsonl", {}, []
    for run in map(json.loads, path.read_text().splitlines() if path.exists() else []):
        if run["arm"].startswith(("text-", "learned-")):
            single.append(run)
        else:
            arms.setdefault(run["arm"], {})[run["seed"]] = run
    return dict(sorted(arms.items(), key=lambda item: statistics.median(
        steps(run, part.endpoint) for run in item[1].values()))), single


# --------------------------------------------------------------------------------------------------
# differences to random masking


def steps(run, endpoint):
    """The step; the budget of a run without one."""
    return endpoint(run) or run["steps"]


def flops(run, endpoint, teacher):
    """FLOPs up to that step, with (1) or without (0) the training of the teacher."""
    return steps(run, endpoint) * run["flops"] / run["steps"] + teacher * run["teacher_flops"]


def without(runs, endpoint):
    """The seeds of the runs that have no such step."""
    return [seed for seed, run in runs.items() if endpoint(run) is None]


def pairs(arms, arm):
    """{seed: (run, the run that masks at random on the same text)}, both of one machine."""
    runs = arms.get(arm, {})
    others = arms.get("small-random" if arm.startswith("small-") else "random", {})
    return {seed: (runs[seed], others[seed]) for seed in sorted(runs.keys() & others.keys())
            if all(runs[seed].get(name) == others[seed].get(name) for name in WHERE)}


def ratios(part, arms, measure):
    """{arm: {seed: run}}, run -> a number -> {arm: paired() of that number's logarithm with random
    masking, and "each" of its differences}. Of an arm that was fixed before, only its seeds count.
    """
    found = {}
    for arm in arms:
        both = pairs(arms, arm)
        if arm in part.tested + part.shown:
            both = {seed: pair for seed, pair in both.items() if seed in part.seeds}
        if both and arm not in ("random", "small-random"):
            ours, theirs = ({seed: math.log(measure(pair[i])) for seed, pair in both.items()}
                            for i in (0, 1))
            found[arm] = {**paired(ours, theirs), "each": [ours[s] - theirs[s] for s in both]}
    return found


def show_p(p):
    return f"{p:.4f}" if p >= 1e-4 else "< 0.0001"


def holm(p):
    """{name: p} -> {name: p corrected for the number of tests} (Holm 1979)."""
    corrected, largest = {}, 0.0
    for i, name in enumerate(sorted(p, key=p.get)):
        largest = max(largest, min(1.0, (len(p) - i) * p[name]))
        corrected[name] = largest
    return corrected


def tests(part, arms, found):
    """{arm: (its t and corrected p, its sign flip) as words}.

    An arm that lacks too many steps has no test, and still counts as one of Holm's.
    """
    lacking = {arm: n for arm in part.tested
               if (n := len(without(arms[arm], part.endpoint))) > part.limit * len(part.seeds)}
    p = holm({arm: 1.0 if arm in lacking else found[arm]["p_t"] for arm in part.tested})
    return {arm: (f"no test: {lacking[arm]} without", "-") if arm in lacking else
            (f"{found[arm]['difference'] / found[arm]['seed_error']:.1f}; {show_p(p[arm])}",
             f"{found[arm]['p_sign_flip']:.3f}") for arm in part.tested}


# --------------------------------------------------------------------------------------------------
# tables and pictures


def show(ratio, censored):
    """paired() of logarithms -> a ratio and its interval, as words."""
    if ratio["low"] is None:
        return f"{math.exp(ratio['difference']):.2f}"
    low, middle, high = (math.exp(ratio[name]) for name in ("low", "difference", "high"))
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]" + " or more" * bool(censored)


def print_part(part, arms):
    """Print the tables of {arm: {seed: run}} -> ratios() of the part's endpoint."""
    found = ratios(part, arms, partial(steps, endpoint=part.endpoint))
    verdicts = tests(part, arms, found)
    print(f"\n| arm | runs | {part.name}, steps: median (range) | over random [95 %] | t; p, Holm "
          f"| sign flip | seeds without |\n{'|---' * 7}|")
    for arm, runs in arms.items():
        values = sorted(steps(run, part.endpoint) for run in runs.values())
        missing = without(runs, part.endpoint)
        cells = [arm, str(len(runs)), f"{statistics.median(values):.0f} ({values[0]:.0f} to "
                 f"{values[-1]:.0f})", show(found[arm], missing) if arm in found else "-",
                 *verdicts.get(arm, "--"), " ".join(map(str, missing)) or "-"]
        print("|", " | ".join(cells), "|")
    costs = [ratios(part, arms, partial(flops, endpoint=part.endpoint, teacher=teacher))
             for teacher in (0, 1)]
    print("\n| over random | FLOPs to it | with the teacher's",
          *(title for title, _ in part.beside), sep=" | ", end=" |\n")
    print("|---" * (3 + len(part.beside)) + "|")
    for arm in found:
        more = " or more" * bool(without(arms[arm], part.endpoint))
        cells = [f"{math.exp(cost[arm]['difference']):.2f}{more}" for cost in costs]
        cells += [show(ratios(part, arms, partial(steps, endpoint=endpoint))[arm],
                       without(arms[arm], endpoint)) for _, endpoint in part.beside]
        print(f"| {arm} |", " | ".join(cells), "|")
    return found


def print_single(runs):
    """Runs that carry no test (plan.md): single values."""
    print("\n| run | exit, million tokens | lowest loss | at, million tokens |\n|---|---|---|---|")
    for run in sorted(runs, key=lambda run: (run["arm"], run["seed"])):
        millions = run["batch_tokens"] / 1e6
        step, (at, lowest) = exit_step(run), min(run["loss"], key=lambda point: point[1])
        print(f"| {run['arm']}-{run['seed']} |",
              f"{step * millions:.1f}" if step else f"not in {run['steps'] * millions:.0f}",
              f"| {lowest:.2f} | {at * millions:.1f} |")


def draw(part, arms, found):
    """Write the curves of all arms, and the ratios of their endpoints to random masking's."""
    key, title = part.curve
    curves = {arm: [[tuple(point) for point in run[key] if point[1] < 20]  # or it diverged
                    for run in runs.values()] for arm, runs in arms.items()}
    levels = {part.name: part.bound(run) for run in arms["random"].values() if part.bound}
    write_atomic(HERE / f"{part.name}-curves.svg", draw_curves(
        curves, levels, title, "training steps", 1).encode())
    rows = []
    for arm, ratio in found.items():
        missing = len(without(arms[arm], part.endpoint))
        if ratio["low"] is not None:  # one pair has no interval
            nats = [ratio["difference"], ratio["low"], ratio["high"], *ratio["each"]]
            rows.append((arm + f" ({missing} without)" * bool(missing),
                         *(value / math.log(2) for value in nats)))
    write_atomic(HERE / f"{part.name}-ratios.svg", draw_differences(
        [(f"{part.name} over that of random masking: mean, 95 % interval, every seed", rows)],
        f"halvings (-1, -2) and doublings (+1, +2) of the steps to the {part.name}",
        lambda doublings: f"{2**doublings:.2f}").encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="RUN", help="add a finished run to a file")
    parser.add_argument("--to", default="onset.jsonl", help="that file (default onset.jsonl)")
    args = parser.parse_args()
    if args.keep:
        return keep(args.keep, HERE / args.to)
    for part in PARTS:
        print(f"\n{part.name}.jsonl")
        arms, single = read_runs(part)
        if single:
            print_single(single)
        draw(part, arms, print_part(part, arms))


if __name__ == "__main__":
    run_script(main)
