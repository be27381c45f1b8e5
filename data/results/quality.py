"""Does any choice of masks make a better model? The tables and the picture of plan.md's third part.

    python -m data.results.quality [FILE]      # prints the tables, draws the picture beside FILE
    python glue.py RUN --table --jsonl STUDY | python -m data.results.quality FILE --keep RUN
    python -m data.results.quality FILE --check            # would it take a run of this commit?

FILE (default: quality.jsonl in this folder) has a line for each run of replicate.sh, and one for
the random weights of each seed. No planned difference is shown below its number of pairs.
"""

import fcntl
import json
import math
import statistics
import sys
from functools import partial
from itertools import product
from pathlib import Path

from data.arms import SAME
from data.confidence import paired, t_quantile
from data.files import UserError, run_script, write_atomic
from data.flags import flag_parser
from data.machine import commit
from data.results.differences import draw_differences
from data.results.exit import holm, show_p
from data.runs import read_config, read_log
from data.scores import RANDOM_WEIGHTS, grid, measures, row_error
from data.tasks import PRIMARY

RECIPE = {"max_train": 5000, "epochs": 3, "freeze": False}  # of the primary endpoint (recipe.md)
PATHS = ("corpus", "teacher", "init_from", "flops_of")  # flags that say where, not what
SMALLEST = 0.86  # points: the smallest effect of interest (plan.md)
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
    ("distill", "random"): KD,
    **{(f"self-{kind}", f"random-{kind}"): THREE for kind in ("1.6M", "25.8M", "rate30")}}
RULES = {"error": "random", "vocabulary": "random", "self": "longer", "high": "longer",
         "context": "longer"}  # one of them, with a falling rate, is the last test
CONTRASTS |= {(f"{arm}-fall", "fall"): MOON for arm in RULES}
# Holm's correction is over these three arms. self must differ from both of its controls.
CONFIRMATORY = {"self": ("random", "longer"), "error": ("random",), "entropy-distill": ("distill",)}


def by_recipe(line, recipe):
    """The scores of a run whose recipe has these values, in a fixed order."""
    return sorted((e for e in line["scores"] if recipe.items() <= e["recipe"].items()),
                  key=lambda e: (e["task"], e["seed"]))


def points(line, what="primary", **recipe):
    return measures(by_recipe(line, recipe or RECIPE)).get(what)


SECONDARY = {
    "MNLI": partial(points, what="MNLI matched"), "QNLI": partial(points, what="QNLI accuracy"),
    "STS-B": partial(points, what="STS-B spearman"),
    "frozen encoder": partial(points, freeze=True),
    "20 000 rows": partial(points, max_train=20_000, epochs=3, freeze=False),
    "loss (nats: lower is better)": lambda line: line.get("val_loss"),
    **{f"loss, {bin}": lambda line, bin=bin: line["bins"].get(bin, (0, None))[1] for bin in (
        "100 most frequent", "1000 times or more", "100 times or more", "less often")}}


