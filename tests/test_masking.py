"""Where to mask and what to put there.   python -m pytest tests/test_masking.py -q"""

from argparse import Namespace

import numpy as np
import pytest
import torch

import masking as M
from data.tokenizer import MASK, N_SPECIAL
from tests.helpers import T, V, rows_of, small_model
from train import make_strategy


def noise_of(n, length=T, step=0):
    return M.draw(7, step, n, length)


def choose(tokens, k, H, rule, pool, noise):
    """Positions (B, k) by a strategy that reads entropies off a table H (B, T); None: it reads
    nothing."""
    reads = None if H is None else lambda model, tokens, places: H.gather(1, places)
    return M.Strategy(None, reads, M.SELECT[rule], pool)(tokens, k, noise)


def pool_of(tokens, c, noise):
    """The candidates (B, c): the ordinary tokens with the largest numbers."""
    return (noise[..., M.POOL] - (tokens < N_SPECIAL).float()).argsort(descending=True)[:, :c]


# ---- random numbers


def test_draws_are_a_function_of_seed_step_and_row():
    a = M.draw(1, 5, 8, 10)
    assert torch.equal(a, M.draw(1, 5, 8, 10))
    assert torch.equal(a[:3], M.draw(1, 5, 3, 10))  # a row does not know how many there are
    for other in ((2, 5), (1, 6)):
        assert not torch.equal(a, M.draw(*other, 8, 10))
    assert a.shape == (8, 10, 5) and a.min() >= 0 and a.max() < 1
    assert abs(np.corrcoef(M.draw(0, 0, 100, 100).view(-1, 5).T.numpy()) - np.eye(5)).max() < 0.05


# ---- entropy


def test_entropy_equals_float64():
    logits = torch.randn(50, V, generator=torch.Generator().manual_seed(0)) * 6
    p = logits.double().softmax(-1).numpy()
    H = -(p * np.log(p)).sum(-1)
    assert np.allclose(M.entropy(logits).numpy(), H, atol=1e-5)


def test_entropies_in_pieces_are_those_of_all_rows_at_once():
    logits = torch.randn(700, 1000, generator=torch.Generator().manual_seed(0)) * 6
    assert (1 << 18) // 1000 < 700 / 2  # three pieces, of which the last is shorter
    assert torch.equal(M.entropies(logits), M.entropy(logits))


def test_dropout_s_stream_is_a_function_of_seed_step_and_row():
    def drawn(*where):
        M.seed_dropout(*where)
        return torch.rand(9)

    assert torch.equal(drawn(1, 2, 3), drawn(1, 2, 3))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(drawn(1, 2, 3), drawn(*other))


