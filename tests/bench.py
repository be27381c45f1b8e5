"""How fast are a training step and a fine-tuning step, next to the machine's peak and to others?

    python -m tests.bench                       # some minutes on two cores, no data needed
    python -m tests.bench --size tiny --only self
    python -m tests.bench --size small --vocab-size 30522 --batch-size 256 --compile     # on a GPU

Prints one table. A training row calls train.update, a fine-tuning row glue.fine_tune, as the
scripts do, on random tokens with frequencies as in a language. The cases take turns, and the
figures are medians over the rounds. Ratios are taken within a round: on a machine that is shared
they mean more than the figures.

`peak` is the product of two large square matrices in the same --dtype, measured in every round.
The share of it counts the matrix-product FLOPs that a step really executes: one that computes
logits which nobody reads has a high share and is slow all the same. In fine-tuning only those of
real tokens count, not those of padding.

Where Hugging Face transformers is installed its BERT of the same shape takes the same steps, in the
same way: SDPA, autocast, fused AdamW, clipping, no dropout, 80/10/10 masking as its collator does
it, and logits for every token ("as it is") or for the masked ones alone ("gathered"). It reads one
batch, which is on the device already; ours makes a new one. --compile is for both: of ours the
training forward, as in train.py; of theirs the model with its loss, or, gathered, all but the head,
whose rows vary in number.
"""

import importlib.util
import itertools
import math
import sys
import time
from argparse import Namespace
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import glue
import train
from data import corpus
from data.files import run_script
from data.flags import check_ranges, defaults, flag_parser
from data.machine import MACHINE_FLAGS, Machine
from data.tasks import batches
from data.tokenizer import MASK, N_SPECIAL
from model import SIZES, Bert, Shape

FLAGS = {"Bench": [
    ("size", "mini", tuple(SIZES), "layers and width, as train.py --help lists them"),
    ("vocab-size", 8192, "above 0", "pieces"),
    ("batch-size", 16, "above 0", "rows of an update"),
    ("seq-len", 128, "from 16 to 65536", "tokens of a row, at most in fine-tuning"),
    ("steps", 10, "above 0", "updates of a training case"),
    ("rows", 640, "above 0", "rows of a fine-tuning epoch"),
    ("rounds", 3, "above 0", "how often every case runs"),
    ("only", "", None, "cases whose name has this in it"),
    ("compile", False, None, "torch.compile, on both sides"),
], "Machine": MACHINE_FLAGS}
ARMS = {  # flags of train.py
    "random": "--masking random",
    "self, masked": "--masking self --init-frac 0 --score-input masked",
    "self, unmasked": "--masking self --init-frac 0 --score-input unmasked",
    "self, vocabulary": "--masking self --init-frac 0 --score-input vocabulary",
}
# Tokens in a row, mean and deviation: those of GLUE's training rows with a vocabulary of 8192.
LENGTHS = {"CoLA": (12.9, 4.7), "MNLI": (45.4, 21.2)}


def zipf_tokens(count, vocab_size):
    """Ordinary tokens with frequencies as in a language (Zipf) -> (count,) uint16."""
    p = 1 / (np.arange(vocab_size - N_SPECIAL) + 2.7)
    chosen = np.random.default_rng(0).choice(len(p), count, p=p / p.sum())
    return (N_SPECIAL + chosen).astype(np.uint16)


def dense_flops(layers, width, T, V=0, predicted=0):
    """As model.forward_flops, for a last block that computes every token."""
    d = width
    return layers * T * (24 * d**2 + 4 * T * d) + predicted * (2 * d**2 + 2 * d * V)


# --------------------------------------------------------------------------------------------------
# cases: (args, machine, what) -> step(), the tokens that it reads, the FLOPs that it takes


def training(args, machine, arm):
    """train.update, of one arm."""
    flags, *_ = train.parse_args([
        "--size", args.size, "--vocab-size", str(args.vocab_size), "--seq-len", str(args.seq_len),
        "--batch-size", str(args.batch_size), "--out", "never-made", *ARMS[arm].split(),
        *["--compile"] * args.compile])
    text = SimpleNamespace(
        train=zipf_tokens(64 * args.batch_size * (args.seq_len - 2), args.vocab_size)
        .reshape(-1, args.seq_len - 2), tokenizer=SimpleNamespace(vocab_size=args.vocab_size))
    job, *_ = train.build(flags, machine, text, torch.zeros(1, args.seq_len, dtype=torch.long))
    steps = itertools.count()
    return (lambda: train.update(flags, job, next(steps)), args.batch_size * args.seq_len,
            train.count_flops(flags, job, [0]))


