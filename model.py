"""BERT, by hand: embeddings, post-LN transformer blocks, and the masked-language-model head.

Two things differ from the textbook:

1. Only masked positions are predicted, so the last block computes queries, attention output and
   feed-forward at those k positions alone, and the head (the most expensive matrix of a small
   model) runs on them alone. Keys and values of the last block still come from every position:
   this is exact.
2. Positions are rotary (RoFormer, Su et al. 2021, arXiv 2104.09864) with a *local start* by
   default: an initialisation that lets a small model leave the unigram plateau. `learned` is BERT
   as published. data/results/plateau.md has the measurements.

    python model.py runs/self-0 --fill "The [MASK] returns a tensor."
    python model.py runs/self-0 --export FOLDER    # for Hugging Face transformers

    model, tokenizer = load("runs/self-0")         # the same from Python
    fill_mask(model, tokenizer, "The [MASK] returns a tensor.")

Shapes: B rows, T tokens a row, k masked positions a row, d width, h heads, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from data.export import export
from data.files import UserError, load_tensors, run_script
from data.flags import flag_parser
from data.runs import config_sha256, read_config, resume_command
from data.tokenizer import CLS, MASK, SEP, Tokenizer

# The sizes of Turc et al. 2019 (arXiv 1908.08962): layers, width; wide has no name there. A head is
# always 64 wide.
SIZES = {"tiny": (2, 128), "wide": (2, 256), "mini": (4, 256), "small": (4, 512),
         "medium": (8, 512), "base": (12, 768)}
HEAD_WIDTH = 64
MAX_SEQ_LEN = 1 << 16  # of a file from outside: no weight shows how long rotary positions go


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, how its weights begin, and its dropout. Saved with the weights."""

    vocab_size: int
    layers: int = 2
    width: int = 128
    seq_len: int = 128  # the longest row
    positions: str = "rotary"  # or "learned": --positions, not the (B, k) places below
    rotary_base: float = 100.0  # small: the slowest plane turns once in ~550 tokens
    local_start: float = 1.0  # initial query and key bias; 0 is off
    init_std: float = 0.05  # BERT: 0.02
    dropout: float = 0.0  # BERT: 0.1

    @property
    def heads(self):
        return self.width // HEAD_WIDTH


def at_places(x, positions):
    """x (B, T, d), positions (B, k) -> x at those positions (B, k, d)."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def rotate(x, cos, sin):
    """Turn the pairs (x_i, x_{i + D/2}) of every head vector by its position's angles.

    x (B, h, n, D); cos, sin broadcast to (B, 1, n, D / 2). The dot product of a rotated query and
    a rotated key depends on the distance between them alone.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(a * sin, b, cos)), -1)


