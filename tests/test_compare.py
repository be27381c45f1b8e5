"""Statistics, tables and the curve, by hand.   python -m pytest tests/test_compare.py -q"""

import json
import math
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from data import compare as C
from data import confidence, curve
from data import tasks as G
from data.files import UserError
from data.tables import show_tables
from model import Shape


def test_t_factor_is_the_textbook_s():
    book = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 8: 2.306, 9: 2.262, 17: 2.110,
            30: 2.042, 120: 1.980}
    for df, value in book.items():
        assert confidence.t_factor(df) == pytest.approx(value, abs=5e-4)


def test_sign_flip_by_hand():
    # Of the 8 sign patterns of 1, 2, 3 only +++ and --- reach a sum of 6.
    assert confidence.sign_flip([1.0, 2.0, 3.0]) == (2 / 8, 2 / 8)
    # |1 + 2 - 3| = 0: every pattern is as far. And |1 + 3 - 2| = 2: sums 6, 4, 2 and 0 (twice).
    assert confidence.sign_flip([1.0, 2.0, -3.0]) == (1.0, 0.25)
    assert confidence.sign_flip([1.0, -2.0, 3.0]) == (6 / 8, 0.25)
    assert confidence.sign_flip([0.1] * 9) == (2 / 512, 2 / 512)  # rounding does not lose a tie
    assert confidence.sign_flip([0.5]) == (1.0, 1.0)


def test_paired_by_hand():
    arm, base = {0: 72.0, 1: 71.0, 2: 73.0, 9: 50.0}, {0: 70.0, 1: 70.0, 2: 70.0, 7: 10.0}
    # Differences 2, 1, 3: mean 2, sd 1, standard error 1 / sqrt(3).
    c = confidence.paired(arm, base)
    assert c["pairs"] == 3 and c["difference"] == pytest.approx(2)
    assert c["high"] - 2 == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4) == 2 - c["low"]
    assert c["p"] == c["p_smallest"] == 0.25 and c["gain_percent"] == pytest.approx(100 * 2 / 70)
    one = confidence.paired({0: 1.0}, {0: 2.0})
    assert one["low"] is None and one["p"] == 1 and confidence.paired({0: 1.0}, {1: 2.0}) is None


def entry(task, seed, score, recipe=None, data="d", rows=None):
    official = list(G.TASKS[task].rows)
    names = ["matched", "mismatched"] if task == "MNLI" else G.TASKS[task].metrics
    # Parts lie 2 to both sides of the score: the primary endpoint takes the first of them.
    parts = {n: score + d for n, d in zip(names, (2, -2) if len(names) > 1 else (0,))}
    return {"task": task, "seed": seed, "score": score, "parts": parts,
            "recipe": recipe or {"lr": 1}, "data": data, "majority": {n: 40.0 for n in names},
            "rows": rows or official, "official": official, "trained_on": (rows or official)[0]}


FLAGS = {"masking": "random", "select": "mix", "distill": "off", "mask_rate": 0.15,
         "mask_rate_end": 0.15, "steps": 100, "flops_of": "", "seed": 0}


def fake_run(seed, scores, masking="random", flops=100.0, tokens=1000, **flags):
    """A run as open_subject of glue.py gives it; scores: {task: score}."""
    flags = {**FLAGS, "masking": masking, "seed": seed, **flags}
    return SimpleNamespace(
        path=f"{masking}-{seed}-{flags}", seed=seed, flags=flags, defaults=FLAGS, shape=Shape(600),
        tokenizer=SimpleNamespace(sha256="t"), corpus="c" * 64, tokens=tokens, flops=flops,
        flops_of=flags["flops_of"], teacher_flops=0, flops_with_teacher=flops, seconds=10.0,
        margin=1.0, entries=[entry(task, 0, score) for task, score in scores.items()])


def floor_of(score):
    return {(Shape(600), "t"): [SimpleNamespace(seed=0, entries=[
        entry(task, 0, score) for task in G.TASKS])]}


