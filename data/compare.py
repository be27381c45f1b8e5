"""Scores of many runs -> tables that a reader can trust: which runs may be compared, and how.

An arm is a set of runs that differ in nothing but the seed; its row is the mean +- the standard
deviation over these pretraining seeds. Two arms are compared seed by seed, since runs with one seed
share initial weights, data order and fine-tuning seeds: the difference has a 95 % t interval and
the p of an exact sign-flip test, beside the smallest p that so few pairs can give at all.

A score is in points: 100 times a metric, or the mean of a task's metrics.
"""

import math
import os
import statistics
from collections import Counter
from itertools import zip_longest
from types import SimpleNamespace

from data.confidence import paired
from data.files import UserError
from data.runs import WITHOUT_CONTEXT
from data.tasks import TASKS

# Flags that say how or where a run was made, not what it is. Teachers and corpora are compared by
# what they are (FLOPs, hash), since a path says nothing.
NOT_WHAT = {
    "out", "seed", "teacher", "begin_from", "corpus", "cache", "flops_of", "device", "dtype",
    "threads", "compile", "micro_batch", "log_every", "eval_every", "eval_blocks",
    "checkpoint_every", "tensorboard"}
PRIMARY = [name for name, task in TASKS.items() if task.primary]
AVERAGED = [name for name, task in TASKS.items() if task.averaged]
RATES = {"lr", "embedding_lr"}  # of a recipe; random weights have their own
CHOOSING = {"masking", "select", "score_input", "pool", "init_frac"}  # what a contrast is about


def mean_sd(by_seed):
    """{seed: score} -> mean, sd over seeds (None at one) and the scores; None if there are none."""
    if not by_seed:
        return None
    values = list(by_seed.values())
    return {"mean": statistics.fmean(values), "seeds": by_seed,
            "sd": statistics.stdev(values) if len(values) > 1 else None}


# --------------------------------------------------------------------------------------------------
# arms and what may stand in one table


def arm_key(run):
    """Equal for runs that differ in nothing but the seed."""
    flags = {k: v for k, v in run.flags.items() if k not in NOT_WHAT}
    paths = [bool(run.flags.get(name)) for name in ("flops_of", "begin_from")]
    return repr((sorted(flags.items()), run.flops, run.teacher_flops, comparable(run), paths))


def group_arms(runs):
    """-> [[runs of one arm]]. UserError where two of them have one seed: a run and its copy."""
    arms = {}
    for run in runs:
        arm = arms.setdefault(arm_key(run), {})
        if run.seed in arm:
            raise UserError(f"{arm[run.seed].path} and {run.path} are the same arm and seed "
                            "(teachers are told apart by their FLOPs alone): give one of them")
        arm[run.seed] = run
    return [list(arm.values()) for arm in arms.values()]


def comparable(run):
    """Equal for runs that may stand in one table: the same text, size and number of tokens."""
    return (run.corpus, run.tokenizer.sha256, run.shape, run.tokens)


def same_compute(run, runs):
    """The token count of the run whose FLOPs --flops-of gave to this one; else its own."""
    if run.flops_of:  # first the very run it names, then one that spent as much
        for other in sorted(runs, key=lambda r: r.path != os.path.normpath(run.flops_of)):
            if (not other.flops_of and comparable(run)[:3] == comparable(other)[:3]
                    and abs(run.flops - other.flops) < 0.02 * other.flops):
                return other.tokens
    return run.tokens


