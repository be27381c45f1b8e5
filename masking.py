"""Which tokens a masked language model must predict.

Every strategy is one score per token; the k highest-scoring tokens of each row are masked:

    tokens (B, T) -> candidates (B, c) -> entropies H (B, c) -> scores (B, T) -> positions (B, k)

    --masking      where H comes from      random: nowhere, all scores are equal
                                           entropy: a teacher; self: the model in training
    --score-input  what that model reads   masked_entropy, clear_entropy, TypeEntropy below
    --select       how H becomes a score   high, low, mid, sample, mix below

Where to mask (choose) and what to put there (replace) are two functions. All of them are pure: the
random numbers come in as arguments, drawn by `draw` from (seed, step, row) alone.

Method: Srinivasagan, Hartung, Georges, "Entropy-aware Masking for Masked Language Modeling",
*SEM 2026, arXiv 2605.28526. Entropies are Shannon entropies in nats.

See what each strategy does to a sentence, with a run that train.py has finished:

    python masking.py runs/self-0 "The function returns a new array."
    python masking.py runs/self-0 "The function returns a new array." --html page.html
"""

import numpy as np
import torch

from data.tokenizer import MASK, N_SPECIAL

# --------------------------------------------------------------------------------------------------
# random numbers: pure functions of (seed, step, what they are for, row)

POOL, SELECT, HALF, REPLACE, DROPOUT = range(5)  # what they are for


def draw(seed, step, purpose, rows, columns):
    """(rows, columns) uniform numbers in [0, 1), float32; row r is the same for any `rows` > r."""
    generator = np.random.default_rng((seed, step, purpose))
    return torch.from_numpy(generator.random((rows, columns), dtype=np.float32))


def seed_dropout(seed, step, row):
    """Dropout draws from torch's global stream: set it for the micro-batch that begins at `row`."""
    state = np.random.SeedSequence((seed, step, DROPOUT, row)).generate_state(1)
    torch.manual_seed(int(state[0]))


# --------------------------------------------------------------------------------------------------
# entropy


def entropy(logits):
    """H(p) = -sum_v p_v ln p_v for p = softmax(logits): (..., V) -> (...), nats, float32.

    Computed as logsumexp(z) - sum_v p_v z_v with z shifted by its maximum. No p ln p, so no 0 ln 0;
    and never negative, though the difference of two nearly equal numbers could be.
    """
    z = logits.float()
    z = z - z.amax(-1, keepdim=True)
    e = z.exp()
    total = e.sum(-1)
    return (total.log() - torch.linalg.vecdot(e, z) / total).clamp_min(0)


CHUNK = 1 << 19  # logits at once: 2 MiB of float32 stay in a core's cache, and no (B, T, V) tensor


