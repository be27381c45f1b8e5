"""Pretrain a small BERT with a masking strategy. One flat script: flags, one update, the loop.

    python train.py                              # self-masking, offline, minutes on a laptop
    python train.py --masking random             # the baseline, on the same data in the same order
    python train.py --masking entropy --teacher runs/random-0
    python train.py --resume runs/self-0         # go on after any interruption, bit for bit
    python train.py --eval runs/self-0           # print the held-out loss of a finished run again
    torchrun --nproc-per-node=2 train.py         # several GPUs, each with a share of the batch

The method is in update() and where_to_mask(): begin there. What stands before them is flags.

A run is a folder: config.json, tokenizer.model, log.jsonl, checkpoint.pt, model.pt.
Every random draw is a function of (seed, step, row or micro-batch): on a CPU, with the same torch,
threads and flags and without --compile, a resumed run equals an uninterrupted one bit for bit.
"""

import json
import math
import os
import shlex
import signal
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import masking
from data import corpus
from data.download import NAMED
from data.files import UserError, catch_signals, out_of_memory, progress, run_script
from data.flags import check_ranges, defaults, flag_parser
from data.inspection import diagnose, token_kinds
from data.machine import MACHINE_FLAGS, RANK, WORLD, Machine
from data.runs import (
    WITHOUT_CONTEXT, Run, State, check_new, less_memory, load_text, open_earlier, read_config,
    resume_command,
)
from model import SIZES, Bert, Shape, copy_token_type, copy_weights, forward_flops, load

# --------------------------------------------------------------------------------------------------
# flags: name, default (the laptop preset; None: follows from others), what is allowed, help

FLAGS = {
    "Run": [
        ("out", "", "path", "run folder, never overwritten (default runs/<masking>-<seed>)"),
        ("seed", 0, "below 2^63", "of initial weights, data order and masks: pair arms by it"),
    ],
    "Data": [
        ("corpus", "docs", "path", "docs: the English in your Python, torch and numpy; wikitext2, "
         "wikitext103, bookcorpus: downloaded; or a text file (plain, .gz, .xz, .bz2) or a folder "
         "of them, a paragraph a line, a blank line between documents"),
        ("corpus-tokens", 0, "0 or more", "use only the first so many training tokens; 0: all"),
        ("vocab-size", 8192, "above 0", "pieces of the tokenizer that is learned from the corpus"),
        ("seq-len", 128, "from 16 to 65536", "tokens in a block, [CLS] and [SEP] included"),
    ],
    "Model": [
        ("size", "tiny", tuple(SIZES), "layers and width, as python model.py lists them"),
        ("layers", 0, "0 or more", "overrides --size; 0: as the size says"),
        ("width", 0, "0 or more", "overrides --size, a multiple of 64; 0: as the size says"),
        ("positions", "rotary", ("rotary", "learned"), "learned is BERT as published"),
        ("rotary-base", 100.0, "above 0", "frequency base of rotary positions; small is local"),
        ("local-start", 1.0, "0 or more", "initial query and key bias, with rotary; 0: off"),
        ("init-std", 0.05, "above 0", "deviation of the initial weights; BERT: 0.02"),
        ("dropout", 0.0, "from 0 to below 1", "on embeddings, attention, block outputs; BERT: 0.1"),
        ("init-from", "", "path", "begin with the weights of this finished run (every second layer "
         "of a deeper one); optimiser, schedule and step are new"),
    ],
    "Masking": [
        ("masking", "self", tuple(masking.MASKING), "anywhere; where a --teacher is uncertain; "
         "where the model itself is"),
        ("teacher", "", "path", "finished run that is asked (--masking entropy) and that teaches "
         "(--distill): the paper's external reference model"),
        ("select", "mix", (*masking.SELECT, "rise"), "which entropies: highest, lowest, nearest "
         "the row's median, in proportion, half highest and half random; low first, high last"),
        ("score-input", None, (*masking.SCORE_INPUT, "vocabulary"), "who is asked reads: the text "
         "without the candidates; the text; the same, once before training (entropy); nothing, a "
         "running mean per vocabulary item is looked up (default of self; of entropy: masked)"),
        ("pool", 2, "0 or more", "candidates are a random pool of so many times k; 0: all tokens"),
        ("init-frac", None, "from 0 to below 1", "share of the run that masks at random first "
         "(self: 0.15, else 0)"),
        ("static", False, None, "a block is masked at the same places in every epoch"),
        ("mask-rate", 0.15, "above 0 and at most 1", "share of the tokens that are masked"),
        ("mask-rate-end", None, "above 0 and at most 1", "reached linearly (default: constant)"),
    ],
    "Distillation": [
        ("distill", "off", ("off", "complete", "after-init"), "learn from the --teacher, too: "
         "never, always, or after --init-frac"),
        ("alpha", 0.5, "above 0 and at most 1", "weight of the teacher against the true tokens"),
        ("tau", 2.0, "above 0", "temperature of both distributions"),
    ],
    "Optimisation": [
        ("steps", 2500, "above 0", "updates in the whole run"),
        ("flops-of", "", "path", "instead of --steps: the FLOPs that this finished run spent"),
        ("batch-size", 16, "above 0", "blocks in an update: part of the method"),
        ("lr", None, "above 0", "peak learning rate (default 3e-3, from width 256 on 1e-3)"),
        ("warmup-frac", 0.05, "from 0 to below 1", "share of the run over which the rate rises"),
        ("decay-frac", 1.0, "from 0 to 1", "share of the run, its end, over which the rate falls "
         "to 0; 1: from the warm-up on; 0: it never falls"),
        ("weight-decay", 0.01, "0 or more", "of matrices and embeddings, not of vectors"),
        ("clip", 1.0, "above 0", "largest norm of the gradient"),
    ],
    "Machine": [
        *MACHINE_FLAGS,
        ("micro-batch", 0, "0 or more", "blocks in a forward, for less memory; divides the batch"),
        ("compile", False, None, "torch.compile the training forward (not bit for bit)"),
        ("cache", os.path.relpath(Path(__file__).parent / "data" / "cache"), "path",
         "where prepared corpora are kept"),
    ],
    "Log": [
        ("log-every", 10, "above 0", "steps between log lines"),
        ("eval-every", 250, "0 or more", "steps between evaluations; 0: at start and end only"),
        ("eval-blocks", 1024, "above 0", "held-out blocks in an evaluation"),
        ("checkpoint-every", 250, "above 0", "steps between checkpoints"),
    ],
}
DEFAULTS = defaults(FLAGS)
# The flags that are the experiment: runs of one arm agree in them.
EXPERIMENT = {name for group in FLAGS if group not in ("Run", "Machine", "Log")
              for name in defaults({group: FLAGS[group]})}
