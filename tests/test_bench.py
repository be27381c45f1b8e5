"""Is what the benchmark says about a step true?   python -m pytest tests/test_bench.py -q"""

from argparse import Namespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data.flags import defaults
from data.machine import Machine
from model import Shape, forward_flops
from tests import bench
from tests.helpers import write_corpus


def small(**changes):
    args = Namespace(**{**defaults(bench.FLAGS), "size": "tiny", "vocab_size": 500, "steps": 2,
                        "batch_size": 4, "seq_len": 32, "rows": 40, "device": "cpu", "threads": 1,
                        **changes})
    return args, Machine(args)


@pytest.mark.parametrize("arm, scored", [
    ("random", 0), ("entropy", 10), ("self, unmasked, pool 0", 30)])
def test_an_arm_learns_by_train_py_and_its_flops_are_those_of_the_model(arm, scored):
    args, machine = small()
    step, tokens, flops = bench.training(args, machine, arm)
    assert torch.isfinite(step()).all() and tokens == 4 * 32
    shape = Shape(500, 2, 128, 32)
    wanted = 3 * forward_flops(shape, 32, 5)  # 15 % of 30 tokens, rounded half up
    assert flops == 4 * (wanted + (forward_flops(shape, 32, scored) if scored else 0))


@pytest.mark.parametrize("arm", ["random", "self, unmasked, pool 0", "random + distillation"])
def test_counted_flops_are_those_that_torch_counts(arm):
    step, _, flops = bench.training(*small(), arm)
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == flops


def test_their_flops_are_those_that_torch_counts():
    pytest.importorskip("transformers")
    step, _, flops = bench.transformers_training(*small(), gathered=False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()  # the fused kernel of CPUs would not be counted
    assert counter.get_total_flops() == flops


def test_flops_of_others_are_ours_where_every_token_is_predicted():
    expected = forward_flops(Shape(8192, 4, 256), 128, 128)
    assert bench.dense_flops(4, 256, 128, 8192, 128) == expected


def test_both_fine_tunings_read_the_same_rows():
    pytest.importorskip("transformers")
    args, machine = small()
    (ours, *mine), (theirs, *same) = (tune(args, machine, "CoLA") for tune in (
        bench.tuning, bench.transformers_tuning))
    assert mine == same
    with FlopCounterMode(display=False) as a, sdpa_kernel(SDPBackend.MATH):
        ours()
    with FlopCounterMode(display=False) as b, sdpa_kernel(SDPBackend.MATH):
        theirs()  # theirs has another matrix in the head, of one vector a row
    assert b.get_total_flops() == pytest.approx(a.get_total_flops(), rel=0.05)


def test_fine_tuning_and_the_peak_are_measured_at_all():
    args, _ = small()
    tuned, peak = bench.measure("glue.py, CoLA", args), bench.measure("peak", args)
    assert tuned["tokens_per_s"] > 1 and tuned["memory_mb"] > 50
    assert 0 < tuned["flops_per_s"] < peak["flops_per_s"]


def test_both_encoders_give_the_tokens_that_are_counted(tmp_path):
    args, machine = small()
    vars(args).update(corpus=str(write_corpus(tmp_path / "text.txt")), cache=str(tmp_path),
                      vocab_size=600)
    encode, tokens, _ = bench.preparation(args, machine, whole=True)
    assert encode() is None
    encode, same, _ = bench.preparation(args, machine, whole=False)
    assert tokens == same
    documents = 120  # of two paragraphs each; ours ends each with a [SEP]
    assert sum(map(len, encode())) == tokens - documents


def test_ratios_are_taken_within_a_round():
    def rounds(speeds, flops):
        return [{"tokens_per_s": speed, "flops_per_s": 10 * speed, "flops_per_token": flops,
                 "memory_mb": 9} for speed in speeds]

    results = {"peak": rounds([100, 200, 40], 0), "train.py, random": rounds([10, 100, 1], 2.0),
               "train.py, entropy": rounds([5, 20, 0.25], 3.0)}
    lines = bench.table(results)
    assert lines[2] == "| train.py, random | 10 | 1.00 | 1.00 | 0.10 | 9 |"
    # 2, 5 and 4 times as long; of the peak 0.05, 0.1 and 0.006
    assert lines[3] == "| train.py, entropy | 5 | 4.00 | 1.50 | 0.05 | 9 |"
    assert bench.table({name: results[name] for name in ("peak", "train.py, entropy")})[2] == (
        "| train.py, entropy | 5 | - | - | 0.05 | 9 |")
