"""Which tokens a masked language model must predict.

A masking strategy asks somebody how uncertain they are about each token, and turns the answers into
scores. The k highest-scoring tokens of each row are masked:

    tokens (B, T) -> candidates (B, c) -> entropies H (B, T) -> scores (B, T) -> positions (B, k)

    --masking      who is asked             random: nobody; entropy: a teacher; self: the model
    --score-input  what they read           masked: the text without the candidates; unmasked: all;
                                            vocabulary: nothing, a mean of earlier answers
    --select       how H becomes a score    high, low, mid, sample, mix; rise

*Where* to mask (`choose`) and *what* to put there (`corrupt`) are two functions. Both are pure: the
random numbers come in as an argument, drawn by `draw` from (seed, step, row) alone.

Method: Srinivasagan, Hartung, Georges, "Entropy-aware Masking for Masked Language Modeling",
*SEM 2026, arXiv 2605.28526. Entropies are Shannon entropies in nats.

See what each strategy does to a sentence, with the model of a run that train.py has finished:

    python masking.py runs/self-0 "The function returns a new array."
    python masking.py runs/self-0 "The function returns a new array." --html page.html
    python masking.py runs/self-0          # how strongly every rule selects, on held-out text

Shapes: B rows, T tokens a row, c candidates a row, k masked tokens a row, V vocabulary.
`places` (B, c) are where somebody is asked, `positions` (B, k) where tokens are masked.
"""

import math
import os
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from data.files import UserError, run_script
from data.flags import flag_parser
from data.tokenizer import MASK, N_SPECIAL

# --------------------------------------------------------------------------------------------------
# --masking: who is asked how uncertain they are about the tokens at `places` (B, c)?
# ask(model, tokens, places) is a --score-input, below. -> entropies (B, c) in nats


def random_masking(ask, model, teacher, tokens, places):
    """Ask nobody: all places are alike, and the noise that breaks ties decides. The baseline."""
    return torch.zeros(places.shape, device=places.device)


def entropy_masking(ask, model, teacher, tokens, places):
    """Ask an external reference model, which was trained before (--teacher)."""
    return ask(teacher, tokens, places)


def self_masking(ask, model, teacher, tokens, places):
    """Ask the model that is being trained."""
    return ask(model, tokens, places)


MASKING = {"random": random_masking, "entropy": entropy_masking, "self": self_masking}


# --------------------------------------------------------------------------------------------------
# --score-input: what they read before they answer. -> H (B, c)


def masked(model, tokens, places):
    """Hide all candidates at once, and ask about them in one forward. The model cannot see what it
    is asked about, but it misses the other candidates, too: this is not the entropy under the final
    mask, which hides fewer."""
    return uncertainty(model, tokens.scatter(1, places, MASK), places)


def unmasked(model, tokens, places):
    """Show the text as it is: the model sees the very token that it is asked about."""
    return uncertainty(model, tokens, places)


class VocabularyMean:
    """--score-input vocabulary, the default of self-masking: nobody reads anything. H is a running
    mean over the vocabulary item's own predictions, without a forward. Not from the paper.

    Training computes logits at the masked positions anyway; `see` keeps their entropies where
    [MASK] was shown, and `learn` takes them in after the update. An item that was not seen yet has
    ln V, the entropy of a model that knows nothing, so that it is tried soon. The last ~WINDOW
    values count: entropies fall as training goes on.
    """

    WINDOW = 64

    def __init__(self, vocab_size, device="cpu"):
        self.mean = torch.full((vocab_size,), math.log(vocab_size), device=device)
        self.seen = torch.zeros(vocab_size, device=device)
        self.parts = []  # of this step: (N, 3) item, entropy, 1 where [MASK] was shown

    def __call__(self, model, tokens, places):
        return self.mean[tokens.gather(1, places)]

    def see(self, labels, shown, logits):
        """labels (N,) the items to predict, shown (N,) what stood there, logits (N, V)."""
        H = entropies(logits.detach())
        self.parts.append(torch.stack([labels.float(), H, (shown == MASK).float()], 1))

    def learn(self, machine):
        """Take in what was seen since the last update, by all processes. All at once, so that a
        micro-batch is only about memory."""
        items, H, weight = torch.cat([machine.gather_rows(p) for p in self.parts]).unbind(1)
        items, self.parts = items.long(), []
        n = torch.zeros_like(self.mean).index_add_(0, items, weight)
        total = torch.zeros_like(self.mean).index_add_(0, items, weight * H)
        self.seen += n
        # The mean of all values while they are few, then one that forgets.
        rate = (n / self.seen.clamp(1, self.WINDOW)).clamp_max(1)
        self.mean += rate * (total / n.clamp_min(1) - self.mean)

    def state(self):
        return torch.stack([self.mean, self.seen])

    def load_state(self, state):
        self.mean, self.seen = state.to(self.mean.device)