# What may change when a run goes on. A corpus, teacher or origin that moved is known by its hash.
MAY_CHANGE = set(defaults({"": FLAGS["Machine"]})) - {"dtype"} | {"corpus", "teacher", "init_from"}

LONG = dict(  # why these: data/results/LOG.md
    corpus="wikitext103", mask_rate=0.3, decay_frac=1 / 8, checkpoint_every=1000)
PRESETS = {
    "laptop": {},  # the defaults: minutes on two cores
    "laptop-long": LONG | dict(  # --masking random: an hour in bfloat16, float32 half as fast
        size="wide", steps=32_000, warmup_frac=1 / 160, eval_every=2000),
    "gpu": LONG | dict(  # an H100: half an hour, estimated; some 20 epochs, so with dropout
        size="small", vocab_size=30522, dropout=0.1, init_std=0.02, batch_size=256,
        steps=80_000, warmup_frac=1 / 160, eval_every=1000, compile=True),
    "paper": dict(  # our literal guess from the abstract and the author's public model cards
        corpus="wikitext103", size="small", vocab_size=30522, seq_len=512, positions="learned",
        init_std=0.02, dropout=0.1, select="high", score_input="unmasked", pool=0, init_frac=0.0,
        batch_size=200, lr=1e-4, steps=28_600, warmup_frac=10_000 / 28_600, eval_every=1000,
        checkpoint_every=1000),
}


def settle(args):
    """The defaults that follow from other flags."""
    if args.init_frac is None:
        args.init_frac = 0.15 if args.masking == "self" else 0.0
    if args.score_input is None:  # why: data/results/dose.md
        args.score_input = "vocabulary" if args.masking == "self" else "masked"
    if args.lr is None:  # measured on tiny, wide and mini: data/results/LOG.md
        args.lr = 3e-3 if (args.width or SIZES[args.size][1]) < 256 else 1e-3
    if args.mask_rate_end is None:
        args.mask_rate_end = args.mask_rate
    args.out = args.out or f"runs/{args.masking}-{args.seed}"


