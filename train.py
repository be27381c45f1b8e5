"""Pretrain a small BERT with a masking strategy. One flat script: one update, and the loop.

    python train.py                              # self-masking, offline, minutes on a laptop
    python train.py --masking random             # the baseline, on the same data in the same order
    python train.py --masking entropy --teacher runs/random-0
    python train.py --resume runs/self-0         # go on after any interruption, bit for bit
    python train.py --eval runs/self-0           # print the held-out loss of a finished run again
    torchrun --nproc-per-node=2 train.py         # several GPUs, each with a share of the batch

The method is in update() and where_to_mask(). The flags, `args`, are listed in data/arguments.py.

A run is a folder: config.json, tokenizer.model, log.jsonl, checkpoint.pt, model.pt.
Every random draw is a function of (seed, step, row or micro-batch): on a CPU, with the same torch,
threads and flags and without --compile, a resumed run equals an uninterrupted one bit for bit.
"""

import json
import math
import shlex
import signal
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import masking
from data import corpus
from data.arguments import parse_args
from data.files import UserError, catch_signals, out_of_memory, progress, run_script
from data.inspection import diagnose, token_kinds
from data.machine import RANK, WORLD, Machine
from data.runs import (
    WITHOUT_CONTEXT, NotFinite, Run, State, less_memory, load_text, read_config, resume_command,
)
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
    means: masking.VocabularyMean | None  # --score-input vocabulary
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
        ask = job.means or masking.SCORE_INPUT[args.score_input]
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
        line |= masking.evaluate(job.model, job.valid, job.machine)
        if not math.isfinite(line["val_loss"]):
            raise NotFinite(state.step)
        # What the strategy masks, some ten times a run; the dose, which takes a forward per token,
        # half way and at the end.
        every = args.eval_every or args.steps
        tenth, half = (every * max(1, round(args.steps / n / every)) for n in (10, 2))
        if state.step % tenth == 0 or state.step in (half, args.steps):
            kinds = token_kinds(job.text.tokenizer.pieces, job.text.counts)
            with job.machine.autocast():
                line["masked"] = diagnose(
                    job.model, job.valid[:64], plan(args, state.step)[0],
                    lambda tokens, noise: where_to_mask(args, job, state.step, tokens, noise),
                    kinds, job.means, with_dose=state.step in (half, args.steps))
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
    forward, means = machine.parallel(model), None
    if args.compile:
        forward = machine.compile(forward)
    if args.score_input == "vocabulary":
        means = masking.VocabularyMean(model.shape.vocab_size, machine.device)
    teacher, answers = teacher and teacher.to(machine.device), None
    if args.score_input == "once":
        answers = ask_once(args, machine, teacher, text.train)
        flops += len(text.train) * forward_flops(teacher.shape, args.seq_len, args.seq_len - 2)
    job = Job(
        machine=machine, text=text, valid=valid, model=model, forward=forward, teacher=teacher,
        optimizer=make_optimizer(model, args.lr, args.weight_decay), means=means, answers=answers)
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
                state.average_pending(job.machine)
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
    args, earlier = parse_args(description=__doc__)
    machine = Machine(args)
    print(f"machine: {WORLD} x {machine.about}")
    text = load_text(args, earlier, machine)
    valid = corpus.with_ends(text.valid[:args.eval_blocks]).to(machine.device)  # (N, T)
    print(f"corpus: {text.about}; {len(text.train)} blocks of {args.seq_len} to train on, "
          f"{len(valid)} held out, unigram entropy {text.unigram_entropy:.2f} nats")
    if earlier and (Path(args.out) / "model.pt").exists():  # --eval
        found = masking.evaluate(load(args.out)[0].to(machine.device), valid, machine)
        return print(f"{args.out}: held-out loss {found['val_loss']:.4f} nats, "
                     f"accuracy {found['val_accuracy']:.4f}")

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
