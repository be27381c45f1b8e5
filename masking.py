"""Which tokens a masked language model must predict.

A masking strategy asks a model how uncertain it is about each token, and masks the k tokens of each
row that score highest:

    tokens (B, T) -> candidates (B, c) -> entropies H (B, T) -> scores (B, T) -> positions (B, k)

    Strategy()                                     random masking: nobody is asked
    Strategy(teacher, masked, SELECT["mix"], 2)    entropy masking: a reference model is asked
    Strategy(model, masked, SELECT["mix"], 2)      self-masking: the model in training is asked

*Where* to mask (a Strategy) and *what* to put there (`corrupt`) are two things. Neither draws: the
random numbers come in as an argument, drawn by `draw` from (seed, step, row) alone.

Method: Srinivasagan, Hartung, Georges, "Entropy-aware Masking for Masked Language Modeling",
*SEM 2026, arXiv 2605.28526. Entropies are Shannon entropies in nats.

See what each strategy does to a sentence, with the model of a run that train.py has finished:

    python -m data.inspection runs/self-0 "If the input is not a tensor, it raises an error."

Shapes: B rows, T tokens a row, c candidates a row, k masked tokens a row, V vocabulary.
`places` (B, c) are where somebody is asked, `positions` (B, k) where tokens are masked.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from data.tokenizer import MASK, N_SPECIAL

# --------------------------------------------------------------------------------------------------
# --score-input: what a model reads before it says how uncertain it is.
# (model, tokens (B, T), places (B, c)) -> answers (B, c), nats


def masked(model, tokens, places):
    """Hide all candidates at once, and ask about them in one forward. The model cannot see what it
    is asked about, but it misses the other candidates, too: this is not the entropy under the final
    mask, which hides fewer."""
    return uncertainty(model, tokens.scatter(1, places, MASK), places)


def unmasked(model, tokens, places):
    """Show the text as it is: the model sees the very token that it is asked about."""
    return uncertainty(model, tokens, places)


READS = {"masked": masked, "unmasked": unmasked}

# --------------------------------------------------------------------------------------------------
# --select: how entropies become scores. H (B, T) is nan where no candidate is; noise (B, T, 5) is
# uniform; k tokens will be taken. -> scores (B, T); nan is never taken

# What each of a token's five random numbers decides. The first three are about places:
POOL = 0  # who is a candidate
TIES = 1  # the order of equal scores
OTHERS = 2  # the random part of `mix` and `sample`
WHICH = 3  # what is shown: [MASK], another token or the same
TOKEN = 4  # which other token


def high(H, noise, k):
    return H


def low(H, noise, k):
    return -H


def mid(H, noise, k):
    """Nearest to the median of the row's candidates (nanmedian would take the lower of two)."""
    return -(H - H.nanquantile(0.5, dim=1, keepdim=True)).abs()


def sample(H, noise, k):
    """ln H + Gumbel noise: its top k are k draws without replacement, each proportional to H."""
    gumbel = -(-noise[..., OTHERS].clamp(1e-7, 1 - 1e-7).log()).log()
    return H.clamp_min(1e-7).log() + gumbel


