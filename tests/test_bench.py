"""Is what the benchmark says about a step true?   python -m pytest tests/test_bench.py -q"""

from argparse import Namespace

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data.flags import defaults
from data.machine import Machine
from model import Shape, forward_flops
from tests import bench

ARGS = Namespace(**{**defaults(bench.FLAGS), "size": "tiny", "vocab_size": 500, "steps": 2,
                    "batch_size": 4, "seq_len": 32, "rows": 40, "device": "cpu", "threads": 1})
OURS = [name for name in bench.CASES if name.startswith(("train.py", "glue.py"))]
THEIRS = [name for name in bench.CASES if name.startswith("transformers")]


def flops_of(step):
    """As torch counts them, without the fused attention of CPUs, which it does not count."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", OURS)
def test_our_cases_are_measured(name):
    machine = Machine(ARGS)
    speed, flops = bench.measure(name, ARGS, machine)
    _, peak = bench.measure("peak", ARGS, machine)
    assert speed > 1 and 0 < flops < peak


def test_flops_of_others_are_ours_where_every_token_is_predicted():
    expected = forward_flops(Shape(8192, 4, 256), 128, 128)
    assert bench.dense_flops(4, 256, 128, 8192, 128) == expected


@pytest.mark.parametrize("name", THEIRS)
def test_their_cases_take_the_flops_that_are_counted(name):
    pytest.importorskip("transformers")
    function, which, _ = bench.CASES[name]
    step, tokens, flops = function(ARGS, Machine(ARGS), which)
    assert tokens > 100
    if "as it is" in name:  # else the coins decide how many tokens are predicted
        assert flops_of(step) == flops
    elif "gathered" in name:
        assert flops_of(step) == pytest.approx(flops, rel=0.1)
    else:  # they have another matrix in the head, of one vector a row
        ours, *same = bench.tuning(ARGS, Machine(ARGS), which)
        assert (tokens, flops) == tuple(same)
        assert flops_of(step) == pytest.approx(flops_of(ours), rel=0.05)


def test_ratios_are_taken_within_a_round():
    def rounds(*speeds):
        return [(speed, 10 * speed) for speed in speeds]

    results = {"peak": rounds(100, 200, 40), "train.py, random": rounds(10, 100, 1),
               "train.py, self, masked": rounds(5, 20, 0.25)}
    # 2, 5 and 4 times as long; of the peak 0.05, 0.1 and 0.006
    assert bench.table(results)[2:] == ["| train.py, random | 10 | 1.00 | 0.10 |",
                                        "| train.py, self, masked | 5 | 4.00 | 0.05 |"]
    del results["train.py, random"]
    assert bench.table(results)[2:] == ["| train.py, self, masked | 5 | - | 0.05 |"]


def test_cases_take_turns(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(bench, "measure", lambda name, *_: asked.append(name) or (2.0, 3.0))
    monkeypatch.setattr("sys.argv", ["bench", *"--only train --rounds 2 --compile --device cpu "
                        "--size small --vocab-size 30522 --batch-size 256 --threads 1".split()])
    bench.main()
    training = [name for name in OURS if name.startswith("train.py")]
    assert asked == 2 * ["peak", *training]
    lines = capsys.readouterr().out.splitlines()
    assert "small, 30522 pieces, 256 rows of 128, compiled, peak 0 GFLOP/s, 2 rounds" in lines[0]
    assert lines[-len(training):] == [f"| {name} | 2 | 1.00 | 1.00 |" for name in training]
