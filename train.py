"""Pretrain a small BERT with a masking strategy. One flat script: flags, data, model, loop.

    python train.py                              # self-masking, offline, minutes on a laptop
    python train.py --masking random             # the baseline, on the same data in the same order
    python train.py --masking entropy --teacher runs/random-0
    python train.py --resume runs/self-0         # go on after any interruption, bit for bit
    python train.py --eval runs/self-0           # print the held-out loss of a finished run again
    torchrun --nproc-per-node=2 train.py         # several GPUs, each with a share of the batch

A run is a folder: config.json, tokenizer.model, log.jsonl, checkpoint.pt, model.pt.
Every random draw is a function of (seed, step, row or micro-batch): on a CPU, with the same torch,
threads and flags and without --compile, a resumed run equals an uninterrupted one bit for bit.
"""

import argparse
import json
import math
import os
import platform
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from data import ranks
from data.files import (
    UserError, add_flags, catch_signals, peak_memory, refuse_command, run_script, save_tensors,
    sha256_file,
)
from data.runs import (
    WITHOUT_CONTEXT, begin_run, check_flags, check_origin, load_checkpoint, load_origin, open_log,
    open_run, open_tensorboard, origin_sha256, read_log, save_checkpoint, spent_flops,
)

# --------------------------------------------------------------------------------------------------
# flags: name, default (the laptop preset), help, and the choices where there are any