def test_the_table_by_hand():
    base = {task: 60.0 for task in G.TASKS}
    runs = [fake_run(s, {**base, "RTE": 60.0 + s}) for s in range(3)]
    better = {**base, "SST-2": 68.0, "WNLI": 0.0}
    runs += [fake_run(s, {**better, "RTE": 60.0 + s}, "self", flops=140.0) for s in range(3)]
    table, = C.make_tables(runs, floor_of(50.0))
    random, own = table["rows"]
    assert (random["name"], own["name"], own["n"]) == ("random", "self", 3)
    assert random["tasks"]["RTE"]["mean"] == 61 and random["tasks"]["RTE"]["sd"] == 1
    # primary: SST-2, QNLI; MNLI-m and the accuracy of QQP, which lie 2 above their task's score
    assert random["ends"]["primary"]["mean"] == pytest.approx((60 + 62 + 62 + 60) / 4)
    assert own["ends"]["primary"]["mean"] == pytest.approx((68 + 62 + 62 + 60) / 4)
    # GLUE: 8 tasks, WNLI is not among them
    assert random["ends"]["glue"]["mean"] == pytest.approx((7 * 60 + 61) / 8)
    assert own["ends"]["glue"]["seeds"][0] == pytest.approx((6 * 60 + 68 + 60) / 8)
    assert own["cost"] == 1.4 and random["cost"] == 1 and "against" not in random
    c = own["against"]["glue"]
    assert c["difference"] == pytest.approx(1) and c["pairs"] == 3 and c["p"] == 0.25
    assert c["gain_percent"] == pytest.approx(100 / 60.125)
    assert [row["name"] for row in table["floors"]] == ["majority class", "random weights"]
    assert any("can be compared" in note for note in table["notes"])
    text = show_tables([table])
    assert "61.0 ± 1.0" in text and "0.250 (0.250)" in text and "+1.00 [+1.00, +1.00]" in text
    markdown = show_tables([table], markdown=True)
    lines = [x for x in markdown.splitlines() if x.startswith("|")]
    assert len({x.count("|") for x in lines[:6]}) == 1 and lines[1].startswith("| --- |")
    assert "MNLI mismatched" in show_tables([table], parts=True)


def test_a_random_arm_that_is_no_better_than_its_floor_is_not_a_baseline():
    runs = [fake_run(s, {task: 60.0 for task in G.TASKS}, name) for name in ("random", "self")
            for s in range(2)]
    table, = C.make_tables(runs, floor_of(59.5))
    note, = [n for n in table["notes"] if "NO COMPARISON" in n]
    # SST-2 has 872 rows: two errors of a difference are 2 sqrt(2 * 0.6 * 0.4 / 872) = 4.7 points
    assert "SST-2 +0.5 against random weights, within two standard errors (4.7)" in note
    assert "QQP +0.5" in note and "0.7" in note
    for margin, words in ((0.3, "0.30 nats below 0.9 of"), (-1.2, "1.20 nats above 0.9 of")):
        for run in runs:
            run.margin = margin
        table, = C.make_tables(runs, floor_of(46.0))
        assert any(words in n and "SST-2" not in n for n in table["notes"])