def test_entropy_is_float32_under_autocast():
    logits = torch.randn(50, 8192, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        H = M.entropy(logits)
    assert H.dtype == torch.float32 and torch.equal(H, M.entropy(logits))


def test_entropy_of_uniform_and_of_certain():
    assert M.entropy(torch.full((1, V), 3.0)).item() == pytest.approx(np.log(V), abs=1e-5)
    certain = torch.full((1, V), -1e4)
    certain[0, 7] = 1e4
    assert M.entropy(certain).item() == 0
    nearly = torch.full((4, V), -20.0)
    nearly[:, 3] = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert (M.entropy(nearly) >= 0).all()
    assert M.entropy(torch.randn(2, 3, V).bfloat16()).dtype == torch.float32


def test_uncertainty_equals_dense_and_leaves_no_trace():
    model, tokens = small_model(vocab_size=V).train(), rows_of(4)
    where = torch.arange(1, 8).expand(4, 7)
    model(tokens).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    H = M.uncertainty(model, tokens, where)
    assert model.training and not H.requires_grad and not H.is_inference()
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    for p, g in zip((p for p in model.parameters() if p.grad is not None), gradients):
        assert torch.equal(p.grad, g)
    with torch.no_grad():
        p = model.eval()(tokens).gather(1, where[..., None].expand(-1, -1, V)).double().softmax(-1)
    assert torch.allclose(H.double(), -(p * p.log()).sum(-1), atol=1e-5)
    big = rows_of(900)  # 900 x 32 logits of 300 are more than one part of 2^23: parts fit together
    everywhere = torch.arange(1, T - 1).expand(900, -1)
    assert torch.allclose(M.uncertainty(model, big, everywhere)[890:],
                          M.uncertainty(model, big[890:], everywhere[890:]), atol=1e-5)


# ---- running means of vocabulary items


class OneProcess:
    @staticmethod
    def sum(x):
        return x


def of_flags(score_input, select):
    """-> (Strategy, the VocabularyMean that it reads) of self-masking with these flags."""
    args = Namespace(masking="self", score_input=score_input, select=select, pool=2)
    strategy = make_strategy(args, None, small_model(), None)
    return strategy, strategy.reads


@pytest.mark.parametrize("score_input, unseen, prior", [
    ("vocabulary", np.log(V), 0),  # the entropy of a prediction, with nothing added
    ("error", 0.5, 1)])  # is it wrong? With one value more, of a half
def test_what_an_item_has_is_a_mean_over_training_s_own_predictions(score_input, unseen, prior):
    """Against plain Python: 200 steps of predictions of three items, one seen in each of them."""
    strategy, means = of_flags(score_input, "sample")
    assert strategy == M.Strategy(None, means, M.sample, 2)
    rng, mean, seen = np.random.default_rng(0), {7: 0.0, 8: 0.0, 9: 0.0}, {7: 0, 8: 0, 9: 0}
    for step in range(200):
        items = [9] * 2 + [8] * (step % 3 == 0) + [7] * (step == 5)
        right = rng.random(len(items)) < 0.4
        shown = [MASK if rng.random() < 0.8 else 30 for _ in items]
        logits = torch.zeros(len(items), V)
        for row, (item, is_right) in enumerate(zip(items, right)):
            logits[row, item if is_right else 20] = 1 + step / 20  # and it becomes more certain
        p = logits.double().softmax(-1)
        numbers = -(p * p.log()).sum(-1) if score_input == "vocabulary" else 1.0 - right
        means.see(torch.tensor(items), torch.tensor(shown), logits)
        means.learn(OneProcess)
        for item in set(items):
            values = [float(number) for i, number, x in zip(items, numbers, shown)
                      if i == item and x == MASK]
            if values:
                seen[item] += len(values)
                rate = min(1, len(values) / min(seen[item], 64))
                mean[item] += rate * (np.mean(values) - mean[item])
    assert seen[9] > 200 and 30 < seen[8] < 64 and seen[7] == 1
    score = means(None, torch.tensor([[7, 8, 9, 10]]), torch.tensor([[0, 1, 2, 3]]))[0]
    weights = [(min(seen[i], 64) * mean[i] + prior * unseen) / (min(seen[i], 64) + prior)
               for i in (7, 8, 9)]
    assert score.tolist() == pytest.approx([*weights, unseen], abs=1e-5)


def test_context_is_what_a_score_has_beyond_the_mean_of_its_item():
    """Against plain Python, of four batches; what is not training changes nothing."""
    strategy, means = of_flags("context", "high")
    model, tokens = strategy.model.train(), rows_of(40) % 20 + N_SPECIAL
    assert strategy == M.Strategy(model, means, M.high, 2)
    mean, seen = dict.fromkeys(range(V), 0.0), dict.fromkeys(range(V), 0)
    for step, batch in enumerate(tokens.split(10)):
        places = pool_of(batch, 8, noise_of(10, step=step)).sort().values
        H, items = M.masked(model, batch, places), batch.gather(1, places)
        expected = pytest.approx([h - mean[i] if seen[i] else 0.0 for h, i in zip(
            H.flatten().tolist(), items.flatten().tolist())], abs=1e-5)
        assert means(model.eval(), batch, places).flatten().tolist() == expected
        assert means(model.train(), batch, places).flatten().tolist() == expected
        logits = torch.zeros(4, V)  # training's own predictions are not what is taken off
        means.see(torch.full((4,), 9), torch.full((4,), MASK), logits)
        means.learn(OneProcess)
        for item in set(items.flatten().tolist()):
            values = H[items == item].tolist()
            seen[item] += len(values)
            rate = min(1, len(values) / min(seen[item], 64))
            mean[item] += rate * (np.mean(values) - mean[item])
        model.head_bias.data += torch.randn(V)
    before = means.state().clone()
    means.learn(OneProcess)  # of a step that masked at random
    assert torch.equal(means.state(), before) and (before[1] > 0).sum() == 20


# ---- scores -> positions


def test_rules_on_a_hand_made_table():
    """One row, ten maskable tokens, k = 4, every token a candidate."""
    tokens = rows_of(1, 12)
    H = torch.tensor([[9.0, 0.1, 5.0, 4.0, 0.3, 2.0, 7.0, 3.0, 0.2, 6.0, 1.0, 9.0]])
    noise = noise_of(1, 12)

    def chosen(rule):
        return choose(tokens, 4, H, rule, 0, noise)[0].tolist()

    assert chosen("high") == [2, 3, 6, 9]  # 5, 4, 7, 6; the 9s stand on [CLS] and [SEP]
    assert chosen("low") == [1, 4, 8, 10]
    assert chosen("mid") == [3, 5, 7, 10]  # the median of the ten is 2.5: 2, 3, then 1 and 4
    mix = chosen("mix")
    assert {6, 9} <= set(mix) and len(set(mix)) == 4 and set(mix) <= set(range(1, 11))


def test_static_keeps_the_places_of_a_block_and_not_what_is_shown():
    blocks, other = np.array([7, 3, 5]), np.array([5, 2, 7])
    a = M.keep_places(M.draw(1, 0, 3, T), M.draw_blocks(1, blocks, T))
    b = M.keep_places(M.draw(1, 9, 3, T), M.draw_blocks(1, other, T))
    places, shown = slice(0, M.WHICH), slice(M.WHICH, None)
    assert torch.equal(a[0, :, places], b[2, :, places])  # block 7
    assert torch.equal(a[2, :, places], b[0, :, places])  # block 5
    assert not torch.equal(a[1, :, places], b[1, :, places])
    assert torch.equal(a[..., shown], M.draw(1, 0, 3, T)[..., shown])
    assert not torch.equal(a, M.keep_places(M.draw(1, 0, 3, T), M.draw_blocks(2, blocks, T)))


def test_sample_draws_in_proportion_to_entropy():
    """k = 1: the share of every token is H / sum H."""
    n = 40_000
    H = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 0.0]).expand(n, 6)
    tokens = rows_of(n, 6)
    positions = choose(tokens, 1, H, "sample", 0, noise_of(n, 6))
    shares = torch.bincount(positions.flatten(), minlength=6) / n
    assert torch.allclose(shares, torch.tensor([0, 0.1, 0.2, 0.3, 0.4, 0]), atol=0.01)


