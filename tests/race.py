"""How long until a model has learned something: from the first step to a held-out loss.

    python -m tests.race --corpus FILE                # ours, then transformers' BERT
    python -m tests.race --corpus FILE --budget 20    # give theirs 20 times the time ours took

Ours is train.py with its defaults and --masking random. Theirs is transformers' BertForMaskedLM of
the same shape, as it comes: learned positions, initial weights of 0.02. Both read the same blocks
in the same order, without dropout, with the same AdamW, clipping and warm-up. Theirs masks as the
collator of transformers does, and its rate stays at the peak after the warm-up: ours falls to 0
over 2500 steps, and theirs may need more of them.

Three peak rates are tried for theirs, in its quicker form: the head at the masked tokens alone
("gathered"). The best of the three then runs as it is, with logits for every token.

Both are evaluated in the same way: masking.evaluate, on the same held-out masks. The clock stands
still meanwhile, and compilation is in it. Sides run one after the other, each in a process of its
own with the memory setting of data/machine.py.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import masking
import train
from data import arguments, corpus
from data.files import UserError, run_script
from data.flags import check_ranges, defaults, flag_parser
from data.machine import MACHINE_FLAGS, Machine
from model import SIZES, at_places
from tests.bench import their_loss, their_model, their_update

ROOT = Path(__file__).parent.parent
OF_TRAIN = ("corpus", "corpus-tokens", "vocab-size", "seq-len", "cache", "batch-size", "seed")
FLAGS = {
    "Race": [
        ("size", "tiny", tuple(SIZES), "layers and width, as python model.py lists them"),
        ("losses", "6.0,5.0", None, "held-out losses to reach, in falling order"),
        ("rates", "3e-3,1e-3,3e-4", None, "peak rates for theirs"),
        ("budget", 10.0, "above 0", "theirs may take so many times as long as ours did"),
        ("every", 25, "above 0", "steps between evaluations"),
        ("eval-blocks", 256, "above 0", "held-out blocks in an evaluation"),
        ("compile", False, None, "torch.compile, on both sides"),
    ],
    "As in train.py": [row for rows in arguments.FLAGS.values() for row in rows
                       if row[0] in OF_TRAIN],
    "Machine": MACHINE_FLAGS,
}
OURS, GATHERED, AS_IT_IS = "train.py", "transformers, gathered", "transformers, as it is"


class Theirs(nn.Module):
    """transformers' BERT with the interface that masking.evaluate asks for."""

    def __init__(self, args, vocab_size):
        super().__init__()
        self.bert = their_model(args.size, args.seq_len, vocab_size)
        self.shape = SimpleNamespace(vocab_size=vocab_size)

    def forward(self, inputs, positions):
        """inputs (B, T), positions (B, k) -> logits (B, k, V)."""
        return self.bert.cls(at_places(self.bert.bert(inputs).last_hidden_state, positions))


def our_side(flags, machine, text, valid, compiled):
    """-> (the model, its update(step))"""
    flags.compile = compiled
    job, *_ = train.build(flags, machine, text, valid)
    return job.model, lambda step: train.update(flags, job, step)


def their_side(args, flags, machine, text, rate, gathered):
    """-> (the model, its update(step))"""
    torch.manual_seed(args.seed)
    model = Theirs(args, text.tokenizer.vocab_size).to(machine.device)
    optimizer = train.make_optimizer(model, rate, flags.weight_decay)
    inner, warmup = model.bert, round(flags.warmup_frac * flags.steps)  # as long as ours
    if args.compile and gathered:
        inner.bert = machine.compile(inner.bert)
    elif args.compile:
        inner = machine.compile(inner)

    def update(step):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / warmup)
        tokens = corpus.batch_at(text.train, args.seed, step, args.batch_size)
        return their_update(inner, optimizer, machine, lambda inner: their_loss(
            inner, tokens.to(machine.device), gathered))

    return model, update


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def race(args, side, rate, seconds):
    """Train one side in this process until it has reached all losses, or its time is over (0: to
    the end of train.py's schedule) -> what it took."""
    words = [word for name in OF_TRAIN if (value := getattr(args, name.replace("-", "_"))) != ""
             for word in (f"--{name}", str(value))]
    flags, _ = arguments.parse_args([*words, "--size", args.size, "--masking", "random",
                                     "--out", "never-made"])
    machine = Machine(args)
    text = corpus.load(corpus.prepare(flags.corpus, flags.vocab_size, flags.cache,
                                      machine.threads), flags.seq_len, flags.corpus_tokens)
    valid = corpus.with_ends(text.valid[:args.eval_blocks]).to(machine.device)
    if side == OURS:
        model, update = our_side(flags, machine, text, valid, args.compile)
    else:
        model, update = their_side(args, flags, machine, text, rate, side == GATHERED)
    wanted = [float(loss) for loss in args.losses.split(",")]
    reached, spent, step, lowest = [], 0.0, 0, float("inf")
    while len(reached) < len(wanted) and (spent < seconds if seconds else step < flags.steps):
        began = time.perf_counter()
        for _ in range(args.every):
            update(step)
            step += 1
        wait(machine.device)
        spent += time.perf_counter() - began
        loss = masking.evaluate(model, valid, machine)["val_loss"]
        lowest = min(lowest, loss)
        print(f"{side} {rate:g}: step {step}, {spent:.0f} s, loss {loss:.3f}", file=sys.stderr)
        while len(reached) < len(wanted) and loss <= wanted[len(reached)]:
            reached.append([spent, step])
        if not math.isfinite(loss):
            break
    return {"side": side, "rate": rate if rate else flags.lr, "reached": reached, "lowest": lowest,
            "seconds": spent, "steps": step, "batch_tokens": flags.batch_size * flags.seq_len,
            "about": f"{machine.about}, torch {torch.__version__}"}