# And VocabularyMean. `once` is unmasked, too, but asked before training: train.ask_once.
SCORE_INPUT = {"masked": masked, "unmasked": unmasked, "once": unmasked}


# --------------------------------------------------------------------------------------------------
# --select: how entropies become scores. H (B, T) is nan where no candidate is; noise (B, T, 5) is
# uniform; k tokens will be taken. -> scores (B, T), where nan is never taken

# What each of a token's five numbers decides. Where to mask: who is in the pool; the order of equal
# scores; the random part of `mix` and `sample`. What is shown: [MASK], another or the same; which
# other token. (keep_places relies on this order.)
POOL, TIES, OTHERS, WHICH, TOKEN = range(5)


def high(H, noise, k):
    return H


def low(H, noise, k):
    return -H


def mid(H, noise, k):
    """Nearest to the median of the row's candidates."""
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


def rise(q):
    """Beyond the paper, easy first: a rule that takes the entropies nearest to the share q of the
    row's candidates, in order of entropy. train.py lets q rise from 1/4 to 3/4 (--select rise)."""
    def rule(H, noise, k):
        candidates = (~H.isnan()).sum(1, keepdim=True)
        shuffled = noise[..., TIES].argsort(dim=1)  # equal entropies: in random order
        order = H.nan_to_num(nan=torch.inf).gather(1, shuffled).argsort(dim=1, stable=True)
        rank = shuffled.gather(1, order).argsort(dim=1)  # of each token, 0: the lowest entropy
        return (-((rank + 0.5) / candidates - q).abs()).masked_fill(H.isnan(), math.nan)

    return rule


# --------------------------------------------------------------------------------------------------
# where to mask, and what to put there


def choose(tokens, k, score, select, pool, noise):
    """Decide where to mask: tokens (B, T) -> positions (B, k), in ascending order.

    score   function (tokens, places) -> H (B, c): a --masking function without its first arguments
    select  a name in SELECT, or a rule of that kind
    pool    candidates are a random pool of pool * k tokens a row, a new one each time: without it
            (0: every token) the same hard tokens would be masked whenever their row is read
    noise   (B, T, 5), from draw
    Special tokens are never chosen: every row must have max(1, pool) * k others.
    """
    B, T = tokens.shape
    ordinary = tokens >= N_SPECIAL
    if pool:
        anywhere = noise[..., POOL].masked_fill(~ordinary, -1.0)
        places = anywhere.topk(pool * k).indices.sort().values  # (B, c)
    else:
        places = torch.arange(1, T - 1, device=tokens.device).expand(B, -1)
    nowhere = torch.full((B, T), math.nan, device=tokens.device)
    H = nowhere.scatter(1, places, score(tokens, places)).masked_fill(~ordinary, math.nan)
    scores = SELECT.get(select, select)(H, noise, k).masked_fill(~ordinary, math.nan)
    return highest(scores, k, noise[..., TIES])


def highest(scores, k, noise):
    """Positions (B, k) of the k highest scores of each row (B, T), in ascending order; nan is last.

    Ties are broken by `noise` (B, T): the row is brought into a random order first and sorted
    stably. Without it, equal scores would give neighbouring positions.
    """
    shuffled = noise.argsort(dim=1)
    scores = scores.nan_to_num(nan=-torch.inf).gather(1, shuffled)
    ranks = scores.argsort(dim=1, descending=True, stable=True)
    return shuffled.gather(1, ranks[:, :k]).sort(dim=1).values


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


ORDER, NOISE, DROPOUT, STATIC = range(4)  # streams; the first is that of data/corpus.py


def draw(seed, step, rows, T, stream=NOISE):
    """(rows, T, 5) uniform numbers in [0, 1), float32; row r is the same for any `rows` > r."""
    generator = np.random.default_rng((seed, step, stream))
    return torch.from_numpy(generator.random((rows, T, 5), dtype=np.float32))