def test_mix_takes_its_random_half_from_outside_the_pool_too():
    """k = 5: the two highest of a pool of ten, and three of the eighteen other tokens."""
    n, k = 20_000, 5
    tokens, noise = rows_of(n, 22), noise_of(n, 22)
    H = torch.rand(n, 22, generator=torch.Generator().manual_seed(0))
    pool = pool_of(tokens, 2 * k, noise)
    best = pool.gather(1, H.gather(1, pool).topk(2).indices)
    is_best, in_pool = (torch.zeros(n, 22).scatter(1, x, 1.0) for x in (best, pool))
    positions = choose(tokens, k, H, "mix", 2, noise)
    assert (is_best.gather(1, positions).sum(1) == 2).all()
    others = in_pool.gather(1, positions).sum(1) - 2
    assert others.mean().item() == pytest.approx(3 * 8 / 18, abs=0.02)


def test_ties_are_broken_at_random_not_by_position():
    n = 20_000
    tokens = rows_of(n, 22)
    for H in (None, torch.ones(n, 22)):
        positions = choose(tokens, 5, H, "high", 0, noise_of(n, 22))
        shares = torch.bincount(positions.flatten(), minlength=22) / n
        assert torch.allclose(shares[1:21], torch.full((20,), 0.25), atol=0.015)
        neighbours = (positions.diff(dim=1) == 1).float().sum(1).mean().item()
        assert neighbours == pytest.approx(4 * 5 / 20, abs=0.04)  # k (k - 1) / n for random sets