def test_the_error_of_a_difference_is_over_the_rows_that_both_answer():
    def subject(*entries):
        return SimpleNamespace(entries=[{"task": "SST-2", "parts": {"accuracy": 100 * share},
                                         "right": right} for share, right in entries])

    # Rows 0 to 3, the lowest bit first: shares right 1, 1, 1/2, 0; of the floor 1, 0, 0, 0.
    runs = [subject((0.75, "0x7")), subject((0.5, "0x3"))]
    floors = [subject((0.25, "0x1"))]
    # Differences 0, 1, 1/2, 0: mean 3/8, squares 5/4 / 4 - 9/64 = 11/64.
    assert C.standard_error("SST-2", 4, runs, floors) == pytest.approx(math.sqrt(11 / 64 / 4))
    assert C.standard_error("SST-2", 4, runs, [subject((0.25, "0x1"), (0.25, "0x1"))]) == (
        C.standard_error("SST-2", 4, runs, floors))
    # The same answers: no error at all, where two samples would have one.
    assert C.standard_error("SST-2", 4, [subject((0.5, "0x5"))], [subject((0.5, "0x5"))]) == 0
    old = C.standard_error("SST-2", 4, [subject((0.5, ""))], [subject((0.5, "0x5"))])
    assert old == pytest.approx(math.sqrt(2 * 0.25 / 4))
    # 18 more rows right, none lost: far beyond an error by rows, within that of two samples.
    rows = G.TASKS["SST-2"].rows[1]
    better, floor = [fake_run(0, {task: 60.0 for task in G.TASKS})], floor_of(50.0)
    for entries, right in ((better[0].entries, 540), (floor[Shape(600), "t"][0].entries, 522)):
        sst2 = next(e for e in entries if e["task"] == "SST-2")
        sst2["parts"] = {"accuracy": 100 * right / rows}
        sst2["right"] = hex((1 << right) - 1)
    note, = [n for n in C.make_tables(better, floor)[0]["notes"] if "it can be compared" in n]
    for e in better[0].entries:
        e["right"] = ""
    note, = [n for n in C.make_tables(better, floor)[0]["notes"] if "NO COMPARISON" in n]
    assert "SST-2 +2.1 against random weights, within two standard errors (4.7)" in note


def test_random_weights_that_a_recipe_cannot_train_are_no_floor():
    runs = [fake_run(0, {task: 60.0 for task in G.TASKS}, name) for name in ("random", "self")]
    table, = C.make_tables(runs, floor_of(43.0))  # the majority class has 40
    note, = [n for n in table["notes"] if "NO COMPARISON" in n]
    # SST-2: two errors of a share are 2 sqrt(0.43 * 0.57 / 872) = 3.35 points; QNLI has more rows
    assert "random weights do not learn SST-2" in note and "QNLI" not in note


def test_random_weights_count_at_the_rate_that_serves_them_best():
    runs = [fake_run(0, {})]
    runs[0].entries = [entry(task, 0, 60.0, {"lr": 3, "epochs": 3}) for task in G.TASKS]
    floors = floor_of(0)
    floor, = floors[Shape(600), "t"]

    def sst2(*others):
        floor.entries = [entry(task, 0, 50.0, {"lr": 3, "epochs": 3}) for task in G.TASKS]
        floor.entries += others
        table, = C.make_tables(runs, floors)
        assert table["floors"][1]["tasks"]["QNLI"]["mean"] == 50
        return table["floors"][1]["tasks"]["SST-2"]["mean"], " ".join(table["notes"])

    score, notes = sst2(entry("SST-2", 0, 45.0, {"lr": 1, "epochs": 3}))
    assert score == 50 and "it can be compared with" in notes
    assert "3 (of 2 scored) on SST-2" in notes
    assert "alone, a lower may suit: CoLA, MRPC, STS-B, QQP, MNLI, QNLI, RTE, WNLI" in notes
    score, notes = sst2(entry("SST-2", 0, 58.0, {"lr": 1, "epochs": 3}),
                        entry("SST-2", 1, 60.0, {"lr": 1, "epochs": 3}))
    assert score == 59 and "1 (of 2 scored) on SST-2" in notes
    assert "SST-2 +1.0 against random weights, within" in notes
    # A rate with fewer seeds takes none away: seed 0 at its best, and seed 1.
    assert sst2(entry("SST-2", 1, 60.0, {"lr": 3, "epochs": 3}),
                entry("SST-2", 0, 58.0, {"lr": 1, "epochs": 3}))[0] == 59
    assert "at the --lr of the runs alone" in sst2()[1]
    # More epochs are another recipe, other rows another experiment.
    assert sst2(entry("SST-2", 0, 59.0, {"lr": 1, "epochs": 9}))[0] == 50
    assert sst2(entry("SST-2", 0, 59.0, {"lr": 1, "epochs": 3}, data="other"))[0] == 50
    # The primary endpoint takes QQP's accuracy: so does the choice of the rate.
    other = entry("QQP", 0, 50.5, {"lr": 1, "epochs": 3})
    other["parts"] = {"accuracy": 51.5, "f1": 49.5}  # the other has 52, 48
    assert "3 (of 2 scored) on QQP" in sst2(other)[1]
    # Another rate for the embeddings is another rate; of equal scores one that tells its rows.
    words = {"lr": 3, "embedding_lr": 1, "epochs": 3}
    assert "3 (embeddings 1) (of 2 scored) on SST-2" in sst2(entry("SST-2", 0, 51.0, words))[1]
    told = {**entry("SST-2", 0, 50.0, words), "right": "0x1"}
    floor.entries = [entry("SST-2", 0, 50.0, {"lr": 3, "epochs": 3}), told]
    best, = C.at_best_rate([floor], words, {"SST-2": "d"})[0]
    assert best.entries == [told]