def keep(run, path, diverged):
    """Add a run to a file, with its scores (stdin: lines of glue.py --jsonl); and the random
    weights of its seed, if the file has none. What is there already stays as it is."""
    config, last, scores = read_config(run), read_log(run)[-1], {}
    flags, starts = config["flags"], config["starts"]
    for entry in map(json.loads, filter(str.strip, sys.stdin)):
        # Of two that differ in the machine alone, the later.
        key = entry["task"], entry["seed"], json.dumps(entry["recipe"])
        scores.setdefault(entry.pop("run"), {})[key] = entry
    of_both = {"seed": flags["seed"], **{
        name: "/".join(sorted({start.get(name, "") for start in starts}))
        for name in (*SAME, "machine", "commit")}}
    weights = {"run": f"{RANDOM_WEIGHTS}-{flags['seed']}", "arm": RANDOM_WEIGHTS, **of_both}
    line = {"run": run.name, "arm": run.name.removesuffix(f"-{flags['seed']}"), **of_both,
            "finished": not diverged, "date": starts[0]["date"],
            "flags": {name: flags[name] for name in config["experiment"] if name not in PATHS},
            **{name: config[name] for name in (
                "flops", "teacher_flops", "teacher_sha256", "corpus_sha256")},
            **{name: last.get(name) for name in (
                "val_loss", "context_gain", "loss_by_frequency", "masked", "seconds")}}
    for each in (line, weights):
        each["scores"] = list(scores.get(each["run"], {}).values())
        if not diverged and points(each) is None:
            raise UserError(f"{path}: {each['run']} is not kept, since it has no score on each of "
                            f"{', '.join(PRIMARY)}")
        for entry in each["scores"]:  # which rows are right, in a quarter of the letters
            entry["correct"] = f"{int('0' + entry['correct'], 2):x}"
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs may end at the same time
        old = path.read_text() if path.exists() else ""
        new = [each for each in (line, weights) if f'"run": "{each["run"]}"' not in old]
        new = [each for each in new if each is line or each["scores"]]
        for each in new:
            check(path, *{each["commit"], *(e["commit"] for e in each["scores"])})
        write_atomic(path, (old + "".join(json.dumps(e) + "\n" for e in new)).encode())


def check(path, *commits):
    """UserError where what is of these commits, or of more than one, could not stand in a file."""
    first = commits[0]
    if path.exists():
        first = json.loads(path.read_text().partition("\n")[0])["commit"]
    if {first} != set(commits):
        raise UserError(f"{path} is of commit {first}, and this of {', '.join(sorted(commits))}: "
                        "run all with one, for example in a git worktree, or give another OUT")


def read_lines(path):
    """-> {arm: {seed: line}}. UserError for a line of another commit, or a run that is there twice.
    """
    arms, first = {}, None
    for line in map(json.loads, path.read_text().splitlines()):
        first = line["commit"] if first is None else first
        commits = {e["commit"] for e in (line, *line["scores"])}
        if commits != {first}:
            raise UserError(f"{path}: {line['run']} is of commit {', '.join(commits)}, and the "
                            f"first line of {first}: they cannot stand in one table")
        for entry in line["scores"]:
            bits = bin(int(entry["correct"], 16))[2:]
            entry["correct"] = bits.zfill(entry["rows"][1]) if entry["task"] in PRIMARY else ""
        line["bins"] = line.get("loss_by_frequency") or {}
        if arms.setdefault(line["arm"], {}).setdefault(line["seed"], line) is not line:
            raise UserError(f"{path}: {line['run']} is there twice")
    for line in [line for runs in arms.values() for line in runs.values()]:
        if not line.get("finished", True):
            missing = line["seed"] not in arms.get(RANDOM_WEIGHTS, {})
            print(f"{line['run']} diverged: it counts with the scores of its random weights"
                  + ", which are missing" * missing)
            line["scores"] = arms.get(RANDOM_WEIGHTS, {}).get(line["seed"], line)["scores"]
    return arms


def differing(pair):
    """What the two runs of a pair must share and do not -> names."""
    seen = {name: {e[name] for run in pair for e in (run, *run["scores"])} for name in SAME}
    seen["teacher"] = {run.get("teacher_sha256") for run in pair} - {None, ""}
    seen["text"] = {run.get("corpus_sha256") for run in pair} - {None}
    seen["fine-tunings"] = {str([(e["task"], e["seed"]) for e in by_recipe(run, RECIPE)])
                            for run in pair}
    seen["rows"] = {str({e["task"]: e["data"] for e in by_recipe(run, RECIPE)}) for run in pair}
    return [name for name, values in seen.items() if len(values) > 1]


def pairs_of(arms, contrast):
    """{seed: (run, its control)} of all pairs that may be compared; prints which may not."""
    (ours, theirs), pairs, mixed = (arms.get(arm, {}) for arm in contrast), {}, []
    for seed in sorted(ours.keys() & theirs.keys()):
        pair = ours[seed], theirs[seed]
        names = ["scores"] * any(points(run) is None for run in pair) or differing(pair)
        if names:
            print(f"{' - '.join(contrast)}, seed {seed}: left out, for "
                  f"{'want of' if names == ['scores'] else 'another'} {', '.join(names)}")
            continue
        pairs[seed] = pair
        if len({e["machine"] for run in pair for e in (run, *run["scores"])}) > 1:
            mixed.append(str(seed))
    if mixed:
        print(f"{' - '.join(contrast)}, not of one processor: seeds {', '.join(mixed)}")
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