@pytest.mark.parametrize("rule", ["random", "high", "low", "mid", "sample", "mix"])
@pytest.mark.parametrize("pool", [2, 0])
def test_every_strategy_masks_exactly_k_and_never_a_special_token(rule, pool):
    tokens = rows_of(100, separators=2)
    before = tokens.clone()
    H = None if rule == "random" else torch.rand(100, T)
    rule = "high" if rule == "random" else rule
    positions = choose(tokens, 8, H, rule, pool, noise_of(100))
    assert positions.shape == (100, 8)
    assert (positions.diff(dim=1) > 0).all()  # ascending, so all different
    assert (tokens.gather(1, positions) >= N_SPECIAL).all()
    assert torch.equal(tokens, before)
    again = choose(tokens, 8, H, rule, pool, noise_of(100))
    assert torch.equal(positions, again)
    other = choose(tokens, 8, H, rule, pool, noise_of(100, step=1))
    assert torch.equal(positions, other) == (
        H is not None and pool == 0 and rule in ("high", "low", "mid"))


def test_mid_uses_the_row_median_of_real_tokens():
    """float64 numpy on random tables, with [SEP]s inside the row."""
    tokens = rows_of(50, separators=3)
    H = torch.rand(50, T, generator=torch.Generator().manual_seed(1))
    positions = choose(tokens, 6, H, "mid", 0, noise_of(50))
    for row in range(50):
        real = np.flatnonzero(tokens[row].numpy() >= N_SPECIAL)
        h = H[row, real].double().numpy()
        nearest = real[np.argsort(np.abs(h - np.median(h)))[:6]]
        assert sorted(nearest) == positions[row].tolist()


def test_self_masking_agrees_with_a_plain_loop():
    """Scores of a real model, row by row and token by token, in float64."""
    model, tokens = small_model().eval(), rows_of(5, separators=1)
    noise = noise_of(5)
    positions = M.Strategy(model, M.masked, M.high, 2)(tokens, 4, noise)
    model.double()
    for row in range(5):
        real = [t for t in range(T) if tokens[row, t] >= N_SPECIAL]
        pool = sorted(real, key=lambda t: -noise[row, t, M.POOL])[:8]
        masked = tokens[row].clone()
        masked[pool] = MASK
        with torch.no_grad():
            p = model(masked[None])[0].softmax(-1)
        H = -(p * p.log()).sum(-1)
        assert sorted(sorted(pool, key=lambda t: -H[t])[:4]) == positions[row].tolist()


# ---- what to put there


def test_corruption_is_80_10_10_from_one_draw():
    n, k = 3000, 34
    tokens = rows_of(n, 100)
    positions = M.Strategy()(tokens, k, noise_of(n, 100))
    before = tokens.clone()
    new = M.corrupt(tokens, positions, noise_of(n, 100), V)
    assert torch.equal(tokens, before)
    at, was = new.gather(1, positions), tokens.gather(1, positions)
    masks, same = (at == MASK).float().mean().item(), (at == was).float().mean().item()
    assert masks == pytest.approx(0.8, abs=0.005)
    assert same == pytest.approx(0.1 + 0.1 / (V - N_SPECIAL), abs=0.004)
    other = at[(at != MASK) & (at != was)]
    assert other.min() == N_SPECIAL and other.max() == V - 1  # never special, all of the others
    untouched = torch.ones_like(tokens, dtype=torch.bool).scatter(1, positions, False)
    assert torch.equal(new[untouched], tokens[untouched])
