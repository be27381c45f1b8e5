"""Scores of models -> tables in which arms (data/arms.py) are compared seed by seed.

Two arms are paired by pretraining seed: runs of one seed share initial weights, order of the text
and fine-tuning seeds. Random weights, fresh ones of the same seed, are an arm like every other.

A score is in points: 100 times a metric, or times the mean of a task's metrics.
"""

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.arms import SAME, WHERE, Model, differing, group_arms
from data.confidence import paired
from data.files import UserError, read_json, write_json
from data.runs import USES_CONTEXT
from data.tasks import AVERAGED, PRIMARY, TASKS

RANDOM_WEIGHTS = "random weights"
# The two numbers by which arms are compared: the mean accuracy on the four large tasks, where
# errors are small, and GLUE's average.
ENDPOINTS = {"primary": [f"{task} {'matched' if task == 'MNLI' else 'accuracy'}"
                         for task in PRIMARY], "GLUE (8)": AVERAGED}
RATE_NAMES = {"lr", "embedding_lr"}  # of a recipe: random weights have their own
MASKING_FLAGS = {"--masking", "--select", "--score-input", "--pool", "--init-frac", "--static"}


# --------------------------------------------------------------------------------------------------
# glue.json

SCORE = {"task": str, "seed": int, "recipe": dict, "data": str, "model": str, "score": float,
         "parts": dict, "majority": dict, "correct": str, "trained_on": int, "rows": list,
         "official": list, "shared": list, **dict.fromkeys(WHERE, str)}


def is_score(entry):
    """Can a table be made of this entry?"""
    try:
        task = TASKS[entry["task"]]
        values = [entry["score"], *(entry[of][part] for of in ("parts", "majority")
                                    for part in task.parts)]
        return (all(isinstance(entry[name], kind) for name, kind in SCORE.items())
                and all(map(math.isfinite, values))
                and min(entry["rows"] + entry["official"]) > 0 <= min(entry["shared"])
                and len(entry["correct"]) == entry["rows"][1] * task.primary)
    except (LookupError, TypeError, ValueError):
        return False


def read_scores(folder, sha256):
    """Read the scores in a folder's glue.json that belong to weights with this hash -> dicts.
    UserError if the file is damaged."""
    path = Path(folder) / "glue.json"
    if not path.exists():
        return []
    entries = read_json(path).get("scores")
    if not isinstance(entries, list) or not all(map(is_score, entries)):
        raise UserError(f"{path} is damaged, or of another version: move it away, and its scores "
                        "are computed again")
    return [entry for entry in entries if entry["model"] == sha256]


def add_score(folder, entry):
    """Add an entry to glue.json. All that is there, also for another recipe, stays."""
    path = Path(folder) / "glue.json"
    entries = read_json(path)["scores"] if path.exists() else []
    write_json(path, {"scores": [*entries, entry]})


# --------------------------------------------------------------------------------------------------
# differences


def measures(entries):
    """The scores of one model -> {what: points}: tasks, their parts, and the endpoints that are
    complete. Fine-tuning seeds are averaged."""
    values = {}
    for task in TASKS:
        of_task = [e for e in entries if e["task"] == task]
        if of_task:
            values[task] = statistics.fmean(e["score"] for e in of_task)
            for part in TASKS[task].parts:
                values[f"{task} {part}"] = statistics.fmean(e["parts"][part] for e in of_task)
    for end, parts in ENDPOINTS.items():
        if all(part in values for part in parts):
            values[end] = statistics.fmean(values[part] for part in parts)
    return values


def make_row(models):
    """Models of one arm -> its row: mean and standard deviation over pretraining seeds."""
    by_seed = {}
    for model in models:
        for what, value in measures(model.scores).items():
            by_seed.setdefault(what, {})[model.seed] = value
    row = {"name": models[0].arm, "seeds": [model.seed for model in models], "scores": {
        what: {"mean": statistics.fmean(seeds.values()), "seeds": seeds,
               "sd": statistics.stdev(seeds.values()) if len(seeds) > 1 else None}
        for what, seeds in by_seed.items()}}
    if ends := [model.pretraining.evaluations[-1] for model in models if model.pretraining]:
        row |= {name: statistics.fmean(end.get(name, 0.0) for end in ends)
                for name in ("flops", "flops_with_teacher", "seconds")}
    return row