def arm_names(arms):
    """Names that tell the arms of a table apart: the masking, and the flags that are not the
    default's and differ between the arms; how tokens are chosen: between arms of one masking."""
    names = []
    for runs in arms:
        run, name = runs[0], runs[0].flags["masking"]
        for flag, value in run.flags.items():
            varies = any(other[0].flags.get(flag) != value for other in arms if flag not in CHOOSING
                         or other[0].flags["masking"] == run.flags["masking"])
            follows = ((flag == "mask_rate_end" and value == run.flags["mask_rate"])
                       or (flag == "steps" and not run.flops_of))  # a table has one token count
            if (flag not in NOT_WHAT and varies and not follows
                    and value != run.defaults.get(flag)):
                name += f", {flag.replace('_', '-')} {value}"
        name += ", continued" if run.flags.get("begin_from") else ""
        names.append(name + (", equal FLOPs" if run.flops_of else ""))
    for name, count in Counter(names).items():  # what differs is the teacher
        if count > 1:
            for i in [i for i, other in enumerate(names) if other == name]:
                names[i] += f", teacher {arms[i][0].flags.get('teacher') or 'none'}"
    return names


def by_task(entries, tasks, fine_tuning_seeds):
    """Scores of one run -> {task: score}, {task: {part: value}}: means over fine-tuning seeds."""
    scores, parts = {}, {}
    for task in tasks:
        mine = [e for e in entries if e["task"] == task and e["seed"] in fine_tuning_seeds[task]]
        if mine:
            scores[task] = statistics.fmean(e["score"] for e in mine)
            parts[task] = {part: statistics.fmean(e["parts"][part] for e in mine)
                           for part in mine[0]["parts"]}
    return scores, parts


def primary_part(task, parts):
    """The part of a task's score that is in the primary endpoint: accuracy, of MNLI the matched."""
    return parts["matched" if task == "MNLI" else "accuracy"]


def endpoints(scores, parts, tasks):
    """-> {"primary": mean accuracy of MNLI-m, QNLI, SST-2, QQP; "glue": mean of 8 task scores},
    each only where all its tasks are scored; without either, "mean": over the table's tasks."""
    ends = {}
    if all(task in parts for task in PRIMARY):
        ends["primary"] = statistics.fmean(primary_part(task, parts[task]) for task in PRIMARY)
    if all(task in scores for task in AVERAGED):
        ends["glue"] = statistics.fmean(scores[task] for task in AVERAGED)
    if not ends and len(scores) == len(tasks):  # means over other tasks say nothing
        averaged = [task for task in tasks if task in AVERAGED] or tasks
        ends["mean"] = statistics.fmean(scores[task] for task in averaged)
    return ends


def make_row(name, runs, tasks, fine_tuning_seeds):
    """Runs (anything with .seed and .entries) -> a row: means and deviations over their seeds."""
    scores, parts, ends = {}, {}, {}
    for run in runs:
        run_scores, run_parts = by_task(run.entries, tasks, fine_tuning_seeds)
        for task in run_scores:
            scores.setdefault(task, {})[run.seed] = run_scores[task]
            for part, value in run_parts[task].items():
                parts.setdefault(task, {}).setdefault(part, {})[run.seed] = value
        for end, value in endpoints(run_scores, run_parts, tasks).items():
            ends.setdefault(end, {})[run.seed] = value
    return {
        "name": name, "n": len(runs),
        "tasks": {task: mean_sd(scores[task]) for task in scores},
        "parts": {task: {part: mean_sd(v) for part, v in parts[task].items()} for task in parts},
        "ends": {end: mean_sd(v) for end, v in ends.items()},
    }


def make_tables(runs, floors, baseline=()):
    """-> a table per set of comparable runs with one recipe: a dict that JSON can hold.

    runs    namespaces with path, seed, flags, defaults, shape, tokens, flops, teacher_flops,
            seconds, margin (nats below what a model without context can reach) and entries: what
            glue.json holds
    floors  {(shape, tokenizer sha256): [namespaces with seed and entries: random weights]}
    """
    tables, groups = [], {}
    for run in runs:
        key = (*comparable(run)[:3], same_compute(run, runs))
        for recipe in dict.fromkeys(recipe_key(e) for e in run.entries):
            groups.setdefault((key, recipe), []).append(run)
    for (key, recipe), members in groups.items():
        floor = floors.get((key[2], key[1]), [])
        tables.append(make_table(members, floor, recipe, baseline, tokens=key[3]))
    return tables