def tuning(args, machine, task):
    """An epoch of glue.fine_tune."""
    rows, labels, lengths, flops = rows_to_tune(args, task)
    recipe = Namespace(**{**defaults({"": glue.FLAGS["Recipe"]}), "epochs": 1, "lr": 1e-3,
                          "embedding_lr": 1e-3, "batch_size": args.batch_size})
    model = glue.Classifier(Bert(Shape(args.vocab_size, *SIZES[args.size], args.seq_len)), 2,
                            recipe.pool_output).to(machine.device)
    return (lambda: glue.fine_tune(model, rows, labels, recipe, 0, machine), lengths.sum(), flops)


def rows_to_tune(args, task):
    """Rows as long as the task's -> [(ids, length of the first sentence)], labels, lengths, and the
    FLOPs of an epoch."""
    rng, (mean, deviation) = np.random.default_rng(0), LENGTHS[task]
    # Lengths are skewed: a lognormal with this mean and deviation.
    sigma = math.log(1 + (deviation / mean) ** 2) ** 0.5
    lengths = np.exp(rng.normal(math.log(mean) - sigma**2 / 2, sigma, args.rows))
    lengths = lengths.round().clip(5, args.seq_len).astype(int)
    tokens = np.split(zipf_tokens(lengths.sum(), args.vocab_size), lengths.cumsum()[:-1])
    flops = 3 * sum(dense_flops(*SIZES[args.size], int(n)) for n in lengths)
    return [(ids, len(ids)) for ids in tokens], [i % 2 for i in range(args.rows)], lengths, flops


def their_model(args, kind):
    """transformers' BERT of this size, in training, without dropout."""
    import transformers

    layers, width = SIZES[args.size]
    return getattr(transformers, kind)(transformers.BertConfig(
        vocab_size=args.vocab_size, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=width // 64, intermediate_size=4 * width, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, max_position_embeddings=args.seq_len,
        attn_implementation="sdpa")).train()


def their_update(model, optimizer, machine, loss_of):
    """A step of theirs, as train.update does it: loss_of(model) -> the loss."""
    with machine.autocast():
        loss = loss_of(model)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def their_training(args, machine, head):
    """A step of transformers' BertForMaskedLM: "as it is", or "gathered"."""
    (layers, width), T, V = SIZES[args.size], args.seq_len, args.vocab_size
    model, gathered = their_model(args, "BertForMaskedLM").to(machine.device), head == "gathered"
    optimizer = train.make_optimizer(model.parameters(), 1e-3, 0.01)
    if args.compile and gathered:
        model.bert = machine.compile(model.bert)
    elif args.compile:
        model = machine.compile(model)
    blocks = zipf_tokens(args.batch_size * (T - 2), V).reshape(-1, T - 2)
    tokens = corpus.with_ends(blocks).to(machine.device)  # (B, T)

    def loss_of(model):
        """Masked as DataCollatorForLanguageModeling does it: a coin for each token."""
        coins = torch.rand(4, *tokens.shape, device=tokens.device)
        masked = (coins[0] < 0.15) & (tokens >= N_SPECIAL)
        labels = tokens.masked_fill(~masked, -100)
        inputs = tokens.masked_fill(masked & (coins[1] < 0.8), MASK)
        another = masked & (coins[1] >= 0.8) & (coins[2] < 0.5)
        inputs = torch.where(another, (coins[3] * V).long(), inputs)
        if not gathered:
            return model(inputs, labels=labels).loss
        hidden = model.bert(inputs).last_hidden_state[masked]
        return F.cross_entropy(model.cls(hidden), labels[masked])

    return (lambda: their_update(model, optimizer, machine, loss_of), tokens.numel(),
            3 * args.batch_size * dense_flops(
                layers, width, T, V, 0.15 * (T - 2) if gathered else T))