def matched(a, b):
    """The scores of two models of one seed that may be compared -> [(of a, of b)]: of one task and
    fine-tuning seed, made with the same device, dtype and torch, as the models themselves were."""
    if a.pretraining and b.pretraining and any(
            a.pretraining.start[key] != b.pretraining.start[key] for key in SAME):
        return []
    of_b = {(e["task"], e["seed"]): e for e in b.scores}
    pairs = [(e, of_b.get((e["task"], e["seed"]))) for e in a.scores]
    return [(x, y) for x, y in pairs if y and all(x[key] == y[key] for key in SAME)]


def partners(arms, ours, theirs):
    """The models of two arms that share a seed -> [(ours, theirs)]."""
    by_seed = {model.seed: model for model in arms[theirs]}
    return [(model, by_seed[model.seed]) for model in arms[ours] if model.seed in by_seed]


def row_error(pairs, tasks):
    """Standard error, over development rows, of the difference in the mean accuracy of `tasks`
    between the two sides of pairs of scores, in points.

    Both answer the same rows, many of which both get right, so what varies is the difference row by
    row, of shares over all seeds.
    """
    def share_right(entries, task):  # (rows,)
        return np.mean([np.array(list(e["correct"])) == "1"
                        for e in entries if e["task"] == task], axis=0)

    ours, theirs = zip(*pairs)
    differences = [share_right(ours, task) - share_right(theirs, task) for task in tasks]
    return 100 * math.sqrt(sum(np.var(d) / len(d) for d in differences)) / len(tasks)


def compare(arms, ours, theirs, what):
    """paired() for two arms, over the seeds that have matched scores of all that `what` takes; of
    the primary endpoint with the joint error: another sample of development rows would give another
    difference, and so would one of pretraining seeds. sqrt(rows^2 + seeds^2)."""
    pairs = {a.seed: matched(a, b) for a, b in partners(arms, ours, theirs)}
    sides = [{seed: measures([pair[i] for pair in of]) for seed, of in pairs.items()}
             for i in (0, 1)]
    result = paired(*({seed: values[what] for seed, values in side.items() if what in values}
                      for side in sides))
    if result and what == "primary":
        over_rows = row_error([pair for seed in result["seeds"] for pair in pairs[seed]], PRIMARY)
        over_seeds = result["seed_error"]
        result |= {"row_error": over_rows, "joint_error": None if over_seeds is None
                   else math.hypot(over_rows, over_seeds)}
    return result


# --------------------------------------------------------------------------------------------------
# tables


def make_tables(models, baseline):
    """Models with their scores -> a table, a dict that JSON can hold, for every shape, tokenizer
    and recipe of the runs among them."""
    groups = {}
    for run in (model for model in models if model.pretraining):
        for recipe in dict.fromkeys(json.dumps(e["recipe"]) for e in run.scores):
            groups.setdefault((run.shape, run.tokenizer.sha256, recipe), []).append(run)
    tables = []
    for (*kind, recipe), runs in groups.items():
        weights = [m for m in models if m.pretraining is None
                   and [m.shape, m.tokenizer.sha256] == kind]
        tables.append(make_table([*weights, *runs], json.loads(recipe), baseline))
    return tables