def make_table(runs, floors, recipe, baseline, tokens):
    def select(subjects, data=None):
        """Copies of the subjects with the entries of this recipe (and these rows) alone."""
        return [with_entries(s, [e for e in s.entries if recipe_key(e) == recipe
                                 and (data is None or e["data"] == data.get(e["task"]))])
                for s in subjects]

    notes = []
    runs = select(runs)
    seen = [e for run in runs for e in run.entries]
    tasks = [task for task in TASKS if any(e["task"] == task for e in seen)]
    data = {}  # task -> the hash of its rows
    for task in tasks:
        (data[task], _), *others = Counter(e["data"] for e in seen if e["task"] == task
                                           ).most_common()
        if others:
            notes.append(f"{task}: scores on other rows are left out")
    runs = select(runs, data)
    floors, tried = at_best_rate(floors, seen[0]["recipe"], data)
    example = {e["task"]: e for run in runs for e in run.entries}
    seeds = {task: set.intersection(*filter(None, (
        {e["seed"] for e in run.entries if e["task"] == task} for run in runs))) for task in tasks}
    runs = [with_entries(run, [e for e in run.entries if e["seed"] in seeds[e["task"]]])
            for run in runs]
    arms = group_arms(runs)
    names = arm_names(arms)
    rows = [make_row(name, members, tasks, seeds) for name, members in zip(names, arms)]

    named = [i for i, members in enumerate(arms) if any(r.path in baseline for r in members)]
    if len(named) > 1:
        raise UserError(f"--baseline names several arms: {', '.join(names[i] for i in named)}")
    if baseline and not named:
        notes.append("the runs of --baseline are not in this table")
    random = [i for i, members in enumerate(arms) if members[0].flags["masking"] == "random"]
    plainest = min(random, key=lambda i: plain(arms[i][0])) if random else None
    references = [named[0] if named else reference(arms, i, random, plainest)
                  for i in range(len(arms))]
    notes += compare_rows(rows, arms, names, references)
    constant = [{**e, "seed": 0, "parts": e["majority"],
                 "score": statistics.fmean(e["majority"].values())} for e in example.values()]
    majority = make_row("majority class", [SimpleNamespace(seed=0, entries=constant)], tasks,
                        dict.fromkeys(tasks, {0}))
    floor_seeds = {task: {e["seed"] for f in floors for e in f.entries} for task in tasks}
    scored = [f for f in floors if f.entries]
    floor = make_row("random weights", scored, tasks, floor_seeds)

    notes += told_rows(example) + told_seeds([floor, *rows])
    notes += told_rates(floors, tried, seen[0]["recipe"])
    notes += validity(
        arms[plainest], rows[plainest], floors, floor, example) if random else [
        "NO COMPARISON COUNTS YET, there is no random arm that shows whether pretraining pays"]
    run = runs[0]
    return {
        "title": f"{run.shape.layers} layers of width {run.shape.width}, {run.shape.vocab_size} "
                 f"pieces, {tokens / 1e6:.1f} million tokens of corpus {run.corpus[:8]}",
        "tokens": tokens, "subject": repr(comparable(run)[:3]),
        "recipe": seen[0]["recipe"], "tasks": tasks,
        "fine_tuning_seeds": {task: sorted(seeds[task]) for task in tasks},
        "baseline": names[named[0]] if named else names[plainest] if random else None,
        "floors": [majority, floor] if scored else [majority], "rows": rows, "notes": notes,
    }


def recipe_key(entry):
    return repr(sorted(entry["recipe"].items()))


def with_entries(subject, entries):
    return type(subject)(**{**vars(subject), "entries": entries})


def rates_of(recipe):
    """The rates of a recipe, as a note names them: one, or that of the embeddings, too."""
    lr = recipe.get("lr")
    words = recipe.get("embedding_lr", lr)
    return f"{lr}" if lr == words else f"{lr} (embeddings {words})"


