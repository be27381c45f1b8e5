"""How fast are a training step and a fine-tuning step, next to the machine's peak and to others?

    python -m tests.bench                       # some ten minutes on two cores, no data needed
    python -m tests.bench --size tiny --vocab-size 30522
    python -m tests.bench --size small --vocab-size 30522 --batch-size 256 --compile     # on a GPU

Prints one table. A training row calls train.update, a fine-tuning row glue.fine_tune, as the
scripts do, on random tokens with frequencies as in a language. Each case is a process of its own,
so each has its own peak memory; they take turns, and the figures are medians over the rounds.
Ratios are taken within a round: on a machine that is shared they mean more than the figures.

`peak` is the product of two large square matrices in the same --dtype, measured in every round.
The share of it counts the matrix-product FLOPs that a step really executes: one that computes
logits which nobody reads has a high share and is slow all the same. In fine-tuning only those of
real tokens count, not those of padding. Encoding a text has none.

Where Hugging Face transformers is installed its BERT of the same shape takes the same steps, in the
same way: the memory setting of data/machine.py, SDPA, autocast, fused AdamW, clipping, no dropout,
80/10/10 masking as its collator does it, and logits for every token ("as it is") or for the masked
ones alone ("gathered"). It reads one batch, which is on the device already; ours makes a new one.
--compile is for both: of ours the training forward, as in train.py; of theirs the model with its
loss, or, gathered, all but the head, whose rows vary in number.
"""

import importlib.util
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import glue
import train
from data import arguments, corpus
from data.files import UserError, progress, read_json, run_script
from data.flags import check_ranges, defaults, flag_parser
from data.machine import MACHINE_FLAGS, Machine
from data.tasks import batches
from data.text import find_files, read_documents
from data.tokenizer import MASK, N_SPECIAL, Tokenizer, normalize
from model import SIZES, Bert, Shape
from train import make_optimizer

ROOT = Path(__file__).parent.parent
FLAGS = {"Bench": [
    ("size", "mini", tuple(SIZES), "layers and width, as python model.py lists them"),
    ("vocab-size", 8192, "above 0", "pieces"),
    ("batch-size", 16, "above 0", "rows of an update"),
    ("seq-len", 128, "from 16 to 65536", "tokens of a row, at most in fine-tuning"),
    ("steps", 10, "above 0", "updates of a training case"),
    ("rows", 640, "above 0", "rows of a fine-tuning epoch"),
    ("corpus", "docs", "path", "the text that is prepared"),
    ("cache", arguments.DEFAULTS["cache"], "path", "where it is kept"),
    ("rounds", 3, "above 0", "how often every case runs"),
    ("only", "", None, "cases whose name has this in it"),
    ("compile", False, None, "torch.compile, on both sides"),
], "Machine": MACHINE_FLAGS}
ARMS = {  # what differs from the random arm
    "random": {},
    "entropy": {"masking": "entropy"},
    "self, masked": {"masking": "self", "score_input": "masked"},
    "self, unmasked": {"masking": "self", "score_input": "unmasked"},
    "self, unmasked, pool 0": {"masking": "self", "score_input": "unmasked", "pool": 0},
    "self, vocabulary": {"masking": "self", "score_input": "vocabulary"},
    "random + distillation": {"distill": "complete"},
    "self + distillation": {"masking": "self", "score_input": "masked", "distill": "complete"},
}
# Tokens in a row, mean and deviation: those of GLUE's training rows with a vocabulary of 8192.
LENGTHS = {"CoLA": (12.9, 4.7), "MNLI": (45.4, 21.2)}


def zipf_tokens(count, vocab_size, seed=0):
    """Ordinary tokens with frequencies as in a language (Zipf) -> (count,) uint16."""
    p = 1 / (np.arange(vocab_size - N_SPECIAL) + 2.7)
    rng = np.random.default_rng(seed)
    return (N_SPECIAL + rng.choice(len(p), count, p=p / p.sum())).astype(np.uint16)


