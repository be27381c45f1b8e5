"""When a run leaves the plateau, by hand.

    python -m pytest tests/test_exit.py -q
"""

import pytest

from data.results.exit import CONTRASTS, SEEDS, exit_step, holm, print_arms

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