def entropy_at(model, tokens, positions):
    """Entropy (B, c) of the model's predictions for `tokens` (B, T) at `positions` (B, c).

    Runs in eval mode, without gradients, and draws no random number; the model's mode is restored.
    """
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        hidden = model.encode(tokens, positions).flatten(0, 1)  # (B c, d)
        rows = max(1, CHUNK // model.shape.vocab_size)
        H = torch.cat([entropy(model.logits(part)) for part in hidden.split(rows)])
    model.train(was_training)
    return H.view_as(positions).clone()  # a clone outside inference mode is an ordinary tensor


# --------------------------------------------------------------------------------------------------
# --score-input: what the scoring model reads. tokens (B, T), candidates (B, c) -> H (B, c)


def masked_entropy(model, tokens, candidates):
    """All candidates are replaced by [MASK] at once: one forward. The model cannot see what it is
    scored on, but it also misses the other candidates: not the entropy under the final mask."""
    return entropy_at(model, tokens.scatter(1, candidates, MASK), candidates)


def clear_entropy(model, tokens, candidates):
    """The intact text: the model sees the very token that it is scored on."""
    return entropy_at(model, tokens, candidates)


class TypeEntropy:
    """No forward at all: a running mean of H for every vocabulary item (beyond the paper).

    Training computes logits at the masked positions anyway; `update` takes their entropies where
    [MASK] was shown. A type not seen yet has ln V, the entropy of a model that knows nothing, so
    that it is tried soon. The last ~WINDOW sightings count: entropies fall as training goes on.
    """

    WINDOW = 64

    def __init__(self, vocab_size, device="cpu"):
        self.mean = torch.full((vocab_size,), float(np.log(vocab_size)), device=device)
        self.seen = torch.zeros(vocab_size, device=device)

    def __call__(self, tokens, candidates):
        return self.mean[tokens.gather(1, candidates)]

    def update(self, types, H, weight):
        """types (N,) ids, H (N,) nats, weight (N,) 1 where the sighting counts and 0 elsewhere."""
        n = torch.zeros_like(self.mean).index_add_(0, types, weight)
        total = torch.zeros_like(self.mean).index_add_(0, types, weight * H)
        self.seen += n
        # The mean of all sightings while they are few, then one that forgets.
        rate = (n / self.seen.clamp(1, self.WINDOW)).clamp_max(1)
        self.mean += rate * (total / n.clamp_min(1) - self.mean)


# --------------------------------------------------------------------------------------------------
# --select: how entropies become scores. H (B, c), u (B, c) uniform noise -> scores (B, c)


def high(H, u):
    return H


def low(H, u):
    return -H


def mid(H, u):
    return -(H - H.nanquantile(0.5, dim=1, keepdim=True)).abs()


def sample(H, u):
    """ln H + Gumbel noise: its top k are k draws without replacement, each proportional to H."""
    gumbel = -(-u.clamp(1e-7, 1 - 1e-7).log()).log()
    return H.clamp_min(1e-7).log() + gumbel  # the floor keeps H = 0 a candidate, if the last one


SELECT_RULES = {"high": high, "low": low, "mid": mid, "sample": sample}  # and mix, in choose


def top_k(scores, k, noise):
    """Positions (B, k) of the k highest scores of each row, in ascending order.

    Ties are broken by `noise` (B, T): the row is brought into a random order first and sorted
    stably. Without it, equal scores would give neighbouring positions.
    """
    shuffled = noise.argsort(dim=1)
    ranks = scores.gather(1, shuffled).argsort(dim=1, descending=True, stable=True)
    return shuffled.gather(1, ranks[:, :k]).sort(dim=1).values


def choose(tokens, k, score, select, pool, noise):
    """Where to mask: tokens (B, T) -> positions (B, k).

    score   None for random masking, or a function (tokens, candidates) -> H
    select  high, low, mid, sample or mix: half by highest H, the rest uniformly from what is left
    pool    candidates are a random pool of pool * k positions a row; 0: every position
    noise   {POOL, SELECT, HALF: (B, T) uniform numbers}
    Special tokens are never chosen: every row must have max(1, pool) * k others.
    """
    maskable = tokens >= N_SPECIAL
    equal = torch.zeros(tokens.shape, device=tokens.device).masked_fill(~maskable, -torch.inf)
    if score is None:
        return top_k(equal, k, noise[SELECT])
    if pool:
        candidates = top_k(equal, pool * k, noise[POOL])
    else:
        T = tokens.shape[1]
        candidates = torch.arange(1, T - 1, device=tokens.device).expand(len(tokens), -1)
    H = score(tokens, candidates)
    H = H.masked_fill(~maskable.gather(1, candidates), torch.nan)  # [SEP]s inside a pool of all
    if select == "mix":
        by_entropy = spread(high(H, None), candidates, tokens.shape)
        half = top_k(by_entropy, k // 2, noise[SELECT])
        return top_k(equal.scatter(1, half, 1.0), k, noise[HALF])
    scores = SELECT_RULES[select](H, noise[SELECT].gather(1, candidates))
    return top_k(spread(scores, candidates, tokens.shape), k, noise[SELECT])


def spread(scores, candidates, shape):
    """Candidate scores (B, c) -> (B, T), -inf at special tokens (nan) and everywhere else."""
    everywhere = torch.full(shape, -torch.inf, device=scores.device)
    return everywhere.scatter(1, candidates, scores.nan_to_num(nan=-torch.inf))


# --------------------------------------------------------------------------------------------------
# what to put there


def replace(tokens, positions, u, vocab_size):
    """What to put at `positions` (B, k): 80 % [MASK], 10 % a random ordinary token, 10 % the same.

    u (B, k, 2): one uniform draw decides which, the other which token. Returns a new (B, T).
    """
    which, token = u.unbind(-1)
    original = tokens.gather(1, positions)
    other = N_SPECIAL + (token * (vocab_size - N_SPECIAL)).long()
    new = torch.where(which < 0.8, MASK, torch.where(which < 0.9, other, original))
    return tokens.scatter(1, positions, new)


def mask_rate_at(progress, start, end):
    """Share of tokens masked when `progress` (0 to 1) of the run is over: linear."""
    return start + (end - start) * progress


def mask_count(rate, T):
    """k, the same in every row and arm: the rate's share of a row without [CLS] and [SEP]."""
    return max(1, int(rate * (T - 2) + 0.5))


# --------------------------------------------------------------------------------------------------
# what a strategy masks


def token_kinds(pieces, counts):
    """Kinds of vocabulary items, as boolean (V,) tensors, for the table of what is masked.

    pieces: the vocabulary; counts (V,): how often each occurs in the training text. (Capitals are
    not among them: the tokenizer folds case, and ids do not remember it.)
    """
    counts = torch.as_tensor(np.where(np.arange(len(counts)) < N_SPECIAL, 0, counts))
    frequent = torch.zeros(len(pieces), dtype=torch.bool)
    frequent[counts.argsort(descending=True, stable=True)[:100]] = True
    return {
        "word_internal": torch.tensor([not p.startswith("▁") for p in pieces]),
        "number": torch.tensor([any(c.isdigit() for c in p) and len(p) < 6 for p in pieces]),
        "frequent": frequent,  # the 100 most frequent
        "rare": counts < 100,  # seen fewer than 100 times
    }


def diagnose(model, tokens, k, choose_now, noise, kinds):
    """What the strategy masks, next to all tokens: a dict for the log.

    choose_now(tokens, noise) -> positions is the strategy as it is at this step; tokens (B, T);
    noise: three draws as for choose. Pairs are [chosen, all]:
    entropy, accuracy  of the model at the chosen tokens, all [MASK], and at k random ones
    word_internal ...  shares of the kinds of token_kinds
    overlap            share of the chosen that are chosen again with other noise, and what a random
                       choice has: how repetitive the masks are
    rate               masked share of the maskable tokens
    """
    chosen, again = choose_now(tokens, noise[0]), choose_now(tokens, noise[1])
    anywhere = choose(tokens, k, None, None, 0, noise[2])
    maskable = tokens >= N_SPECIAL
    pairs = {"entropy": [], "accuracy": []}
    for positions in (chosen, anywhere):
        inputs = tokens.scatter(1, positions, MASK)
        pairs["entropy"].append(entropy_at(model, inputs, positions).mean().item())
        with torch.inference_mode():
            guesses = torch.cat([model(x, p).argmax(-1)
                                 for x, p in zip(inputs.split(16), positions.split(16))])
        pairs["accuracy"].append((guesses == tokens.gather(1, positions)).float().mean().item())
    for name, kind in kinds.items():
        kind = kind.to(tokens.device)
        pairs[name] = [kind[tokens.gather(1, chosen)].float().mean().item(),
                       kind[tokens[maskable]].float().mean().item()]
    is_chosen = torch.zeros_like(maskable).scatter(1, chosen, True)
    rate = (is_chosen & maskable).sum() / maskable.sum()
    overlap = is_chosen.gather(1, again).float().mean()
    pairs["overlap"] = [overlap.item(), (k * len(tokens) / maskable.sum()).item()]
    return {"rate": rate.item(), **pairs}


def spearman(a, b):
    """Spearman's rank correlation of two tensors; ties share their mean rank; constant: 0."""
    ranks = []
    for x in (a, b):
        _, group, size = x.flatten().unique(return_inverse=True, return_counts=True)
        mean_rank = size.cumsum(0) - (size - 1) / 2
        ranks.append(mean_rank[group].double() - (x.numel() + 1) / 2)
    scale = ranks[0].norm() * ranks[1].norm()
    return (ranks[0] @ ranks[1] / scale).item() if scale > 0 else 0.0


def type_rank_correlation(types, model, tokens, c, noise):
    """Spearman of --score-input type with fresh masked-input scores, on c random tokens a row."""
    candidates = choose(tokens, c, None, None, 0, noise)
    return spearman(types(tokens, candidates), masked_entropy(model, tokens, candidates))
