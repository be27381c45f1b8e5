"""The model against independent references.   python -m pytest tests/test_model.py -q"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data.files import UserError
from model import SIZES, Bert, Shape, copy_weights, forward_flops

V = 300


def make(seed=0, **changes):
    torch.manual_seed(seed)
    return Bert(Shape(**{"vocab_size": V, "layers": 2, "width": 128, "seq_len": 32, **changes}))


def tokens_of(rows, length, seed=0):
    return torch.randint(5, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def naive_forward(model, tokens, attend, types):
    """BERT written again in float64, one head and one position pair at a time."""
    shape = model.shape
    w = {n: p.double() for n, p in model.state_dict().items()}

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    B, T = tokens.shape
    x = w["token_embedding.weight"][tokens] + w["type_embedding.weight"][types]
    if shape.positions == "learned":
        x = x + w["position_embedding.weight"][:T]
    x = norm(x, "norm")
    for b in range(shape.layers):
        name = f"blocks.{b}."
        q, k, v = linear(x, name + "attention.qkv").chunk(3, -1)
        heads = []
        for h in range(shape.heads):
            part = slice(64 * h, 64 * h + 64)
            qh, kh, vh = q[..., part], k[..., part], v[..., part]
            logits = torch.zeros(B, T, T, dtype=torch.double)
            if shape.positions == "rotary":
                for i in range(32):  # the pair (i, i + 32) as a complex number, turned by distance
                    theta = shape.rotary_base ** (-2 * i / 64)
                    qc = torch.complex(qh[..., i], qh[..., i + 32])
                    kc = torch.complex(kh[..., i], kh[..., i + 32])
                    t = torch.arange(T, dtype=torch.double)
                    turn = torch.polar(torch.ones(T, T, dtype=torch.double),
                                       theta * (t[:, None] - t[None, :]))
                    logits += (qc[:, :, None] * kc[:, None, :].conj() * turn).real
            else:
                logits = qh @ kh.transpose(1, 2)
            logits = logits / 8  # sqrt(64)
            logits = logits.masked_fill(~attend[:, None, :], -torch.inf)
            heads.append(logits.softmax(-1) @ vh)
        x = norm(x + linear(torch.cat(heads, -1), name + "attention.out"), name + "norm1")
        x = norm(x + linear(gelu(linear(x, name + "up")), name + "down"), name + "norm2")
    x = norm(gelu(linear(x, "head_dense")), "head_norm")
    return x @ w["token_embedding.weight"].T + w["head_bias"]


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_forward_equals_a_naive_float64_bert(positions):
    model = make(positions=positions, layers=3).eval()
    tokens = tokens_of(3, 20)
    attend = torch.ones(3, 20, dtype=torch.bool)
    attend[1, 12:] = False
    none, some = torch.zeros(3, 20, dtype=torch.long), torch.arange(60).view(3, 20) % 2
    with torch.no_grad():
        for types in (none, some):
            expected = naive_forward(model, tokens, attend, types)
            actual = model(tokens, None, types, attend)
            assert torch.allclose(actual.double(), expected, atol=1e-5)
        assert torch.equal(model(tokens), model(tokens, None, none))


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("layers", [1, 3])
def test_only_the_masked_positions_equals_dense(positions, layers):
    """The last block and the head at k positions: the same logits and the same gradients."""
    model = make(positions=positions, layers=layers, dropout=0.0)
    tokens = tokens_of(4, 32)
    where = torch.stack([torch.randperm(32)[:7].sort().values for _ in range(4)])
    target = tokens.gather(1, where).flatten()
    dense = model(tokens).gather(1, where[..., None].expand(-1, -1, V))
    F.cross_entropy(dense.flatten(0, 1), target).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    sparse = model(tokens, where)
    F.cross_entropy(sparse.flatten(0, 1), target).backward()
    assert sparse.shape == (4, 7, V)
    assert torch.allclose(sparse, dense, atol=1e-5)
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(p.grad, gradients[name], atol=1e-5), name


def test_block_equals_torch_encoder_layer():
    model = make(positions="learned", dropout=0.0)
    block = model.blocks[0]
    layer = nn.TransformerEncoderLayer(128, 2, 512, dropout=0.0, activation=F.gelu,
                                       batch_first=True, norm_first=False)
    layer.load_state_dict({
        "self_attn.in_proj_weight": block.attention.qkv.weight,
        "self_attn.in_proj_bias": block.attention.qkv.bias,
        "self_attn.out_proj.weight": block.attention.out.weight,
        "self_attn.out_proj.bias": block.attention.out.bias,
        "linear1.weight": block.up.weight, "linear1.bias": block.up.bias,
        "linear2.weight": block.down.weight, "linear2.bias": block.down.bias,
        "norm1.weight": block.norm1.weight, "norm1.bias": block.norm1.bias,
        "norm2.weight": block.norm2.weight, "norm2.bias": block.norm2.bias,
    })
    x = torch.randn(3, 20, 128)
    attend = torch.ones(3, 20, dtype=torch.bool)
    attend[0, 15:] = False
    expected = layer(x, src_key_padding_mask=~attend)  # torch: True is "ignore"
    actual = block(x, None, None, attend[:, None, None, :])
    assert torch.allclose(actual[attend], expected[attend], atol=1e-5)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_padding_changes_nothing(positions):
    model = make(positions=positions).eval()
    tokens = tokens_of(2, 20)
    attend = torch.ones(2, 20, dtype=torch.bool)
    attend[:, 14:] = False
    other = tokens.clone()
    other[:, 14:] = 77
    with torch.no_grad():
        padded = model(tokens, attend=attend)[:, :14]
        assert torch.equal(padded, model(other, attend=attend)[:, :14])
        assert torch.allclose(padded, model(tokens[:, :14]), atol=1e-5)


def test_head_is_tied_and_names_are_unique():
    model, tokens = make().eval(), torch.arange(10, 18)[None]
    with torch.no_grad():
        before = model(tokens)
        model.token_embedding.weight[9] += 1.0  # no input, but an output
        after = model(tokens)
    assert (before != after).any(0).any(0).nonzero().tolist() == [[9]]
    assert sum("token_embedding" in n for n in model.state_dict()) == 1
    assert not any("decoder" in n for n in model.state_dict())


def test_dropout_is_off_in_eval():
    model = make(dropout=0.5)
    tokens = tokens_of(2, 16)
    with torch.no_grad():
        assert not torch.equal(model(tokens), model(tokens))
        model.eval()
        assert torch.equal(model(tokens), model(tokens))


def test_rotary_logits_depend_on_distance_alone_and_start_local():
    model = make(local_start=1.0)
    for block in model.blocks:
        q, k, v = block.attention.qkv.bias.view(3, 2, 64)
        assert (q == 1).all() and (k == 1).all() and (v == 0).all()
    from model import rotate
    q, k = (rotate(x[0].expand(1, 1, 32, 64), model.cos[:32], model.sin[:32])[0, 0] for x in (q, k))
    logits = q @ k.T / 8
    for distance in range(5):
        diagonal = logits.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4)
    # By hand: 64 ones, every pair contributes 2 cos(theta * distance), over sqrt(64).
    for distance in (0, 1, 3):
        by_hand = sum(2 * math.cos(100 ** (-i / 32) * distance) for i in range(32)) / 8
        assert logits[0, distance].item() == pytest.approx(by_hand, abs=1e-4)
    assert logits[0, 0] > logits[0, 1] > logits[0, 2] > logits[0, 4]


def test_the_initial_weights_have_the_deviation_that_was_asked_for():
    for std in (0.02, 0.08):
        model = make(init_std=std)
        for name, p in model.named_parameters():
            if p.dim() == 2 and p.numel() > 10_000:
                # a normal distribution cut at two deviations keeps 0.8796 of its deviation
                assert p.std().item() == pytest.approx(0.8796 * std, rel=0.03), name
                assert p.abs().max() <= 2 * std


def test_published_sizes():
    """Turc et al. give 4.4, 11.3, 29.1, 41.7 and 110.1 million parameters (30522 pieces, 512
    positions); wide is by hand. These counts have the pooler (d^2 + d) and lack the head."""
    for name, millions in zip(SIZES, (4.4, 9.6, 11.2, 28.8, 41.4, 109.5)):
        layers, d = SIZES[name]
        with torch.device("meta"):
            model = Bert(Shape(30522, layers, d, 512, "learned"))
        head = sum(p.numel() for n, p in model.named_parameters() if n.startswith("head_"))
        count = sum(p.numel() for p in model.parameters()) - head + d * d + d
        assert count / 1e6 == pytest.approx(millions, rel=0.01), name


@pytest.mark.parametrize("layers, width, k", [(1, 128, 4), (2, 128, 5), (3, 192, 9)])
def test_flops_equal_torchs_own_counter(layers, width, k):
    from torch.utils.flop_counter import FlopCounterMode
    model = make(layers=layers, width=width, dropout=0.0)
    tokens = tokens_of(3, 32)
    where = torch.arange(k).expand(3, k)
    attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, attention, torch.no_grad():
        model(tokens, where)
    assert counter.get_total_flops() == 3 * forward_flops(model.shape, 32, k)


def test_dropout_acts_once_on_the_embeddings_and_three_times_in_a_block(monkeypatch):
    seen, forward = [], nn.Dropout.forward
    monkeypatch.setattr(nn.Dropout, "forward",
                        lambda self, x: seen.append(x.shape) or forward(self, x))
    make(layers=3, dropout=0.3).train()(tokens_of(2, 20))
    hidden, attention = (2, 20, 128), (2, 2, 20, 20)
    assert seen == [hidden, *[attention, hidden, hidden] * 3]


def test_copy_weights_takes_every_second_block():
    teacher, student = make(1, layers=4), make(2, layers=2)
    copy_weights(student, teacher)
    for i in range(2):
        assert torch.equal(student.blocks[i].up.weight, teacher.blocks[2 * i].up.weight)
    assert torch.equal(student.token_embedding.weight, teacher.token_embedding.weight)
    with pytest.raises(UserError, match="same vocabulary, width"):
        copy_weights(student, make(1, width=192))
    with pytest.raises(UserError, match="twice as many"):
        copy_weights(make(layers=4), make(layers=5))
    with pytest.raises(UserError, match="rotary base"):
        copy_weights(make(), make(rotary_base=10.0))


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(UserError, match="multiple of 64"):
        make(width=100)


class OnGpu(torch.Tensor):
    """A tensor of the CPU that takes the way of a GPU."""

    is_cuda = True


def test_attention_written_out_is_sdpa(monkeypatch):
    """CPUs take the one, GPUs the other: they must be one function, without dropout in eval."""
    torch.manual_seed(0)
    model = Bert(Shape(99, 2, 128, 32, init_std=0.3, dropout=0.2)).double().eval()
    attention, x = model.blocks[0].attention, torch.randn(3, 32, 128).double()
    attend = (torch.arange(32) < torch.tensor([[32], [20], [9]]))[:, None, None, :]
    positions = torch.tensor([[1, 5, 8]] * 3)
    rotary, sdpa, rates = (model.cos, model.sin), F.scaled_dot_product_attention, []

    def watched(*args, dropout_p, **kwargs):
        rates.append(dropout_p)
        return sdpa(*args, dropout_p=dropout_p, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    for where, query in ((None, x), (positions, x[:, [1, 5, 8]])):
        for mask in (None, attend):
            ours = attention(x, query, where, rotary, mask)
            theirs = attention(x.as_subclass(OnGpu), query, where, rotary, mask)
            torch.testing.assert_close(ours, theirs.as_subclass(torch.Tensor), rtol=0, atol=1e-10)
    assert rates == [0.0] * 4  # the written-out form does not call it
    attention.train()(x.as_subclass(OnGpu), x, None, rotary, None)
    assert rates[4:] == [0.2]