def check_flags(args, given):
    """Refuse flags that contradict each other. `given`: the names of those that the user typed;
    None: the flags of an earlier run, whose --corpus, --teacher and --init-from may have moved."""
    new, given = given is not None, given or set()
    asking, teaching = args.masking != "random", args.distill != "off"
    share, rest = divmod(args.batch_size, WORLD)
    # A block of n tokens holds at most ceil(n / 17) [SEP]s, see data/corpus.py.
    n = args.seq_len - 2
    most = int(max(args.mask_rate, args.mask_rate_end) * n + 0.5)
    most *= max(1, args.pool) if asking else 1
    for wrong, message in (
        (args.width % 64, f"--width {args.width}: must be a multiple of 64, the width of a head"),
        (not asking and given & {"select", "score_input", "pool"},
         "--select, --score-input and --pool need entropies: --masking self or entropy"),
        (not asking and args.init_frac and args.distill != "after-init",
         "--init-frac with --masking random means something only with --distill after-init"),
        (args.pool == 1, "--pool 1 leaves nothing to choose: give 2 or more, or 0"),
        (asking and not args.pool and args.score_input == "masked", "--pool 0 with --score-input "
         "masked would hide whole rows: give --pool 2, or --score-input unmasked"),
        (args.masking == "entropy" and args.score_input == "vocabulary",
         "--score-input vocabulary is learned by the model in training: use --masking self"),
        (args.masking == "self" and args.score_input == "once", "--score-input once is for a "
         "--teacher (--masking entropy): a model in training changes"),
        ((args.masking == "entropy" or teaching) and not args.teacher, "--masking entropy and "
         "--distill need --teacher RUN, for example one of  python train.py --masking random"),
        (args.teacher and args.masking != "entropy" and not teaching,
         "nothing uses --teacher: add --masking entropy or --distill complete"),
        (args.distill == "after-init" and not args.init_frac,
         "--distill after-init begins where --init-frac ends: give it a value above 0"),
        (not teaching and given & {"alpha", "tau"}, "--alpha and --tau need --distill"),
        (args.positions == "learned" and given & {"rotary_base", "local_start"},
         "--rotary-base and --local-start need --positions rotary"),
        (args.flops_of and "steps" in given, "give --steps or --flops-of, not both"),
        (rest, f"--batch-size {args.batch_size} cannot be split evenly over {WORLD} processes"),
        (share % (args.micro_batch or share), f"--micro-batch {args.micro_batch} does not divide "
         f"--batch-size {args.batch_size}" + f" over {WORLD} processes" * (WORLD > 1)),
        (most > n - -(-n // 17), f"{most} candidates for masking are more than a row of "
         f"{args.seq_len} tokens holds: lower --pool or --mask-rate"),
    ):
        if wrong:
            raise UserError(message)
    if new and args.corpus not in ("docs", *NAMED) and not os.path.exists(args.corpus):
        raise UserError(f"--corpus {args.corpus}: no such file or folder; the names are docs, "
                        + ", ".join(NAMED))
    for name in ("teacher", "init_from", "flops_of")[:3 if new else 2]:
        run = getattr(args, name)
        if run and not (Path(run) / "model.pt").exists():
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {run}: not a finished run folder (if it has moved, say where "
                            f"with {flag})")


def parse_args(argv=None):
    """The command line -> (the flags; the config of the run that is resumed or evaluated, or None).

    A new run takes its flags from the command line and a preset; an earlier one from its
    config.json, and the flags that are given must then agree, but for those that may change.
    """
    parser = flag_parser("python train.py [FLAGS]", __doc__, FLAGS)
    parser.add_argument("--preset", choices=PRESETS, help="laptop (default): minutes; laptop-long: "
                        "an hour; gpu: one GPU; paper: our literal guess. Any flag overrides it")
    parser.add_argument("--resume", nargs="?", const="", metavar="RUN",
                        help="continue this unfinished run (default: --out) with its own flags")
    parser.add_argument("--eval", metavar="RUN", help="only evaluate this finished run")
    typed = vars(parser.parse_args(argv))
    preset, resume, evaluated = (typed.pop(n, None) for n in ("preset", "resume", "eval"))
    args = Namespace(**{**DEFAULTS, **PRESETS[preset or "laptop"], **typed})
    if evaluated == "" or None not in (evaluated, resume):
        raise UserError("--eval RUN only evaluates and needs a run folder; --resume goes on")
    if evaluated is None and resume is None:
        settle(args)
        check_ranges(args, FLAGS)
        check_flags(args, set(typed))
        check_new(Path(args.out))
        args.cache = os.path.abspath(args.cache)  # a run may go on in another working directory
        if preset:
            print(f"preset {preset}: " + ", ".join(f"{n} {v}" for n, v in vars(args).items() if v))
        return args, None

    run = Path(evaluated or resume or args.out or f"runs/{args.masking}-{args.seed}").expanduser()
    args, config = open_earlier(run, evaluated is not None, typed, DEFAULTS, MAY_CHANGE)
    check_ranges(args, FLAGS)
    if resume is not None:
        check_flags(args, None)
    args.cache = os.path.abspath(args.cache)
    return args, config


# --------------------------------------------------------------------------------------------------
# one update


@dataclass
class Job:
    """What the flags have made: everything that an update works with."""

    machine: Machine
    text: object  # of data/corpus.py: blocks to train on, tokenizer, counts
    valid: torch.Tensor  # (N, T) held-out tokens
    model: Bert
    forward: object  # the same, as torch.compile and several processes need it
    teacher: Bert | None
    optimizer: torch.optim.Optimizer
    free: masking.VocabularyMean | None  # --score-input vocabulary: no forward, so free of cost
    kinds: dict  # of vocabulary items, for the log
    answers: torch.Tensor | None  # (N, T) --score-input once: entropies of the training text


def plan(args, step):
    """-> (k masked tokens a row; are entropies asked for; does the teacher teach) at this step."""
    rate = (args.mask_rate
            + (args.mask_rate_end - args.mask_rate) * min(step, args.steps - 1) / args.steps)
    after_init = step >= args.init_frac * args.steps
    return (masking.mask_count(rate, args.seq_len), args.masking != "random" and after_init,
            args.distill == "complete" or (args.distill == "after-init" and after_init))


def where_to_mask(args, job, step, tokens, noise, blocks=None):
    """tokens (B, T), noise (B, T, 5) -> positions (B, k) that this step's strategy masks.
    blocks (B,): their numbers in the training text, where they are from there."""
    k, asking, _ = plan(args, step)
    if not asking:
        return masking.choose_at_random(tokens, k, noise)

    select = args.select
    if select == "rise":  # a quarter to three quarters, over the steps that ask
        first = args.init_frac * args.steps
        select = masking.rise(0.25 + 0.5 * (step - first) / max(1, args.steps - first))

    def score(tokens, places):
        if job.answers is not None and blocks is not None:
            return job.answers[blocks].gather(1, places)
        ask = job.free or masking.SCORE_INPUT[args.score_input]
        return masking.MASKING[args.masking](ask, job.model, job.teacher, tokens, places)

    with job.machine.autocast():
        return masking.choose(tokens, k, score, select, args.pool, noise)


def update(args, job, step):
    """One step of training -> (2,): loss in nats at the masked tokens, norm of the gradient."""
    job.model.train()
    blocks = corpus.block_order(len(job.text.train), args.seed, step, args.batch_size)
    tokens = corpus.with_ends(job.text.train[blocks]).to(job.machine.device)  # (B, T)
    noise = masking.draw(args.seed, step, *tokens.shape)  # (B, T, 5)
    if args.static:
        noise = masking.keep_places(noise, args.seed, blocks)
    noise = noise.to(job.machine.device)
    for group in job.optimizer.param_groups:
        group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup_frac, args.decay_frac)
    total, (_, _, teaching) = 0.0, plan(args, step)
    for rows, weight in job.machine.micro_batches(args.batch_size, args.micro_batch):
        # 1. Where: k tokens of each row, as the strategy chooses. It may ask the model here.
        x = tokens[rows]  # (b, T)
        positions = where_to_mask(args, job, step, x, noise[rows], blocks[rows])  # (b, k)
        # 2. What stands there instead: [MASK], another token, or the same.
        inputs = masking.corrupt(x, positions, noise[rows], job.model.shape.vocab_size)  # (b, T)
        labels = x.gather(1, positions).flatten()  # (b k,)
        # 3. Predict these places, and these alone.
        masking.seed_dropout(args.seed, step, rows.start)
        with job.machine.autocast():
            logits = job.forward(inputs, positions).flatten(0, 1)  # (b k, V)
        logits = logits.float()
        loss = F.cross_entropy(logits, labels)
        total += weight * loss.detach()
        if teaching:  # --distill: match the teacher's whole distribution at the same places, too
            with torch.no_grad(), job.machine.autocast():
                taught = job.teacher(inputs, positions).flatten(0, 1)
            loss = (1 - args.alpha) * loss + args.alpha * distillation_loss(
                logits, taught.float(), args.tau)
        # 4. Learn. `weight` is the share of these rows in the batch: as all rows have k masked
        # tokens, the sum of the weighted means is the mean over the batch.
        (weight * loss).backward()
        if job.free:
            job.free.see(labels, inputs.gather(1, positions).flatten(), logits)
    norm = nn.utils.clip_grad_norm_(job.model.parameters(), args.clip)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    if job.free:
        job.free.learn(job.machine)
    return torch.stack([total, norm])


