"""When a run leaves the plateau, and when it begins to use context, by hand.

    python -m pytest tests/test_exit.py -q
"""

import json
import os
import re
import shutil
import subprocess

import pytest

from data.results.exit import (
    PARTS, exit_step, flops, holm, keep, main, onset, print_part, print_single, read_runs,
)
from tests.helpers import ROOT

H = 7.0  # so the bound is 0.9 x 7 - 0.1 = 6.2


def run(*losses, **more):
    return {"unigram_entropy": H, "steps": 25 * (len(losses) - 1), "flops": 1,
            "loss": [[25 * i, loss] for i, loss in enumerate(losses)], **more}


@pytest.mark.parametrize("losses, step", [
    ((9.0, 7.0, 6.3, 6.1, 5.0), 62.5),  # half way from 50 to 75
    ((9.0, 6.0, 6.6, 5.8, 5.0), 62.5),  # it came back once: the last crossing counts
    ((9.0, 6.2, 6.2, 5.8), 25),  # on the bound is not above it
    ((9.0, 7.0, 6.3, 6.21), None), ((9.0, 6.0, 6.3), None), ((9.0, 6.0, float("nan")), None),
])
def test_the_exit_is_the_last_crossing(losses, step):
    assert exit_step(run(*losses)) == (step if step is None else pytest.approx(step))


def test_a_run_that_diverged_has_not_left():
    assert exit_step(run(9.0, 6.0, 5.0, finished=False)) is None


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.5, "b": 0.9}) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize("gains, level, step", [
    # Two above, one below, then four above: from 100 to 125 it goes from 0.1 to 0.3.
    ((0, 0.05, 0.3, 0.3, 0.1, 0.3, 0.35, 0.4, 0.5, 0.2), 0.25, 118.75),
    ((0, 0.05, 0.3, 0.3, 0.1, 0.3, 0.35, 0.4, 0.5, 0.2), 0.2, 112.5),
    ((0, 0.05, 0.3, 0.3, 0.1, 0.3, 0.35, 0.4, 0.5, 0.2), 0.35, None),
    ((0, 0.3, 0.3, 0.3), 0.25, None), ((0, 0.5, 0.5, 0.5, 0.5), 0.25, 12.5),
    ((0, 0.25, 0.25, 0.25, 0.25), 0.25, None), ((0, 1, 1, 1, float("nan")), 0.25, None),
])
def test_the_onset_is_before_the_first_four_above(gains, level, step):
    found = onset({"context_gain": [[25 * i, gain] for i, gain in enumerate(gains)]}, level)
    assert found == (step if step is None else pytest.approx(step))


def test_the_endpoints_beside_the_onset():
    assert [(title, endpoint(begins(100))) for title, endpoint in PARTS[1].beside] == [
        ("onset at 0.1 nats", 40), ("at 0.5 nats", 200), ("exit", None)]


def test_flops_up_to_a_step_and_with_the_teacher():
    run = begins(100, flops=9000, teacher_flops=500)  # 3 a step
    assert flops(run, onset, 0) == 300 and flops(run, onset, 1) == 800
    assert flops(begins(None, flops=9000), onset, 0) == 9000  # the budget


def begins(step, seed=0, arm="random", **more):
    """A run of 3000 steps that begins to use context at `step`; None: it does not. Its gain rises
    from 0 in a straight line, so it is at 0.1 nats at 0.4 times that step, at 0.5 at twice."""
    gain = 1 if step else 0
    gains = [[0, 0], [4 * (step or 100), gain], *([2900 + 25 * i, gain] for i in range(3))]
    return {"arm": arm, "seed": seed, "steps": 3000, "flops": 3000, "teacher_flops": 0,
            "unigram_entropy": H, "context_gain": gains, "loss": [[0, 9.0], [3000, 7.0]],
            "machine": "ours", **more}


def nine(arm, steps):
    return [begins(step, seed, arm) for seed, step in zip(range(30, 39), steps)]


WAVER = 0.8, 1.25, 0.8, 1.25, 0.8, 1.25, 0.8, 1.25, 1  # their geometric mean is 1