def race_apart(args, words, side, rate=0.0, seconds=0.0):
    """race() in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.race", *words, "--side", side, "--rate", str(rate),
         "--seconds", str(seconds)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(args.threads or os.cpu_count())})
    if done.returncode:
        raise UserError(f"{side} failed: its complaint is above")
    return json.loads(done.stdout.splitlines()[-1])


def progress_of(run):
    """The smaller the better: many losses reached, the last of them soon, or a low one at least."""
    return -len(run["reached"]), run["reached"][-1][0] if run["reached"] else run["lowest"]


def table(runs, losses):
    """-> the lines of a Markdown table; times over ours, which is the first run."""
    lines = ["| who | peak rate | tokens/s | " + " | ".join(
        f"to {loss}: seconds | steps | tokens | time / ours" for loss in losses)
        + " | lowest loss |", "|" + "---|" * (4 + 4 * len(losses))]
    for run in runs:
        cells = [run["side"], f"{run['rate']:g}",
                 f"{run['steps'] * run['batch_tokens'] / run['seconds']:.0f}"]
        for i in range(len(losses)):
            if i < len(run["reached"]):
                seconds, step = run["reached"][i]
                ours = runs[0]["reached"][i][0] if i < len(runs[0]["reached"]) else None
                cells += [f"{seconds:.1f}", str(step), f"{step * run['batch_tokens'] / 1e6:.2f} M",
                          f"{seconds / ours:.1f}" if ours else "-"]
            else:
                cells += [f"not reached in {run['seconds']:.0f} s", "-", "-", "-"]
        lines.append("| " + " | ".join([*cells, f"{run['lowest']:.2f}"]) + " |")
    return lines


def main():
    parser = flag_parser("python -m tests.race --corpus FILE [FLAGS]", __doc__, FLAGS)
    for name, kind in (("side", str), ("rate", float), ("seconds", float)):
        parser.add_argument(f"--{name}", type=kind, help="used by the script itself")
    typed = vars(parser.parse_args())
    inner = [typed.pop(name, None) for name in ("side", "rate", "seconds")]
    args = Namespace(**{**defaults(FLAGS), **typed})
    check_ranges(args, FLAGS)
    if inner[0]:
        return print(json.dumps(race(args, *inner)))
    words = [word for name, value in typed.items() if name != "compile"
             for word in (f"--{name.replace('_', '-')}", str(value))]
    words += ["--compile"] * args.compile
    runs = [race_apart(args, words, OURS)]
    if importlib.util.find_spec("transformers"):
        limit = args.budget * runs[0]["seconds"]
        tried = [race_apart(args, words, GATHERED, float(rate), limit)
                 for rate in args.rates.split(",")]
        best = min(tried, key=progress_of)
        runs += tried
        if best["reached"]:
            runs.append(race_apart(args, words, AS_IT_IS, best["rate"], limit))
    else:
        print("transformers is not installed: its rows are left out", file=sys.stderr)
    print(f"{runs[0]['about']}, {args.size}, {args.batch_size} rows of {args.seq_len}, seed "
          f"{args.seed}, an evaluation every {args.every} steps, "
          f"{'compiled, ' * args.compile}{time.strftime('%Y-%m-%d')}\n")
    print("\n".join(table(runs, args.losses.split(","))))


if __name__ == "__main__":
    run_script(main)
