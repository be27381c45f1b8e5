"""How far does a model look? Its loss on masked tokens when it may see only what is near them.

    python -m data.reach runs/random-0

Held-out blocks, masked as in every evaluation. For each masked token the model runs once with the
attention of all heads cut to the tokens at most so many places away ([CLS] stays in sight: heads
rest there). A narrow window also hurts because no model was trained with one; but where a wider one
helps no more, the model makes little use of what is farther away. `repeated`: rare tokens (below 1
in 10 000) that stand once more, in sight, more than 8 places away; `single`: those that stand there
once. A model that looks for a token's other place gains more on the first from a window above 8.
"""

import argparse

import torch

import masking as M
from data import corpus as corpora
from data.files import UserError, check_range, refuse_command, run_script
from data.runs import read_config
from model import load, pick_machine
from train import DEFAULTS

WINDOWS = (2, 8, 32)


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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a finished run folder")
    for name in ("corpus", "cache"):
        parser.add_argument(f"--{name}", help="where it is, if not where the run had it")
    parser.add_argument("--blocks", type=int, default=1024, help="held-out blocks (default 1024)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.error = refuse_command
    a = parser.parse_args()
    check_range(vars(a), "blocks", lambda v: v > 0, "above 0")
    check_range(vars(a), "threads", lambda v: v >= 0, "0 or more")
    pick_machine("cpu", "float32", a.threads)
    model, tokenizer = load(a.run)
    config = read_config(a.run, DEFAULTS)
    flags = {**DEFAULTS, **config["flags"]}
    corpus = a.corpus or flags["corpus"]
    folder = corpora.prepare(corpus, flags["vocab_size"], a.cache or flags["cache"])
    text = corpora.load(folder, flags["seq_len"], flags["corpus_tokens"])
    if text.sha256 != config.get("corpus_sha256"):
        raise UserError(f"--corpus {corpus} is not the text that {a.run} was trained on")
    tokens = corpora.with_ends(text.valid[:a.blocks])  # (N, T)
    positions, inputs, labels = M.mask_for_evaluation(tokens, model.shape.vocab_size)

    counts = torch.as_tensor(text.counts).double()
    rare = (counts / counts.sum())[labels] < 1e-4
    again, once = elsewhere(inputs, positions, labels)
    groups = {"all": labels >= 0, "rare, repeated": rare & again, "rare, single": rare & once}
    groups = {name: group for name, group in groups.items() if group.any()}
    print(f"{a.run}: loss in nats, and what is lost against seeing everything +- a standard error")
    heads = [f"{name} ({group.sum()})" for name, group in groups.items()]
    print(f"{'in sight':10}", *(f"{head:>26}" for head in heads))
    whole = losses(model, inputs, positions, labels, 0)
    for window in WINDOWS:
        loss = losses(model, inputs, positions, labels, window)
        cells = []
        for group in groups.values():
            lost = (loss - whole)[group]
            error = lost.std(correction=0) / max(1, len(lost)) ** 0.5
            cells.append(f"{loss[group].mean():10.2f}  {lost.mean():+6.3f} +- {error:.3f}")
        print(f"{f'+-{window}':10}", *cells)
    print(f"{'everything':10}", *(f"{whole[group].mean():10.2f}{'':16}" for group in
                                  groups.values()))


if __name__ == "__main__":
    run_script(main)