def study():
    """All runs of the second part: high takes 4 times as long as random, distillation half."""
    runs = nine("random", [100] * 9) + nine("small-random", [200] * 9)
    steps = {"high": 400, "distill": 50, "distill-control": 80, "small-static": 250}
    for arm, step in steps.items():
        runs += nine(arm, [step * factor for factor in WAVER])
    return runs


def table(tmp_path, monkeypatch, capsys, runs):
    """What the script prints of these runs of the second part -> {first cell: [its lines]}."""
    (tmp_path / "onset.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    monkeypatch.setattr("data.results.exit.HERE", tmp_path)
    monkeypatch.setattr("sys.argv", ["exit"])
    main()
    lines = {}
    for line in capsys.readouterr().out.split("onset.jsonl")[1].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        lines.setdefault(cells[0], []).append(cells)
    return lines


def test_the_table_of_the_second_part_by_hand(tmp_path, monkeypatch, capsys):
    lines = table(tmp_path, monkeypatch, capsys, study())
    # ln 1.25 is 0.223: deviation 0.223, error 0.0744, interval ln 4 -+ 2.306 x 0.0744, t 18.6.
    assert lines["high"][0] == ["high", "9", "400 (320 to 500)", "4.00 [3.37, 4.75]",
                                "18.6; < 0.0001", "0.004", "-"]
    assert lines["distill"][0][3:6] == ["0.50 [0.42, 0.59]", "-9.3; < 0.0001", "0.004"]
    # Over random masking of its own text. The largest p of three stays as it is.
    assert lines["small-static"][0][3:5] == ["1.25 [1.05, 1.48]", "3.0; 0.0171"]
    assert lines["distill-control"][0][3:6] == ["0.80 [0.67, 0.95]", "-", "-"]
    assert lines["random"][0] == ["random", "9", "100 (100 to 100)", *"----"]
    # FLOPs; 0.1 and 0.5 nats; the exit, which no loss here has.
    assert lines["high"][1][1:] == ["4.00", "4.00", "4.00 [3.37, 4.75]", "4.00 [3.37, 4.75]",
                                    "1.00 [1.00, 1.00] or more"]
    for picture in ("onset-curves.svg", "onset-ratios.svg"):
        assert "small-static" in (tmp_path / picture).read_text()


def test_a_finished_run_is_kept_as_one_line(tmp_path):
    run, kept = tmp_path / "small-static-31", tmp_path / "kept.jsonl"
    run.mkdir()
    start = {"machine": "ours", "dtype": "float32", "torch": "2", "date": "today"}
    names = ("corpus_sha256", "tokenizer_sha256", "teacher_sha256", "origin_sha256")
    (run / "config.json").write_text(json.dumps({
        "flags": {"seed": 31, "steps": 25, "corpus_tokens": 0, "batch_size": 16, "seq_len": 128},
        "parameters": 1, "unigram_entropy": 7.00004, "flops": 5, "teacher_flops": 2,
        "experiment": [], "starts": [start], **dict.fromkeys(names, "")}))
    line = {"step": 0, "val_loss": 9.00012, "context_gain": -0.00004}
    lines = line, {"step": 10}, {"step": 25, "val_loss": 8.5, "context_gain": 0.25}
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    keep(run, kept)
    entry = json.loads(kept.read_text())
    assert entry.pop("commit") is not None
    assert entry == {
        "run": "small-static-31", "arm": "small-static", "seed": 31, "steps": 25,
        "corpus_tokens": 0, "batch_tokens": 2048, "unigram_entropy": 7.0, "flops": 5,
        "teacher_flops": 2, **start, "finished": False, "loss": [[0, 9.0], [25, 8.5]],
        "context_gain": [[0, -0.0], [25, 0.25]]}


@pytest.mark.parametrize("arm", ["high", "small-static", "distill-control"])
def test_an_arm_is_hidden_at_eight_seeds(tmp_path, monkeypatch, capsys, arm):
    lines = table(tmp_path, monkeypatch, capsys, [
        run for run in study() if run["arm"] != arm or run["seed"] != 38])
    assert arm not in lines and f"{arm}: not full yet, 8 of its 9 pairs are there. Run  bash " \
        "data/results/onset.sh" in lines
    if arm != "distill-control":  # no p before Holm's correction is known
        assert lines["distill"][0][4:6] == ["-", "-"]
    assert not list(tmp_path.glob("*.svg"))


def test_a_pair_of_two_machines_is_no_pair(tmp_path, monkeypatch, capsys):
    runs = study()
    for run in runs:
        if run["arm"] == "small-random" and run["seed"] == 30:
            run["machine"] = "another"
    assert "small-static" not in table(tmp_path, monkeypatch, capsys, runs)


@pytest.mark.parametrize("count, test, seeds", [
    (3, "6.2; 0.0005", "30 31 32"), (4, "no test: 4 without", "30 31 32 33")])
def test_an_arm_that_often_does_not_begin_has_no_test(
        tmp_path, monkeypatch, capsys, count, test, seeds):
    runs = study()
    for run in runs:
        if run["arm"] == "high" and run["seed"] < 30 + count:
            run |= begins(None, run["seed"], "high")
    lines = table(tmp_path, monkeypatch, capsys, runs)
    assert lines["high"][0][2].endswith("to 3000)") and lines["high"][0][3].endswith("or more")
    assert lines["high"][0][4] == test and lines["high"][0][6] == seeds
    # What has no test counts as one of Holm's three: then the second smallest p is doubled.
    assert lines["small-static"][0][4] == ("3.0; 0.0171" if count == 3 else "3.0; 0.0341")


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_the_page_says_what_the_script_prints(part, capsys):
    found = print_part(part, read_runs(part)[0])
    page = (ROOT / "data/results/exit.md").read_text()
    if set(part.tested + part.shown) <= found.keys():
        for line in capsys.readouterr().out.splitlines():
            assert line in page
    else:
        assert f"Not full yet: run `CORPUS=FILE bash data/results/{part.name}.sh" in page


def test_single_runs_have_a_table_of_their_own(capsys):
    run = {"arm": "learned-high", "seed": 1, "batch_tokens": 2048, "steps": 2000,
           "unigram_entropy": 7.0, "loss": [[0, 9.0], [1000, 6.7], [2000, 5.7]]}  # the bound: 6.2
    stuck = {**run, "arm": "learned-random", "seed": 0, "loss": [[0, 9.0], [2000, 6.5]]}
    print_single([stuck, run])
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "| learned-high-1 | 3.1 | 5.70 | 4.1 |", "| learned-random-0 | not in 4 | 6.50 | 4.1 |"]