def at_best_rate(floors, recipe, data):
    """Random weights, each task and seed at the rate that serves it best, of those scored by this
    recipe on these rows. A rate that is too high for random weights alone would look like a gain of
    pretraining (README, "The fine-tuning recipe"). -> copies with these entries, {task: the rates
    that were tried}"""
    def value(e):  # by what the primary endpoint takes; of equals one that tells its rows
        score = primary_part(e["task"], e["parts"]) if e["task"] in PRIMARY else e["score"]
        return score, bool(e.get("right"))

    chosen, tried = [], {}
    for floor in floors:
        best = {}
        for e in floor.entries:
            same, wanted = ({k: v for k, v in r.items() if k not in RATES}
                            for r in (e["recipe"], recipe))
            if e["data"] != data.get(e["task"]) or same != wanted:
                continue
            tried.setdefault(e["task"], set()).add(rates_of(e["recipe"]))
            key = e["task"], e["seed"]
            best[key] = max(best.get(key, e), e, key=value)
        chosen.append(with_entries(floor, list(best.values())))
    return chosen, tried


def differing(run, other):
    """The flags, beside those that choose tokens, in which two runs differ."""
    flags = [flag for flag, value in run.flags.items() if flag not in NOT_WHAT | CHOOSING
             and other.flags.get(flag) != value]
    begun = [bool(r.flags.get("begin_from")) for r in (run, other)]
    return flags + (["begin_from"] if begun[0] != begun[1] else [])


def plain(run):
    """Small for the random arm that the others are measured by: no distillation, one rate..."""
    flags = run.flags
    return (flags["distill"] != "off", flags["mask_rate"] != flags["mask_rate_end"],
            bool(run.flops_of), bool(flags.get("begin_from")))


def reference(arms, i, random, plainest):
    """The arm that arm i is compared with: a random arm that differs from it in as little as there
    is but the masking (with distillation: random with distillation); random arms: the plainest."""
    if i in random or not random:
        return plainest
    return min(random, key=lambda j: (len(differing(arms[i][0], arms[j][0])), plain(arms[j][0])))


def compare_rows(rows, arms, names, references):
    """Put into each row its flags, what it costs and how it differs, against the row of its
    reference (an index, or None). -> notes on contrasts that are not of masking alone"""
    notes = []
    for row, members in zip(rows, arms):
        for what in ("flops", "flops_with_teacher", "seconds"):
            row[what] = statistics.fmean(getattr(run, what) for run in members)
    for row, members, name, j in zip(rows, arms, names, references):
        row["flags"] = {k: v for k, v in members[0].flags.items() if k not in NOT_WHAT}
        if j is None:
            continue
        base, row["baseline"] = rows[j], names[j]
        for ratio, what in (("cost", "flops"), ("cost_with_teacher", "flops_with_teacher"),
                            ("time", "seconds")):
            row[ratio] = row[what] / base[what] if base[what] else None
        if row is base:
            continue
        row["against"] = {end: paired(row["ends"][end]["seeds"], base["ends"][end]["seeds"])
                          for end in row["ends"] if end in base["ends"]}
        more = differing(members[0], arms[j][0])
        if more and members[0].flags["masking"] != "random":
            notes.append(f"{name}, against {names[j]}: not of masking alone, they differ in "
                         + ", ".join(flag.replace("_", "-") for flag in more))
    return notes


def told_rows(example):
    """{task: a score} -> notes on the tasks of which not all official rows were there."""
    notes = []
    for task, e in sorted(example.items(), key=lambda item: list(TASKS).index(item[0])):
        if e["rows"] != e["official"] or e["trained_on"] != e["rows"][0]:
            counts = [f"{n} of {m}" for n, m in zip(e["rows"], e["official"])]
            counts[0] = f"{e['trained_on']} of {e['official'][0]}"
            notes.append(f"{task} {counts[0]} (training), {', '.join(counts[1:])} (development)")
    return notes