FLAGS = {
    "Run": [
        ("out", "", "run folder, never overwritten (default runs/<masking>-<seed>)"),
        ("seed", 0, "decides initial weights, data order, masks and dropout: pair arms by it"),
        ("begin-from", "", "finished run (of --decay-frac 0) of which this one is a continuation: "
         "it takes over its weights, optimiser and step; --steps counts from the very first"),
    ],
    "Data": [
        ("corpus", "docs", "docs: the English in your Python, torch and numpy; wikitext2, "
         "wikitext103, bookcorpus: downloaded; or a text file (plain, .gz, .xz, .bz2) or a folder "
         "of them, a paragraph a line, a blank line between documents"),
        ("corpus-tokens", 0, "use only the first so many training tokens; 0: all"),
        ("vocab-size", 8192, "pieces of the tokenizer that is learned from the corpus"),
        ("seq-len", 128, "tokens in a block, [CLS] and [SEP] included"),
        ("cache", os.path.relpath(Path(__file__).parent / "data" / "cache"),
         "where prepared corpora are kept"),
    ],
    "Model": [
        ("size", "tiny", "layers/width 2/128, 2/256, 4/256, 4/512, 8/512, 12/768",
         ("tiny", "wide", "mini", "small", "medium", "base")),
        ("layers", 0, "overrides --size; 0: as the size says"),
        ("width", 0, "overrides --size, a multiple of 64; 0: as the size says"),
        ("positions", "rotary", "rotary leaves the plateau early; learned is BERT as published",
         ("rotary", "learned")),
        ("rotary-base", 100.0, "frequency base of the rotary positions; small is local"),
        ("local-start", 1.0, "initial query and key bias with rotary positions; 0: off"),
        ("init-std", 0.05, "standard deviation of the initial weights; BERT's is 0.02"),
        ("dropout", 0.1, "on embeddings, attention and block outputs"),
    ],
    "Masking": [
        ("masking", "self", "anywhere, by the uncertainty of a --teacher, or by the model's own",
         ("random", "entropy", "self")),
        ("teacher", "", "finished run that scores (--masking entropy) and teaches (--distill)"),
        ("select", "mix", "which entropies: highest, lowest, nearest the row's median, drawn in "
         "proportion, half highest and half random", ("high", "low", "mid", "sample", "mix")),
        ("score-input", "masked", "what the scoring model reads: all candidates masked, the intact "
         "text, nothing (a running mean per vocabulary item)", ("masked", "clear", "type")),
        ("pool", 2, "candidates: a random pool of so many times the masked count; 0: all tokens"),
        ("init-frac", -1.0, "share of the run that masks at random first (self: 0.15, else 0)"),
        ("mask-rate", 0.15, "share of the tokens that are masked"),
        ("mask-rate-end", -1.0, "rate at the end, reached linearly (default: constant)"),
    ],
    "Distillation": [
        ("distill", "off", "learn from the --teacher too: never, always, or after --init-frac",
         ("off", "complete", "after-init")),
        ("alpha", 0.5, "weight of the teacher's predictions against the true tokens"),
        ("tau", 2.0, "temperature of both distributions"),
        ("init-from-teacher", False, "start from its weights (every second layer of a deeper one)"),
    ],
    "Optimisation": [
        ("steps", 2500, "updates in the whole run"),
        ("flops-of", "", "train for the FLOPs that this finished run spent, instead of --steps"),
        ("batch-size", 16, "blocks in an update: part of the method"),
        ("micro-batch", 0, "blocks in a forward: memory, dropout draws; divides the batch; 0: all"),
        ("lr", -1.0, "peak learning rate (default 3e-3, from width 256 on 1e-3)"),
        ("warmup-frac", 0.05, "share of the run over which the rate rises"),
        ("decay-frac", 1.0, "share of the run, its end, over which the rate falls to 0; 1: from "
         "the warm-up on; 0: it never falls"),
        ("weight-decay", 0.01, "of matrices and embeddings; biases and LayerNorm have none"),
        ("clip", 1.0, "largest norm of the gradient"),
    ],
    "Machine": [
        ("device", "auto", "auto: a GPU where there is one", ("auto", "cpu", "cuda")),
        ("dtype", "auto", "auto: bfloat16 on GPUs that have it", ("auto", "float32", "bfloat16")),
        ("threads", 0, "CPU threads; 0: torch's choice"),
        ("compile", False, "torch.compile the training forward (not bit for bit)"),
    ],
    "Log": [
        ("log-every", 10, "steps between log lines"),
        ("eval-every", 250, "steps between evaluations on held-out text; 0: start and end only"),
        ("eval-blocks", 1024, "held-out blocks in an evaluation"),
        ("checkpoint-every", 250, "steps between checkpoints"),
        ("tensorboard", False, "mirror the log into RUN/tensorboard (needs: pip install "
         "tensorboard)"),
    ],
}
DEFAULTS = {f[0].replace("-", "_"): f[1] for flags in FLAGS.values() for f in flags}
# What may change when resuming; a corpus or teacher that moved is known by its hash.
HOW_NOT_WHAT = {"device", "threads", "compile", "micro_batch", "corpus", "cache", "teacher",
                "begin_from", "tensorboard"}

LONG = dict(  # why these: README, "Does pretraining pay yet?"
    corpus="wikitext103", dropout=0.0, mask_rate=0.3, decay_frac=1 / 8, checkpoint_every=1000)
PRESETS = {
    "laptop": {},  # the defaults: minutes on two cores
    "laptop-long": LONG | dict(  # --masking random: an hour in bfloat16, float32 half as fast
        size="wide", steps=32_000, warmup_frac=1 / 160, eval_every=2000),
    "gpu": LONG | dict(  # an H100: half an hour, estimated; some 20 epochs, so with dropout
        size="small", vocab_size=30522, dropout=0.1, init_std=0.02, batch_size=256,
        steps=80_000, warmup_frac=1 / 160, eval_every=1000, compile=True),
    "paper": dict(  # the paper's public model cards, read literally
        corpus="bookcorpus", size="small", vocab_size=30522, seq_len=512, positions="learned",
        init_std=0.02, select="high", score_input="clear", pool=0, init_frac=0.0, batch_size=160,
        lr=1e-4, steps=356_000, warmup_frac=10_000 / 356_000, eval_every=5000,
        checkpoint_every=5000),
}