def mix(H, noise, k):
    """Half of them by highest entropy, the others anywhere in the row."""
    best = highest(H, k // 2, noise[..., TIES])
    return noise[..., OTHERS].scatter(1, best, 2.0)  # above all noise, which is below 1


SELECT = {rule.__name__: rule for rule in (high, low, mid, sample, mix)}


def highest(scores, k, noise):
    """Positions (B, k) of the k highest scores of each row (B, T), in ascending order; nan is last.

    Ties are broken by `noise` (B, T): the row is brought into a random order first and sorted
    stably. Without it, equal scores would give neighbouring positions.
    """
    shuffled = noise.argsort(dim=1)
    scores = scores.nan_to_num(nan=-torch.inf).gather(1, shuffled)
    ranks = scores.argsort(dim=1, descending=True, stable=True)
    return shuffled.gather(1, ranks[:, :k]).sort(dim=1).values


# --------------------------------------------------------------------------------------------------
# where to mask


@dataclass
class Strategy:
    """Where to mask: who is asked, what they read, how their answers become a choice."""

    model: object = None  # who is asked: a Bert
    reads: Callable | None = None  # what they read; None: nobody is asked, all places are alike
    select: Callable = high  # (H, noise, k) -> scores
    # Candidates are a random pool of pool * k tokens a row, a new one each time. Without it (0:
    # every token) the same hard tokens would be masked whenever their row is read.
    pool: int = 0

    def __call__(self, tokens, k, noise):
        """tokens (B, T), noise (B, T, 5) of `draw` -> positions (B, k), in ascending order.

        Special tokens are never chosen: every row must have max(1, pool) * k others.
        """
        B, T = tokens.shape
        ordinary = tokens >= N_SPECIAL
        if self.pool:
            anywhere = noise[..., POOL].masked_fill(~ordinary, -1.0)
            # In ascending order: a set of places gives the same bits however it was found.
            places = anywhere.topk(self.pool * k).indices.sort().values  # (B, c)
        else:
            places = torch.arange(1, T - 1, device=tokens.device).expand(B, -1)
        answers = torch.zeros(places.shape, device=tokens.device)
        if self.reads:
            answers = self.reads(self.model, tokens, places)  # (B, c)
        nowhere = torch.full((B, T), math.nan, device=tokens.device)
        H = nowhere.scatter(1, places, answers).masked_fill(~ordinary, math.nan)
        # Once more, since mix gives every place a score.
        scores = self.select(H, noise, k).masked_fill(~ordinary, math.nan)
        return highest(scores, k, noise[..., TIES])


# --------------------------------------------------------------------------------------------------
# what to put there


def corrupt(tokens, positions, noise, vocab_size):
    """Decide what to show at `positions` (B, k): 80 % [MASK], 10 % another ordinary token, 10 % the
    same (BERT, Devlin et al. 2019, section 3.1). -> inputs (B, T), a new tensor."""
    which = noise[..., WHICH].gather(1, positions)
    another = noise[..., TOKEN].gather(1, positions) * (vocab_size - N_SPECIAL)
    another = N_SPECIAL + another.long()  # rounded down: any ordinary token
    same = tokens.gather(1, positions)
    new = torch.where(which < 0.8, MASK, torch.where(which < 0.9, another, same))
    return tokens.scatter(1, positions, new)


def mask_count(rate, T):
    """k, the same in every row and arm: the rate's share of a row without [CLS] and [SEP]."""
    return max(1, int(rate * (T - 2) + 0.5))


# --------------------------------------------------------------------------------------------------
# random numbers: pure functions of (seed, step, row)


NOISE, DROPOUT, STATIC = 1, 2, 3  # streams; 0 is the order of the text, in data/corpus.py


def draw(seed, step, rows, T, stream=NOISE):
    """(rows, T, 5) uniform numbers in [0, 1), float32; row r is the same for any `rows` > r."""
    generator = np.random.default_rng((seed, step, stream))
    return torch.from_numpy(generator.random((rows, T, 5), dtype=np.float32))


def draw_blocks(seed, blocks, T):
    """Numbers (B, T, 5) that depend on the block (B,) of the training text, and not on the step:
    its number takes the place of the step."""
    return torch.cat([draw(seed, int(block), 1, T, STATIC) for block in blocks])


def keep_places(noise, fixed):
    """--static: take the numbers that choose places from `fixed`, so that a block is masked alike
    in every epoch. What is shown there still differs. Both (B, T, 5) -> (B, T, 5)"""
    return torch.cat((fixed[..., :WHICH], noise[..., WHICH:]), -1)


def seed_dropout(seed, step, row):
    """Dropout draws from torch's global stream: set it for the micro-batch that begins at `row`."""
    state = np.random.SeedSequence((seed, step, DROPOUT, row)).generate_state(1)
    torch.manual_seed(int(state[0]))


# --------------------------------------------------------------------------------------------------
# entropy


def entropy(logits):
    """Compute H(p) = -sum_v p_v ln p_v for p = softmax(logits): (..., V) -> (...), nats, float32.

    This is logsumexp(z) - sum_v p_v z_v with z shifted by its maximum. There is no p ln p, so no
    0 ln 0; and it is never negative: as no z is above 0 and one is 0, neither term can be.
    """
    z = logits.float()
    z = z - z.amax(-1, keepdim=True)
    e = z.exp()
    total = e.sum(-1)
    return total.log() - (e * z).sum(-1) / total  # autocast would make a dot product bfloat16


def entropies(logits):
    """entropy of logits (N, V) -> (N,), a few rows at a time: on a CPU 1 MiB of float32, which its
    cache keeps through the passes of entropy; on a GPU 256 MiB, to launch few kernels."""
    rows = max(1, (1 << (26 if logits.is_cuda else 18)) // logits.shape[1])
    return torch.cat([entropy(part) for part in logits.split(rows)])


def uncertainty(model, inputs, places):
    """Compute the entropy (B, c) of the model's predictions for `inputs` (B, T) at `places` (B, c).

    Runs in eval mode, without gradients, and draws no random number; the model's mode is restored.
    There never is a (B, T, V) tensor: logits are made for a few rows at a time.
    """
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        hidden = model.encode(inputs, places).flatten(0, 1)  # (B c, d)
        # On a CPU 32 MiB of float32, enough rows for a fast matrix product; on a GPU 256 MiB.
        rows = max(1, (1 << (26 if hidden.is_cuda else 23)) // model.shape.vocab_size)
        H = torch.cat([entropies(model.logits(part)) for part in hidden.split(rows)])
    model.train(was_training)
    return H.view_as(places).clone()  # a clone outside inference mode is an ordinary tensor