def test_what_cannot_be_compared_stands_apart():
    scores = {"RTE": 60.0}
    runs = [fake_run(0, scores), fake_run(0, scores, "self"), fake_run(0, scores, tokens=2000),
            fake_run(0, scores, tokens=3000, flops=140.0, steps=300, flops_of="runs/self-0")]
    runs[1].flops = 140.0
    tables = C.make_tables(runs, {})
    assert sorted(len(t["rows"]) for t in tables) == [1, 3]
    assert "cannot be compared" in show_tables(tables)
    names = [row["name"] for t in tables if len(t["rows"]) == 3 for row in t["rows"]]
    assert names == ["random", "self", "random, steps 300, equal FLOPs"]
    runs[0].entries.append(entry("RTE", 0, 61.0, {"lr": 2}))
    assert len(C.make_tables(runs, {})) == 3  # another recipe
    # Two runs spent as much: the one that --flops-of names decides, whatever the order.
    runs = [fake_run(0, scores, "self", flops=140.0), fake_run(0, scores, tokens=1400, flops=140.0),
            fake_run(0, scores, tokens=1400, flops=140.0, flops_of="runs/self-0/")]
    runs[0].path = "runs/self-0"
    assert C.same_compute(runs[2], runs) == C.same_compute(runs[2], runs[::-1]) == 1000


def test_arms_are_named_by_what_differs():
    scores = {"RTE": 60.0}
    runs = [fake_run(0, scores), fake_run(0, scores, "self"),
            fake_run(0, scores, "self", select="high"),
            fake_run(0, scores, mask_rate=0.3), fake_run(1, scores, "self", out="elsewhere")]
    table, = C.make_tables(runs, {})
    assert [(row["name"], row["n"]) for row in table["rows"]] == [
        ("random", 1), ("self", 2), ("self, select high", 1), ("random, mask-rate 0.3", 1)]
    assert table["baseline"] == "random"  # the plain one, not the one whose rate falls
    table, = C.make_tables(runs, {}, [runs[2].path])
    assert table["baseline"] == "self, select high"
    with pytest.raises(UserError, match="several arms"):
        C.make_tables(runs, {}, [runs[2].path, runs[3].path])
    origins = [fake_run(s, scores, begin_from=f"runs/trunk-{s}") for s in (2, 3)]
    table, = C.make_tables([*runs, *origins], {})  # a path says nothing but that there is one
    assert (table["rows"][-1]["name"], table["rows"][-1]["n"]) == ("random, continued", 2)
    late = fake_run(4, scores, flops=140.0, begin_from="runs/self-trunk")  # another origin
    table, = C.make_tables([*origins, late], {})
    assert [row["n"] for row in table["rows"]] == [2, 1]
    with pytest.raises(UserError, match="the same arm and seed"):
        C.make_tables([*runs, fake_run(0, scores, "self", out="again")], {})