def parse_flags():
    """The command line -> (flags by name, the config of an earlier run or None)."""
    parser = argparse.ArgumentParser(
        usage="python train.py [FLAGS]", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    parser.error = refuse_command
    parser.add_argument("--preset", choices=PRESETS, help="laptop (default): minutes; laptop-long: "
                        "an hour; gpu: one GPU; paper: read literally. Any flag overrides it")
    parser.add_argument("--resume", nargs="?", const="", metavar="RUN",
                        help="continue this unfinished run (default: --out) with its own flags")
    parser.add_argument("--eval", metavar="RUN", help="only evaluate this finished run")
    add_flags(parser, FLAGS)
    given = vars(parser.parse_args())
    name = given.pop("preset", None)
    flags = {**DEFAULTS, **PRESETS[name or "laptop"], **given}
    if not {"resume", "eval"} & set(given):
        check_flags(flags, set(given))
        if name:
            print(f"preset {name}: " + ", ".join(f"{n} {v}" for n, v in flags.items() if v != ""))
    return open_run(flags, set(given), HOW_NOT_WHAT)


if __name__ == "__main__":
    COMMAND = run_script(parse_flags)  # before torch is imported: a typo is told at once

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import masking as M
from data import corpus as corpora
from data.tokenizer import MASK
from model import (
    SIZES, Bert, Shape, copy_weights, forward_flops, load, lr_at, make_optimizer, pick_machine,
    share_types,
)


def plan(a, step):
    """-> (k masked tokens a row, do entropies choose them, does the teacher teach) at this step."""
    rate = a.mask_rate + (a.mask_rate_end - a.mask_rate) * min(step, a.steps - 1) / a.steps
    after_init = step >= a.init_frac * a.steps
    return (M.mask_count(rate, a.seq_len), a.masking != "random" and after_init,
            a.distill == "complete" or (a.distill == "after-init" and after_init))


def step_flops(a, shape, scorer, teacher, step):
    """Matrix-multiply FLOPs of a step: training, and the forwards that score and teach."""
    k, choosing, teaching = plan(a, step)
    flops = 3 * forward_flops(shape, a.seq_len, k)
    if choosing and a.score_input != "type":
        flops += forward_flops(scorer, a.seq_len, a.pool * k or a.seq_len - 2)
    if teaching:
        flops += forward_flops(teacher, a.seq_len, k)
    return a.batch_size * flops


def distillation_loss(logits, taught, tau):
    """tau^2 KL(teacher_tau || student_tau) in nats, a mean over rows; both (N, V) logits.

    tau^2 keeps the size of the gradient when tau changes (Hinton et al. 2015, section 2).
    """
    student, teacher = (logits / tau).log_softmax(-1), (taught / tau).log_softmax(-1)
    return tau**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


# --------------------------------------------------------------------------------------------------


def main():
    a, earlier = COMMAND
    a, run = argparse.Namespace(**a), Path(a["out"])

    # ---- machine ---------------------------------------------------------------------------------
    dtype = earlier["dtype"] if earlier else a.dtype
    device, dtype, why = pick_machine(a.device, dtype, a.threads)
    device = ranks.join(device)
    print(f"machine: {ranks.WORLD} x {device.type}, {torch.get_num_threads()} threads, {dtype} "
          f"({why})")

    def amp():
        return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")

    # ---- corpus and teacher ----------------------------------------------------------------------
    folder = ranks.in_turn(lambda: corpora.prepare(a.corpus, a.vocab_size, a.cache))
    text = corpora.load(folder, a.seq_len, a.corpus_tokens)
    valid = corpora.with_ends(text.valid[:a.eval_blocks]).to(device)  # (N, T)
    tokenizer, V, T = text.tokenizer, text.tokenizer.vocab_size, a.seq_len
    if earlier and earlier["corpus_sha256"] != text.sha256:
        raise UserError(f"--corpus {a.corpus} is not the text that {run} began with")
    if a.eval:
        loss, accuracy = M.evaluate(load(run)[0].to(device), valid, amp)
        return print(f"{run}: held-out loss {loss:.4f} nats (unigram entropy "
                     f"{text.unigram_entropy:.4f}), accuracy {accuracy:.4f}")
    print(f"corpus: {len(text.train)} blocks of {T} to train on, {len(valid)} held out, "
          f"unigram entropy {text.unigram_entropy:.2f} nats")
    if len(text.train) < a.batch_size:
        raise UserError(f"the corpus is too small: {len(text.train)} blocks are less than a batch "
                        f"of {a.batch_size}: give more text, or a smaller --batch-size")
    teacher, teacher_flops = None, 0
    if a.teacher:
        teacher, teacher_tokenizer = load(a.teacher)
        teacher = teacher.to(device).requires_grad_(False)
        teacher_flops = sum(spent_flops(a.teacher))
        if teacher_tokenizer.sha256 != tokenizer.sha256 or teacher.shape.seq_len < T:
            raise UserError(f"--teacher {a.teacher} has another tokenizer or a shorter --seq-len: "
                            "it must be trained on the same --corpus and --vocab-size")

    # ---- model and optimiser ---------------------------------------------------------------------
    torch.manual_seed(a.seed)
    shape = Shape(V, a.layers or SIZES[a.size][0], a.width or SIZES[a.size][1], T, a.positions,
                  a.rotary_base, a.local_start, a.init_std, a.dropout)
    model = Bert(shape)
    if a.init_from_teacher:
        copy_weights(model, teacher)
    model.to(device)
    optimizer = make_optimizer(model, a.lr, a.weight_decay)
    parallel = ranks.wrap(model)
    forward = torch.compile(parallel) if a.compile else parallel
    scorer = teacher if a.masking == "entropy" else model
    types = M.TypeEntropy(V, device) if a.score_input == "type" else None

    def score(tokens, candidates):
        if types:
            return types(tokens, candidates)
        how = M.masked_entropy if a.score_input == "masked" else M.clear_entropy
        with amp():
            return how(scorer, tokens, candidates)

    def flops_at(step):
        return step_flops(a, shape, scorer.shape, teacher and teacher.shape, step)

    if a.flops_of and not earlier:
        a.steps = 1000  # FLOPs depend on the share of the run that is over: average over it
        mean = sum(map(flops_at, range(a.steps))) / a.steps
        a.steps = max(1, round(spent_flops(a.flops_of)[0] / mean))
    step, spent, spent_by_teacher = 0, 0, 0  # by the run that this one continues
    if a.begin_from and not earlier:
        step, spent, spent_by_teacher = check_origin(vars(a), text.sha256)
    all_flops = earlier["flops"] if earlier else spent + sum(map(flops_at, range(step, a.steps)))
    teacher_flops = earlier["teacher_flops"] if earlier else teacher_flops + spent_by_teacher

    # ---- run folder: a new one, or an interrupted run, which goes on where its checkpoint is -----
    lock = None if ranks.RANK else begin_run(run, earlier, text.tokenizer_path, {
        "flags": {name: value for name, value in vars(a).items() if name in DEFAULTS},
        "corpus_sha256": text.sha256, "tokenizer_sha256": tokenizer.sha256,
        "teacher_sha256": sha256_file(Path(a.teacher) / "model.pt") if teacher else "",
        "origin_sha256": earlier["origin_sha256"] if earlier else origin_sha256(a.begin_from),
        "parameters": sum(p.numel() for p in model.parameters()),
        "unigram_entropy": text.unigram_entropy, "flops": all_flops, "teacher_flops": teacher_flops,
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
        "threads": torch.get_num_threads(), "dtype": dtype, "processes": ranks.WORLD,
        "command": sys.argv,
    })
    step, seconds = 0, 0.0  # updates done, and the time spent in them
    recent = []  # (loss, gradient norm) of the updates since the last log line
    own = load_checkpoint(run) if earlier else None
    if saved := own or (a.begin_from and load_origin(a.begin_from, earlier)):
        step, recent = saved["step"], list(saved["recent"].to(device))
        seconds = saved["seconds"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if types and len(saved["types"]):
            types.mean, types.seen = saved["types"].to(device)
        print(f"{run}: going on after step {step}")
    log, logged = (open(os.devnull, "a"), None) if ranks.RANK else open_log(
        run, step if own else 0, own and own["logged"])
    mirror = lambda entry: None  # noqa: E731
    if a.tensorboard and not ranks.RANK:
        mirror = open_tensorboard(run, 0 if logged is None else logged + 1)
    begun = step

    # ---- loop ------------------------------------------------------------------------------------
    stop = catch_signals()  # a signal asks for a stop after the step

    def not_finite(step):
        bar.close()
        print(f"error: the loss or its gradient is not finite at step {step}; the last checkpoint "
              "is intact, but a lower --lr is needed", file=sys.stderr)
        sys.exit(1)

    share = a.batch_size // ranks.WORLD  # rows of this process
    micro = a.micro_batch or share
    assert share * ranks.WORLD == a.batch_size and share % micro == 0, "rows would be left out"
    mine = range(ranks.RANK * share, (ranks.RANK + 1) * share, micro)
    kinds = M.token_kinds(tokenizer.pieces, text.counts)
    flops = all_flops - sum(map(flops_at, range(step, a.steps)))  # so far
    bar = tqdm(total=a.steps, initial=step, desc=run.name, unit=" steps",
               disable=ranks.RANK > 0, mininterval=0.2 if sys.stderr.isatty() else 30)
    began, timed = time.perf_counter(), 0  # since the last log line: time, and steps in it

    while True:
        k, choosing, teaching = plan(a, step)
        now_score = score if choosing else None

        # ---- log, evaluate, save: everything that happens once in a while
        stopping = ranks.any_of(bool(stop))
        last = stopping or step == a.steps
        due = step in (0, a.steps) or (a.eval_every and step % a.eval_every == 0)
        to_log = due or step % a.log_every == 0
        to_save = last or (step != begun and step % a.checkpoint_every == 0)
        if recent and (to_log or to_save):
            values = ranks.mean(torch.stack(recent))
            recent = list(values)
            finite = values.isfinite().all(1)
            if not finite.all():
                not_finite(step - len(recent) + 1 + finite.int().argmin().item())
        if to_log and step != logged:
            entry = {"step": step, "tokens": step * a.batch_size * T}
            if recent:
                since = time.perf_counter() - began
                seconds += since
                entry |= {"train_loss": values[:, 0].mean().item(),
                          "grad_norm": values[:, 1].mean().item(),
                          "lr": optimizer.param_groups[0]["lr"],
                          "tokens_per_s": round(timed * a.batch_size * T / since),
                          "seconds": round(seconds, 1)}
                bar.set_postfix(loss=f"{entry['train_loss']:.2f}", refresh=False)
            entry |= {"flops": flops, "flops_with_teacher": flops + teacher_flops}
            if due:
                entry["val_loss"], entry["val_accuracy"] = M.evaluate(model, valid, amp)
                if not math.isfinite(entry["val_loss"]):
                    not_finite(step)

                def choose_now(tokens, noise):
                    return M.choose(tokens, k, now_score, a.select, a.pool, noise)

                with amp():
                    entry["masked"] = M.diagnose(model, valid[:64], k, choose_now, kinds, types)
                entry["peak_memory_mb"] = peak_memory(device) >> 20
                bar.write(f"step {step:6}  held-out loss {entry['val_loss']:.3f} (unigram entropy "
                          f"{text.unigram_entropy:.3f})  accuracy {entry['val_accuracy']:.3f}")
            log.write(json.dumps(entry) + "\n")
            log.flush()
            mirror(entry)
            recent, logged, began, timed = [], step, time.perf_counter(), 0
        if to_save and not ranks.RANK:
            os.fsync(log.fileno())  # the log must never be behind the checkpoint
            save_checkpoint(run, {
                "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "recent": torch.stack(recent) if recent else torch.zeros(0, 2),
                "types": torch.stack([types.mean, types.seen]) if types else torch.zeros(0),
                "seconds": seconds, "logged": logged})
        if last:
            break

        # ---- one update: where to mask, what to put there, loss, gradient
        model.train()
        tokens = corpora.batch_at(text.train, a.seed, step, a.batch_size).to(device)
        noise = {p: M.draw(a.seed, step, p, a.batch_size, T).to(device)
                 for p in (M.POOL, M.SELECT, M.HALF)}
        u = M.draw(a.seed, step, M.REPLACE, a.batch_size, 2 * k).view(-1, k, 2).to(device)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, a.steps, a.lr, a.warmup_frac, a.decay_frac)
        total, sightings = 0.0, []
        for first in mine:
            part = slice(first, first + micro)
            x = tokens[part]
            positions = M.choose(x, k, now_score, a.select, a.pool,
                                 {p: n[part] for p, n in noise.items()})
            inputs = M.replace(x, positions, u[part], V)
            labels = x.gather(1, positions).flatten()
            M.seed_dropout(a.seed, step, first)
            # Processes average their gradients once: in the backward of the last part.
            parallel.require_backward_grad_sync = first == mine[-1]
            with amp():
                logits = forward(inputs, positions).flatten(0, 1)  # (B k, V)
            logits = logits.float()
            log_p = logits.log_softmax(-1)
            loss = F.nll_loss(log_p, labels)
            total += loss.detach() * (micro / share)
            if teaching:
                with torch.no_grad(), amp():
                    taught = teacher(inputs, positions).flatten(0, 1).float()
                loss = (1 - a.alpha) * loss + a.alpha * distillation_loss(logits, taught, a.tau)
            if types:
                shown = inputs.gather(1, positions).flatten() == MASK
                H = M.entropy_of(log_p.detach())
                sightings.append(torch.stack([labels.float(), H, shown.float()]))
            # All rows have k masked tokens: the mean over the batch is the mean of these means.
            (loss * (micro / share)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), a.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if types:  # all at once, in the order of the rows: a micro-batch is only about memory
            by_part = [ranks.gather(s) for s in sightings]
            labels, H, shown = torch.cat([x for rank in zip(*by_part) for x in rank], 1)
            types.update(labels.long(), H, shown)
        recent.append(torch.stack([total, norm]))
        flops += flops_at(step)
        step, timed = step + 1, timed + 1
        bar.update()

    # ---- end -------------------------------------------------------------------------------------
    bar.close()
    if stopping:
        print(f"stopped after step {step}; go on with:  python train.py --resume {run}")
        ranks.leave()  # after process 0 has saved: torchrun ends the others when one is gone
        sys.exit(128 + (stop or [signal.SIGTERM])[0])
    if ranks.RANK:
        return ranks.leave()
    share_types(weights := {n: w.cpu() for n, w in model.state_dict().items()})
    save_tensors(run / "model.pt", {"shape": asdict(shape), "model": weights})
    lock.close()
    ranks.leave()
    loss, H = read_log(run)[-1]["val_loss"], text.unigram_entropy
    stuck = "" if loss < WITHOUT_CONTEXT * H else ": no context is used yet, train for more --steps"
    print(f"{run}: held-out loss {loss:.3f} nats, unigram entropy {H:.3f} ({loss - H:+.2f}){stuck}"
          f'\nsee what it masks:  python masking.py {run} "The function returns an array."')


if __name__ == "__main__":
    run_script(lambda: ranks.guard(main))