def verdict(arm, found, p):
    """What the tests say of a confirmatory arm: the corrected p, and the 90 % interval (self:
    against longer) against the smallest effect of interest."""
    last = found[arm, CONFIRMATORY[arm][-1]]
    small = ninety(last)[1] < SMALLEST
    if p[arm] < 0.05:
        if last["difference"] < 0:
            return "no gain that matters, a loss"
        return "gain" + ", too small to matter" * small
    return "no gain that matters" if small else "inconclusive"


def choose_last(full, cut=()):
    """Which rule the last test gives a falling rate, by seeds 10 to 15 (plan.md) -> in words. Those
    that were `cut` from the comparison are left out."""
    rules = {arm: control for arm, control in RULES.items() if arm not in cut}
    if not rules:
        return "All rules of the last test are cut."
    missing = [f"{arm} - {control}" for arm, control in rules.items() if (arm, control) not in full]
    if missing:
        return f"The rule of the last test is chosen when these are full: {', '.join(missing)}."
    means = {arm: compare({seed: full[arm, control][seed] for seed in SIX})["difference"]
             for arm, control in rules.items()}
    best = max(means, key=means.get)
    rule = best if means[best] >= means.get("error", -math.inf) + 0.2 else "error"
    said = ", ".join(f"{arm} {mean:+.2f}" for arm, mean in means.items())
    return f"Means of seeds 10 to 15: {said}. The last test: " + (
        "none, all are below -0.3." if means[best] < -0.3 else f"{rule}-fall.")


def as_steps(pairs, longer_pairs):
    """What a difference to random is worth as steps of random masking -> the ratio and its interval
    by leaving out one seed at a time, as words; - where longer is not surely better, by all of its
    seeds and by those of this arm. (By three seeds that alone would be luck too often.)"""
    for seeds in (longer_pairs, longer_pairs.keys() & pairs.keys()):
        r = compare({seed: longer_pairs[seed] for seed in seeds})
        if not r or r["low"] is None or r["low"] <= 0 or pairs is longer_pairs:
            return "-"
    both = {seed: tuple(points(a) - points(b) for a, b in (longer_pairs[seed], pairs[seed]))
            for seed in pairs.keys() & longer_pairs.keys()}

    def doublings(seeds):
        longer, ours = (statistics.fmean(both[seed][i] for seed in seeds) for i in (0, 1))
        return DOUBLINGS * ours / longer

    value, n = doublings(both), len(both)
    each = [doublings([s for s in both if s != left_out]) for left_out in both]
    half = t_quantile(n - 1) * math.sqrt((n - 1) / n * sum(
        (x - statistics.fmean(each))**2 for x in each))
    return f"{2**value:.2f} [{2**(value - half):.2f}, {2**(value + half):.2f}]"


def flops(pairs, *names):
    """The FLOPs of these names, over those of the control, as words."""
    both = [[sum(run.get(name) or 0 for name in names) for run in pair] for pair in pairs.values()]
    ratios = [ours / theirs for ours, theirs in both if theirs]
    return f"{statistics.fmean(ratios):.2f}" if ratios else "-"


def show(r):
    """paired() as words: the difference with its interval, or alone where there is one pair."""
    if r is None or r["low"] is None:
        return f"{r['difference']:+.2f}" if r else "-"
    return "{difference:+.2f} [{low:+.2f}, {high:+.2f}]".format(**r)


def show_secondary(pairs, measure):
    """The same of a secondary endpoint, with the number of pairs that have it, if not all do."""
    r = compare(pairs, measure)
    return show(r) + (f" (n {len(r['seeds'])})" if r and len(r["seeds"]) < len(pairs) else "")


