"""Statistics, arms and tables, by hand.   python -m pytest tests/test_scores.py -q"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from data import scores as S
from data.arms import Model, Pretraining, group_arms
from data.confidence import paired, sign_flip, t_quantile, t_test_p
from data.files import UserError, write_json
from data.tasks import PRIMARY, TASKS
from model import Shape

# ---- statistics


def test_student_t_is_the_textbook_s():
    quantiles = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 8: 2.306, 9: 2.262, 17: 2.110,
                 30: 2.042, 120: 1.980}
    for df, value in quantiles.items():
        assert t_quantile(df) == pytest.approx(value, abs=5e-4)
        assert t_test_p(value, df) == pytest.approx(0.05, abs=5e-5)
    # One-sided 0.01 and 0.0005 of the same tables.
    for t, df, p in ((31.821, 1, 0.02), (2.896, 8, 0.02), (5.041, 8, 0.001), (3.646, 30, 0.001)):
        assert t_test_p(t, df) == t_test_p(-t, df) == pytest.approx(p, rel=2e-3)
    assert t_test_p(0, 4) == 1 and t_test_p(math.inf, 3) == t_test_p(math.inf, 4) == 0


def test_sign_flip_by_hand():
    # Of the 8 sign patterns of 1, 2, 3 only +++ and --- reach a sum of 6.
    assert sign_flip([1.0, 2.0, 3.0]) == 2 / 8
    # |1 + 2 - 3| = 0: every pattern is as far. And |1 + 3 - 2| = 2: sums 6, 4, 2 and 0 (twice).
    assert sign_flip([1.0, 2.0, -3.0]) == 1.0
    assert sign_flip([1.0, -2.0, 3.0]) == 6 / 8
    assert sign_flip([0.1] * 9) == 2 / 512  # rounding does not lose a tie
    assert sign_flip([0.5]) == 1.0


def test_paired_by_hand():
    arm, base = {0: 72.0, 1: 71.0, 2: 73.0, 9: 50.0}, {0: 70.0, 1: 70.0, 2: 70.0, 7: 10.0}
    # Differences 2, 1, 3: mean 2, sd 1, standard error 1 / sqrt(3).
    c = paired(arm, base)
    assert c["seeds"] == [0, 1, 2] and c["difference"] == pytest.approx(2)
    assert c["seed_error"] == pytest.approx(1 / math.sqrt(3))
    assert c["high"] - 2 == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4) == 2 - c["low"]
    assert c["p_t"] == pytest.approx(0.0742, abs=1e-4)  # t = 3.4641, df 2
    assert c["p_sign_flip"] == 0.25
    assert c["gain_percent"] == pytest.approx(100 * 2 / 70)
    one = paired({0: 1.0}, {0: 2.0})
    assert one["low"] is one["p_t"] is one["seed_error"] is None and one["p_sign_flip"] == 1
    assert paired({0: 1.0}, {1: 2.0}) is None
    same = paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert same["p_t"] == same["p_sign_flip"] == 1
    assert paired({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0})["p_t"] == 0  # no spread at all


# ---- models with scores

EXPERIMENT = {"masking": "random", "select": "mix", "distill": "off", "teacher": "",
              "mask_rate": 0.15, "steps": 100, "corpus": "c" * 64, "lr": 0.003}
HERE = {"machine": "cpu", "device": "cpu", "dtype": "float32", "torch": "2"}
TOKENIZER = SimpleNamespace(sha256="t")


def entry(task, score, seed=0, recipe=None, data="d", correct="", **changes):
    official = list(TASKS[task].rows)
    names = TASKS[task].parts
    # Parts lie 2 to both sides of the score: the primary endpoint takes the first of them.
    parts = {n: float(score + d) for n, d in zip(names, (2, -2) if len(names) > 1 else (0,))}
    return {"task": task, "seed": seed, "score": float(score), "parts": parts, "data": data,
            "recipe": recipe or {"epochs": 3, "lr": 1}, "majority": {n: 40.0 for n in names},
            "rows": official, "official": official, "trained_on": official[0], "model": "m",
            "shared": [0] * len(TASKS[task].dev), "correct": correct or "10", **HERE, **changes}


def fake_run(arm, seed, scores, start=HERE, shape=Shape(600), entries=(), gain=1.0, flops=100,
             **experiment):
    """A run with {task: score}, or with these entries."""
    end = {"tokens": 1000, "flops": flops, "flops_with_teacher": flops, "seconds": 10.0,
           "context_gain": gain}
    made = Pretraining({**EXPERIMENT, **experiment}, start, [end])
    entries = list(entries) or [entry(task, score) for task, score in scores.items()]
    return Model(arm, seed, Path(f"runs/{arm}-{seed}"), "m", shape, TOKENIZER, made, entries)


def random_weights(seed, scores, entries=(), shape=Shape(600), recipe=None):
    entries = list(entries) or [entry(task, score, recipe=recipe) for task, score in scores.items()]
    return Model(S.RANDOM_WEIGHTS, seed, Path("cache"), "", shape, TOKENIZER, None, entries)


def table_of(*models, baseline="random"):
    table, = S.make_tables(models, baseline)
    json.dumps(table)
    return table


def row(table, name):
    return next(row for row in table["rows"] if row["name"] == name)


ALL = {task: 60.0 for task in TASKS}


def test_the_table_by_hand():
    runs = [fake_run("random", s, {**ALL, "RTE": 60.0 + s}) for s in range(3)]
    better = {**ALL, "SST-2": 68.0, "WNLI": 0.0}
    runs += [fake_run("self", s, {**better, "RTE": 60.0 + s}, flops=140, masking="self")
             for s in range(3)]
    weights = [random_weights(s, {task: 50.0 for task in TASKS}) for s in range(3)]
    table = table_of(*weights, *runs)
    assert [r["name"] for r in table["rows"]] == [
        "majority class", "random weights", "random", "self"]
    base, ours = row(table, "random"), row(table, "self")
    assert ours["seeds"] == [0, 1, 2] and table["baseline"] == "random"
    assert base["scores"]["RTE"]["mean"] == 61 and base["scores"]["RTE"]["sd"] == 1
    # primary: SST-2, QNLI; MNLI-m and the accuracy of QQP, which lie 2 above their task's score
    assert base["scores"]["primary"]["mean"] == pytest.approx((60 + 62 + 62 + 60) / 4)
    assert ours["scores"]["primary"]["mean"] == pytest.approx((68 + 62 + 62 + 60) / 4)
    # GLUE: 8 tasks, WNLI is not among them
    assert base["scores"]["GLUE (8)"]["mean"] == pytest.approx((7 * 60 + 61) / 8)
    assert ours["scores"]["GLUE (8)"]["seeds"][0] == pytest.approx((6 * 60 + 68 + 60) / 8)
    assert "against" not in base and set(ours["against"]) == {"primary", "GLUE (8)"}
    c = ours["against"]["GLUE (8)"]
    assert c["difference"] == pytest.approx(1) and len(c["seeds"]) == 3
    assert c["p_sign_flip"] == 0.25 and c["gain_percent"] == pytest.approx(100 / 60.125)
    assert row(table, "random weights")["against"]["primary"]["difference"] == -10
    assert row(table, "majority class")["scores"]["MRPC f1"]["mean"] == 40
    assert table["notes"] == [] and "seconds" in base

    text = S.show_tables([table])
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines[:5]}) == 1 and set(lines[1]) <= set("|-: ")
    assert any(line.split() == "| RTE | 40.0 | 50.0 ± 0.0 | 61.0 ± 1.0 | 61.0 ± 1.0 |".split()
               for line in lines)
    assert "| MNLI mismatched " in text and "| SST-2 accuracy" not in text
    assert ("| self | GLUE (8) | 3 | +1.00 | [+1.00, +1.00] | - | 0.000 | 0.250 | +1.7 % | "
            "1.40 | 1.40 | 1.00 |") in " ".join(text.split())


def test_without_the_endpoints_each_task_is_compared():
    table = table_of(fake_run("random", 0, {"RTE": 50.0, "CoLA": 10.0}),
                     fake_run("self", 0, {"RTE": 52.0}, masking="self"))
    assert row(table, "self")["against"]["RTE"]["difference"] == 2
    assert set(row(table, "self")["against"]) == {"RTE"}
    assert "no common seed" in S.show_tables([table_of(
        fake_run("random", 0, ALL), fake_run("self", 1, ALL, masking="self"))])


def test_an_arm_is_a_name_and_its_runs_must_agree():
    runs = [fake_run("self", 0, ALL), fake_run("self", 1, ALL), fake_run("self-b", 0, ALL, lr=0.1)]
    assert {arm: len(of) for arm, of in group_arms(runs).items()} == {"self": 2, "self-b": 1}
    with pytest.raises(UserError, match="runs/self-0 and runs/self-1 are by their names one arm, "
                       r"self, but differ in --mask-rate \(0.15, 0.3\).*self-b-1"):
        group_arms([runs[0], fake_run("self", 1, ALL, mask_rate=0.3)])
    with pytest.raises(UserError, match="are both the arm self with seed 0.* self-b-0"):
        group_arms([*runs, fake_run("self", 0, ALL)])


def test_what_else_two_arms_differ_in_is_named():
    kd = {"distill": "complete", "teacher": 10**15}
    models = [fake_run("random", 0, ALL), fake_run("self", 0, ALL, masking="self", select="high"),
              fake_run("self-kd", 0, ALL, masking="self", **kd),
              fake_run("entropy", 0, ALL, masking="entropy", teacher=10**15),
              fake_run("random-kd", 0, ALL, **kd)]
    notes = table_of(*models)["notes"]
    assert notes == [
        "self-kd and random differ in more than the masking: --distill, --teacher",
        "random-kd and random differ in more than the masking: --distill, --teacher"]
    notes = table_of(models[2], models[4], baseline="random-kd")["notes"]
    assert notes == []
    assert table_of(models[1], baseline="random")["baseline"] is None


def test_a_difference_is_of_scores_of_one_device_dtype_and_torch():
    """Compared score by score: the two arms below were made on the same two devices, so that their
    scores, taken together, do not differ in any of these."""
    here, other = HERE, {**HERE, "device": "cuda"}
    tasks = {"RTE": 60.0, "CoLA": 10.0}
    runs = [fake_run("random", s, {}, entries=[
        entry("RTE", 60, **(other if s else here)), entry("CoLA", 10, **(here if s else other))])
        for s in range(3)]
    runs += [fake_run("self", s, {}, masking="self", entries=[
        entry("RTE", 61 + s, **here), entry("CoLA", 12 + s, **other)]) for s in range(3)]
    table = table_of(*runs)
    against = row(table, "self")["against"]
    assert against["RTE"]["seeds"] == against["CoLA"]["seeds"] == [0]
    assert against["RTE"]["difference"] == 1 and against["CoLA"]["difference"] == 2
    assert table["notes"] == [
        "self and random: left out of the difference, for want of a partner of the same "
        "fine-tuning seed, device, dtype and torch: seed 1 (CoLA, RTE), seed 2 (CoLA, RTE)"]
    # Models that were pretrained in another number format, and scores by another torch.
    for changes in (dict(start={**HERE, "dtype": "bfloat16"}),
                    dict(entries=[entry(task, 60, torch="3") for task in tasks])):
        table = table_of(fake_run("random", 0, tasks), fake_run("self", 0, tasks, masking="self",
                                                                **changes))
        assert row(table, "self")["against"] == {"RTE": None, "CoLA": None}
        assert "seed 0 (CoLA, RTE)" in table["notes"][0] and len(table["notes"]) == 1
    # A pair is of the fine-tuning seeds that both have.
    one, two = fake_run("random", 0, {"RTE": 60.0}), fake_run("self", 0, {"RTE": 62.0})
    two.scores.append(entry("RTE", 90.0, seed=1))
    two.arm, table = "self", table_of(one, two)
    assert row(table, "self")["against"]["RTE"]["difference"] == 2
    assert row(table, "self")["scores"]["RTE"]["mean"] == 76
    assert "seed 0 (RTE)" in table["notes"][0]


def test_another_processor_may_stand_in_a_pair():
    elsewhere = {**HERE, "machine": "another"}
    base, score = fake_run("random", 0, {"RTE": 60.0}), entry("RTE", 61, **elsewhere)
    table = table_of(base, fake_run("self", 0, {}, masking="self", entries=[score]))
    assert row(table, "self")["against"]["RTE"]["difference"] == 1 and table["notes"] == []
    table = table_of(base, fake_run("self", 0, {"RTE": 61.0}, masking="self", start=elsewhere))
    assert row(table, "self")["against"]["RTE"]["difference"] == 1 and table["notes"] == []


def test_a_table_is_of_one_shape_tokenizer_and_recipe():
    runs = [fake_run("random", 0, ALL), fake_run("random-wide", 0, ALL, shape=Shape(600, 2, 256))]
    runs[0].scores.append(entry("RTE", 70.0, recipe={"epochs": 9, "lr": 1}))
    # Random weights have rates of their own; the rest of their recipe must be that of the runs.
    weights = random_weights(0, {"RTE": 50.0}, recipe={"epochs": 3, "lr": 5})
    weights.scores.append(entry("RTE", 99.0, recipe={"epochs": 8, "lr": 1}))
    tables = S.make_tables([weights, *runs], "random")
    assert [[r["name"] for r in t["rows"]] for t in tables] == [
        ["majority class", "random weights", "random"], ["majority class", "random"],
        ["majority class", "random-wide"]]
    assert row(tables[0], "random weights")["scores"]["RTE"]["mean"] == 50
    assert row(tables[1], "random")["scores"]["RTE"]["mean"] == 70
    assert "3 tables: " in S.show_tables(tables)


def test_a_frozen_encoder_has_one_rate_for_runs_and_random_weights():
    weights, run = random_weights(0, {}), fake_run("random", 0, {})
    for lr, floor, score in ((1e-3, 50.0, 60.0), (3e-3, 65.0, 70.0)):
        recipe = {"epochs": 3, "freeze": True, "lr": lr}
        weights.scores.append(entry("RTE", floor, recipe=recipe))
        run.scores.append(entry("RTE", score, recipe=recipe))
    found = [[row(table, name)["scores"]["RTE"]["mean"] for name in ("random weights", "random")]
             for table in S.make_tables([weights, run], "random")]
    assert sorted(found) == [[50, 60], [65, 70]]


def test_scores_that_are_missing_or_of_other_rows():
    table = table_of(fake_run("random", 0, {"RTE": 60.0, "CoLA": 10.0}),
                     fake_run("self", 0, {"RTE": 62.0}, masking="self"))
    assert "CoLA" not in row(table, "self")["scores"] and table["notes"] == []
    # Of two scores by one recipe the later counts.
    again = fake_run("random", 0, {"RTE": 60.0})
    again.scores.append(entry("RTE", 64.0, data="others"))
    assert row(table_of(again), "random")["scores"]["RTE"]["mean"] == 64
    with pytest.raises(UserError, match="RTE: runs/random-0 and runs/self-0 were scored on "
                       "other rows: leave out --table"):
        table_of(again, fake_run("self", 0, {"RTE": 62.0}, masking="self"))
    # Fewer rows than the official files have, rows in both files, fewer seeds than the others.
    subset = entry("RTE", 60.0, rows=[2000, 277], trained_on=1000)
    shared = entry("CoLA", 60.0, shared=[16])
    table = table_of(fake_run("random", 0, {}, entries=[subset, shared]),
                     fake_run("random", 1, {}, entries=[subset]))
    assert table["notes"] == ["CoLA: 16 of 1043 development rows are training rows, too",
                              "RTE: 1000 of 2490 training rows, 277 of 277 development rows",
                              "random: scored for fewer than its 2 seeds: CoLA 1"]


def test_an_arm_that_uses_no_context_is_named():
    notes = table_of(fake_run("random", 0, ALL, gain=0.26), fake_run("random", 1, ALL, gain=None),
                     fake_run("self", 0, ALL, gain=0.25, masking="self"),
                     fake_run("slow", 0, ALL), fake_run("slow", 1, ALL, gain=0.0))["notes"]
    assert [note.partition(": a run of it uses no context yet")[0] for note in notes] == [
        "self", "slow"]


# ---- errors


def test_the_error_of_a_difference_is_over_the_rows_that_both_answer():
    def pairs(*answers):
        return [[{"task": "SST-2", "correct": c} for c in pair] for pair in answers]

    # Shares right of rows 0 to 3: 1, 1, 1/2, 0, and 1, 0, 0, 0. Differences 0, 1, 1/2, 0: mean 3/8,
    # variance 5/4 / 4 - 9/64 = 11/64. Pretraining and fine-tuning seeds count alike.
    two = pairs(("1110", "1000"), ("1100", "1000"))
    assert S.row_error(two, ["SST-2"]) == pytest.approx(100 * math.sqrt(11 / 64 / 4))
    # The same answers: no error at all, where two samples would have one.
    assert S.row_error(pairs(("1010", "1010")), ["SST-2"]) == 0


def test_the_joint_error_is_over_rows_and_seeds():
    def answers(arm, seed, right):  # a model that has so many of 400 rows right, the first ones
        entries = []
        for task in PRIMARY:
            rows = [1000] + [400] * len(TASKS[task].dev)
            e = entry(task, 0, correct="1" * right + "0" * (400 - right), rows=rows, official=rows,
                      trained_on=1000)
            entries.append({**e, "parts": dict.fromkeys(e["parts"], right / 4)})
        return fake_run(arm, seed, {}, entries=entries)

    # SST-2, QQP, MNLI, QNLI: 12, 16 and 20 of 400 rows more in the three seeds.
    models = [answers("random", seed, 200) for seed in range(3)]
    models += [answers("self", seed, right) for seed, right in enumerate((212, 216, 220))]
    c = row(table_of(*models), "self")["against"]["primary"]
    assert c["difference"] == pytest.approx(4)
    # A task's rows: 12 differ by 1, 4 by 2/3 and 4 by 1/3, of 400; four tasks of one weight.
    variance = (12 + 4 * 4 / 9 + 4 / 9) / 400 - 0.04**2
    over_rows, over_seeds = 100 * math.sqrt(variance / 400 / 4), 1 / math.sqrt(3)
    assert c["row_error"] == pytest.approx(over_rows)
    assert c["joint_error"] == pytest.approx(math.hypot(over_rows, over_seeds))
    # A seed without a pair says nothing.
    assert row(table_of(*models, answers("self", 7, 360)), "self")["against"]["primary"] == c


# ---- glue.json


def test_scores_are_kept_with_their_weights(tmp_path):
    assert S.read_scores(tmp_path, "m") == []
    first, second = (entry(task, 60.0, correct="1" * (TASKS[task].rows[1] if task in PRIMARY else 0)
                           or " ") for task in ("RTE", "SST-2"))
    first["correct"] = ""
    S.add_score(tmp_path, first)
    S.add_score(tmp_path, {**second, "model": "other"})
    assert S.read_scores(tmp_path, "m") == [first]
    assert S.read_scores(tmp_path, "other") == [{**second, "model": "other"}]
    for what, value in (("task", "SNLI"), ("score", "60"), ("parts", {}), ("rows", [0, 1]),
                        ("correct", "1"), ("torch", None), ("recipe", 3), ("shared", [-1]),
                        ("parts", {"accuracy": math.nan}), ("majority", {"f1": 1.0})):
        write_json(tmp_path / "glue.json", {"scores": [{**first, what: value}]})
        with pytest.raises(UserError, match="glue.json is damaged.* computed again"):
            S.read_scores(tmp_path, "m")