def test_a_part_of_the_gpu_script_ends_and_is_not_run_again(tmp_path):
    def call(*parts):
        return subprocess.run(
            ["bash", ROOT / "data/results/gpu.sh", *parts], capture_output=True, text=True,
            env={**os.environ, "OUT": str(tmp_path), "PYTHON": "echo", "CORPUS": ""})

    assert re.match(r"bench: \d+ s, ended with 0\n", call("bench").stdout)
    text = (tmp_path / "bench.txt").read_text()
    assert text == ("-m tests.bench --device cuda --rounds 1 --compile --only tra --size small "
                    "--vocab-size 30522 --batch-size 256\nended with 0\n")
    assert call("bench").stdout == "" and call("bench", "nonsense").returncode == 2
    assert "learned reads a text" in call("bench", "learned").stderr


@pytest.mark.parametrize("line, kept", [
    ("error: the loss or its gradient is not finite at step 9; the last checkpoint", True),
    ("RuntimeError: CUDA error: an illegal memory access was encountered", False)])
def test_a_run_that_broke_is_not_filed_as_one_that_diverged(tmp_path, line, kept):
    (tmp_path / "data/results").mkdir(parents=True)
    shutil.copy(ROOT / "data/results/exit.sh", tmp_path / "data/results")
    python = tmp_path / "python"  # train.py says `line` and ends with 1; else it says its arguments
    train = f"[ $1 != train.py ] || {{ echo '{line}' >&2; exit 1; }}"
    python.write_text(f"#!/bin/sh\n{train}\necho $*\n")
    python.chmod(0o755)
    done = subprocess.run(["bash", tmp_path / "data/results/exit.sh", "text"], text=True,
                          capture_output=True, env={**os.environ, "CORPUS": "x",
                                                    "PYTHON": str(python)})
    assert ("--keep runs/exit/text-200000-0" in done.stdout) == kept == (done.returncode == 0)