def test_a_contrast_is_of_masking_alone_or_says_what_else_it_is_of():
    teach = {"distill": "complete", "alpha": 0.5}
    runs = [fake_run(s, {"RTE": score}, masking, **flags) for s in range(2)
            for score, masking, flags in ((50.0, "random", {}), (58.0, "random", teach),
                                          (60.0, "self", teach), (53.0, "self", {"lr": 1e-3}))]
    runs.sort(key=lambda run: run.path)
    table, = C.make_tables(runs, {})
    rows = {row["name"]: row for row in table["rows"]}
    kd = ", distill complete, alpha 0.5"
    assert set(rows) == {"random", "random" + kd, "self" + kd, "self, lr 0.001"}
    assert [rows[name]["baseline"] for name in rows] == [
        "random" + kd if name == "self" + kd else "random" for name in rows]
    difference = {name: row["against"]["mean"]["difference"] for name, row in rows.items()
                  if "against" in row}
    assert difference == {"random" + kd: 8, "self" + kd: 2, "self, lr 0.001": 3}
    more = [note for note in table["notes"] if "not of masking alone" in note]
    assert more == ["self, lr 0.001, against random: not of masking alone, they differ in lr"]
    assert "| random" + kd + " | 1.00 |" in show_tables([table], markdown=True)
    # From one trunk: the contrast is with the random arm that was continued, too.
    trunk = {"begin_from": "runs/trunk"}
    further = [fake_run(0, {"RTE": 55.0}, **trunk), fake_run(0, {"RTE": 56.0}, "self", **trunk)]
    table, = C.make_tables([*further, fake_run(0, {"RTE": 50.0})], {})
    assert [row["baseline"] for row in table["rows"]] == ["random", "random, continued", "random"]
    assert [row["against"]["mean"]["difference"] for row in table["rows"][:2]] == [5, 1]
    table, = C.make_tables(runs, {}, [r.path for r in runs if r.flags["masking"] == "random"
                                      and r.flags["distill"] == "off"])
    assert {row["baseline"] for row in table["rows"]} == {"random"}
    table, = C.make_tables([r for r in runs if r.flags["masking"] == "self"], {}, [runs[-1].path])
    assert any("there is no random arm" in note for note in table["notes"])


def test_scores_that_are_missing_or_of_other_rows():
    runs = [fake_run(0, {"RTE": 60.0, "CoLA": 10.0}), fake_run(0, {"RTE": 62.0}, "self")]
    runs[1].entries.append(entry("RTE", 1, 90.0))  # random has no such fine-tuning seed
    table, = C.make_tables(runs, {})
    tasks = table["rows"][1]["tasks"]
    assert tasks["RTE"]["mean"] == 62 and "CoLA" not in tasks
    assert table["rows"][0]["ends"]["mean"]["mean"] == 35 and not table["rows"][1]["ends"]
    assert "not scored on all tasks" in show_tables([table])
    runs = [fake_run(0, {"CoLA": 20.0, "RTE": 60.0, "WNLI": 10.0}), fake_run(1, {"CoLA": 40.0})]
    table, = C.make_tables(runs, {})
    assert table["rows"][0]["ends"]["mean"]["mean"] == 40  # without WNLI
    assert table["floors"][0]["ends"]["mean"]["mean"] == 40
    assert "random: scored for fewer than its 2 seeds: RTE 1, WNLI 1" in table["notes"]
    subset = [1000, 277]
    runs = [fake_run(0, {}), fake_run(0, {}, "self"), fake_run(1, {})]
    runs[0].entries = [entry("RTE", 0, 60.0, rows=subset)]
    runs[2].entries = [entry("RTE", 0, 61.0, rows=subset)]
    runs[1].entries = [entry("RTE", 0, 99.0, data="others")]
    table, = C.make_tables(runs, {})
    assert "RTE" not in table["rows"][1]["tasks"]
    assert "RTE: scores on other rows are left out" in table["notes"]
    assert "RTE 1000 of 2490 (training), 277 of 277 (development)" in table["notes"]