def make_table(models, recipe, baseline):
    """Models of one shape and tokenizer -> the table of their scores by this recipe."""
    models = [replace(model, scores=select_scores(model, recipe)) for model in models]
    refuse_other_rows(models)
    arms = group_arms([model for model in models if model.scores])
    rows = {arm: make_row(members) for arm, members in arms.items()}
    notes = []
    found = {e["task"]: e for model in models for e in model.scores}
    examples = {task: found[task] for task in TASKS if task in found}
    base = rows.get(baseline)
    ends = [end for end in ENDPOINTS if base and end in base["scores"]] or examples
    for arm, row in rows.items():
        if base and row is not base:
            row["against"] = {what: compare(arms, arm, baseline, what) for what in ends
                              if what in row["scores"] and what in base["scores"]}
            notes += notes_on_pair(arm, baseline, arms)
    majority = Model("majority class", 0, None, scores=[
        {**e, "parts": e["majority"], "score": statistics.fmean(e["majority"].values())}
        for e in examples.values()])
    runs = [model for model in models if model.pretraining]
    shape = runs[0].shape
    tokens = sorted({run.pretraining.evaluations[-1]["tokens"] for run in runs})
    return {
        "title": f"{shape.layers} layers of width {shape.width}, {shape.vocab_size} pieces, "
                 f"{' or '.join(f'{n / 1e6:.1f}' for n in tokens)} million tokens",
        "recipe": recipe, "baseline": baseline if base else None,
        "fine_tuning_seeds": {task: sorted({e["seed"] for m in models for e in m.scores
                                            if e["task"] == task}) for task in examples},
        "rows": [make_row([majority]), *rows.values()],
        "notes": notes + notes_on_rows(examples) + notes_on_runs(arms, rows),
    }


def select_scores(model, recipe):
    """The scores of a model by this recipe, of which random weights have their own rates (but for
    --freeze). Of two of one task and fine-tuning seed: the later."""
    if model.pretraining is None and not recipe.get("freeze"):
        recipe = {name: value for name, value in recipe.items() if name not in RATE_NAMES}
    return list({(e["task"], e["seed"]): e for e in model.scores
                 if e["recipe"].items() >= recipe.items()}.values())


def refuse_other_rows(models):
    """UserError where two models were scored on other rows of a task."""
    first = {}
    for model in models:
        for e in model.scores:
            other, data = first.setdefault(e["task"], (model, e["data"]))
            if data != e["data"]:
                raise UserError(f"{e['task']}: {other.folder} and {model.folder} were scored on "
                                "other rows: leave out --table, and all are scored on the same")


def notes_on_pair(arm, baseline, arms):
    """In which flags beside those of the masking two arms differ, and which of their scores are
    not compared."""
    ours, theirs, notes = arms[arm], arms[baseline], []
    flags = set(differing(ours[0], theirs[0])) - MASKING_FLAGS
    if ours[0].pretraining and ours[0].pretraining.experiment["distill"] == "off":
        flags -= {"--teacher"}  # it only scores: that is the masking
    if flags:
        notes.append(f"{arm} and {baseline} differ in more than the masking: "
                     + ", ".join(sorted(flags)))
    alone = []
    for a, b in partners(arms, arm, baseline):
        paired_off = [e for pair in matched(a, b) for e in pair]
        common = {e["task"] for e in a.scores} & {e["task"] for e in b.scores}
        tasks = {e["task"] for e in a.scores + b.scores if e not in paired_off} & common
        if tasks:
            alone.append(f"seed {a.seed} ({', '.join(t for t in TASKS if t in tasks)})")
    if alone:
        notes.append(f"{arm} and {baseline}: left out of the difference, for want of a partner of "
                     f"the same fine-tuning seed, device, dtype and torch: {', '.join(alone)}")
    return notes


def notes_on_rows(examples):
    """Of which tasks not all official rows were there, and where files share rows."""
    notes = []
    for task, e in examples.items():
        used = [e["trained_on"], *e["rows"][1:]]
        if used != e["official"]:
            train, *devs = [f"{n} of {m}" for n, m in zip(used, e["official"])]
            notes.append(f"{task}: {train} training rows, {', '.join(devs)} development rows")
        if any(e["shared"]):
            notes.append(f"{task}: {sum(e['shared'])} of {sum(e['rows'][1:])} development rows are "
                         "training rows, too")
    return notes