def print_tables(full, found, cut):
    p = confirm(found)
    rows = ["arm,control,n,difference [95 %],[90 %],p (not corrected),sign flip,p (Holm),"
            "joint error,FLOPs,with teacher,time,as steps".split(",")]
    for (arm, control), pairs in full.items():
        r, tested = found[arm, control], control in CONFIRMATORY.get(arm, ())
        timed = {seed: (a, b) for seed, (a, b) in pairs.items()  # by one processor; "/": of two
                 if a["machine"] == b["machine"] and "/" not in a["machine"] and a.get("seconds")}
        over_rows = row_error([scores for pair in pairs.values() for scores in zip(*(
            by_recipe(run, RECIPE) for run in pair))], PRIMARY)
        rows.append([
            arm, control, str(len(pairs)), show(r), "[{:+.2f}, {:+.2f}]".format(*ninety(r)),
            show_p(r["p_t"]), show_p(r["p_sign_flip"]), show_p(p[arm]) if tested else "-",
            f"{math.hypot(r['seed_error'], over_rows):.2f}", flops(pairs, "flops"),
            flops(pairs, "flops", "teacher_flops"), flops(timed, "seconds"),
            as_steps(pairs, full.get(("longer", "random"), {})) if control == "random" else "-"])
    print("\n" + grid(rows) + "\n")
    for arm, controls in CONFIRMATORY.items():
        if all((arm, control) in full for control in controls):
            print(f"{arm}: {verdict(arm, found, p)}")
    if {("self", "random"), ("longer", "random")} <= full.keys():
        ours, longer = (found[arm, "random"]["difference"] for arm in ("self", "longer"))
        print("By the means, self is " + (
            "below random." if ours < 0 else "above longer." if ours > longer
            else "between random and longer."))
    if ("self", "random") in full:
        claim = 0.05 * statistics.fmean(points(run) for _, run in full["self", "random"].values())
        known = found["self", "random"]["high"] < claim
        print(f"The paper's +5 % would be {claim:.2f} points: "
              + ("refuted here" if known else "not refuted") + " for self.")
    print(choose_last(full, cut))
    print("\n" + grid([["difference [95 %]", *SECONDARY]] + [
        [" - ".join(contrast), *(show_secondary(pairs, of) for of in SECONDARY.values())]
        for contrast, pairs in full.items()]) + "\n")
    for (contrast, pairs), name in product(full.items(), ("teacher_sha256", "dtype")):
        values = {run[name] for run, _ in pairs.values()} - {""}
        for value in sorted(values) if len(values) > 1 or name == "teacher_sha256" else []:
            own = {s: pair for s, pair in pairs.items() if pair[0][name] == value}
            print(f"{' - '.join(contrast)}, {name.partition('_')[0]} {value[:8]}, {len(own)} "
                  f"seeds: {show(compare(own))}")


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
    parser = flag_parser("python -m data.results.quality [FILE] [--keep RUN] [--check]", __doc__)
    parser.add_argument("file", type=Path, nargs="?", default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--keep", type=Path, metavar="RUN", help="add this run to FILE")
    parser.add_argument("--diverged", action="store_true", help="it did, or a fine-tuning of it")
    parser.add_argument("--cut", default="", help="rules that were cut, a list with commas")
    parser.add_argument("--check", action="store_true", help="UserError for another commit")
    args = parser.parse_args()
    if "keep" in args:
        return keep(args.keep, args.file, "diverged" in args)
    if "check" in args:
        return check(args.file, commit())
    if not args.file.exists():
        raise UserError(f"{args.file} is not there: bash data/results/replicate.sh makes one")
    cut = [name for name in args.cut.split(",") if name]
    if unknown := set(cut) - RULES.keys():
        raise UserError(f"--cut {', '.join(unknown)}: the rules are {', '.join(RULES)}")
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
        print_tables(full, found, cut)
    if ("random", RANDOM_WEIGHTS) in full and len(full) > 1:
        draw(full, found, args.file.with_suffix(".svg"))
    if others[1:]:
        print("\n" + grid(others))


if __name__ == "__main__":
    run_script(main)
