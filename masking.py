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

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data.files import (
    UserError, load_tensors, read_json, refuse_command, run_script, write_atomic,
)
from data.metrics import spearman
from data.page import html_page, print_rows
from data.tokenizer import CLS, MASK, N_SPECIAL, SEP
from model import load

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
    and never negative: as no z is above 0 and one is 0, neither term can be.
    """
    z = logits.float()
    z = z - z.amax(-1, keepdim=True)
    e = z.exp()
    total = e.sum(-1)
    return total.log() - torch.linalg.vecdot(e, z) / total


def entropy_of(log_p):
    """H = -sum_v p_v ln p_v from log-probabilities: (N, V) -> (N,), nats."""
    # A quarter of a chunk: pieces small enough for the allocator to reuse, in the middle of a step.
    parts = log_p.split(max(1, chunk_rows(log_p, log_p.shape[-1]) // 4))
    return -torch.cat([torch.linalg.vecdot(part.exp(), part) for part in parts])


def chunk_rows(x, vocab_size):
    """Rows of logits to hold at once, so that there never is a (B, T, V) tensor: on a CPU 32 MiB
    of float32, enough rows for a fast matrix product; on a GPU 256 MiB, to launch few kernels."""
    return max(1, (1 << (26 if x.is_cuda else 23)) // vocab_size)


def entropy_at(model, tokens, positions):
    """Entropy (B, c) of the model's predictions for `tokens` (B, T) at `positions` (B, c).

    Runs in eval mode, without gradients, and draws no random number; the model's mode is restored.
    """
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        hidden = model.encode(tokens, positions).flatten(0, 1)  # (B c, d)
        parts = hidden.split(chunk_rows(hidden, model.shape.vocab_size))
        H = torch.cat([entropy(model.logits(part)) for part in parts])
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
    return H.clamp_min(1e-7).log() + gumbel  # ln 0 is -inf, and that is for special tokens


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
        half = top_k(spread(H, candidates, tokens.shape), k // 2, noise[SELECT])
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


def mask_count(rate, T):
    """k, the same in every row and arm: the rate's share of a row without [CLS] and [SEP]."""
    return max(1, int(rate * (T - 2) + 0.5))


# --------------------------------------------------------------------------------------------------
# how well it predicts, and what a strategy masks

EVAL_SEED = 260528526  # one constant: every arm, seed and restart is evaluated on the same masks
EVAL_RATE = 0.15  # whatever the training rate
DIAGNOSIS_SEED = 2605  # likewise: every step and arm is looked at with the same noise


def mask_for_evaluation(tokens, vocab_size):
    """tokens (N, T) -> positions (N, k), inputs (N, T), labels (N, k); the same masks always."""
    (N, T), k = tokens.shape, mask_count(EVAL_RATE, tokens.shape[1])
    noise = draw(EVAL_SEED, 0, SELECT, N, T).to(tokens.device)
    u = draw(EVAL_SEED, 0, REPLACE, N, 2 * k).view(N, k, 2).to(tokens.device)
    positions = choose(tokens, k, None, None, 0, {SELECT: noise})
    return positions, replace(tokens, positions, u, vocab_size), tokens.gather(1, positions)


@torch.inference_mode()
def evaluate(model, tokens, amp):
    """Mean loss (nats) and accuracy on tokens (N, T) at 15 % random masks, the same every time.

    amp() is the context in which the model runs. Leaves eval mode on.
    """
    model.eval()
    positions, inputs, labels = mask_for_evaluation(tokens, model.shape.vocab_size)
    loss = right = 0
    for x, p, y in zip(inputs.split(64), positions.split(64), labels.split(64)):
        with amp():
            logits = model(x, p).flatten(0, 1).float()
        loss += F.cross_entropy(logits, y.flatten(), reduction="sum").item()
        right += (logits.argmax(-1) == y.flatten()).sum().item()
    return loss / labels.numel(), right / labels.numel()


def token_kinds(pieces, counts):
    """Kinds of vocabulary items, as boolean (V,) tensors, for the table of what is masked.

    pieces: the vocabulary; counts (V,): how often each occurs in the training text. (Capitals are
    not among them: the tokenizer folds case, and ids do not remember it.)
    """
    counts = torch.as_tensor(np.where(np.arange(len(counts)) < N_SPECIAL, 0, counts))
    pieces = ["" if p.startswith("<0x") else p for p in pieces]  # bytes of rare characters
    frequent = torch.zeros(len(pieces), dtype=torch.bool)
    frequent[counts.argsort(descending=True, stable=True)[:100]] = True
    return {
        "word_internal": torch.tensor([p[:1].isalnum() for p in pieces]),  # no "▁" before it
        "number": torch.tensor([any(c.isdigit() for c in p) for p in pieces]),
        "frequent": frequent,  # the 100 most frequent
        "rare": counts < 100,  # seen fewer than 100 times
    }


