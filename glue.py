"""Fine-tune finished runs on GLUE and compare them. One flat script: flags, data, fine-tuning, job.

    python glue.py runs/random-0 runs/self-0                # all tasks; data downloaded once
    python glue.py runs/random-* runs/self-* --seeds 3      # arms paired over pretraining seeds
    python glue.py runs/self-0 --tasks CoLA,RTE --glue-dir DIR   # your copy, official layout
    python glue.py runs/* --table                           # only print what is already scored

A score is a function of the run, the recipe, the rows and the fine-tuning seed, and is kept in the
run's glue.json as soon as it is there: a job that was killed continues where it was, and nothing is
computed twice. Every table has two floors on the same rows: the majority class, and the same model
with random weights, at their own rate. Scores follow Wang et al. 2018 (GLUE, arXiv 1804.07461).
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

from data.compare import RATES, group_arms, make_tables
from data.files import (
    UserError, add_flags, check_range, checksum, lock_folder, make_folder, refuse_command,
    run_script, sha256_file,
)
from data.runs import WITHOUT_CONTEXT, add_score, read_config, read_log, read_scores, spent_flops
from data.tables import show_tables
from data.tasks import TASKS, batches, encode_rows, read_task

# --------------------------------------------------------------------------------------------------
# flags: name, default, help, and the choices where there are any

RECIPE = [  # one for every arm and task; README, "The fine-tuning recipe", says how it was chosen
    ("epochs", -1, "passes over the training rows (default 3; with --freeze 10)"),
    ("batch-size", 16, "rows in an update"),
    ("lr", -1.0, "peak rate (1e-3, from width 256 on 6e-4; random weights less; --freeze 3e-3)"),
    ("embedding-lr", -1.0, "that of the token embeddings (from width 256 on a tenth of --lr; "
     "below, and with random weights, all of it)"),
    ("warmup-frac", 0.1, "share of the updates over which the rate rises; then it falls to 0"),
    ("weight-decay", 0.01, "of matrices and embeddings; biases and LayerNorm have none"),
    ("dropout", 0.0, "in the encoder and on the sentence vector, whatever pretraining had"),
    ("clip", 1.0, "largest norm of the gradient"),
    ("max-len", 128, "tokens in a row; the longer sentence of a pair is cut first"),
    ("max-train", 20_000, "only so many training rows a task, always the same; 0: all"),
    ("pool-output", "pair", "sentence vector: the mean over the tokens of each sentence and their "
     "difference; mean, over all tokens; cls, that of [CLS]", ("pair", "mean", "cls")),
    ("freeze", False, "keep the encoder as it is and train the last layer alone"),
]
FLAGS = {
    "What": [
        ("tasks", ",".join(TASKS), "a list with commas"),
        ("seeds", 1, "fine-tuning seeds for every run and task"),
        ("glue-dir", "", "GLUE in the official layout, DIR/CoLA/train.tsv (default: downloaded)"),
        ("cache", os.path.relpath(Path(__file__).parent / "data" / "cache"),
         "where downloads and the scores of random weights are kept"),
    ],
    "Recipe": RECIPE,
    "Machine": [
        ("device", "auto", "auto: a GPU where there is one", ("auto", "cpu", "cuda")),
        ("dtype", "auto", "auto: bfloat16 on GPUs that have it", ("auto", "float32", "bfloat16")),
        ("threads", 0, "CPU threads; 0: torch's choice"),
    ],
    "Table": [
        ("table", False, "only print what is already scored, each recipe in a table of its own"),
        ("parts", False, "show both parts of two-part metrics"),
        ("markdown", False, "print the tables ready for a README"),
        ("json", False, "print the tables for a program"),
    ],
}
DEFAULTS = {f[0].replace("-", "_"): f[1] for flags in FLAGS.values() for f in flags}
RECIPE_NAMES = [f[0].replace("-", "_") for f in RECIPE]


def parse_flags():
    """The command line -> (flags as a namespace, the names of those that were given)."""
    parser = argparse.ArgumentParser(
        usage="python glue.py RUN [RUN ...] [FLAGS]", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    parser.error = refuse_command
    parser.add_argument("runs", nargs="*", metavar="RUN", help="finished run folders of train.py")
    parser.add_argument("--baseline", nargs="+", metavar="RUN", default=[],
                        help="runs of the arm to compare with (default: the random arm)")
    add_flags(parser, FLAGS)
    given = vars(parser.parse_args())
    a = argparse.Namespace(**{**DEFAULTS, "runs": [], **given})
    if a.epochs == -1:
        a.epochs = 10 if a.freeze else 3

    flags = vars(a)
    check_range(flags, "epochs batch_size clip seeds", lambda v: 0 < v < math.inf, "above 0")
    check_range(flags, "lr embedding_lr", lambda v: v == -1 or 0 < v < math.inf, "above 0")
    check_range(flags, "weight_decay max_train threads", lambda v: 0 <= v < math.inf, "0 or more")
    check_range(flags, "warmup_frac dropout", lambda v: 0 <= v < 1, "from 0 to below 1")
    check_range(flags, "max_len", lambda v: v >= 16, "at least 16")
    names = {name.lower(): name for name in TASKS}
    a.tasks = [task.strip() for task in a.tasks.split(",")]
    if unknown := [task for task in a.tasks if task.lower() not in names]:
        raise UserError(f"--tasks: there is no task {unknown[0] or 'without a name'}; the tasks "
                        f"are {','.join(TASKS)}")
    a.tasks = [task for task in TASKS if task in {names[t.lower()] for t in a.tasks}]
    if not a.runs:
        raise UserError("give the run folders to score:  python glue.py runs/random-0 runs/self-0")
    if a.markdown and a.json:
        raise UserError("give --markdown or --json, not both")
    a.runs = list(dict.fromkeys(os.path.normpath(run) for run in [*a.runs, *a.baseline]))
    a.baseline = [os.path.normpath(run) for run in a.baseline]
    return a, set(given)


if __name__ == "__main__":
    COMMAND = run_script(parse_flags)  # before torch is imported: a typo is told at once

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data.metrics import majority, measure, right_rows
from data.tokenizer import PAD
from masking import seed_dropout
from model import Bert, load, lr_at, make_optimizer, pick_machine, read_model, share_types
from train import DEFAULTS as TRAIN_DEFAULTS

EVAL_TOKENS = 8192  # in a batch without gradients: large, and within a CPU's caches
SUBSET_SEED = 2605  # of --max-train: one subset of the rows for every run, arm and seed

# --------------------------------------------------------------------------------------------------
# the model


def collate(rows, device):
    """Rows -> tokens (B, T), types (B, T), attend (B, T); T is the longest row of these."""
    B, T = len(rows), max(len(ids) for ids, _ in rows)
    tokens, types = np.full((B, T), PAD), np.zeros((B, T), dtype=np.int64)
    attend = np.zeros((B, T), dtype=bool)
    for i, (ids, first) in enumerate(rows):
        tokens[i, :len(ids)] = ids
        types[i, first:len(ids)] = 1
        attend[i, :len(ids)] = True
    return [torch.from_numpy(x).to(device) for x in (tokens, types, attend)]


class Classifier(nn.Module):
    """A Bert, a sentence vector, and one linear layer: a logit per class, or one number."""

    def __init__(self, bert, outputs, pool_output):
        super().__init__()
        self.bert, self.pool_output = bert, pool_output
        self.dropout = nn.Dropout(bert.shape.dropout)
        parts = 3 if pool_output == "pair" else 1
        self.head = nn.Linear(parts * bert.shape.width, outputs)
        nn.init.normal_(self.head.weight, std=0.02)  # as BERT's classifier
        nn.init.zeros_(self.head.bias)

    def vector(self, tokens, types, attend):
        """-> (B, d): the hidden state of [CLS], or the mean over all tokens; or (B, 3 d): the means
        u and v over each sentence (v = 0 without a second) and |u - v|, as Sentence-BERT (Reimers
        and Gurevych 2019, section 3), but from one forward over both."""
        if self.pool_output == "cls":
            first = torch.zeros_like(tokens[:, :1])
            return self.bert.encode(tokens, first, types, attend)[:, 0]
        hidden = self.bert.encode(tokens, None, types, attend)  # (B, T, d)

        def mean(which):  # (B, T) -> (B, d); padding is never in it
            share = which / which.sum(1, keepdim=True).clamp_min(1)
            return (hidden * share[..., None]).sum(1)

        if self.pool_output == "mean":
            return mean(attend)
        u, v = mean(attend & (types == 0)), mean(attend & (types == 1))
        return torch.cat((u, v, (u - v).abs()), 1)

    def forward(self, vector):
        return self.head(self.dropout(vector))


@torch.inference_mode()
def over_rows(function, rows, device, bar):
    """function(tokens, types, attend) -> (B, n) for every row -> (N, n) in the rows' order."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]), reverse=True)
    outputs, first = [], 0
    while first < len(order):
        size = max(1, EVAL_TOKENS // len(rows[order[first]][0]))
        part = [rows[i] for i in order[first:first + size]]
        outputs.append(function(*collate(part, device)).float())
        bar(part)
        first += size
    back = torch.empty(len(order), dtype=torch.long, device=device)
    back[torch.tensor(order, device=device)] = torch.arange(len(order), device=device)
    return torch.cat(outputs)[back]


def fine_tune(bert, outputs, train, labels, devs, a, stream, device, amp, bar):
    """Train a Classifier on `train` rows -> its outputs (N, outputs) for the rows of each of devs.

    outputs  classes, or 1: a regression, on labels that are standardised by the training rows
    stream   decides the head's weights, the order of the rows and dropout
    bar      is called with the rows of each batch, and 1 where it was an update
    """
    torch.manual_seed(stream)
    model = Classifier(bert, outputs, a.pool_output).to(device)
    labels = torch.tensor(labels, device=device)
    if outputs == 1:  # correction 0: a single row has a deviation, too
        labels = (labels - labels.mean()) / labels.std(correction=0).clamp_min(1e-6)
    lengths = np.array([len(ids) for ids, _ in train])

    def vector(*batch):
        with amp():
            return model.vector(*batch).float()

    if a.freeze:  # the vectors never change: computed once, and brought to one scale
        model.eval()
        bert.requires_grad_(False)
        vectors = over_rows(vector, train, device, bar)
        mean, std = vectors.mean(0), vectors.std(0, correction=0).clamp_min(1e-6)
        vectors = ((vectors - mean) / std).clone()  # clone: inference tensors cannot be trained on
    optimizer = make_optimizer(model, a.lr, a.weight_decay, a.embedding_lr)
    peaks = [group["lr"] for group in optimizer.param_groups]
    step, steps = 0, a.epochs * math.ceil(len(train) / a.batch_size)
    for epoch in range(a.epochs):
        model.train()
        total = 0.0
        for chosen in batches(lengths, a.batch_size, stream, epoch):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = lr_at(step, steps, peak, a.warmup_frac)
            seed_dropout(stream, step, 0)
            rows = [train[i] for i in chosen]
            x = vectors[chosen] if a.freeze else vector(*collate(rows, device))
            output, y = model(x), labels[torch.from_numpy(chosen).to(device)]
            # squeeze: (B, 1) minus (B) would be (B, B), without any complaint
            loss = F.mse_loss(output.squeeze(1), y) if outputs == 1 else F.cross_entropy(output, y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), a.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.detach()
            step += 1
            if not a.freeze:
                bar(rows, 1)
        if not math.isfinite(total):
            return None
    model.eval()

    def predict(*batch):
        x = vector(*batch)
        return model((x - mean) / std if a.freeze else x)

    return [over_rows(predict, rows, device, bar).cpu() for rows in devs]


# --------------------------------------------------------------------------------------------------
# runs, floors, and their scores


def open_subject(path):
    """A finished run folder -> what scoring it needs, and what data/compare.py needs to know."""
    run = Path(path)
    model, tokenizer = load(run)
    config = read_config(run, TRAIN_DEFAULTS)
    log = [line for line in read_log(run) if "val_loss" in line]
    try:
        flags = config["flags"]
        flops, teacher_flops = spent_flops(run)
        return SimpleNamespace(
            path=path, is_floor=False, folder=run, seed=flags["seed"], entries=[],
            flags=flags, defaults=TRAIN_DEFAULTS, tokenizer=tokenizer,
            shape=replace(model.shape, dropout=0.0),  # that of pretraining is a flag, not a size
            model=sha256_file(run / "model.pt"), corpus=str(config["corpus_sha256"]),
            flops_of=flags["flops_of"], flops=flops,
            tokens=flags["steps"] * flags["batch_size"] * flags["seq_len"],
            teacher_flops=teacher_flops, flops_with_teacher=flops + teacher_flops,
            seconds=float(log[-1].get("seconds", 0)),
            margin=WITHOUT_CONTEXT * config["unigram_entropy"] - float(log[-1]["val_loss"]))
    except (KeyError, TypeError, ValueError, OverflowError, IndexError):
        raise UserError(f"{run}: config.json or log.jsonl is damaged, or of another version")


def make_floor(run, seed, cache):
    """The model that `run` would have been before its first update, with this seed."""
    key = checksum({"shape": asdict(run.shape), "tokenizer": run.tokenizer.sha256, "seed": seed})
    return SimpleNamespace(
        path="random weights", is_floor=True, folder=Path(cache) / "glue" / key[:16], seed=seed,
        entries=[], shape=run.shape, tokenizer=run.tokenizer, model=key)


def build(subject, dropout):
    """A fresh Bert with the subject's weights."""
    if not subject.is_floor:
        trained = read_model(subject.folder / "model.pt")
        bert = Bert(replace(trained.shape, dropout=dropout))
        bert.load_state_dict(trained.state_dict())
        return bert
    torch.manual_seed(subject.seed)
    bert = Bert(replace(subject.shape, dropout=dropout))
    share_types(weights := bert.state_dict())
    bert.load_state_dict(weights)
    return bert


def stream_of(seed, fine_tuning_seed, task):
    """The number all random draws come from. The pretraining seed is part of it: arms with one seed
    are fine-tuned alike, and two seeds are two samples of everything that is random."""
    key = (seed, fine_tuning_seed, list(TASKS).index(task))
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def recipe_of(subject, a):
    """Unasked, the rates follow the weights: README, "The fine-tuning recipe"."""
    wide, floor = subject.shape.width >= 256, subject.is_floor
    usual = (1.5e-4 if wide else 5e-4) if floor else 6e-4 if wide else 1e-3
    lr = a.lr if a.lr > 0 else 3e-3 if a.freeze else usual
    tenth = float(f"{lr / 10:.12g}")  # rounded: a tenth of 6e-4 shall be shown as 6e-05
    words = a.embedding_lr if a.embedding_lr > 0 else tenth if wide and not floor else lr
    return {name: getattr(a, name) for name in RECIPE_NAMES} | {"lr": lr, "embedding_lr": words}


def main():
    a, given = COMMAND
    runs = []
    for path in a.runs:
        try:
            runs.append(open_subject(path))
        except UserError as error:  # a table of what is there is wanted while others still train
            if not a.table:
                raise
            print(f"left out: {error}", file=sys.stderr)
    if not runs:
        raise UserError("no finished run to show")
    group_arms(runs)  # a run that is given twice is told now, not after the work
    floor_seeds = range(min(3, len({run.seed for run in runs})))  # three are enough for a floor
    floors = {(run.shape, run.tokenizer.sha256): [make_floor(run, s, a.cache) for s in floor_seeds]
              for run in runs}
    subjects = [*runs, *(floor for group in floors.values() for floor in group)]

    if not a.table:
        with contextlib.ExitStack() as held:
            for run in runs:
                held.enter_context(lock_folder(run.folder))
                read_scores(run.folder, run.model)  # a damaged file is told now, too
            rows = work(a, subjects)
    for subject in subjects:
        recipe = recipe_of(subject, a)
        wanted = given.intersection(RECIPE_NAMES) if a.table else set(RECIPE_NAMES)
        wanted -= RATES if subject.is_floor else set()  # their best is what has to be passed
        subject.entries = [
            e for e in read_scores(subject.folder, subject.model) if e["task"] in a.tasks
            and (a.table or e["data"] == rows[e["task"]])
            and all(e["recipe"].get(name) == recipe[name] for name in wanted)]
    tables = make_tables(runs, floors, a.baseline)
    if not tables:
        raise UserError("nothing is scored yet: leave out --table")
    print(json.dumps(tables, indent=1) if a.json else show_tables(tables, a.markdown, a.parts))


def work(a, subjects):
    """Compute every score that is not there yet."""
    device, dtype, why = pick_machine(a.device, a.dtype, a.threads)
    out = sys.stderr if a.json or a.markdown else sys.stdout  # what others read is tables alone
    print(f"machine: {device.type}, {torch.get_num_threads()} threads, {dtype} ({why})", file=out)

    def amp():
        return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")

    # ---- the data, tokenised once for all runs and seeds that share a tokenizer
    tasks, encoded = {}, {}
    for name in a.tasks:
        train, devs, sha256 = read_task(name, a.glue_dir, a.cache)
        keep = np.random.default_rng(SUBSET_SEED).permutation(len(train))[:a.max_train or None]
        tasks[name] = SimpleNamespace(train=train, devs=devs, sha256=sha256, keep=keep)
        for subject in subjects:
            key = (name, subject.tokenizer.sha256, subject.shape.seq_len)
            if key not in encoded:
                max_len = min(a.max_len, subject.shape.seq_len)
                rows = [encode_rows(subject.tokenizer, part.sentences, max_len)
                        for part in (train, *devs)]
                rows[0] = [rows[0][i] for i in keep]
                encoded[key] = rows
                # One row is shown: the cheapest way to see a wrong label or tokenizer.
                ids, label = rows[0][0][0], train.labels[keep[0]]
                print(f"{name}: {len(keep)} of {len(train)} training rows, for example "
                      f"{''.join(subject.tokenizer.pieces[i] for i in ids)[:150]} -> {label}",
                      file=out)

    # ---- what there is to do, and about how much work it is
    def cost(subject, rows, updates=0):
        """FLOPs of a forward over these rows, or of training on them in so many updates."""
        d, tokens = subject.shape.width, sum(len(ids) for ids, _ in rows)
        encoder = 12 * subject.shape.layers * d**2
        if not updates:
            return 2 * encoder * tokens
        # AdamW takes about as long as 30 FLOPs for every parameter.
        return 6 * encoder * tokens + 30 * updates * (encoder + subject.shape.vocab_size * d)

    def is_done(subject, task, seed):
        return any(e["task"] == task and e["seed"] == seed and e["data"] == tasks[task].sha256
                   and e["recipe"] == recipe_of(subject, a)
                   for e in read_scores(subject.folder, subject.model))

    items = []
    for name in a.tasks:
        for seed, subject in itertools.product(range(a.seeds), subjects):
            train, *devs = encoded[name, subject.tokenizer.sha256, subject.shape.seq_len]
            updates = 0 if a.freeze else math.ceil(len(train) / a.batch_size)
            size = (1 if a.freeze else a.epochs) * cost(subject, train, updates)
            size += sum(cost(subject, rows) for rows in devs)
            if not is_done(subject, name, seed):
                items.append((subject, name, seed, train, devs, size))
    for subject, *_ in items:
        make_folder(subject.folder)
    # smoothing 0: the average speed so far; tasks differ too much for anything shorter
    bar = tqdm(total=sum(size for *_, size in items), smoothing=0,
               mininterval=0.2 if sys.stderr.isatty() else 30,
               bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}")
    for subject, name, seed, train, devs, size in items:
        with contextlib.ExitStack() as held:
            if subject.is_floor:  # jobs side by side share these: wait, and perhaps it is done
                held.enter_context(lock_folder(subject.folder, wait=True))
                if is_done(subject, name, seed):
                    bar.update(size)
                    continue
            bar.set_description_str(f"{subject.path} {name}", refresh=False)
            data, task, began = tasks[name], TASKS[name], time.perf_counter()
            labels = [data.train.labels[i] for i in data.keep]
            recipe = recipe_of(subject, a)
            outputs = fine_tune(
                build(subject, a.dropout), task.outputs, train, labels, devs,
                SimpleNamespace(**recipe), stream_of(subject.seed, seed, name), device, amp,
                lambda rows, updates=0: bar.update(cost(subject, rows, updates)))
            if outputs is None:
                bar.close()
                print(f"error: {subject.path}, {name}, seed {seed}: the loss is not finite, a "
                      "lower --lr is needed; all scores before it are kept", file=sys.stderr)
                sys.exit(1)
            parts = measure(task, outputs, data.devs)
            add_score(subject.folder, {
                "task": name, "seed": seed, "recipe": recipe, "data": data.sha256,
                "model": subject.model, "score": sum(parts.values()) / len(parts), "parts": parts,
                "majority": majority(task, labels, data.devs), "trained_on": len(train),
                "right": right_rows(task, outputs, data.devs),
                "rows": [len(part) for part in (data.train, *data.devs)],
                "official": [part.official for part in (data.train, *data.devs)],
                "seconds": round(time.perf_counter() - began, 1), "torch": torch.__version__,
                "device": device.type, "dtype": dtype, "threads": torch.get_num_threads()})
    bar.close()
    return {name: data.sha256 for name, data in tasks.items()}


if __name__ == "__main__":
    run_script(main)
