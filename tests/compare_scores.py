"""How masked and clear scores rank the tokens of held-out sentences, next to the exact entropy.

    python -m tests.compare_scores runs/self-0 [NUMBER OF SENTENCES, default 200]

All three are entropies of one model for the same tokens, a random pool of 30 % of each sentence as
in training: `masked` sees the whole pool masked at once, `clear` the intact sentence, `exact` masks
one token at a time (n forwards). Prints Spearman's correlation over all the tokens, and its mean
within a sentence, which is what a choice of k tokens in a row depends on.
"""

import sys
from pathlib import Path

import numpy as np
import torch

import masking as M
from data import corpus
from data.files import UserError, read_json, run_script
from data.metrics import spearman
from data.tokenizer import CLS, N_SPECIAL, SEP
from model import load


def held_out_sentences(text, longest):
    """Token ids of the held-out sentences of 10 to `longest` tokens, in order."""
    ends = [i for i, piece in enumerate(text.tokenizer.pieces) if piece in (".", "?", "!", "[SEP]")]
    stream = text.valid.ravel().astype(np.int64)
    for part in np.split(stream, np.flatnonzero(np.isin(stream, ends)) + 1):
        part = part[part >= N_SPECIAL]
        if 10 <= len(part) <= longest:
            yield part


def main():
    if len(sys.argv) not in (2, 3) or not (sys.argv[2:] or ["1"])[0].isdigit():
        raise UserError("usage: python -m tests.compare_scores RUN [SENTENCES]")
    run, most = sys.argv[1], int((sys.argv[2:] or [200])[0])
    model, tokenizer = load(run)
    flags = read_json(Path(run) / "config.json")["flags"]
    text = corpus.load(corpus.prepare(flags["corpus"], flags["vocab_size"], flags["cache"]),
                       model.shape.seq_len)
    if text.tokenizer.pieces != tokenizer.pieces:
        raise UserError(f"the corpus of {run} is not what it was")
    scores = {"masked": [], "clear": [], "exact": []}
    for step, ids in enumerate(held_out_sentences(text, min(60, model.shape.seq_len - 2))):
        if step == most:
            break
        tokens = torch.tensor([[CLS, *ids, SEP]])
        c = 2 * M.mask_count(0.15, tokens.shape[1])
        noise = {M.SELECT: M.draw(0, step, M.SELECT, *tokens.shape)}
        candidates = M.choose(tokens, c, None, None, 0, noise)
        scores["masked"].append(M.masked_entropy(model, tokens, candidates)[0])
        scores["clear"].append(M.clear_entropy(model, tokens, candidates)[0])
        scores["exact"].append(M.exact_entropy(model, tokens[0])[0][candidates[0] - 1])
    if not scores["exact"]:
        raise UserError("there is no held-out sentence of 10 to 60 tokens")
    tokens = sum(map(len, scores["exact"]))
    print(f"{run}: {len(scores['exact'])} held-out sentences, {tokens} tokens")
    print("Spearman           all tokens   within a sentence")
    for a, b in (("masked", "clear"), ("masked", "exact"), ("clear", "exact")):
        within = np.mean([spearman(x, y) for x, y in zip(scores[a], scores[b])])
        over_all = spearman(torch.cat(scores[a]), torch.cat(scores[b]))
        print(f"{a + ' and ' + b:18} {over_all:10.3f}   {within:17.3f}")
    for name, H in scores.items():
        print(f"mean {name:6} entropy {torch.cat(H).mean().item():.2f} nats")


if __name__ == "__main__":
    run_script(main)
