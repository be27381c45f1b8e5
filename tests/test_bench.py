"""Is what the benchmark says about a step true?   python -m pytest tests/test_bench.py -q"""

from argparse import Namespace

import pytest

from data.flags import defaults
from data.machine import Machine
from tests import bench

ARGS = Namespace(**{**defaults(bench.FLAGS), "size": "tiny", "vocab_size": 500, "steps": 2,
                    "batch_size": 4, "seq_len": 32, "rows": 40, "device": "cpu", "threads": 1})
OURS = [name for name in bench.CASES if name.startswith(("train.py", "glue.py"))]


@pytest.mark.parametrize("name", OURS)
def test_our_cases_are_measured(name):
    machine = Machine(ARGS)
    speed, flops = bench.measure(name, ARGS, machine)
    _, peak = bench.measure("peak", ARGS, machine)
    assert speed > 1 and 0 < flops < peak


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