def distillation_loss(logits, taught, tau):
    """tau^2 KL(teacher_tau || student_tau) in nats, a mean over rows; both (N, V) logits.

    tau^2 keeps the size of the gradient when tau changes (Hinton et al. 2015, section 2).
    """
    student, teacher = (logits / tau).log_softmax(-1), (taught / tau).log_softmax(-1)
    return tau**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def learning_rate(step, steps, peak, warmup_frac, decay_frac=1.0):
    """Linear warm-up, constant, linear decay; above 0 at the first update and at the last."""
    warmup = min(round(warmup_frac * steps), steps - 1)
    decay = max(1, min(round(decay_frac * steps), steps - warmup))
    return peak * min(1, (step + 1) / max(1, warmup), (steps - step) / decay)


def make_optimizer(model, lr, weight_decay, embedding_lr=None):
    """AdamW, in which matrices and embeddings decay; biases and LayerNorm, vectors, do not. With
    embedding_lr the token embeddings are a third group, which has that rate."""
    embeddings = [p for name, p in model.named_parameters()
                  if embedding_lr is not None and "token_embedding" in name]
    rest = [p for p in model.parameters() if all(p is not e for e in embeddings)]
    groups = [{"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    if embeddings:
        groups.append({"params": embeddings, "weight_decay": weight_decay, "lr": embedding_lr})
    return torch.optim.AdamW(  # BERT's betas and eps
        groups, lr=lr, betas=(0.9, 0.999), eps=1e-6, fused=True)


def count_flops(args, shape, teacher, steps):
    """Matrix-multiply FLOPs of these steps: training, and the forwards that score and teach."""
    asked = teacher.shape if args.masking == "entropy" else shape
    total = 0
    for step in steps:
        k, asking, teaching = plan(args, step)
        total += 3 * forward_flops(shape, args.seq_len, k)
        if asking and args.score_input not in ("vocabulary", "once"):
            total += forward_flops(asked, args.seq_len, args.pool * k or args.seq_len - 2)
        if teaching:
            total += forward_flops(teacher.shape, args.seq_len, k)
    return args.batch_size * total


def steps_for(flops, args, job):
    """How many steps spend these FLOPs. What a step costs depends on the share of the run that is
    over: the mean over a run of 1000 steps stands for any length."""
    if flops <= 0:
        raise UserError("--flops-of leaves nothing beyond what is spent before the first update "
                        "(the run of --init-from, --score-input once)")
    short = Namespace(**{**vars(args), "steps": 1000})
    return max(1, round(1000 * flops / count_flops(
        short, job.model.shape, job.teacher, range(1000))))


# --------------------------------------------------------------------------------------------------
# the run around it


class NotFinite(Exception):
    """The loss or its gradient at this step is not a number."""


def check_finite(job, state):
    """Average state.pending, the (loss, norm) of each update since the last log line, over the
    processes. NotFinite, with the first bad step, where one is not a number."""
    if state.pending:
        values = job.machine.mean(torch.stack(state.pending))  # (n, 2)
        state.pending = list(values)
        finite = values.isfinite().all(1)
        if not finite.all():
            first_bad = finite.int().argmin().item()
            raise NotFinite(state.step - len(values) + 1 + first_bad)


def report(args, job, state, teacher_flops, evaluating):
    """A line for the log, a dict. When `evaluating`, it has the held-out loss and what the strategy
    masks, too."""
    line = {"step": state.step, "tokens": state.step * args.batch_size * args.seq_len}
    if state.pending:
        loss, norm = torch.stack(state.pending).mean(0).tolist()
        (step, began), now = state.clock, time.perf_counter()
        state.seconds += now - began
        speed = (state.step - step) * args.batch_size * args.seq_len / (now - began)
        line |= {"train_loss": loss, "grad_norm": norm, "lr": job.optimizer.param_groups[0]["lr"],
                 "tokens_per_s": round(speed), "seconds": round(state.seconds, 1)}
    line |= {"flops": state.flops, "flops_with_teacher": state.flops + teacher_flops}
    if evaluating:
        line["val_loss"], line["val_accuracy"] = masking.evaluate(
            job.model, job.valid, job.machine)
        if not math.isfinite(line["val_loss"]):
            raise NotFinite(state.step)
        # What the strategy masks, some ten times a run; the dose, which takes a forward per token,
        # half way and at the end.
        every, last = args.eval_every, state.step == args.steps
        tenth = every * max(1, round(args.steps / 10 / every)) if every else args.steps
        if last or state.step % tenth == 0:
            with job.machine.autocast():
                line["masked"] = diagnose(
                    job.model, job.valid[:64], plan(args, state.step)[0],
                    lambda tokens, noise: where_to_mask(args, job, state.step, tokens, noise),
                    job.kinds, job.free, with_dose=last or state.step == 5 * tenth)
        line["peak_memory_mb"] = job.machine.peak_memory() >> 20
    return line


def load_other(args, flag, text):
    """The run that --teacher or --init-from names -> (its model or None, the FLOPs spent on it)."""
    run = getattr(args, flag)
    if not run:
        return None, 0
    model, tokenizer = load(run)
    if tokenizer.sha256 != text.tokenizer.sha256 or model.shape.seq_len < args.seq_len:
        raise UserError(f"--{flag.replace('_', '-')} {run} has another tokenizer or a shorter "
                        "--seq-len: it must be trained on the same --corpus and --vocab-size")
    config = read_config(run)
    if flag == "init_from" and config["flags"]["seed"] == args.seed:
        print(f"note: {run} has --seed {args.seed}, too, so this run reads the same batches with "
              "the same noise again: give another --seed")
    return model.requires_grad_(False), config["flops"] + config["teacher_flops"]


def build(args, machine, text, valid):
    """-> (the Job; the FLOPs spent before the first update; those spent on the teacher)"""
    if len(text.train) < args.batch_size:
        raise UserError(f"the corpus is too small: {len(text.train)} blocks are less than a batch "
                        f"of {args.batch_size}: give more text, or a smaller --batch-size")
    teacher, teacher_flops = load_other(args, "teacher", text)
    origin, flops = load_other(args, "init_from", text)
    torch.manual_seed(args.seed)
    layers, width = args.layers or SIZES[args.size][0], args.width or SIZES[args.size][1]
    model = Bert(Shape(text.tokenizer.vocab_size, layers, width, args.seq_len, args.positions,
                       args.rotary_base, args.local_start, args.init_std, args.dropout))
    if origin:
        copy_weights(model, origin)
    model.to(machine.device)
    forward, free = machine.parallel(model), None
    if args.compile:
        forward = machine.compile(forward)
    if args.score_input == "vocabulary":
        free = masking.VocabularyMean(model.shape.vocab_size, machine.device)
    teacher, answers = teacher and teacher.to(machine.device), None
    if args.score_input == "once":
        answers = ask_once(args, machine, teacher, text.train)
        flops += len(text.train) * forward_flops(teacher.shape, args.seq_len, args.seq_len - 2)
    job = Job(
        machine=machine, text=text, valid=valid, model=model, forward=forward, teacher=teacher,
        optimizer=make_optimizer(model, args.lr, args.weight_decay), free=free,
        kinds=token_kinds(text.tokenizer.pieces, text.counts), answers=answers)
    return job, flops, teacher_flops


def ask_once(args, machine, teacher, blocks):
    """--score-input once -> the teacher's entropies of the training text (N, T), nats. Neither of
    the two changes, so a text that is read in many epochs need not be asked about in each."""
    H = torch.full((len(blocks), args.seq_len), math.nan, device=machine.device)
    for first in progress(range(0, len(blocks), 64), desc="asking the teacher", unit=" batches",
                          disable=RANK > 0):
        tokens = corpus.with_ends(blocks[first:first + 64]).to(machine.device)
        places = torch.arange(1, args.seq_len - 1, device=machine.device).expand(len(tokens), -1)
        with machine.autocast():
            H[first:first + 64, 1:-1] = masking.unmasked(teacher, tokens, places)
    return H


def train(args, job, run, state):
    """The loop -> 0 at the end of the run, or the number of the signal that stopped it."""
    first = state.step
    signals = catch_signals()  # a list: a signal asks for a stop after the step
    bar = progress(total=args.steps, initial=state.step, desc=run.path.name, unit=" steps",
                   disable=RANK > 0)
    with bar:
        while True:  # steps + 1 rounds, of which the last only reports and saves
            stopping = job.machine.any(bool(signals))
            last = stopping or state.step == args.steps
            evaluating = state.step in (0, args.steps) or (
                args.eval_every and state.step % args.eval_every == 0)
            reporting = state.step != state.logged and (
                evaluating or state.step % args.log_every == 0)
            saving = last or (state.step != first and state.step % args.checkpoint_every == 0)
            if reporting or saving:
                check_finite(job, state)
            if reporting:
                line = report(args, job, state, run.config["teacher_flops"], evaluating)
                run.log(state, line)
                if "train_loss" in line:
                    bar.set_postfix(loss=f"{line['train_loss']:.2f}", refresh=False)
                if evaluating:
                    bar.write(f"step {state.step:6}  held-out loss {line['val_loss']:.3f} (unigram "
                              f"entropy {job.text.unigram_entropy:.3f})  accuracy "
                              f"{line['val_accuracy']:.3f}")
            if saving:
                run.save(job, state)
            if last:
                if not stopping:
                    return 0
                return signals[0] if signals else signal.SIGTERM  # only another process had one
            state.pending.append(update(args, job, state.step))
            state.flops += count_flops(args, job.model.shape, job.teacher, [state.step])
            state.step += 1
            bar.update()


def main():
    args, earlier = parse_args()
    machine = Machine(args)
    print(f"machine: {WORLD} x {machine.about}")
    text = load_text(args, earlier, machine)
    valid = corpus.with_ends(text.valid[:args.eval_blocks]).to(machine.device)  # (N, T)
    print(f"corpus: {text.about}; {len(text.train)} blocks of {args.seq_len} to train on, "
          f"{len(valid)} held out, unigram entropy {text.unigram_entropy:.2f} nats")
    if earlier and (Path(args.out) / "model.pt").exists():  # --eval
        loss, accuracy = masking.evaluate(load(args.out)[0].to(machine.device), valid, machine)
        return print(f"{args.out}: held-out loss {loss:.4f} nats, accuracy {accuracy:.4f}")

    job, flops, teacher_flops = build(args, machine, text, valid)
    if args.flops_of and not earlier:
        args.steps = steps_for(read_config(args.flops_of)["flops"] - flops, args, job)
    state = State(flops=flops)
    flops += count_flops(args, job.model.shape, job.teacher, range(args.steps))
    run = machine.in_turn(lambda: Run(args, job, earlier, flops, teacher_flops))
    state = run.restore(job, state)
    if earlier:
        print(f"{args.out}: going on after step {state.step}")
    try:
        signal_number = train(args, job, run, state)
    except NotFinite as error:
        print(f"error: the loss or its gradient is not finite at step {error}; the last checkpoint "
              "is intact, but a lower --lr is needed", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise less_memory(run.path, args.micro_batch or args.batch_size // WORLD)
    machine.leave()  # after process 0 has saved: torchrun ends the others when one is gone
    if signal_number:
        print(f"stopped after step {state.step}; go on with:  {resume_command(run.path)}")
        sys.exit(128 + signal_number)
    if not RANK:
        weights = {name: w.cpu() for name, w in job.model.state_dict().items()}
        copy_token_type(weights)
        run.finish(job.model.shape, weights)
        loss, H = json.loads(state.log.splitlines()[-1])["val_loss"], text.unigram_entropy
        stuck = loss >= WITHOUT_CONTEXT * H
        hint = ": no context is used yet, train for more --steps" if stuck else ""
        print(f"{args.out}: held-out loss {loss:.3f} nats, unigram entropy {H:.3f} "
              f"({loss - H:+.2f}){hint}\nsee what it masks:  "
              f'python masking.py {shlex.quote(args.out)} "The function returns an array."')


if __name__ == "__main__":
    run_script(main)