def rows_like(task, count, vocab_size, longest=128):
    """-> [(ids, length of the first sentence)] with sentence lengths like the task's."""
    rng, (mean, deviation) = np.random.default_rng(0), LENGTHS[task]
    # Lengths are skewed: a lognormal with this mean and deviation.
    sigma = math.log(1 + (deviation / mean) ** 2) ** 0.5
    lengths = np.exp(rng.normal(math.log(mean) - sigma**2 / 2, sigma, count))
    lengths = lengths.round().clip(5, longest).astype(int)
    tokens = np.split(zipf_tokens(lengths.sum(), vocab_size), lengths.cumsum()[:-1])
    return [(ids, len(ids)) for ids in tokens]


# --------------------------------------------------------------------------------------------------
# cases: (args, machine, ...) -> step(), the tokens that it reads, the FLOPs that it takes


def random_job(words, machine, **changes):
    """What train.py makes of these flags, on random tokens -> (flags, Job)."""
    with redirect_stdout(sys.stderr):  # a preset says what it sets
        flags, _ = arguments.parse_args([*words, "--out", "never-made"])
    vars(flags).update(changes)
    T, V = flags.seq_len, flags.vocab_size
    text = SimpleNamespace(
        train=zipf_tokens(64 * flags.batch_size * (T - 2), V).reshape(-1, T - 2),
        counts=np.ones(V, dtype=np.int64),
        tokenizer=SimpleNamespace(vocab_size=V, pieces=["▁a"] * V))
    job, *_ = train.build(flags, machine, text, torch.zeros(1, T, dtype=torch.long))
    if flags.masking == "entropy" or flags.distill != "off":
        job.teacher = Bert(job.model.shape).to(machine.device).eval().requires_grad_(False)
    return flags, job


