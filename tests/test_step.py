"""The pieces of a step, by hand and in float64.   python -m pytest tests/test_step.py -q"""

from argparse import Namespace
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import masking as M
import train
from data import corpus as corpora
from data.runs import check_flags
from model import Bert, Shape, lr_at


def test_learning_rate():
    rates = [lr_at(s, 100, 1.0, 0.1) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(1 / 90) and rates == sorted(rates[:10]) + sorted(
        rates[10:], reverse=True)
    assert lr_at(0, 10, 1.0, 0.0) == 1.0
    assert all(0 < lr_at(s, 5, 1.0, 0.95) <= 1 for s in range(5))
    assert [lr_at(s, 10, 1.0, 0.2, 0.3) for s in range(10)] == pytest.approx(
        [1 / 2, 1, 1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3])
    assert lr_at(9, 10, 1.0, 0.2, 0.0) == 1.0


def test_the_mask_rate_falls_linearly():
    a = Namespace(**{**train.DEFAULTS, "masking": "random", "init_frac": 0.0, "steps": 100,
                     "mask_rate": 0.3, "mask_rate_end": 0.1})
    # of 126 tokens: 30 %, 20 %, 10.2 %; the step after the last is only evaluated
    assert [train.plan(a, step)[0] for step in (0, 50, 99, 100)] == [38, 25, 13, 13]


def test_presets_name_flags_that_exist_with_values_of_their_types():
    for name, preset in train.PRESETS.items():
        flags = {**train.DEFAULTS, **preset}
        assert set(flags) == set(train.DEFAULTS), name
        assert all(type(flags[n]) is type(train.DEFAULTS[n]) for n in flags), name
        check_flags(flags, set())


def test_distillation_loss_against_float64():
    a, b = torch.randn(7, 50), torch.randn(7, 50)
    assert train.distillation_loss(a, a, 2.0).item() == pytest.approx(0, abs=1e-6)
    for tau in (1.0, 2.0, 5.0):
        s, t = ((x.double() / tau).softmax(-1) for x in (a, b))
        kl = (t * (t / s).log()).sum(-1).mean().item()
        assert train.distillation_loss(a, b, tau).item() == pytest.approx(tau**2 * kl, rel=1e-4)


def test_evaluation_is_the_same_every_time_and_weighs_every_token():
    torch.manual_seed(0)
    model = Bert(Shape(600, 2, 64, 34))
    model.head_bias.data[5] = 10.0  # so that it says 5 everywhere, which a quarter of tokens are
    blocks = np.random.default_rng(0).integers(5, 9, (150, 32)).astype(np.uint16)
    tokens = corpora.with_ends(blocks)
    first = M.evaluate(model, tokens, nullcontext)
    torch.manual_seed(99)
    assert first == M.evaluate(model.train(), tokens, nullcontext)
    T, k = 34, 5
    noise = {M.SELECT: M.draw(M.EVAL_SEED, 0, M.SELECT, 150, T)}
    positions = M.choose(tokens, k, None, None, 0, noise)
    u = M.draw(M.EVAL_SEED, 0, M.REPLACE, 150, 2 * k).view(-1, k, 2)
    with torch.no_grad():
        logits = model.eval()(M.replace(tokens, positions, u, 600), positions).flatten(0, 1)
    labels = tokens.gather(1, positions).flatten()
    assert first[0] == pytest.approx(F.cross_entropy(logits.double(), labels).item(), abs=1e-5)
    assert first[1] > 0.15
    assert first[1] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())


def test_flops_of_a_step_by_hand():
    shape = Shape(600, 2, 64, 34)
    flags = {**train.DEFAULTS, "seq_len": 34, "batch_size": 8, "steps": 100}

    def flops(step, **changes):
        a = Namespace(**{**flags, "init_frac": 0.5, **changes})
        return train.step_flops(a, shape, shape, shape, step) / 8

    # d = 64, T = 34, V = 600; k = 5 trained, 10 scored.
    def forward(k):
        return 34 * (24 * 64**2 + 4 * 34 * 64) + 34 * 4 * 64**2 + k * (20 * 64**2 + 4 * 34 * 64) \
            + k * (2 * 64**2 + 2 * 64 * 600)

    check_flags(flags, set())
    assert flops(0) == 3 * forward(5)
    assert flops(50) == 3 * forward(5) + forward(10)
    assert flops(50, pool=0, score_input="clear") == 3 * forward(5) + forward(32)
    assert flops(50, score_input="type") == 3 * forward(5)
    assert flops(0, distill="complete") == 4 * forward(5)
    assert flops(50, distill="after-init") == 4 * forward(5) + forward(10)
