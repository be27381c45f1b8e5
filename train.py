"""Pretrain a small BERT with a masking strategy. One flat script: one update, and the loop.

    python train.py                              # self-masking, offline, minutes on a laptop
    python train.py --masking random             # the baseline, on the same data in the same order
    python train.py --masking entropy --teacher runs/random-0
    python train.py --resume runs/self-0         # go on after any interruption, bit for bit
    python train.py --eval runs/self-0           # print the held-out loss of a finished run again
    python train.py --eval runs/self-0 --corpus my.txt         # or its loss on another text
    python train.py --init-from runs/self-0 --corpus my.txt --seed 1 --out runs/my-1
    torchrun --nproc-per-node=2 train.py         # several GPUs, each with a share of the batch

The method is update(). The flags, `args`, are listed at the end of this file.

A run is a folder: config.json, tokenizer.model, log.jsonl, checkpoint.pt, model.pt.
Every random draw is a function of (seed, step, row or micro-batch): on a CPU, with the same torch,
threads and flags and without --compile, a resumed run equals an uninterrupted one bit for bit.
"""

import math
import os
import shlex
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import masking
from data import corpus
from data.files import UserError, catch_signals, out_of_memory, progress, run_script
from data.flags import check_ranges, defaults, flag_parser
from data.inspection import diagnose, token_kinds
from data.machine import MACHINE_FLAGS, RANK, WORLD, Machine
from data.runs import (
    Run, State, about_context, check_new, less_memory, open_earlier, read_config, read_log,
    resume_command,
)
from data.tokenizer import N_SPECIAL
from data.vocabulary import VocabularyMean
from model import SIZES, Bert, Shape, copy_token_type, copy_weights, forward_flops, load

# --------------------------------------------------------------------------------------------------
# one update


@dataclass
class Job:
    """What the flags have made: everything that an update works with."""

    machine: Machine
    text: corpus.Text  # blocks to train on, tokenizer, counts
    valid: torch.Tensor  # (N, T) held-out tokens
    model: Bert
    forward: object  # the same, as torch.compile and several processes need it
    teacher: Bert | None
    optimizer: torch.optim.Optimizer
    strategy: masking.Strategy  # where to mask, after --init-frac
    means: VocabularyMean | None  # what it reads, with --score-input vocabulary, error, context


def masks_per_row(args, step):
    """k, the number of masked tokens in a row."""
    done = min(step, args.steps - 1) / args.steps
    rate = args.mask_rate + (args.mask_rate_end - args.mask_rate) * done
    return masking.mask_count(rate, args.seq_len)


def after_init(args, step):
    """Is the first part of the run, which masks at random, over?"""
    return step >= args.init_frac * args.steps


def teaching(args, step):
    """Does the teacher teach at this step?"""
    return args.distill == "complete" or (
        args.distill == "after-init" and after_init(args, step))