def training(args, machine, arm):
    """train.update, of one arm."""
    words = [word for name in ("size", "vocab_size", "seq_len", "batch_size")
             for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    words += ["--masking", "random", *["--compile"] * args.compile]
    flags, job = random_job(words, machine, **ARMS[arm])
    steps = itertools.count()
    return (lambda: train.update(flags, job, next(steps)), args.batch_size * args.seq_len,
            train.count_flops(flags, job.model.shape, job.teacher, [0]))


def their_model(size, seq_len, vocab_size, kind="BertForMaskedLM"):
    """transformers' BERT of this size, in training, without dropout."""
    import transformers

    layers, width = SIZES[size]
    return getattr(transformers, kind)(transformers.BertConfig(
        vocab_size=vocab_size, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=width // 64, intermediate_size=4 * width, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, max_position_embeddings=seq_len,
        attn_implementation="sdpa")).train()


def their_loss(model, tokens, gathered):
    """The loss of tokens (B, T), masked as DataCollatorForLanguageModeling does it: a coin each."""
    coins = torch.rand(4, *tokens.shape, device=tokens.device)
    masked = (coins[0] < 0.15) & (tokens >= N_SPECIAL)
    labels = tokens.masked_fill(~masked, -100)
    inputs = tokens.masked_fill(masked & (coins[1] < 0.8), MASK)
    another = masked & (coins[1] >= 0.8) & (coins[2] < 0.5)
    inputs = torch.where(another, (coins[3] * model.config.vocab_size).long(), inputs)
    if not gathered:
        return model(inputs, labels=labels).loss
    hidden = model.bert(inputs).last_hidden_state[masked]
    return F.cross_entropy(model.cls(hidden), labels[masked])


def their_update(model, optimizer, machine, loss_of):
    """A step of theirs, as train.update does it: loss_of(model) -> the loss."""
    with machine.autocast():
        loss = loss_of(model)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def transformers_training(args, machine, gathered):
    """A step of transformers' BertForMaskedLM."""
    (layers, width), T, V = SIZES[args.size], args.seq_len, args.vocab_size
    model = their_model(args.size, T, V).to(machine.device)
    optimizer = make_optimizer(model, 1e-3, 0.01)
    if args.compile and gathered:
        model.bert = machine.compile(model.bert)
    elif args.compile:
        model = machine.compile(model)
    blocks = zipf_tokens(args.batch_size * (T - 2), V).reshape(-1, T - 2)
    tokens = corpus.with_ends(blocks).to(machine.device)
    predicted = 0.15 * (T - 2) if gathered else T
    return (lambda: their_update(model, optimizer, machine,
                                 lambda model: their_loss(model, tokens, gathered)),
            tokens.numel(),
            3 * args.batch_size * dense_flops(layers, width, T, V, predicted))


def dense_flops(layers, width, T, V=0, predicted=0):
    """As model.forward_flops, for a last block that computes every token."""
    d = width
    return layers * T * (24 * d**2 + 4 * T * d) + predicted * (2 * d**2 + 2 * d * V)


def tuning(args, machine, task):
    """An epoch of glue.fine_tune."""
    rows, labels, lengths, flops = rows_to_tune(args, task)
    recipe = Namespace(**{**defaults({"": glue.FLAGS["Recipe"]}), "epochs": 1, "lr": 1e-3,
                          "embedding_lr": 1e-3, "batch_size": args.batch_size})
    model = glue.Classifier(Bert(Shape(args.vocab_size, *SIZES[args.size], args.seq_len)), 2,
                            recipe.pool_output).to(machine.device)
    return (lambda: glue.fine_tune(model, rows, labels, recipe, 0, machine), lengths.sum(), flops)


def rows_to_tune(args, task):
    """-> rows, labels, lengths, and the FLOPs of an epoch over them."""
    rows = rows_like(task, args.rows, args.vocab_size, args.seq_len)
    lengths = np.array([len(ids) for ids, _ in rows])
    flops = 3 * sum(dense_flops(*SIZES[args.size], int(n)) for n in lengths)
    return rows, [i % 2 for i in range(args.rows)], lengths, flops


def transformers_tuning(args, machine, task):
    """The same epoch with transformers' BertForSequenceClassification: the same batches, which have
    rows of like length together."""
    rows, labels, lengths, flops = rows_to_tune(args, task)
    model = their_model(args.size, args.seq_len, args.vocab_size,
                        "BertForSequenceClassification").to(machine.device)
    optimizer, labels = make_optimizer(model, 1e-3, 0.01), torch.tensor(labels)

    def epoch():
        for chosen in batches(lengths, args.batch_size, 0, 0):
            tokens, types, attend = glue.collate([rows[i] for i in chosen], machine.device)
            y = labels[torch.from_numpy(chosen)].to(machine.device)
            their_update(model, optimizer, machine, lambda model: model(
                tokens, attention_mask=attend, token_type_ids=types, labels=y).loss)

    return epoch, lengths.sum(), flops


def preparation(args, machine, whole):
    """Encode a text: from its file to train.bin, or its paragraphs by sentencepiece alone."""
    with redirect_stdout(sys.stderr):
        folder = corpus.prepare(args.corpus, args.vocab_size, args.cache, machine.threads)
    paths = find_files(args.corpus, Path(args.cache), machine.threads)
    meta, tokenizer = read_json(folder / "meta.json"), Tokenizer(folder / "tokenizer.model")
    out = tempfile.TemporaryDirectory()
    paragraphs = [] if whole else [normalize(" " + paragraph) for _, document in read_documents(
        paths, args.corpus) for paragraph in document]

    def encode():
        if not whole:
            return tokenizer.sp.encode(paragraphs, num_threads=machine.threads)
        corpus.encode_documents(paths, args.corpus, tokenizer, meta["documents"],
                                meta["characters"], Path(out.name), machine.threads)

    return encode, meta["train_tokens"] + meta["valid_tokens"], 0


def peak(args, machine):
    """The product of two large square matrices."""
    n = 8192 if machine.device.type == "cuda" else 1024
    a, b, out = torch.randn(3, n, n, device=machine.device).to(getattr(torch, machine.dtype))
    return lambda: torch.mm(a, b, out=out), 0, 2 * n**3


CASES = {  # name -> (function, its arguments, the case with which it is compared)
    "peak": (peak, (), "peak"),
    **{f"train.py, {arm}": (training, (arm,), "train.py, random") for arm in ARMS},
    "transformers, as it is": (transformers_training, (False,), "train.py, random"),
    "transformers, gathered": (transformers_training, (True,), "train.py, random"),
    **{f"glue.py, {task}": (tuning, (task,), f"glue.py, {task}") for task in LENGTHS},
    **{f"transformers, {task}": (transformers_tuning, (task,), f"glue.py, {task}")
       for task in LENGTHS},
    "encoder, data/corpus.py": (preparation, (True,), "encoder, data/corpus.py"),
    "encoder, sentencepiece": (preparation, (False,), "encoder, data/corpus.py"),
}


def measure(name, args):
    """Run a case in this process -> tokens/s, FLOP/s, FLOPs a token, MB."""
    machine = Machine(args)
    torch.manual_seed(0)
    function, others, _ = CASES[name]
    step, tokens, flops = function(args, machine, *others)
    slow = function in (tuning, transformers_tuning, preparation)
    warm, count = (1, 2) if slow else (3, args.steps)
    seconds = []
    for _ in range(warm + count):
        if machine.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        if machine.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    # What the machine can do is its fastest product; what a step takes, the median of the steps.
    second = min(seconds[warm:]) if function is peak else statistics.median(seconds[warm:])
    return {"tokens_per_s": float(tokens / second), "flops_per_s": flops / second,
            "flops_per_token": float(flops / tokens) if tokens else 0.0,
            "memory_mb": machine.peak_memory() >> 20, "about": machine.about}


# --------------------------------------------------------------------------------------------------


def measure_apart(name, words, threads):
    """measure() in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "tests.bench", *words, "--only", name, "--case"],
                          cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": str(threads or os.cpu_count())})
    if done.returncode:
        raise UserError(f"{name} failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(results):
    """{case: [what each round gave]} -> the lines of a Markdown table. Ratios to the first case of
    a kind and to the peak are medians over the rounds."""
    lines = ["| step | tokens/s | time / first | FLOPs / first | share of peak | memory (MB) |",
             "|---|---|---|---|---|---|"]
    for name, rounds in results.items():
        first = results.get(CASES[name][2])
        if name == "peak":
            continue

        def median(of):
            return statistics.median(map(of, rounds, first or rounds, results["peak"]))

        time_ratio = median(lambda r, f, _: f["tokens_per_s"] / r["tokens_per_s"])
        flops_ratio = rounds[0]["flops_per_token"] / ((first or rounds)[0]["flops_per_token"] or 1)
        share = median(lambda r, _, p: r["flops_per_s"] / p["flops_per_s"])
        ratios = f"{time_ratio:.2f} | {flops_ratio:.2f}" if first else "- | -"
        lines.append(f"| {name} | {median(lambda r, *_: r['tokens_per_s']):.0f} | {ratios} | "
                     f"{share:.2f} | {median(lambda r, *_: r['memory_mb']):.0f} |")
    return lines


def main():
    parser = flag_parser("python -m tests.bench [FLAGS]", __doc__, FLAGS)
    parser.add_argument("--case", action="store_true", help="measure --only here, print JSON")
    typed = vars(parser.parse_args())
    case = typed.pop("case", False)
    args = Namespace(**{**defaults(FLAGS), **typed})
    check_ranges(args, FLAGS)
    if case:
        return print(json.dumps(measure(args.only, args)))
    peers = importlib.util.find_spec("transformers") is not None
    if not peers:
        print("transformers is not installed: its rows are left out", file=sys.stderr)
    names = [name for name in CASES if name == "peak" or args.only in name
             and (peers or "transformers" not in name)]
    words = [word for name, value in typed.items() if name not in ("only", "compile")
             for word in (f"--{name.replace('_', '-')}", str(value))]
    words += ["--compile"] * args.compile
    results, failed = {name: [] for name in names}, {}
    with progress(total=args.rounds * len(names), unit=" cases", unit_scale=False) as bar:
        for name in names * args.rounds:
            bar.set_description(name)
            try:
                results[name].append(measure_apart(name, words, args.threads))
                bar.write(f"{name}: {json.dumps(results[name][-1])}", file=sys.stderr)
            except UserError as error:  # the others are worth having
                failed[name] = str(error)
            bar.update()
    if "peak" in failed:
        raise UserError(failed["peak"])
    results = {name: rounds for name, rounds in results.items() if name not in failed}
    gflops = statistics.median(r["flops_per_s"] for r in results["peak"]) / 1e9
    print(f"{results['peak'][0]['about']}, torch {torch.__version__}, {args.size}, "
          f"{args.vocab_size} pieces, {args.batch_size} rows of {args.seq_len}, "
          f"{'compiled, ' * args.compile}peak {gflops:.0f} GFLOP/s, {args.rounds} rounds, "
          f"{time.strftime('%Y-%m-%d')}\n")
    print("\n".join(table(results)))
    if failed:
        raise UserError("; ".join(failed.values()))


if __name__ == "__main__":
    run_script(main)