def diagnose(model, tokens, k, choose_now, kinds, types=None):
    """What the strategy masks, next to all tokens: a dict for the log. Leaves eval mode on.

    choose_now(tokens, noise) -> positions is the strategy as it is at this step; tokens (B, T).
    The noise is the same at every step and in every run. Pairs are [chosen, all]:
    entropy, accuracy  of the model at the chosen tokens, all [MASK], and at k random ones
    word_internal ...  shares of the kinds of token_kinds
    overlap            share of the chosen that are chosen again with other noise, and what a random
                       choice has: how repetitive the masks are
    rate               masked share of the maskable tokens
    type_rank_correlation, with a TypeEntropy: Spearman of its scores with fresh masked ones
    """
    noise = [{p: draw(DIAGNOSIS_SEED, i, p, *tokens.shape).to(tokens.device)
              for p in (POOL, SELECT, HALF)} for i in range(3)]
    model.eval()
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
    report = {"rate": rate.item(), **pairs}
    if types:
        c = min(2 * k, maskable.sum(1).min().item())
        candidates = choose(tokens, c, None, None, 0, noise[2])
        fresh = masked_entropy(model, tokens, candidates)
        report["type_rank_correlation"] = spearman(types(tokens, candidates), fresh)
    return report


# --------------------------------------------------------------------------------------------------
# the demonstration

DEMO = {  # column -> (select, score, pool); clear: the paper read literally
    "random": (None, None, 0), "clear": ("high", clear_entropy, 0),
    **{select: (select, masked_entropy, 2) for select in (*SELECT_RULES, "mix")},
}


def exact_entropy(model, tokens):
    """Entropy (n,) in nats and logits (n, V) of every token of one row (T,) but its ends, each
    masked alone: what the scores approximate, for n forwards instead of one."""
    where = torch.arange(1, len(tokens) - 1)[:, None]
    rows = tokens.repeat(len(where), 1).scatter(1, where, MASK)
    with torch.inference_mode():
        logits = torch.cat([model(x, p)[:, 0] for x, p in zip(rows.split(64), where.split(64))])
    return entropy(logits), logits


def explain(model, tokenizer, text, strategies, rate, seed):
    """A sentence -> a list with a dict per token: piece; entropies `alone` (masked alone), `pool`
    (as high to mix read them; None outside the pool) and `clear`; guesses; masked {strategy: bool}.
    """
    ids = tokenizer.encode(text)
    if not 2 <= len(ids) <= model.shape.seq_len - 2:
        raise UserError(f"the sentence is {len(ids)} token(s) long: this model reads from 2 to "
                        f"{model.shape.seq_len - 2}; put it in quotes")
    tokens = torch.tensor([[CLS, *ids, SEP]])
    k = min(mask_count(rate, len(ids) + 2), len(ids) // 2)  # a pool of 2k must fit
    noise = {p: draw(seed, 0, p, *tokens.shape) for p in (POOL, SELECT, HALF)}
    masked, scores = {}, {}
    for name, (select, how, pool) in strategies.items():
        def score(tokens, candidates):
            H = how(model, tokens, candidates)
            scores[name] = dict(zip(candidates[0].tolist(), H[0].tolist()))
            return H
        positions = choose(tokens, k, how and score, select, pool, noise)
        masked[name] = set(positions[0].tolist())
    H, logits = exact_entropy(model, tokens[0])
    top = logits.softmax(-1).topk(5)
    rows = []
    for i, token in enumerate(ids):
        guesses = [(tokenizer.pieces[v].replace("▁", " ").strip() or "_", p)
                   for v, p in zip(top.indices[i].tolist(), top.values[i].tolist())]
        rows.append({"piece": tokenizer.pieces[token], "alone": H[i].item(), "guesses": guesses,
                     "pool": scores.get("high", {}).get(i + 1),
                     "clear": scores.get("clear", {}).get(i + 1),
                     "masked": {name: i + 1 in masked[name] for name in strategies}})
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="a finished run folder, its model is the scorer")
    parser.add_argument("sentence", nargs="?", help="what to look at")
    parser.add_argument("--mask-rate", type=float, default=0.15, help="share masked (default 0.15)")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default 0)")
    parser.add_argument("--html", metavar="FILE", help="also write the result as a web page")
    parser.error = refuse_command
    a = parser.parse_args()
    if not a.run or not Path(a.run).is_dir():
        raise UserError('give a run folder and a sentence:  python masking.py RUN "A sentence."  '
                        "A run is made in minutes by  python train.py --masking self")
    if not 0 < a.mask_rate <= 0.5 or a.seed < 0:
        raise UserError("--mask-rate must be above 0 and at most 0.5, --seed 0 or more")
    model, tokenizer = load(a.run)
    if not a.sentence:
        raise UserError(f'give a sentence:  python masking.py {a.run} "The function returns it."')
    strategies = dict(DEMO)
    if read_json(Path(a.run) / "config.json")["flags"].get("score_input") == "type":
        types = TypeEntropy(model.shape.vocab_size)
        types.mean, types.seen = load_tensors(Path(a.run) / "checkpoint.pt")["types"]
        strategies["type"] = ("high", lambda model, *where: types(*where), 2)
    rows = explain(model, tokenizer, a.sentence, strategies, a.mask_rate, a.seed)
    most = max(1.0, np.ceil(max(row["alone"] for row in rows)))  # the hot end of the colours
    if a.html:
        page = Path(a.html)
        if page.exists() and not (
                page.is_file() and b"made by masking.py" in page.read_bytes()[:300]):
            raise UserError(f"{page} exists and is not a page of this program: name another")
        write_atomic(page, html_page(rows, a.run, most).encode())
    print(f"{sum(row['masked']['random'] for row in rows)} of {len(rows)} tokens masked. Entropies "
          "in nats: each token masked alone (so are the guesses); a random pool of\ntwice as many "
          "as are masked, all masked at once (high to mix choose by it); the clear text (clear).")
    print_rows(rows, most, sys.stdout.isatty() and not os.environ.get("NO_COLOR"))


if __name__ == "__main__":
    run_script(main)