def their_tuning(args, machine, task):
    """The epoch of `tuning` with transformers' BertForSequenceClassification: the same batches,
    which have rows of like length together."""
    rows, labels, lengths, flops = rows_to_tune(args, task)
    model = their_model(args, "BertForSequenceClassification").to(machine.device)
    optimizer, labels = train.make_optimizer(model.parameters(), 1e-3, 0.01), torch.tensor(labels)

    def epoch():
        for chosen in batches(lengths, args.batch_size, 0, 0):
            tokens, types, attend = glue.collate([rows[i] for i in chosen], machine.device)
            y = labels[torch.from_numpy(chosen)].to(machine.device)
            their_update(model, optimizer, machine, lambda model: model(
                tokens, attention_mask=attend, token_type_ids=types, labels=y).loss)

    return epoch, lengths.sum(), flops


def peak(args, machine, _):
    """The product of two large square matrices."""
    n = 8192 if machine.device.type == "cuda" else 1024
    a, b, out = torch.randn(3, n, n, device=machine.device).to(getattr(torch, machine.dtype))
    return lambda: torch.mm(a, b, out=out), 0, 2 * n**3


CASES = {  # name -> (function, which, the case with which it is compared)
    "peak": (peak, "", "peak"),
    **{f"train.py, {arm}": (training, arm, "train.py, random") for arm in ARMS},
    **{f"transformers, {head}": (their_training, head, "train.py, random")
       for head in ("as it is", "gathered")},
    **{f"glue.py, {task}": (tuning, task, f"glue.py, {task}") for task in LENGTHS},
    **{f"transformers, {task}": (their_tuning, task, f"glue.py, {task}") for task in LENGTHS},
}


# --------------------------------------------------------------------------------------------------


def measure(name, args, machine):
    """Run a case -> tokens/s, FLOP/s."""
    torch.manual_seed(0)
    torch.compiler.reset()
    function, which, _ = CASES[name]
    step, tokens, flops = function(args, machine, which)
    warm, count = (1, 2) if function in (tuning, their_tuning) else (3, args.steps)
    seconds = []
    for _ in range(warm + count):
        began = time.perf_counter()
        step()
        if machine.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    # What the machine can do is its fastest product; what a step takes, the median of the steps.
    second = min(seconds[warm:]) if function is peak else median(seconds[warm:])
    return tokens / second, flops / second


def table(results):
    """{case: [(tokens/s, FLOP/s) of each round]} -> the lines of a Markdown table."""
    lines = ["| step | tokens/s | time / first | share of peak |", "|---|---|---|---|"]
    for name in list(results)[1:]:  # the first is the peak
        rounds, first = results[name], results.get(CASES[name][2], [])  # --only may leave it out
        time_ratio = [f[0] / r[0] for r, f in zip(rounds, first)]
        share = [r[1] / p[1] for r, p in zip(rounds, results["peak"])]
        lines.append(f"| {name} | {median(r[0] for r in rounds):.0f} | "
                     f"{f'{median(time_ratio):.2f}' if first else '-'} | {median(share):.2f} |")
    return lines


def main():
    parser = flag_parser("python -m tests.bench [FLAGS]", __doc__, FLAGS)
    args = Namespace(**{**defaults(FLAGS), **vars(parser.parse_args())})
    check_ranges(args, FLAGS)
    machine = Machine(args)
    peers = importlib.util.find_spec("transformers") is not None
    if not peers:
        print("transformers is not installed: its rows are left out", file=sys.stderr)
    results = {name: [] for name in CASES if name == "peak" or args.only in name
               and (peers or "transformers" not in name)}
    for name in list(results) * args.rounds:
        results[name].append(measure(name, args, machine))
        print("{}: {:.0f} tokens/s, {:.4g} FLOP/s".format(name, *results[name][-1]),
              file=sys.stderr)
    gflops = median(speed for _, speed in results["peak"]) / 1e9
    print(f"{machine.about}, torch {torch.__version__}, {args.size}, {args.vocab_size} pieces, "
          f"{args.batch_size} rows of {args.seq_len}, {'compiled, ' * args.compile}peak "
          f"{gflops:.0f} GFLOP/s, {args.rounds} rounds, {time.strftime('%Y-%m-%d')}\n",
          *table(results), sep="\n")


if __name__ == "__main__":
    run_script(main)
