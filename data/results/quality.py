"""Does any choice of masks make a better model? The tables and the picture of plan.md's third part.

    python -m data.results.quality [FILE]      # prints the tables, draws the picture beside FILE
    python glue.py RUN --table --jsonl STUDY | python -m data.results.quality FILE --keep RUN

FILE (default: quality.jsonl in this folder) has a line for each run of replicate.sh, and one for
the random weights of each seed. No planned difference is shown below its number of pairs.
"""

import fcntl
import json
import math
import statistics
import sys
from functools import partial
from pathlib import Path

from data.arms import SAME
from data.confidence import paired, t_quantile
from data.files import UserError, run_script, write_atomic
from data.flags import flag_parser
from data.results.differences import draw_differences
from data.results.exit import holm
from data.runs import read_config, read_log
from data.scores import RANDOM_WEIGHTS, commit, grid, measures, row_error
from data.tasks import PRIMARY

RECIPE = {"epochs": 1, "freeze": False}  # of the primary endpoint (recipe.md)
SMALLEST = None  # points: the smallest effect of interest; None until plan.md has it
DOUBLINGS = math.log2(14014 / 10000)  # of the steps of random, that longer has (plan.md)

FIRST, KD, SIX, THREE, MOON = (range(*ends) for ends in (
    (10, 22), (10, 19), (10, 16), (10, 13), (22, 34)))
CONTRASTS = {  # (arm, control) -> the seeds that were planned
    ("random", RANDOM_WEIGHTS): FIRST, ("longer", "random"): FIRST, ("self", "random"): FIRST,
    ("self", "longer"): FIRST, ("error", "random"): FIRST, ("fall", "random"): FIRST,
    ("high", "self"): SIX, ("high", "longer"): SIX, ("low", "self"): SIX, ("low", "longer"): SIX,
    ("vocabulary", "random"): SIX, ("context", "longer"): SIX, ("context", "vocabulary"): SIX,
    ("entropy-distill", "distill"): KD, ("entropy", "random"): THREE, ("static", "random"): THREE,
    ("literal", "random"): THREE, ("double", "random"): THREE, ("redrawn", "random"): SIX,
    ("error-fall", "fall"): MOON,
    **{(f"self-{other}", f"random-{other}"): THREE for other in ("1.6M", "25.8M", "30")}}
# Holm's correction is over these three arms. self must differ from both of its controls.
CONFIRMATORY = {"self": ("random", "longer"), "error": ("random",), "entropy-distill": ("distill",)}


def by_recipe(line, recipe):
    """The scores of a run whose recipe has these values, in a fixed order."""
    return sorted((e for e in line["scores"] if recipe.items() <= e["recipe"].items()),
                  key=lambda e: (e["task"], e["seed"]))


def points(line, what="primary", **recipe):
    return measures(by_recipe(line, recipe or RECIPE)).get(what)


SECONDARY = {
    "three epochs": partial(points, epochs=3, freeze=False),
    "frozen encoder": partial(points, freeze=True),
    "STS-B": partial(points, what="STS-B spearman"),
    "held-out loss": lambda line: line.get("val_loss"),
    **{f"of the {bin}": lambda line, bin=bin: line["bins"].get(bin, (0, None))[1] for bin in (
        "100 most frequent", "1000 times or more", "100 times or more", "less often")}}


def keep(run, path):
    """Add a finished run to a file, with its scores (stdin: lines of glue.py --jsonl); and the
    random weights of its seed, if the file has none."""
    config, last, scores = read_config(run), read_log(run)[-1], {}
    flags, starts = config["flags"], config["starts"]
    for entry in map(json.loads, sys.stdin):
        # Which rows are right, as a hexadecimal number: a quarter of the letters.
        entry["correct"] = f"{int('0' + entry['correct'], 2):x}"
        scores.setdefault(entry.pop("run"), []).append(entry)
    of_both = {"commit": commit(), "seed": flags["seed"], **{
        name: "/".join(sorted({start[name] for start in starts})) for name in (*SAME, "machine")}}
    weights = {"run": f"{RANDOM_WEIGHTS}-{flags['seed']}", "arm": RANDOM_WEIGHTS, **of_both}
    line = {"run": run.name, "arm": run.name.removesuffix(f"-{flags['seed']}"), **of_both,
            "finished": (run / "model.pt").exists(), "date": starts[0]["date"],
            **{name: config[name] for name in (
                "flops", "teacher_flops", "teacher_sha256", "corpus_sha256")},
            **{name: last.get(name) for name in (
                "val_loss", "context_gain", "loss_by_frequency", "masked", "seconds")}}
    with open(path, "ab", buffering=0) as f:  # in one piece: a kill must not leave half a line
        fcntl.flock(f, fcntl.LOCK_EX)  # two runs may end at the same time
        old = f'"run": "{weights["run"]}"'.encode() in path.read_bytes()
        lines = [line, *[weights] * (weights["run"] in scores and not old)]
        f.write("".join(json.dumps({**line, "scores": scores.get(line["run"], [])}) + "\n"
                        for line in lines).encode())


