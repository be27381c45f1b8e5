"""Two questions to a trained model: how far does it look, and how good are its cheap scores?

    python -m tests.probe runs/random-0

*Reach*: the loss at masked tokens, in held-out blocks masked as in every evaluation, when the
attention of all heads is cut to the tokens at most so many places away ([CLS] stays in sight: heads
rest there). A narrow window also hurts because no model was trained with one; but where a wider one
helps no more, the model makes little use of what is farther away. `repeated`: rare tokens (below 1
in 10 000) that stand once more, in sight, more than 8 places away; `single`: those that stand there
once. A model that looks for a token's other place gains more on the first from a window above 8.

*Scores*: Spearman's rank correlation, within a block and over all tokens, of three kinds of entropy
with the exact one, for which each token is masked alone: that with a random share of the tokens
masked at once (a pool of 2 hides twice the mask rate), and that of the unmasked text.
"""

import argparse

import numpy as np
import torch

from data.corpus import with_ends
from data.files import UserError, run_script
from data.inspection import exact_entropy
from data.machine import Machine
from data.metrics import spearman
from data.runs import read_config
from masking import SCORE_INPUT, choose_at_random, draw, mask_count, mask_for_evaluation
from model import load
from train import load_text

WINDOWS = (2, 8, 32)
SHARES = (0.15, 0.30, 0.45, 0.60)


@torch.inference_mode()
def losses(model, inputs, positions, labels, window):
    """Loss in nats (N, k) of each masked token, seen from `window` places around it; 0: all."""
    places = torch.arange(inputs.shape[1])

    def loss(x, p, y, attend=None):
        return -model(x, p, attend=attend).log_softmax(-1).gather(-1, y[..., None])[..., 0]

    result = []
    for x, p, y in zip(inputs.split(64), positions.split(64), labels.split(64)):
        parts = [loss(x, p, y)] if not window else []
        for i in range(p.shape[1] if window else 0):  # one at a time: each has its own window
            attend = (places - p[:, i:i + 1]).abs() <= window  # (64, T)
            attend[:, 0] = True
            parts.append(loss(x, p[:, i:i + 1], y[:, i:i + 1], attend))
        result.append(torch.cat(parts, 1))
    return torch.cat(result)


def elsewhere(inputs, positions, labels):
    """Does a masked token stand in sight elsewhere in its block? -> (N, k) twice: more than 8
    places away; nowhere."""
    distance = (positions[..., None] - torch.arange(inputs.shape[1])).abs()  # (N, k, T)
    same = inputs[:, None] == labels[..., None]
    return (same & (distance > 8)).any(-1), ~(same & (distance > 0)).any(-1)


def print_reach(model, tokens, counts):
    """A table: for each window the loss of all, repeated and single tokens, and what is lost
    against seeing everything, with its standard error."""
    positions, inputs, labels = mask_for_evaluation(tokens, model.shape.vocab_size)
    counts = torch.as_tensor(counts).double()
    rare = (counts / counts.sum())[labels] < 1e-4
    again, once = elsewhere(inputs, positions, labels)
    groups = {"all": labels >= 0, "rare, repeated": rare & again, "rare, single": rare & once}
    groups = {name: group for name, group in groups.items() if group.any()}
    print("| in sight |", " | ".join(f"{name} ({group.sum()}) | lost"
                                     for name, group in groups.items()), "|")
    print("|---|" + "---|---|" * len(groups))
    whole = losses(model, inputs, positions, labels, 0)
    for window in (*WINDOWS, 0):
        loss, cells = losses(model, inputs, positions, labels, window), []
        for group in groups.values():
            lost = (loss - whole)[group]
            error = lost.std(correction=0) / len(lost) ** 0.5
            cells += [f"{loss[group].mean():.2f}", f"{lost.mean():+.3f} +- {error:.3f}"]
        print(f"| {f'+-{window}' if window else 'everything'} |", " | ".join(cells), "|")


def print_scores(model, tokens):
    """A table: how each cheap score ranks the tokens, next to the exact entropies."""
    exact = exact_entropy(model, tokens)
    T, noise = tokens.shape[1], draw(0, 0, *tokens.shape)
    scores = {}
    for share in SHARES:
        places = choose_at_random(tokens, mask_count(share, T), noise)
        H = SCORE_INPUT["masked"](model, tokens, places)
        scores[f"masked, {share:.0%} hidden"] = places, H
    scores["unmasked"] = places, SCORE_INPUT["unmasked"](model, tokens, places)
    print("| entropy | nats | Spearman within a block | over all tokens |\n|---|---|---|---|")
    for name, (places, H) in scores.items():
        alone = exact.gather(1, places)
        within = np.mean([spearman(a, b) for a, b in zip(H, alone)])
        print(f"| {name} | {H.mean():.2f} | {within:.3f} | {spearman(H, alone):.3f} |")
    print(f"| exact | {exact.nanmean():.2f} | | |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a finished run folder")
    parser.add_argument("--blocks", type=int, default=256, help="held-out blocks (default 256)")
    args = parser.parse_args()
    if args.blocks < 1:
        raise UserError("--blocks must be above 0")
    config = read_config(args.run)
    flags = argparse.Namespace(**config["flags"])
    flags.out, flags.device, flags.dtype = args.run, "cpu", "float32"
    text = load_text(flags, config, Machine(flags))
    model, _ = load(args.run)
    tokens = with_ends(text.valid[:args.blocks])  # (N, T)
    print(f"{args.run}: {len(tokens)} held-out blocks\n")
    print_reach(model, tokens, text.counts)
    print()
    print_scores(model, tokens[:max(1, args.blocks // 4)])  # a forward per token


if __name__ == "__main__":
    run_script(main)