# ---- data/curve.py


def test_the_curve_has_a_point_per_arm_and_token_count(tmp_path):
    scores = {task: 60.0 for task in G.TASKS}
    runs = [fake_run(0, {**scores, "RTE": 60.0 + tokens}, name, tokens=int(tokens * 1e6))
            for name in ("random", "self") for tokens in (5, 10, 20)]
    tables = C.make_tables(runs, floor_of(50.0))
    assert sorted(t["tokens"] for t in tables) == [5_000_000, 10_000_000, 20_000_000]
    arms, floors = curve.read_points(tables, "RTE")
    assert arms["random"] == arms["self"] == [(5e6, 65.0), (10e6, 70.0), (20e6, 80.0)]
    assert floors == {"majority class": 40.0, "random weights": 50.0}
    picture = ElementTree.fromstring(curve.draw(arms, floors, "<RTE>"))
    points = [e for e in picture.iter() if e.tag.endswith("circle")]
    x, y = ([float(e.get(c)) for e in points[:3]] for c in ("cx", "cy"))
    assert len(points) == 6 and x == sorted(x) and y == sorted(y, reverse=True)
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)  # a logarithmic axis
    assert y[1] - y[2] == pytest.approx(2 * (y[0] - y[1]), abs=0.3)  # a linear one
    for wanted in ("primary", "STS-B"):
        assert curve.read_points(tables, wanted)[0]["self"][0][0] == 5e6
    assert curve.read_points(tables, "nothing") == ({}, {})
    longer = fake_run(0, scores, tokens=int(4e7), select="high", steps=400)
    with pytest.raises(UserError, match="the arm random has another select at 40000000 tokens"):
        curve.read_points([*tables, *C.make_tables([longer], floor_of(50.0))], "RTE")
    with pytest.raises(UserError, match="recipe"):
        curve.read_points([*tables, {**tables[0], "recipe": {"lr": 2}}], "primary")
    assert curve.draw({"random": [(5e6, 0.0)]}, {}, "")  # every value is the same
    assert curve.ticks(0.12, 0.71) == pytest.approx([i / 10 for i in range(1, 9)])


def test_a_picture_never_takes_the_place_of_another_file(tmp_path, monkeypatch):
    tables = C.make_tables([fake_run(0, {task: 60.0 for task in G.TASKS})], floor_of(50.0))
    scores, picture = tmp_path / "scores.json", tmp_path / "curve.svg"
    scores.write_text(json.dumps(tables))
    for target in (picture, picture, scores, tmp_path, ""):
        monkeypatch.setattr("sys.argv", ["curve", str(scores), str(target)])
        if target == picture:  # its own picture may be drawn anew
            curve.main()
            assert picture.read_text().startswith("<svg")
        else:
            with pytest.raises(UserError, match="is no picture|cannot write"):
                curve.main()
            assert scores.read_text() == json.dumps(tables)


def test_labels_of_the_curve_do_not_lie_on_one_another():
    arms = {"a": [(100e6, 70.0), (248e6, 72.5)], "b": [(262e6, 72.6)], "c": [(393e6, 73.0)]}
    picture = ElementTree.fromstring(curve.draw(arms, {"floor": 72.4, "other": 72.45}, ""))
    words = [(float(e.get("x")), float(e.get("y")), e.text) for e in picture.iter()
             if e.tag.endswith("text")]
    right = sorted((y, text.split()[0]) for x, y, text in words if x > curve.WIDTH - curve.RIGHT)
    assert [name for _, name in right] == ["c", "b", "a", "other", "floor"]
    assert all(b - a >= 15 for (a, _), (b, _) in zip(right, right[1:]))
    assert {"100", "248", "393"} <= {t for *_, t in words} and "262" not in {t for *_, t in words}
