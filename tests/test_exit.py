"""When a run leaves the plateau, by hand.

    python -m pytest tests/test_exit.py -q
"""

import os
import shutil
import subprocess

import pytest

from data.results.exit import CONTRASTS, SEEDS, exit_step, holm, print_arms, print_learned
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


def test_no_contrast_is_shown_before_its_last_seed(capsys):
    left, late = run(9.0, 6.0, 5.0, 5.0), run(9.0, 9.0, 6.0, 5.0)
    arms = {"random": dict.fromkeys(SEEDS, left),
            **{arm: dict.fromkeys(SEEDS[:-1], late) for arm in CONTRASTS}}
    assert not print_arms(arms)
    assert "high: 8 of its 9 seeds" in capsys.readouterr().out
    for arm in CONTRASTS:
        arms[arm][SEEDS[-1]] = run(9.0, 9.0, 9.0, 5.0)
    ratios = print_arms(arms)
    assert set(ratios) == set(CONTRASTS) and len(ratios["high"]["each"]) == 9
    assert "| high | 9 |" in capsys.readouterr().out


def test_learned_positions_have_a_table_of_their_own(capsys):
    run = {"arm": "learned-high", "seed": 1, "batch_tokens": 2048, "steps": 2000,
           "unigram_entropy": 7.0, "loss": [[0, 9.0], [1000, 6.7], [2000, 5.7]]}  # the bound: 6.2
    stuck = {**run, "arm": "learned-random", "seed": 0, "loss": [[0, 9.0], [2000, 6.5]]}
    print_learned([stuck, run])
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "| high | 1 | 3.1 | 5.70 | 4.1 |", "| random | 0 | not left in 4 | 6.50 | 4.1 |"]


def test_a_part_of_the_gpu_script_ends_and_is_not_run_again(tmp_path):
    def call(*parts):
        return subprocess.run(
            ["bash", ROOT / "data/results/gpu.sh", *parts], capture_output=True, text=True,
            env={**os.environ, "OUT": str(tmp_path), "PYTHON": "echo"})

    assert "bench: 0 s, ended with 0" in call("bench").stdout
    text = (tmp_path / "bench.txt").read_text()
    assert text == ("-m tests.bench --device cuda --rounds 1 --compile --only tra --size small "
                    "--vocab-size 30522 --batch-size 256\nended with 0\n")
    assert call("bench").stdout == "" and call("bench", "nonsense").returncode == 2
    assert "race reads a text" in call("bench", "race").stderr


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