def keep_places(noise, seed, blocks):
    """--static: make the noise (B, T, 5) that chooses places a function of the block's number
    instead of the step, so that a block is masked alike in every epoch. What is shown there still
    differs. blocks (B,): the numbers in the training text. -> (B, T, 5)"""
    fixed = torch.cat([draw(seed, int(block), 1, noise.shape[1], STATIC) for block in blocks])
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


# --------------------------------------------------------------------------------------------------
# how well a model predicts: the same held-out masks for all

EVAL_SEED = 260528526  # one constant: every arm, seed and restart is evaluated on the same masks
EVAL_RATE = 0.15  # whatever the training rate


def mask_for_evaluation(tokens, vocab_size):
    """tokens (N, T) -> positions (N, k), inputs (N, T), labels (N, k); the same masks always."""
    k, noise = mask_count(EVAL_RATE, tokens.shape[1]), draw(EVAL_SEED, 0, *tokens.shape)
    noise = noise.to(tokens.device)
    positions = choose_at_random(tokens, k, noise)
    return positions, corrupt(tokens, positions, noise, vocab_size), tokens.gather(1, positions)


def choose_at_random(tokens, k, noise):
    """Positions (B, k) as --masking random chooses them: nobody is asked, every token is a
    candidate, all scores are equal, and the noise that breaks ties decides."""
    nobody = partial(random_masking, None, None, None)  # no ask, no model, no teacher
    return choose(tokens, k, nobody, "high", 0, noise)


@torch.inference_mode()
def evaluate(model, tokens, machine):
    """How well a model predicts tokens (N, T) at 15 % random masks, the same every time -> a dict:

    val_loss      mean cross-entropy in nats
    val_accuracy  share of the masked tokens that it ranks first
    context_gain  nats by which the loss rises when the rest of each row is another row's: what the
                  model gains from context, 0 if it uses none. None where there is one row.

    Leaves eval mode on.
    """
    model.eval()
    positions, inputs, labels = mask_for_evaluation(tokens, model.shape.vocab_size)
    # Half of all rows away: the neighbours of a row are of the same document, and on its topic.
    foreign = tokens.roll(len(tokens) // 2, 0).scatter(1, positions, inputs.gather(1, positions))
    loss = loss_without = right = 0
    for x, other, p, y in zip(*(t.split(64) for t in (inputs, foreign, positions, labels))):
        with machine.autocast():
            logits = model(x, p).flatten(0, 1).float()
        loss += F.cross_entropy(logits, y.flatten(), reduction="sum").item()
        right += (logits.argmax(-1) == y.flatten()).sum().item()
        if len(tokens) > 1:
            with machine.autocast():
                logits = model(other, p).flatten(0, 1).float()
            loss_without += F.cross_entropy(logits, y.flatten(), reduction="sum").item()
    n = labels.numel()
    return {"val_loss": loss / n, "val_accuracy": right / n,
            "context_gain": (loss_without - loss) / n if len(tokens) > 1 else None}


# --------------------------------------------------------------------------------------------------


def main():
    parser = flag_parser("python masking.py RUN [SENTENCE] [FLAGS]", __doc__)
    parser.add_argument("run", nargs="?", default="", help="a finished run: its model is asked")
    parser.add_argument("sentence", nargs="*", default=[], help="what to look at, in quotes; "
                        "without one: a table of what every rule masks, in a minute or two")
    parser.add_argument("--mask-rate", type=float, default=0.15, help="share masked (default 0.15)")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default 0)")
    parser.add_argument("--html", default="", metavar="FILE", help="also write a web page")
    parser.add_argument("--blocks", type=int, default=64, help="held-out blocks (default 64)")
    args = parser.parse_args()
    if not args.run or args.blocks < 1 or len(args.sentence) != 1 and (args.sentence or args.html):
        raise UserError('give a run folder and a sentence in quotes:  python masking.py RUN "A '
                        'sentence."  A run is made in minutes by  python train.py --masking self')
    from data import inspection  # it imports this file
    args.run = os.path.expanduser(args.run)
    if args.sentence:
        args.sentence, = args.sentence
        inspection.demonstrate(args)
    else:
        inspection.show_doses(args.run, args.blocks)


if __name__ == "__main__":
    run_script(main)