class Attention(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x, x_query, positions, rotary, attend):
        """x (B, T, d) gives keys and values; x_query (B, n, d), its rows at `positions` (B, n),
        gives queries (positions None: all of them, n = T). -> (B, n, d)"""
        d, h = self.shape.width, self.shape.heads
        if positions is None:  # every place asks every place
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:  # the last block: only the wanted places ask, but every place answers
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(x_query, weight[:d], bias[:d])
            k, v = F.linear(x, weight[d:], bias[d:]).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (h, HEAD_WIDTH)).transpose(1, 2) for t in (q, k, v))
        if rotary is not None:
            cos, sin = rotary  # (T, D / 2) each
            k = rotate(k, cos, sin)
            if positions is not None:
                cos, sin = cos[positions][:, None], sin[positions][:, None]  # (B, 1, k, D / 2)
            q = rotate(q, cos, sin)
        # SDPA does not look at .train() / .eval(): its dropout must be switched off by hand.
        dropout = self.dropout.p if self.training else 0.0
        if x.is_cuda:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=attend, dropout_p=dropout)
        else:  # the same, written out: SDPA's CPU kernel is slower in bfloat16 and with dropout
            logits = (q * HEAD_WIDTH**-0.5) @ k.mT  # (B, h, n, T)
            if attend is not None:
                logits = logits.masked_fill(~attend, -torch.inf)
            y = self.dropout(logits.softmax(-1)) @ v
        return self.out(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Post-LN, as in BERT: x = LN(x + f(x)) around attention and around the feed-forward."""

    def __init__(self, shape):
        super().__init__()
        self.attention = Attention(shape)
        self.norm1 = nn.LayerNorm(shape.width)
        self.up = nn.Linear(shape.width, 4 * shape.width)
        self.down = nn.Linear(4 * shape.width, shape.width)
        self.norm2 = nn.LayerNorm(shape.width)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x, positions, rotary, attend):
        """x (B, T, d) -> (B, T, d), or (B, k, d) where only `positions` (B, k) are wanted."""
        x_query = x if positions is None else at_places(x, positions)
        y = self.attention(x, x_query, positions, rotary, attend)
        x = self.norm1(x_query + self.dropout(y))
        return self.norm2(x + self.dropout(self.down(F.gelu(self.up(x)))))


class Bert(nn.Module):
    def __init__(self, shape):
        super().__init__()
        if shape.width % HEAD_WIDTH or shape.width < HEAD_WIDTH or shape.layers < 1:
            raise UserError(f"the width must be a multiple of {HEAD_WIDTH} and there must be a "
                            f"layer: not {shape.layers} layers of width {shape.width}")
        self.shape = shape
        d = shape.width
        self.token_embedding = nn.Embedding(shape.vocab_size, d)
        self.type_embedding = nn.Embedding(2, d)
        self.rotary = shape.positions == "rotary"
        if self.rotary:
            # Angle of plane i at position t: t * base^(-2i / D). Tables are made once.
            i = torch.arange(HEAD_WIDTH // 2)
            angles = torch.outer(torch.arange(shape.seq_len),
                                 shape.rotary_base ** (-2 * i / HEAD_WIDTH))
            self.register_buffer("cos", angles.cos(), persistent=False)  # (T, D / 2)
            self.register_buffer("sin", angles.sin(), persistent=False)
        else:
            self.position_embedding = nn.Embedding(shape.seq_len, d)
        self.norm = nn.LayerNorm(d)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        # The MLM head: dense + GELU + LayerNorm, then the token embedding again (tied), one bias.
        self.head_dense = nn.Linear(d, d)
        self.head_norm = nn.LayerNorm(d)
        self.head_bias = nn.Parameter(torch.zeros(shape.vocab_size))
        self.apply(self._init_weights)
        if self.rotary and shape.local_start:
            # With q = k = bias + small, the attention logit between two places begins in proportion
            # to sum_i cos(theta_i * distance): a bump around distance 0. Every token starts by
            # attending to its neighbours instead of having to discover that they matter.
            for block in self.blocks:
                nn.init.constant_(block.attention.qkv.bias[: 2 * d], shape.local_start)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            std = self.shape.init_std  # truncated at two standard deviations, as Google's BERT
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def encode(self, tokens, positions=None, types=None, attend=None):
        """Hidden states of the last block.

        tokens     (B, T) ids, T at most shape.seq_len
        positions  (B, k) the places wanted, or None for all
        types      (B, T) token types, or None for all 0
        attend     (B, T) True at real tokens, False at padding; None: there is no padding.
                   Every row must have a real token.
        -> (B, k, d) or (B, T, d)
        """
        T = tokens.shape[1]
        assert T <= self.shape.seq_len, f"{T} tokens in a model made for {self.shape.seq_len}"
        x = self.token_embedding(tokens)
        x = x + (self.type_embedding.weight[0] if types is None else self.type_embedding(types))
        if not self.rotary:
            x = x + self.position_embedding.weight[:T]
        x = self.dropout(self.norm(x))
        rotary = (self.cos[:T], self.sin[:T]) if self.rotary else None
        attend = None if attend is None else attend[:, None, None, :]  # (B, 1, 1, T)
        for block in self.blocks[:-1]:
            x = block(x, None, rotary, attend)
        return self.blocks[-1](x, positions, rotary, attend)

    def logits(self, hidden):
        """Hidden states (..., d) -> logits over the vocabulary (..., V)."""
        x = self.head_norm(F.gelu(self.head_dense(hidden)))
        return F.linear(x, self.token_embedding.weight, self.head_bias)

    def forward(self, tokens, positions=None, types=None, attend=None):
        """Logits (B, k, V) at `positions`, or (B, T, V). Arguments as for encode."""
        return self.logits(self.encode(tokens, positions, types, attend))


def forward_flops(shape, T, k):
    """Matrix-multiply FLOPs of one forward over a row of T tokens of which k are predicted.

    A product (a, b) @ (b, c) is 2abc. For width d, a dense block does, per token: q, k, v 6d^2,
    output 2d^2, feed-forward 16d^2, together 24d^2; and attention QK' and PV, 2Td each.
    The last block does keys and values (4d^2) for T tokens, the rest (20d^2 + 4Td) for k only.
    The head is 2d^2 + 2dV for k tokens. Backward costs twice the forward (a gradient for each of
    the two factors of every product), so a training step is 3 of these. Embedding look-ups,
    LayerNorm, GELU, softmax and the optimiser are not matrix products and are not counted.
    """
    d, V = shape.width, shape.vocab_size
    dense = (shape.layers - 1) * T * (24 * d**2 + 4 * T * d)
    last = T * 4 * d**2 + k * (20 * d**2 + 4 * T * d)
    head = k * (2 * d**2 + 2 * d * V)
    return dense + last + head


def copy_token_type(weights):
    """Pretraining sees token type 0 alone. Type 1, which fine-tuning gives to the second sentence
    of a pair, begins there as a copy of it. Changes the state dict `weights`."""
    weights["type_embedding.weight"] = weights["type_embedding.weight"][:1].repeat(2, 1)


def copy_weights(model, origin):
    """Start `model` from another of the same width: embeddings, head and blocks; every second block
    where the origin is deeper (as DistilBERT does, Sanh et al. 2019). UserError on a misfit."""
    ours, theirs = model.shape, origin.shape
    stride = 2 if theirs.layers > ours.layers else 1
    same = all(getattr(ours, name) == getattr(theirs, name)
               for name in ("vocab_size", "width", "positions", "rotary_base", "seq_len"))
    if not same or theirs.layers not in (ours.layers, 2 * ours.layers - 1, 2 * ours.layers):
        raise UserError("--init-from needs a run of the same vocabulary, width, positions, rotary "
                        "base and --seq-len, with as many layers or twice as many")

    def source(name):
        if not name.startswith("blocks."):
            return name
        _, i, rest = name.split(".", 2)
        return f"blocks.{int(i) * stride}.{rest}"

    weights = origin.state_dict()
    model.load_state_dict({name: weights[source(name)] for name in model.state_dict()})


# --------------------------------------------------------------------------------------------------
# a finished run


def read_model(path, config=None):
    """Read a model.pt (what train.py writes at the end) -> a Bert in eval mode on the CPU.
    UserError if it is not one, or not the one that this `config` (of config.json) made."""
    saved = load_tensors(path)
    try:
        shape, weights = Shape(**saved["shape"]), saved["model"]
        # A stranger's file must not have us build a giant: the shape is checked first.
        table = weights["token_embedding.weight"]
        if ((shape.vocab_size, shape.width) != table.shape or shape.layers > len(weights)
                or not 0 < shape.seq_len <= MAX_SEQ_LEN):
            raise ValueError("the shape is not that of the weights")
        model = Bert(shape)
        model.load_state_dict(weights)
        trained_by = saved["config_sha256"]
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError
            ) as error:
        raise UserError(f"{path} holds no model of this project: {str(error)[:200]}")
    if config and trained_by != config_sha256(config):
        raise UserError(f"{path} was not trained by the config.json beside it: that was changed, "
                        "or one of the two was copied here")
    return model.eval()


def load(run):
    """Open a finished run folder -> (Bert in eval mode, its Tokenizer). UserError if it is not one.
    """
    run = Path(run)
    if run.is_file():
        raise UserError(f"{run} is a file: give the run's folder, {run.parent}")
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is not a run folder; a run is made by  python train.py")
    if not (run / "model.pt").is_file():
        raise UserError(f"{run} is not finished: continue it with  {resume_command(run)}")
    config = read_config(run)
    tokenizer = Tokenizer(run / "tokenizer.model", config["tokenizer_sha256"])
    return read_model(run / "model.pt", config), tokenizer


@torch.inference_mode()
def fill_mask(model, tokenizer, text):
    """Guess every [MASK] in `text` -> a list, per mask, of the five best (piece, probability). A
    list of texts gives a list of these. UserError where a text has no [MASK] or is longer than the
    model reads."""
    if not isinstance(text, str):
        return [fill_mask(model, tokenizer, one) for one in text]
    ids = [CLS, *tokenizer.encode_with_masks(text), SEP]
    if len(ids) > model.shape.seq_len:
        raise UserError(f"the text has {len(ids)} tokens: this model reads {model.shape.seq_len}")
    positions = [i for i, token in enumerate(ids) if token == MASK]
    if not positions:
        raise UserError('there is no [MASK] in the text, for example "The [MASK] is open."')
    logits = model(torch.tensor([ids]), torch.tensor([positions]))[0]  # (masks, V)
    top = logits.float().softmax(-1).topk(5)
    return [[(tokenizer.pieces[i], p) for i, p in zip(row_ids, row_p)]
            for row_ids, row_p in zip(top.indices.tolist(), top.values.tolist())]


def main():
    parser = flag_parser("python model.py RUN [FLAGS]", __doc__)
    parser.add_argument("run", metavar="RUN", help="a finished run")
    parser.add_argument("--fill", default="", metavar="TEXT", help="print the five best guesses "
                        "for every [MASK] in it")
    parser.add_argument("--export", default="", metavar="DIR", help="write a folder that "
                        "transformers opens: BertForMaskedLM, or RoFormerForMaskedLM with rotary "
                        "positions")
    args = parser.parse_args()
    if not (args.fill or args.export):
        raise UserError('say what to do with it:  --fill "The [MASK] is open."  or  --export DIR')
    model, tokenizer = load(Path(args.run).expanduser())
    for guesses in fill_mask(model, tokenizer, args.fill) if args.fill else ():
        print("  ".join(f"{piece.replace('▁', ' ').strip() or piece} {p:.3f}"
                        for piece, p in guesses))
    if args.export:
        folder = Path(args.export).expanduser()
        kind = export(model, tokenizer, folder)
        print(f"{folder}: open it with  transformers.{kind}.from_pretrained and "
              "AutoTokenizer.from_pretrained")


if __name__ == "__main__":
    run_script(main)