def read_lines(path):
    """-> {arm: {seed: line}}. UserError for a line of another commit."""
    arms, first = {}, None
    for line in map(json.loads, path.read_text().splitlines()):
        first, commits = first or line["commit"], {e["commit"] for e in (line, *line["scores"])}
        if commits != {first}:
            raise UserError(f"{path}: {line['run']} is of commit {', '.join(commits)}, and the "
                            f"first line of {first}: they cannot stand in one table")
        for entry in line["scores"]:
            bits = bin(int(entry["correct"], 16))[2:]
            entry["correct"] = bits.zfill(entry["rows"][1]) if entry["task"] in PRIMARY else ""
        line["bins"] = line.get("loss_by_frequency") or {}
        arms.setdefault(line["arm"], {})[line["seed"]] = line
    for line in [line for runs in arms.values() for line in runs.values()]:
        if not line.get("finished", True):  # it diverged: it counts as what it began with
            line["scores"] = arms.get(RANDOM_WEIGHTS, {}).get(line["seed"], line)["scores"]
    return arms


def differing(pair):
    """What the two runs of a pair must share and do not -> names."""
    seen = {name: {e[name] for run in pair for e in (run, *run["scores"])} for name in SAME}
    seen["teacher"] = {run.get("teacher_sha256") for run in pair} - {None, ""}
    seen["fine-tunings"] = {str([(e["task"], e["seed"]) for e in by_recipe(run, RECIPE)])
                            for run in pair}
    return [name for name, values in seen.items() if len(values) > 1]


def pairs_of(arms, contrast):
    """{seed: (run, its control)} of all pairs that may be compared; prints which may not."""
    (ours, theirs), pairs = (arms.get(arm, {}) for arm in contrast), {}
    for seed in sorted(ours.keys() & theirs.keys()):
        pair = ours[seed], theirs[seed]
        if names := differing(pair):
            print(f"{' - '.join(contrast)}, seed {seed}: left out, for another {', '.join(names)}")
        elif points(ours[seed]) is not None:
            pairs[seed] = pair
            if ours[seed]["machine"] != theirs[seed]["machine"]:
                print(f"{' - '.join(contrast)}, seed {seed}: not of one processor")
    return pairs


def compare(pairs, measure=points):
    """paired() of a measure of the runs over the pairs that have it; None without any."""
    values = {seed: [measure(run) for run in pair] for seed, pair in pairs.items()}
    return paired(*({s: both[i] for s, both in values.items() if None not in both} for i in (0, 1)))


def ninety(result):
    """The ends of the 90 % interval."""
    half = t_quantile(len(result["seeds"]) - 1, 0.1) * result["seed_error"]
    return [result["difference"] - half, result["difference"] + half]


def confirm(found):
    """{contrast: paired()} -> {arm: p by Holm} of the confirmatory arms. What is not full counts
    with p = 1, which can only make the others' larger."""
    p = {}
    for arm, controls in CONFIRMATORY.items():
        results = [found.get((arm, control)) for control in controls]
        agree = all(results) and len({r["difference"] > 0 for r in results}) == 1
        p[arm] = max(r["p_t"] for r in results) if agree else 1.0
    return holm(p)


def verdict(result):
    """What the intervals say, of 95 % and, against the smallest effect of interest, of 90 %."""
    small = SMALLEST is not None and ninety(result)[1] < SMALLEST
    if result["low"] > 0:
        return "gain" + ", too small to matter" * small
    return "loss" if result["high"] < 0 else "no gain that matters" if small else "inconclusive"


def flops(pairs, *names):
    """The FLOPs of these names, over those of the control, as words."""
    both = [[sum(run.get(name, 0) for name in names) for run in pair] for pair in pairs.values()]
    ratios = [ours / theirs for ours, theirs in both if theirs]
    return f"{statistics.fmean(ratios):.2f}" if ratios else "-"