def told_seeds(rows):
    """-> notes on rows whose tasks have fewer seeds than their n says."""
    notes = []
    for row in rows:
        short = [f"{task} {len(of['seeds'])}" for task, of in row["tasks"].items()
                 if len(of["seeds"]) < row["n"]]
        if short:
            notes.append(f"{row['name']}: scored for fewer than its {row['n']} seeds: "
                         + ", ".join(short))
    return notes


def told_rates(floors, tried, recipe):
    """-> notes on the rates of random weights: which were best, and where no other was tried."""
    notes, used, own = [], {}, {rates_of(recipe)}
    for task, rates in tried.items():
        best = sorted({rates_of(e["recipe"]) for f in floors for e in f.entries
                       if e["task"] == task})
        if rates != own:
            used.setdefault(f"{' or '.join(best)} (of {len(rates)} scored)", []).append(task)
    if used:
        notes.append("random weights at the best --lr that was scored: " + "; ".join(
            f"{rate} on {', '.join(on)}" for rate, on in used.items()))
    alone = [task for task, rates in tried.items() if rates == own]
    if alone and not recipe.get("freeze"):
        notes.append("random weights were scored at the --lr of the runs alone, a lower may suit: "
                     + ", ".join(alone))
    return notes


def standard_error(task, count, runs, floors):
    """Standard error of the difference of the mean accuracies of runs and floors (shares) over
    `count` development rows. Both answer the same rows, many of which both get right, so what
    varies is the difference row by row, of means over all seeds. It is the error of these models:
    that other seeds would give others is not in it. Scores from before 2026-11-26 do not say which
    rows were right: then that of two independent samples, which is nearly always larger."""
    shares, variances = [], []
    for subjects in (runs, floors):
        entries = [e for s in subjects for e in s.entries if e["task"] == task]
        p = statistics.fmean(primary_part(task, e["parts"]) for e in entries) / 100
        variances.append(p * (1 - p))
        if all(e.get("right") for e in entries):
            bits = [bin(int(e["right"], 16))[:1:-1] for e in entries]  # a character a row
            shares.append([row.count("1") / len(bits) for row in zip_longest(*bits)])
    if len(shares) < 2:
        return math.sqrt(sum(variances) / count)
    differences = [a - b for a, b in zip_longest(*shares, fillvalue=0)]
    mean = sum(differences) / count  # rows beyond the last right one have a difference of 0
    return math.sqrt(max(0, sum(d * d for d in differences) / count - mean**2) / count)


def validity(runs, row, floors, floor, example):
    """Why a comparison with this random arm does not count yet (method: a random arm on the
    plateau, or no better than random weights, would fake any gain; so would random weights that
    the recipe cannot train). -> notes"""
    reasons = []
    margin = min(run.margin for run in runs)
    if margin < 0.5:
        where = f"{abs(margin):.2f} nats {'below' if margin > 0 else 'above'}"
        reasons.append(f"its held-out loss is {where} {WITHOUT_CONTEXT} of the unigram entropy, "
                       "which needs no context; it must be 0.5 below")
    for task in PRIMARY:
        if task not in row["parts"] or task not in floor["parts"]:
            reasons.append(f"{task} is not scored")
            continue
        p1, p0 = (primary_part(task, r["parts"][task])["mean"] / 100 for r in (row, floor))
        constant = primary_part(task, example[task]["majority"]) / 100
        count = example[task]["rows"][1]
        if p0 - constant <= 2 * math.sqrt(p0 * (1 - p0) / count):  # two binomial standard errors
            reasons.append(f"random weights do not learn {task} by this recipe (a lower --lr?)")
        error = 2 * standard_error(task, count, runs, floors)
        if p1 - p0 <= error:
            reasons.append(f"{task} {100 * (p1 - p0):+.1f} against random weights, within two "
                           f"standard errors ({100 * error:.1f})")
    if not reasons:
        return ["the random arm clears the plateau and the random-weights floor: it can be "
                "compared with"]
    return ["NO COMPARISON COUNTS YET, the random arm is not clearly pretrained: "
            + "; ".join(reasons)]