def update(args, job, step):
    """One step of training -> (2,): loss in nats at the masked tokens, norm of the gradient."""
    job.model.train()
    blocks = corpus.block_order(len(job.text.train), args.seed, step, args.batch_size)
    tokens = corpus.with_ends(job.text.train[blocks]).to(job.machine.device)  # (B, T)
    noise = masking.draw(args.seed, step, *tokens.shape)  # (B, T, 5)
    if args.static:
        noise = masking.keep_places(noise, masking.draw_blocks(args.seed, blocks, args.seq_len))
    noise = noise.to(job.machine.device)
    for group in job.optimizer.param_groups:
        group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup_frac, args.decay_frac)
    strategy = job.strategy if after_init(args, step) else masking.Strategy()
    k = masks_per_row(args, step)
    total = 0.0
    for rows, weight in job.machine.micro_batches(args.batch_size, args.micro_batch):
        # 1. Where: k tokens of each row, as the strategy chooses. It may ask the model here.
        x = tokens[rows]  # (b, T)
        with job.machine.autocast():
            positions = strategy(x, k, noise[rows])  # (b, k)
        # 2. What stands there instead: [MASK], another token, or the same.
        inputs = masking.corrupt(x, positions, noise[rows], job.model.shape.vocab_size)  # (b, T)
        labels = x.gather(1, positions).flatten()  # (b k,)
        # 3. Predict these places, and these alone. (With an autocast of its own: the first one
        # holds weights that were cast without gradients.)
        masking.seed_dropout(args.seed, step, rows.start)
        with job.machine.autocast():
            logits = job.forward(inputs, positions).flatten(0, 1)  # (b k, V)
        logits = logits.float()
        loss = F.cross_entropy(logits, labels)
        total += weight * loss.detach()
        if teaching(args, step):  # match the teacher's whole distribution there, too
            with torch.no_grad(), job.machine.autocast():
                taught = job.teacher(inputs, positions).flatten(0, 1)
            loss = (1 - args.alpha) * loss + args.alpha * distillation_loss(
                logits, taught.float(), args.tau)
        # 4. Learn. `weight` is the share of these rows among those of this process: as all rows
        # have k masked tokens, the sum of the weighted means is the mean over them.
        (weight * loss).backward()
        if job.means:
            job.means.see(labels, inputs.gather(1, positions).flatten(), logits)
    norm = nn.utils.clip_grad_norm_(job.model.parameters(), args.clip)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    if job.means:
        job.means.learn(job.machine)
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


def make_optimizer(parameters, lr, weight_decay):
    """AdamW, in which matrices and embeddings decay; biases and LayerNorm, vectors, do not."""
    parameters = list(parameters)
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(  # BERT's betas and eps
        groups, lr=lr, betas=(0.9, 0.999), eps=1e-6, fused=True)


def count_flops(args, job, steps):
    """Matrix-multiply FLOPs of these steps: training, and the forwards that score and teach."""
    asked, T, total = job.strategy.model, args.seq_len, 0
    for step in steps:
        k = masks_per_row(args, step)
        total += 3 * forward_flops(job.model.shape, T, k)
        if asked and after_init(args, step):
            total += forward_flops(asked.shape, T, job.strategy.pool * k or T - 2)
        if teaching(args, step):
            total += forward_flops(job.teacher.shape, T, k)
    return args.batch_size * total


def steps_for(flops, args, job):
    """How many steps spend these FLOPs. What a step costs depends on the share of the run that is
    over: the mean over a run of 1000 steps stands for any length."""
    if flops <= 0:
        raise UserError("--flops-of leaves nothing beyond what the run of --init-from has spent")
    short = Namespace(**{**vars(args), "steps": 1000})
    return max(1, round(1000 * flops / count_flops(short, job, range(1000))))


# --------------------------------------------------------------------------------------------------
# how well a model predicts: the same held-out masks for all

EVAL_SEED = 260528526  # one constant: every arm, seed and restart is evaluated on the same masks
EVAL_RATE = 0.15  # whatever the training rate


def mask_for_evaluation(tokens, vocab_size):
    """tokens (N, T) -> positions (N, k), inputs (N, T), labels (N, k); the same masks always."""
    k = masking.mask_count(EVAL_RATE, tokens.shape[1])
    noise = masking.draw(EVAL_SEED, 0, *tokens.shape).to(tokens.device)
    positions = masking.Strategy()(tokens, k, noise)
    inputs = masking.corrupt(tokens, positions, noise, vocab_size)
    return positions, inputs, tokens.gather(1, positions)