def show(r):
    """paired() as words: the difference with its interval, or alone where there is one pair."""
    if r is None or r["low"] is None:
        return f"{r['difference']:+.2f}" if r else "-"
    return "{difference:+.2f} [{low:+.2f}, {high:+.2f}]".format(**r)


def print_tables(full, found):
    p, longer = confirm(found), found.get(("longer", "random"), {"difference": 0})
    slope = longer["difference"] / DOUBLINGS
    rows = ["arm,control,n,difference [95 %],[90 %],p,sign flip,Holm,joint error,FLOPs,"
            "with teacher,as steps,verdict".split(",")]
    for (arm, control), pairs in full.items():
        r, tested = found[arm, control], control in CONFIRMATORY.get(arm, ())
        over_rows = row_error([scores for pair in pairs.values() for scores in zip(*(
            by_recipe(run, RECIPE) for run in pair))], PRIMARY)
        rows.append([
            arm, control, str(len(pairs)), show(r), "[{:+.2f}, {:+.2f}]".format(*ninety(r)),
            f"{r['p_t']:.4f}", f"{r['p_sign_flip']:.4f}", f"{p[arm]:.4f}" if tested else "-",
            f"{math.hypot(r['seed_error'], over_rows):.2f}",
            flops(pairs, "flops"), flops(pairs, "flops", "teacher_flops"),
            f"{2**(r['difference'] / slope):.2f}" if slope > 0 and control == "random" else "-",
            verdict(r)])
    print("\n" + grid(rows))
    if slope:
        print(f"\nA doubling of random masking's steps gives {slope:+.2f} points.")
    print("\n" + grid([["difference [95 %]", *SECONDARY]] + [
        [" - ".join(contrast), *(show(compare(pairs, of)) for of in SECONDARY.values())]
        for contrast, pairs in full.items()]))
    for contrast, pairs in full.items():
        for name in sorted({run["teacher_sha256"] for run, _ in pairs.values()} - {""}):
            own = {s: pair for s, pair in pairs.items() if pair[0]["teacher_sha256"] == name}
            print(f"{' - '.join(contrast)}, teacher {name[:8]}: {show(compare(own))}")


def draw(full, found, path):
    """Every difference with its interval and pairs; as lines what pretraining gains, and what the
    paper's +5 % would be."""
    first = "random", RANDOM_WEIGHTS
    rows = [(" - ".join(c), *(found[c][name] for name in ("difference", "low", "high")),
             *(points(a) - points(b) for a, b in pairs.values()))
            for c, pairs in full.items() if c != first]
    claim = 0.05 * statistics.fmean(points(run) for run, _ in full[first].values())
    write_atomic(path, draw_differences(
        [("difference to the control: mean, 95 % interval, every seed", rows)],
        "points of the primary endpoint", "{:+.2f}".format,
        {"pretraining gains": found[first]["difference"], "the paper's +5 %": claim}).encode())


def main():
    parser = flag_parser("python -m data.results.quality [FILE] [--keep RUN]", __doc__)
    parser.add_argument("file", type=Path, nargs="?", default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--keep", type=Path, metavar="RUN", help="add this finished run to FILE")
    args = parser.parse_args()
    if "keep" in args:
        return keep(args.keep, args.file)
    if not args.file.exists():
        raise UserError(f"{args.file} is not there: bash data/results/replicate.sh makes one")
    arms, full, others = read_lines(args.file), {}, [["of no plan", "n", "difference [95 %]"]]
    for contrast, seeds in CONTRASTS.items():
        pairs = pairs_of(arms, contrast)
        planned = {seed: pairs[seed] for seed in seeds if seed in pairs}
        if len(planned) == len(seeds):
            full[contrast] = planned
        else:
            print(f"{' - '.join(contrast)}: {len(planned)} of {len(seeds)} pairs, not shown yet")
        if rest := {seed: pairs[seed] for seed in pairs.keys() - {*FIRST, *MOON}}:
            others.append([" - ".join(contrast), str(len(rest)), show(compare(rest))])
    found = {contrast: compare(pairs) for contrast, pairs in full.items()}
    if full:
        print_tables(full, found)
    if ("random", RANDOM_WEIGHTS) in full and len(full) > 1:
        draw(full, found, args.file.with_suffix(".svg"))
    if others[1:]:
        print("\n" + grid(others))


if __name__ == "__main__":
    run_script(main)
