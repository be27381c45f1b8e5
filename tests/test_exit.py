"""Exits and onsets, by hand.   python -m pytest tests/test_exit.py -q"""

import os
import re
import subprocess

import pytest

from data.results.exit import (
    PARTS, draw, exit_step, flops, holm, onset, pairs, print_part, read_runs,
)
from tests.helpers import ROOT

H = 7.0  # so the bound is 0.9 x 7 - 0.1 = 6.2


@pytest.mark.parametrize("losses, step", [
    ((9.0, 6.0, 6.6, 5.8, 5.0), 62.5),  # it came back once: the last crossing counts
    ((9.0, 6.2, 6.2, 5.8), 25),  # on the bound is not above it
    ((9.0, 6.0, 6.3), None), ((9.0, 6.0, float("nan")), None),
])
def test_the_exit_is_the_last_crossing(losses, step):
    run = {"unigram_entropy": H, "loss": [[25 * i, loss] for i, loss in enumerate(losses)]}
    assert exit_step(run) == (step if step is None else pytest.approx(step))
    assert exit_step({**run, "finished": False}) is None  # it diverged


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.5, "b": 0.9}) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize("gains, level, step", [
    # Two above, one below, then four above: from 100 to 125 it goes from 0.1 to 0.3.
    ((0, 0.05, 0.3, 0.3, 0.1, 0.3, 0.35, 0.4, 0.5, 0.2), 0.25, 118.75),
    ((0, 0.3, 0.3, 0.3), 0.25, None), ((0, 0.25, 0.25, 0.25, 0.25), 0.25, None),
    ((0, 1, 1, 1, float("nan")), 0.25, None),
])
def test_the_onset_is_before_the_first_four_above(gains, level, step):
    found = onset({"context_gain": [[25 * i, gain] for i, gain in enumerate(gains)]}, level)
    assert found == (step if step is None else pytest.approx(step))


def begins(step, seed=0, **more):
    """A run of 3000 steps that begins to use context at `step`; None: it does not. Its gain rises
    from 0 in a straight line, so it is at 0.1 nats at 0.4 times that step, at 0.5 at twice."""
    gain = 1 if step else 0
    gains = [[0, 0], [4 * (step or 100), gain], *([2900 + 25 * i, gain] for i in range(3))]
    return {"seed": seed, "steps": 3000, "flops": 3000, "teacher_flops": 0, "unigram_entropy": H,
            "context_gain": gains, "loss": [[0, 9.0], [3000, 7.0]], "machine": "ours", **more}


def test_flops_up_to_a_step_and_with_the_teacher():
    run = begins(100, flops=9000, teacher_flops=500)  # 3 a step
    assert flops(run, onset, 0) == 300 and flops(run, onset, 1) == 800
    assert flops(begins(None, flops=9000), onset, 0) == 9000  # the budget


def test_a_pair_of_two_machines_is_no_pair():
    arms = {"high": {30: begins(9, machine="another"), 31: begins(9)},
            "random": {seed: begins(9) for seed in (30, 31, 32)}}
    assert list(pairs(arms, "high")) == [31]


WAVER = 0.8, 1.25, 0.8, 1.25, 0.8, 1.25, 0.8, 1.25, 1  # their geometric mean is 1


def test_the_table_of_the_second_part_by_hand(tmp_path, monkeypatch, capsys):
    """high takes 4 times as long as random, distillation half, static 1.25 times."""
    steps = {"high": 400, "distill": 50, "distill-control": 80, "small-static": 250}
    steps = {arm: [step * factor for factor in WAVER] for arm, step in steps.items()}
    steps |= {"random": [100] * 9, "small-random": [200] * 9}
    arms = {arm: dict(zip(range(30, 39), map(begins, of))) for arm, of in steps.items()}

    def table():
        """-> {arm: [its cells in the first table, and in the second]}, and ratios()"""
        found, lines = print_part(PARTS[1], arms), {}
        for line in capsys.readouterr().out.splitlines():
            first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            lines.setdefault(first, []).append(cells)
        return lines, found

    lines, found = table()
    # ln 1.25 is 0.223: deviation 0.223, error 0.0744, interval ln 4 -+ 2.306 x 0.0744, t 18.6.
    assert lines["high"][0] == ["9", "400 (320 to 500)", "4.00 [3.37, 4.75]", "18.6; < 0.0001",
                                "0.004", "-"]
    assert lines["distill"][0][2:5] == ["0.50 [0.42, 0.59]", "-9.3; < 0.0001", "0.004"]
    # Over random masking of its own text. The largest p of three stays as it is.
    assert lines["small-static"][0][2:4] == ["1.25 [1.05, 1.48]", "3.0; 0.0171"]
    assert lines["distill-control"][0][2:5] == ["0.80 [0.67, 0.95]", "-", "-"]
    assert lines["random"][0] == ["9", "100 (100 to 100)", *"----"]
    # FLOPs; 0.1 and 0.5 nats; the exit, which no loss here has.
    assert lines["high"][1] == ["4.00", "4.00", "4.00 [3.37, 4.75]", "4.00 [3.37, 4.75]",
                                "1.00 [1.00, 1.00] or more"]
    monkeypatch.setattr("data.results.exit.HERE", tmp_path)
    draw(PARTS[1], arms, found)
    for picture in ("onset-curves.svg", "onset-ratios.svg"):
        assert "small-static" in (tmp_path / picture).read_text()
    # Four runs that do not begin: no test, which counts as one of Holm's three all the same.
    arms["high"] |= {seed: begins(None) for seed in range(30, 34)}
    lines, _ = table()
    assert lines["high"][0][1].endswith("to 3000)") and lines["high"][0][2].endswith("or more")
    assert lines["high"][0][3] == "no test: 4 without" and lines["high"][0][5] == "30 31 32 33"
    assert lines["small-static"][0][3] == "3.0; 0.0341"  # twice: the second smallest p


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_the_page_says_what_the_script_prints(part, capsys):
    print_part(part, read_runs(part)[0])
    page = (ROOT / "data/results/exit.md").read_text()
    for line in capsys.readouterr().out.splitlines():
        assert line in page


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