@torch.inference_mode()
def evaluate(model, tokens, machine, counts=None):
    """How well a model predicts tokens (N, T) at 15 % random masks, the same every time -> a dict:

    val_loss      mean cross-entropy in nats
    val_accuracy  share of the masked tokens that it ranks first
    context_gain  nats by which the loss rises when the rest of each row is another row's: what the
                  model gains from context, 0 if it uses none. None where there is one row.
    loss_by_frequency  the same loss by how frequent the token is: only with counts (V,)

    Leaves eval mode on.
    """
    model.eval()
    positions, inputs, labels = mask_for_evaluation(tokens, model.shape.vocab_size)
    # Half of all rows away: the neighbours of a row are of the same document, and on its topic.
    foreign = tokens.roll(len(tokens) // 2, 0).scatter(1, positions, inputs.gather(1, positions))
    loss = loss_without = right = 0
    losses = []

    def predict(x, p):
        with machine.autocast():
            return model(x, p).flatten(0, 1).float()

    for x, other, p, y in zip(*(t.split(64) for t in (inputs, foreign, positions, labels))):
        logits, y = predict(x, p), y.flatten()
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        right += (logits.argmax(-1) == y).sum().item()
        if counts is not None:
            losses.append(F.cross_entropy(logits, y, reduction="none"))
        if len(tokens) > 1:
            loss_without += F.cross_entropy(predict(other, p), y, reduction="sum").item()
    n = labels.numel()
    found = {"val_loss": loss / n, "val_accuracy": right / n,
             "context_gain": (loss_without - loss) / n if len(tokens) > 1 else None}
    if counts is not None:
        found["loss_by_frequency"] = by_frequency(torch.cat(losses), labels.flatten(), counts)
    return found


def by_frequency(losses, labels, counts):
    """Losses (n,) of these items (n,) by how often an item is in the training text, counts (V,) ->
    {which items: [their share of the masked tokens, their mean loss in nats]}."""
    counts = torch.as_tensor(counts)
    which = (counts < 1000).int() + (counts < 100).int() + 1  # (V,)
    ordinary = counts[N_SPECIAL:]
    which[N_SPECIAL + ordinary.argsort(descending=True, stable=True)[:100]] = 0
    losses, which = losses.double().cpu(), which[labels.cpu()]
    names = "100 most frequent", "1000 times or more", "100 times or more", "less often"
    return {name: [(which == i).double().mean().item(), losses[which == i].mean().item()]
            for i, name in enumerate(names) if (which == i).any()}


# --------------------------------------------------------------------------------------------------
# the run around it


def report(args, job, state, teacher_flops, evaluating):
    """A line for the log, a dict. When `evaluating`, it has the held-out loss and what the strategy
    masks, too."""
    line = {"step": state.step, "tokens": state.step * args.batch_size * args.seq_len}
    if state.pending:
        loss, norm = torch.stack(state.pending).mean(0).tolist()
        line |= {"train_loss": loss, "grad_norm": norm, "lr": job.optimizer.param_groups[0]["lr"],
                 **state.stop_clock(args.batch_size * args.seq_len)}
    line |= {"flops": state.flops, "flops_with_teacher": state.flops + teacher_flops}
    if evaluating:
        line |= evaluate(job.model, job.valid, job.machine,
                         job.text.counts if state.step == args.steps else None)
        if not math.isfinite(line["val_loss"]):
            raise FloatingPointError(state.step)
        strategy = job.strategy if after_init(args, state.step) else masking.Strategy()
        kinds = token_kinds(job.text.tokenizer.pieces, job.text.counts)
        with job.machine.autocast():
            line["masked"] = diagnose(job.model, job.valid[:64], masks_per_row(args, state.step),
                                      strategy, kinds, args.static, state.step == args.steps)
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
    layers = args.layers or SIZES[args.size][0]
    width = args.width or SIZES[args.size][1]
    model = Bert(Shape(text.tokenizer.vocab_size, layers, width, args.seq_len, args.positions,
                       args.rotary_base, args.local_start, args.init_std, args.dropout))
    if origin:
        copy_weights(model, origin)
    model.to(machine.device)
    if teacher:
        teacher.to(machine.device)
    forward = machine.parallel(model)
    if args.compile:
        forward = machine.compile(forward)
    strategy = make_strategy(args, text, model, teacher)
    means = strategy.reads if isinstance(strategy.reads, VocabularyMean) else None
    job = Job(machine, text, valid, model, forward, teacher,
              make_optimizer(model.parameters(), args.lr, args.weight_decay), strategy, means)
    return job, flops, teacher_flops


def make_strategy(args, text, model, teacher):
    """-> the masking.Strategy of the flags. One of your own may look at text.tokenizer.pieces, the
    vocabulary."""
    select = masking.SELECT[args.select]
    if args.masking == "random":
        return masking.Strategy(select=select)
    if args.score_input in masking.READS:
        asked = teacher if args.masking == "entropy" else model
        return masking.Strategy(asked, masking.READS[args.score_input], select, args.pool)
    V, device = model.shape.vocab_size, next(model.parameters()).device
    if args.score_input == "vocabulary":
        # An item that was not seen yet has ln V, the entropy of a model that knows nothing: it is
        # tried soon.
        means = VocabularyMean(lambda logits, labels: masking.entropies(logits), math.log(V), V,
                               device)
    elif args.score_input == "error":
        # One value more, of a half: an item that was always right keeps a chance with `sample`.
        means = VocabularyMean(lambda logits, labels: (logits.argmax(-1) != labels).float(), 0.5, V,
                               device, prior=1)
    else:
        means = VocabularyMean(None, 0.0, V, device, asks=masking.masked)
    return masking.Strategy(means.asks and model, means, select, args.pool)


def due(every, step):
    """Is it time for what happens every so many steps? 0: never."""
    return every > 0 and step % every == 0


def train(args, job, run, state):
    """The loop -> 0 at the end of the run, or the number of the signal that stopped it."""
    first = state.step
    signals = catch_signals()  # a list: a signal asks for a stop after the step
    bar = progress(total=args.steps, initial=first, desc=run.path.name, unit=" steps",
                   disable=RANK > 0)
    with bar:
        while True:  # steps + 1 rounds, of which the last only reports and saves
            step = state.step
            stopped = job.machine.max(signals[0] if signals else 0)  # in any process
            last = stopped or step == args.steps
            evaluating = step in (0, args.steps) or due(args.eval_every, step)
            reporting = step != state.logged and (evaluating or due(args.log_every, step))
            saving = last or (step != first and due(args.checkpoint_every, step))
            if reporting or saving:
                state.average_pending(job.machine)
            if reporting:
                line = report(args, job, state, run.config["teacher_flops"], evaluating)
                run.log(state, line)
                if "train_loss" in line:
                    bar.set_postfix(loss=f"{line['train_loss']:.2f}", refresh=False)
                if evaluating:
                    bar.write(f"step {step:6}  held-out loss {line['val_loss']:.3f} (unigram "
                              f"entropy {job.text.unigram_entropy:.3f})  accuracy "
                              f"{line['val_accuracy']:.3f}")
            if saving:
                run.save(job, state)
            if last:
                return stopped
            state.pending.append(update(args, job, step))
            state.flops += count_flops(args, job, [step])
            state.step += 1
            bar.update()


def main():
    args, earlier, only_evaluate = parse_args()
    machine = Machine(args)
    print(f"machine: {WORLD} x {machine.about}")
    other = only_evaluate and args.corpus != earlier["flags"]["corpus"]
    text = corpus.load_text(args, earlier, machine, other)
    valid = corpus.with_ends(text.valid[:args.eval_blocks]).to(machine.device)  # (N, T)
    training = "" if only_evaluate else f"{len(text.train)} blocks to train on, "
    print(f"corpus: {text.about}; {training}{len(valid)} of {len(text.valid)} blocks of "
          f"{args.seq_len} to evaluate on, unigram entropy {text.unigram_entropy:.2f} nats")
    if only_evaluate:
        found = evaluate(load(args.out)[0].to(machine.device), valid, machine)
        where = f"{args.out} on {args.corpus}" if other else args.out
        return print(f"{where}: held-out loss {found['val_loss']:.4f} nats, "
                     f"accuracy {found['val_accuracy']:.4f}")

    job, spent, teacher_flops = build(args, machine, text, valid)
    if args.flops_of and not earlier:
        args.steps = steps_for(read_config(args.flops_of)["flops"] - spent, args, job)
    flops = spent + count_flops(args, job, range(args.steps))  # of the whole run
    run = Run(args, job, earlier, EXPERIMENT, flops, teacher_flops)
    machine.in_turn(lambda: run.open(job))
    state = run.restore(job, State(flops=spent))
    if earlier:
        print(f"{args.out}: going on after step {state.step}")
    try:
        signal_number = train(args, job, run, state)
    except FloatingPointError as error:
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
        log = read_log(run.path)
        loss, H = log[-1]["val_loss"], text.unigram_entropy
        print(f"{args.out}: held-out loss {loss:.3f} nats, unigram entropy {H:.3f} "
              f"({loss - H:+.2f}); {about_context(log)}\nwhat each rule masks:  "
              f'python -m data.inspection {shlex.quote(args.out)} "'
              'If the input is not a tensor, the function raises an error."')


# --------------------------------------------------------------------------------------------------
# the flags: name, default (the laptop preset; None: it follows from others), what is allowed, help

BY_ITEM = ("vocabulary", "error", "context")  # of --score-input; the model in training learns them

FLAGS = {
    "Run": [
        ("out", "", "path", "run folder, never overwritten (default runs/<masking>-<seed>)"),
        ("seed", 0, "below 2^63", "of initial weights, data order and masks: pair arms by it"),
    ],
    "Data": [
        ("corpus", "docs", "path", "docs: the English in your Python, torch and numpy; wikitext2, "
         "wikitext103: downloaded; or a text file (plain, .gz, .xz, .bz2, .zip, .tar) or a folder "
         "of them, a paragraph a line, a blank line between documents"),
        ("corpus-tokens", 0, "0 or more", "use only the first so many training tokens; 0: all"),
        ("vocab-size", 8192, "from 300 to 65536", "pieces of the tokenizer that is learned from "
         "the corpus (with --init-from: the tokenizer of that run)"),
        ("seq-len", 128, "from 16 to 65536", "tokens in a block, [CLS] and [SEP] included"),
    ],
    "Model": [
        ("size", "tiny", tuple(SIZES), "layers and width: " + ", ".join(
            f"{name} {layers} of {width}" for name, (layers, width) in SIZES.items())),
        ("layers", 0, "0 or more", "overrides --size; 0: as the size says"),
        ("width", 0, "0 or more", "overrides --size, a multiple of 64; 0: as the size says"),
        ("positions", "rotary", ("rotary", "learned"), "learned is BERT as published"),
        ("rotary-base", 100.0, "above 0", "frequency base of rotary positions; small is local"),
        ("local-start", 1.0, "0 or more", "initial query and key bias, with rotary; 0: off"),
        ("init-std", 0.05, "above 0", "deviation of the initial weights; BERT: 0.02"),
        ("dropout", 0.0, "from 0 to below 1", "on embeddings, attention, block outputs; BERT: 0.1"),
        ("init-from", "", "path", "begin with the weights of this finished run (every second layer "
         "of a deeper one) and read --corpus with its tokenizer; optimiser, schedule and step are "
         "new"),
    ],
    "Masking": [
        ("masking", "self", ("random", "entropy", "self"), "anywhere; where a --teacher is "
         "uncertain; where the model in training is"),
        ("teacher", "", "path", "finished run that is asked (--masking entropy) and that teaches "
         "(--distill): the paper's external reference model"),
        ("score-input", "masked", (*masking.READS, *BY_ITEM), "what is read. masked: the text, its "
         "candidates hidden; unmasked: all of it; vocabulary, error (self): nothing, a running "
         "mean of the vocabulary item is looked up, of its entropy or of how often it was missed; "
         "context (self): as masked, less such a mean"),
        ("select", None, tuple(masking.SELECT), "which entropies: highest, lowest, nearest the "
         "row's median, in proportion, half highest and half random "
         "(default mix; --masking random takes high, or sample: other draws)"),
        ("pool", 2, "0 or more", "candidates are a random pool, so many times the number of masks; "
         "0: all tokens"),
        ("init-frac", None, "from 0 to below 1", "share of the run that masks at random first "
         "(self: 0.15, else 0)"),
        ("static", False, None, "a block is masked at the same places in every epoch"),
        ("mask-rate", 0.15, "above 0 and at most 1", "share of the tokens that are masked"),
        ("mask-rate-end", None, "above 0 and at most 1", "approached linearly (default: constant)"),
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
        ("eval-blocks", 1024, "above 0", "held-out blocks in an evaluation: the first in the "
         "text, so mix text that is sorted"),
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
    if args.select is None:
        args.select = "high" if args.masking == "random" else "mix"
    if args.lr is None:  # measured on tiny, wide and mini: data/results/LOG.md
        args.lr = 3e-3 if (args.width or SIZES[args.size][1]) < 256 else 1e-3
    if args.mask_rate_end is None:
        args.mask_rate_end = args.mask_rate
    args.out = args.out or f"runs/{args.masking}-{args.seed}"


def check_flags(args, given):
    """Refuse flags that contradict each other. `given`: the names of those that the user typed for
    a new run. An earlier one has its own flags, but its --teacher or --init-from may have moved."""
    asking, distilling = args.masking != "random", args.distill != "off"
    share, rest = divmod(args.batch_size, WORLD)
    fewest, most = (masking.mask_count(rate, args.seq_len)
                    for rate in sorted((args.mask_rate, args.mask_rate_end)))
    candidates = most * (max(1, args.pool) if asking else 1)
    for wrong, message in (
        (args.width % 64, f"--width {args.width}: must be a multiple of 64, the width of a head"),
        (not asking and (given & {"score_input", "pool"} or args.select not in ("high", "sample")),
         "--score-input, --pool and --select need somebody to ask: --masking self or entropy"),
        (not asking and args.init_frac and args.distill != "after-init",
         "--init-frac with --masking random means something only with --distill after-init"),
        (asking and args.select == "mix" and fewest == 1 and given, "--select mix takes half of a "
         "row's masked tokens by their score, and a row would have one: give a larger --mask-rate, "
         "or --select high"),
        (args.pool == 1, "--pool 1 leaves nothing to choose: give 2 or more, or 0"),
        (asking and not args.pool and args.score_input in ("masked", "context"), "--pool 0 with "
         f"--score-input {args.score_input} would hide whole rows: give --pool 2, or --score-input "
         "unmasked"),
        (args.score_input == "context" and args.select == "sample", "--score-input context can be "
         "negative, and --select sample cannot draw in proportion to that: give another --select"),
        (args.masking == "entropy" and args.score_input in BY_ITEM, f"--score-input "
         f"{args.score_input} is learned by the model in training: use --masking self"),
        (args.masking == "self" and args.static, "--static masks a block alike in every epoch, and "
         "the model in training changes its mind: use --masking random or entropy"),
        ((args.masking == "entropy" or distilling) and not args.teacher, "--masking entropy and "
         "--distill need --teacher RUN, for example one of  python train.py --masking random"),
        (args.teacher and args.masking != "entropy" and not distilling,
         "nothing uses --teacher: add --masking entropy or --distill complete"),
        (args.distill == "after-init" and not args.init_frac,
         "--distill after-init begins where --init-frac ends: give it a value above 0"),
        (not distilling and given & {"alpha", "tau"}, "--alpha and --tau need --distill"),
        (args.positions == "learned" and given & {"rotary_base", "local_start"},
         "--rotary-base and --local-start need --positions rotary"),
        (args.flops_of and "steps" in given, "give --steps or --flops-of, not both"),
        (rest, f"--batch-size {args.batch_size} cannot be split evenly over {WORLD} processes"),
        (share and share % (args.micro_batch or share), f"--micro-batch {args.micro_batch} does "
         f"not divide --batch-size {args.batch_size}" + f" over {WORLD} processes" * (WORLD > 1)),
        (args.compile and args.micro_batch and os.environ.get("TORCHINDUCTOR_CUDAGRAPHS") == "1",
         "a CUDA graph writes over the gradients that --micro-batch sums: leave that flag out, or "
         "TORCHINDUCTOR_CUDAGRAPHS"),
        (candidates > corpus.maskable(args.seq_len), f"{candidates} candidates for masking are "
         f"more than a row of {args.seq_len} tokens holds: lower --mask-rate, or a --pool above 2"),
    ):
        if wrong:
            raise UserError(message)
    for name in ("teacher", "init_from", *given & {"flops_of"}):  # an earlier run has its --steps
        run = getattr(args, name)
        if run and not (Path(run) / "model.pt").exists():
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {run}: not a finished run folder (if it has moved, say where "
                            f"with {flag})")
    if args.init_from:  # its tokenizer stays
        pieces = read_config(args.init_from)["flags"]["vocab_size"]
        if "vocab_size" in given and args.vocab_size != pieces:
            raise UserError(f"--vocab-size {args.vocab_size}: the tokenizer of --init-from "
                            f"{args.init_from} has {pieces} pieces: leave that flag out")
        args.vocab_size = pieces


def parse_args(argv=None):
    """The command line -> (the flags; the config of the run that is resumed or evaluated, or None;
    is it only evaluated?).

    A new run takes its flags from the command line and a preset; an earlier one from its
    config.json, and the flags that are given must then agree, but for those that may change.
    """
    parser = flag_parser("python train.py [FLAGS]", __doc__, FLAGS)
    parser.add_argument("--preset", choices=PRESETS, help="laptop (default): minutes; laptop-long: "
                        "an hour; gpu: one GPU; paper: our literal guess. Any flag overrides it")
    parser.add_argument("--resume", nargs="?", const="", metavar="RUN",
                        help="continue this unfinished run (default: --out) with its own flags")
    parser.add_argument("--eval", metavar="RUN", help="only evaluate this finished run; with "
                        "--corpus OTHER: on that text (what of it the run was trained on, too, is "
                        "not left out)")
    typed = vars(parser.parse_args(argv))
    preset, resume, evaluated = (typed.pop(name, None) for name in ("preset", "resume", "eval"))
    if evaluated == "" or (evaluated is not None and resume is not None):
        raise UserError("--eval RUN only evaluates and needs a run folder; --resume goes on")
    args, earlier = Namespace(**{**DEFAULTS, **PRESETS[preset or "laptop"], **typed}), None
    settle(args)
    if evaluated or resume is not None:  # --resume alone means the run at --out
        run = Path(evaluated or resume or args.out).expanduser()
        args, earlier = open_earlier(run, bool(evaluated), typed, DEFAULTS, MAY_CHANGE)
        if preset:
            print(f"note: --preset {preset} changes nothing, {run} has its own flags")
    check_ranges(args, FLAGS)
    if not evaluated:
        check_flags(args, set() if earlier else set(typed))
    args.cache = os.path.abspath(args.cache)  # a run may go on in another working directory
    if not earlier:
        check_new(Path(args.out))
        if preset:
            print(f"preset {preset}: " + ", ".join(
                f"{n} {v}" for n, v in vars(args).items() if v != DEFAULTS[n] and n != "cache"))
    return args, earlier, bool(evaluated)


if __name__ == "__main__":
    run_script(main)
