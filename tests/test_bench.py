"""Is what the benchmark says about a step true?   python -m pytest tests/test_bench.py -q"""

import numpy as np

from model import Shape, forward_flops
from tests import bench
from tests import bench_steps as steps


def test_an_arm_is_train_py_and_its_flops_are_those_of_the_model(tmp_path):
    bench.write_text(tmp_path / "text.txt", 0.3, types=400)
    flags = ["--corpus", str(tmp_path / "text.txt"), "--cache", str(tmp_path / "cache"),
             "--vocab-size", "500", "--layers", "2", "--width", "64", "--eval-every", "0",
             "--eval-blocks", "4", "--threads", "1"]
    random, own = (bench.train_arm(tmp_path, [*flags, "--masking", *masking], 1, 15)
                   for masking in (["random"], ["self", "--init-frac", "0"]))
    shape = Shape(500, 2, 64)
    step = 3 * forward_flops(shape, steps.SEQ_LEN, 19)
    assert random["flops_per_step"] == steps.BATCH * step
    assert own["flops_per_step"] == steps.BATCH * (step + forward_flops(shape, steps.SEQ_LEN, 38))
    assert min(random["tokens_per_s"], own["tokens_per_s"]) > 100 and own["memory_mb"] > 50
    assert not list(tmp_path.glob("*/run"))  # what was measured is cleared away


def test_flops_of_the_peer_are_ours_where_every_token_is_predicted():
    for layers, width in bench.SHAPES.values():
        expected = forward_flops(Shape(8192, layers, width), steps.SEQ_LEN, steps.SEQ_LEN)
        assert steps.peer_flops(layers, width, 8192, steps.SEQ_LEN) == expected


def test_row_lengths_are_those_that_are_claimed():
    for task, (mean, deviation) in steps.LENGTHS.items():
        lengths = np.array([n for _, n in steps.rows_like(task, 5000)])
        assert abs(lengths.mean() / mean - 1) < 0.03
        assert abs(lengths.std() / deviation - 1) < 0.1


def test_variants_take_turns_and_ratios_are_taken_within_a_round():
    calls, speeds = [], iter([10, 5, 100, 20, 1, 0.25])

    def variant(name):
        return lambda: calls.append(name) or {"speed": next(speeds)}

    results = bench.take_turns({"a": variant("a"), "b": variant("b")}, 3)
    assert calls == ["a", "b"] * 3
    a = [r["speed"] for r in results["a"]]
    assert bench.median(results["b"], "speed") == 5
    assert bench.median(results["b"], "speed", a) == 0.25  # 0.5, 0.2, 0.25


def test_fine_tuning_and_the_peak_are_measured_at_all():
    assert steps.tune("CoLA", 1, 64, 64)["examples_per_s"] > 1
    assert steps.matrix_peak(64)["flops_per_s"] > 1e6