def notes_on_runs(arms, rows):
    """Which arms lack seeds, or use no context yet."""
    notes = []
    for arm, members in arms.items():
        of = rows[arm]["scores"]
        short = [f"{task} {len(of[task]['seeds'])}" for task in TASKS
                 if task in of and len(of[task]["seeds"]) < len(members)]
        if short:
            notes.append(f"{arm}: scored for fewer than its {len(members)} seeds: "
                         + ", ".join(short))
        gains = [m.pretraining.evaluations[-1].get("context_gain")
                 for m in members if m.pretraining]
        if any(gain is not None and gain <= USES_CONTEXT for gain in gains):
            notes.append(f"{arm}: a run of it uses no context yet, and where none is used all "
                         "strategies are alike: train for more --steps")
    return notes


# --------------------------------------------------------------------------------------------------
# text


def grid(lines):
    """Lines of strings, the first a header -> a Markdown table with aligned columns."""
    widths = [max(3, *map(len, column)) for column in zip(*lines)]
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join("| " + " | ".join(
        cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths))
    ) + " |" for line in (lines[0], rule, *lines[1:]))


def show(value, form="{:.1f}"):
    """A number as text, None as a dash."""
    return "-" if value is None else form.format(value)


def show_scores(table):
    """A column for each arm, a line for each task, part of a task, and endpoint."""
    rows = table["rows"]
    lines = [["points", *(row["name"] for row in rows)],
             ["pretraining seeds", "-", *(str(len(row["seeds"])) for row in rows[1:])]]
    for what in rows[0]["scores"]:
        task, _, part = what.partition(" ")
        if task in TASKS and part and len(TASKS[task].parts) == 1:
            continue  # its only part is its score
        cells = [row["scores"].get(what, {"mean": None, "sd": None}) for row in rows]
        lines.append([what, *(show(cell["mean"]) + ("" if cell["sd"] is None else
                                                    f" ± {cell['sd']:.1f}") for cell in cells)])
    return grid(lines)


def show_differences(table):
    """What each arm has beyond the baseline: a line for each endpoint."""
    lines = [["arm", "endpoint", "pairs", "difference", "95 % interval", "joint error", "p (t)",
              "p (sign flip)", "relative", "FLOPs", "with teacher", "time"]]
    base = next((row for row in table["rows"] if row["name"] == table["baseline"]), None)
    for row in table["rows"]:
        costs = [show(row[key] / base[key], "{:.2f}") if row.get(key) and base[key] else "-"
                 for key in ("flops", "flops_with_teacher", "seconds") if base]
        for what, c in row.get("against", {}).items():
            line = ["0", "no common seed", *["-"] * 5]
            if c:
                interval = "-" if c["low"] is None else f"[{c['low']:+.2f}, {c['high']:+.2f}]"
                line = [str(len(c["seeds"])), f"{c['difference']:+.2f}", interval,
                        show(c.get("joint_error"), "{:.2f}"), show(c["p_t"], "{:.3f}"),
                        show(c["p_sign_flip"], "{:.3f}"), show(c["gain_percent"], "{:+.1f} %")]
            lines.append([row["name"], what, *line, *costs])
    return grid(lines) if lines[1:] else ""


def show_tables(tables):
    """All tables as one text."""
    out = []
    if len(tables) > 1:
        out.append(f"{len(tables)} tables: their models differ in size, vocabulary or recipe, and "
                   "cannot be paired")
    for table in tables:
        recipe = ", ".join(f"{k.replace('_', '-')} {v}" for k, v in table["recipe"].items())
        counts = sorted({len(seeds) for seeds in table["fine_tuning_seeds"].values()})
        out += [f"{table['title']}. Recipe: {recipe}; fine-tuning seeds: "
                + ", ".join(map(str, counts)), show_scores(table)]
        if differences := show_differences(table):
            out.append(f"Against {table['baseline']}, paired by pretraining seed. The t test "
                       "decides; no p is corrected for several comparisons. FLOPs and time of "
                       "pretraining are multiples of the baseline's.")
            out.append(differences)
        if table["notes"]:
            out.append("\n".join(f"- {note}" for note in table["notes"]))
    return "\n\n".join(out)
