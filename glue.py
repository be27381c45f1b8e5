"""Fine-tune finished runs on GLUE and compare them: classifier, updates, runs, jobs, flags.

    python glue.py runs/random-0 runs/self-0                # all tasks; data downloaded once
    python glue.py runs/random-* runs/self-* --seeds 2      # arms, paired by pretraining seed
    python glue.py runs/self-0 --tasks CoLA,RTE --glue-dir DIR   # your copy, official layout
    python glue.py runs/* --table                           # only print what is already scored
    python glue.py runs/* --table --jsonl STUDY >> FILE     # every score, to keep it elsewhere

A score is a function of the run, the recipe, the rows, the fine-tuning seed and the machine, and is
kept in the run's glue.json as soon as it is there: a job that was stopped goes on where it was, and
nothing is computed twice. Random weights are fine-tuned beside the runs. On Linux without a GPU the
jobs run side by side, each in a process with one thread. Scores follow Wang et al. 2018 (GLUE,
arXiv 1804.07461).
"""

import contextlib
import json
import math
import os
import sys
import time
from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.arms import Model, group_arms, machine_of, read_run
from data.files import UserError, on_signals, progress, run_script, sha256_file, sha256_json
from data.flags import check_ranges, defaults, flag_parser
from data.jobs import JOB_FLAGS, bytes_of, processes_for, run_jobs, signals_later
from data.machine import MACHINE_FLAGS, Machine
from data.metrics import measured
from data.scores import RANDOM_WEIGHTS, add_score, make_tables, read_scores, show_tables
from data.tasks import TASKS, batches, encode_task, read_task
from data.tokenizer import PAD
from masking import seed_dropout
from model import Bert, copy_token_type, load, read_model
from train import learning_rate, make_optimizer

# --------------------------------------------------------------------------------------------------
# the model

EVAL_TOKENS = 8192  # in a batch without gradients: large, and within a CPU's caches


def collate(rows, device):
    """Rows of encode_rows, each (ids (n,), length of its first part) -> tokens (B, T),
    types (B, T), attend (B, T); T is the longest row of these."""
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
            weight = which / which.sum(1, keepdim=True).clamp_min(1)
            return (hidden * weight[..., None]).sum(1)

        if self.pool_output == "mean":
            return mean(attend)
        u, v = mean(attend & (types == 0)), mean(attend & (types == 1))
        return torch.cat((u, v, (u - v).abs()), 1)

    def forward(self, vector):
        """From sentence vectors, not from tokens: fit_head computes the vectors only once."""
        return self.head(self.dropout(vector))


def vectors(model, rows, machine):
    """The sentence vectors (B, d or 3 d) of a Classifier for these rows, in float32."""
    with machine.autocast():
        return model.vector(*collate(rows, machine.device)).float()


@torch.inference_mode()
def over_rows(function, rows):
    """function(some rows) -> (B, n), for all of them -> (N, n) in the rows' order."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]), reverse=True)
    outputs, first = [], 0
    while first < len(order):  # rows of like length together: little padding
        size = max(1, EVAL_TOKENS // len(rows[order[first]][0]))
        outputs.append(function([rows[i] for i in order[first:first + size]]))
        first += size
    return torch.cat(outputs)[torch.tensor(order).argsort()]  # in the rows' own order again


def predict(model, rows, machine):
    """The outputs (N, classes or 1) of a Classifier for these rows, on the CPU. FloatingPointError
    where one is not finite: the last update may have broken what no loss has seen."""
    model.eval()
    outputs = over_rows(lambda part: model(vectors(model, part, machine)), rows).cpu()
    if not outputs.isfinite().all():
        raise FloatingPointError("an output is not finite")
    return outputs


def fine_tune(model, rows, labels, recipe, seed, machine):
    """Train a Classifier, encoder and all, on rows of encode_rows. `seed` decides the order of the
    rows and dropout. FloatingPointError where the loss is not finite."""
    def forward(chosen):
        return model(vectors(model, [rows[i] for i in chosen], machine))

    optimise(model, forward, np.array([len(ids) for ids, _ in rows]), labels, recipe, seed)


def fit_head(model, rows, labels, recipe, seed, machine):
    """Train the last layer of a Classifier alone. The vectors below it never change: they are
    computed once, and brought to one scale, which becomes part of the layer at the end."""
    model.eval()
    x = over_rows(lambda part: vectors(model, part, machine), rows)
    mean, std = x.mean(0), x.std(0, correction=0).clamp_min(1e-6)
    x = (x - mean) / std
    optimise(model, lambda chosen: model(x[chosen]), np.array([len(ids) for ids, _ in rows]),
             labels, recipe, seed)
    with torch.no_grad():  # W (x - mean) / std + b = (W / std) x + b - (W / std) mean
        model.head.weight /= std
        model.head.bias -= model.head.weight @ mean


def optimise(model, forward, lengths, labels, recipe, seed):
    """Take the updates of fine_tune and fit_head. forward: numbers of rows (B,) -> outputs (B, n);
    labels: classes, or floats for a regression, which are standardised."""
    labels = torch.tensor(labels, device=model.head.weight.device)
    regression = labels.is_floating_point()
    if regression:  # correction 0: a single row has a deviation, too
        labels = (labels - labels.mean()) / labels.std(correction=0).clamp_min(1e-6)
    table = model.bert.token_embedding.weight  # a group of its own, with its own rate
    optimizer = make_optimizer((p for p in model.parameters() if p is not table), recipe.lr,
                               recipe.weight_decay)
    optimizer.add_param_group({"params": [table], "lr": recipe.embedding_lr,
                               "weight_decay": recipe.weight_decay})
    peaks = [group["lr"] for group in optimizer.param_groups]
    step, steps = 0, recipe.epochs * math.ceil(len(lengths) / recipe.batch_size)
    model.train()
    for epoch in range(recipe.epochs):
        total = 0.0
        for chosen in batches(lengths, recipe.batch_size, seed, epoch):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = learning_rate(step, steps, peak, recipe.warmup_frac)
            seed_dropout(seed, step, 0)
            output, y = forward(chosen), labels[torch.from_numpy(chosen).to(labels.device)]
            # squeeze: (B, 1) minus (B) would be (B, B), without any complaint
            loss = F.mse_loss(output.squeeze(1), y) if regression else F.cross_entropy(output, y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.detach()
            step += 1
        if not math.isfinite(total):
            raise FloatingPointError("the loss is not finite")


# --------------------------------------------------------------------------------------------------
# runs, random weights, rows


def open_run(path):
    """A finished run folder -> its Model."""
    bert, tokenizer = load(path)
    shape = replace(bert.shape, dropout=0.0)  # that of pretraining is a flag, not a size
    return replace(read_run(path), sha256=sha256_file(Path(path) / "model.pt"), shape=shape,
                   tokenizer=tokenizer)


def open_runs(paths, skip):
    """All of them. With `skip`, for a table while others still train, without unfinished ones."""
    runs = []
    for path in paths:
        try:
            runs.append(open_run(path))
        except UserError as error:
            if not skip:
                raise
            print(f"left out: {error}", file=sys.stderr)
    if not runs:
        raise UserError("no finished run to show")
    return runs


def random_weights(runs, cache):
    """Fresh weights: a Model for each shape, tokenizer and seed of these runs."""
    models = {}
    for run in runs:
        key = sha256_json({"shape": asdict(run.shape), "tokenizer": run.tokenizer.sha256,
                           "seed": run.seed})
        models[key] = Model(RANDOM_WEIGHTS, run.seed, Path(cache) / "glue" / key[:16], key,
                            run.shape, run.tokenizer)
    return list(models.values())


def build(model, dropout):
    """A fresh Bert with the weights of this Model."""
    torch.manual_seed(model.seed)  # as train.py makes them
    bert = Bert(replace(model.shape, dropout=dropout))
    trained = read_model(model.folder / "model.pt") if model.pretraining else bert
    weights = trained.state_dict()
    copy_token_type(weights)
    bert.load_state_dict(weights)
    return bert


# --------------------------------------------------------------------------------------------------
# jobs


@dataclass(eq=False)
class Job:
    """A fine-tuning: a score that is missing."""

    model: Model
    task: str
    seed: int
    data: tuple  # what read_task gives
    rows: tuple = ()  # what encode_task gives


def seed_of(job):
    """The number from which all random draws of a fine-tuning come. The pretraining seed is part of
    it: arms with one seed are fine-tuned alike, and two seeds are two samples of everything."""
    key = (job.model.seed, job.seed, list(TASKS).index(job.task))
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def scores_of(model, args, names=None, **more):
    """The scores of a model on the tasks and seeds of `args` whose recipe has, in these names
    (None: in all), what `args` says, and whose entries have these further values."""
    recipe = recipe_of(model, args)
    recipe = {name: recipe[name] for name in (RECIPE_NAMES if names is None else names)}
    return [e for e in read_scores(model.folder, model.sha256)
            if e["task"] in args.tasks and e["seed"] < args.seeds
            and recipe.items() <= e["recipe"].items() and more.items() <= e.items()]


def is_done(job, args, machine):
    """Is there a score already, by this recipe, on these rows and on such a machine?"""
    return bool(scores_of(job.model, args, task=job.task, seed=job.seed, data=job.data[-1],
                          **machine_of(machine.record())))


def score(job, args, machine):
    """Do a job -> an entry for glue.json; None where another command has done it meanwhile."""
    if is_done(job, args, machine):
        return None
    began, recipe, number = time.perf_counter(), recipe_of(job.model, args), seed_of(job)
    bert = build(job.model, args.dropout)
    torch.manual_seed(number)  # of the last layer
    classifier = Classifier(bert, TASKS[job.task].outputs, args.pool_output).to(machine.device)
    try:
        fit = fit_head if args.freeze else fine_tune
        fit(classifier, job.rows[0], job.data[0].labels, Namespace(**recipe), number, machine)
        outputs = [predict(classifier, dev, machine) for dev in job.rows[1:]]
    except FloatingPointError as error:
        raise FloatingPointError(f"{job.model.name}, {job.task}, seed {job.seed}: {error}")
    return {"task": job.task, "seed": job.seed, "recipe": recipe, "model": job.model.sha256,
            **measured(TASKS[job.task], outputs, job.data),
            "seconds": round(time.perf_counter() - began, 1), **machine.record()}


def work(models, args):
    """Compute every score that is not there yet; then give each model those that are asked for."""
    machine, rows = Machine(args), {}
    print(f"machine: {machine.about}")
    data = {task: read_task(task, args.glue_dir, args.cache, args.max_train)
            for task in args.tasks}
    jobs = [Job(model, task, seed, data[task]) for task in args.tasks
            for seed in range(args.seeds) for model in models]
    jobs = [job for job in jobs if not is_done(job, args, machine)]
    for job in jobs:  # models that share a tokenizer and a length share rows
        length = recipe_of(job.model, args)["max_len"]
        key = job.task, job.model.tokenizer.sha256, length
        rows[key] = job.rows = rows.get(key) or encode_task(
            job.task, job.data, job.model.tokenizer, length, machine.threads)
        job.model.folder.mkdir(parents=True, exist_ok=True)
    memory = {job: bytes_of(job.model.shape, args.batch_size * args.max_len) for job in jobs}
    # The longest first: at the end no core waits for one.
    jobs.sort(key=lambda job: -memory[job] * sum(len(ids) for ids, _ in job.rows[0]))
    processes = processes_for(machine, args.jobs, list(memory.values()))
    entries = run_jobs(lambda job: score(job, args, machine), jobs, processes,
                       lambda job: job.model.folder)
    with contextlib.closing(entries), progress(
            total=len(jobs), unit=" fine-tunings", unit_scale=False) as bar:
        for job, entry in entries:
            with signals_later():
                if entry:
                    add_score(job.model.folder, entry)
            bar.set_description_str(f"{job.model.name} {job.task}")
            bar.update()
    here = machine_of(machine.record())
    for model in models:
        model.scores = [e for e in scores_of(model, args, **here)
                        if e["data"] == data[e["task"]][-1]]


def main():
    args, given = parse_args()
    on_signals(lambda number, frame: sys.exit(128 + number))
    kept = "finished scores are kept: give the same command again to go on"
    try:
        runs = open_runs(args.runs, skip=args.table)
        arms = group_arms(runs)  # what cannot be compared is told now, not after the work
        if "baseline" in given and args.baseline not in arms:
            raise UserError(f"--baseline {args.baseline}: the arms are {', '.join(arms)}")
        models = [*random_weights(runs, args.cache), *runs]
        if args.table:
            asked = {name: getattr(args, name) for name in ("device", "dtype")
                     if getattr(args, name) != "auto"}
            args.seeds = args.seeds if "seeds" in given else math.inf
            for model in models:
                model.scores = scores_of(model, args, given & set(RECIPE_NAMES), **asked)
        else:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for the tables alone
                work(models, args)
    except FloatingPointError as error:
        print(f"error: {error}, a lower --lr is needed; {kept}", file=sys.stderr)
        sys.exit(1)
    except SystemExit:  # a signal: a fine-tuning can take minutes, its end is not waited for
        print(f"stopped; {kept}", file=sys.stderr)
        raise
    tables = make_tables(models, args.baseline)
    if not tables:
        raise UserError("nothing is scored yet: leave out --table")
    if args.jsonl:
        for model in models:
            for entry in model.scores:
                print(json.dumps({"study": args.jsonl, "run": model.name, **entry}))
    else:
        print(json.dumps(tables, indent=1) if args.json else show_tables(tables))


# --------------------------------------------------------------------------------------------------
# flags: name, default (None or 0: follows from others), what is allowed, help

FLAGS = {
    "What": [
        ("tasks", ",".join(TASKS), None, "a list with commas"),
        ("seeds", 1, "above 0", "fine-tuning seeds for every run and task"),
        ("glue-dir", "", "path", "GLUE in the official layout, DIR/CoLA/train.tsv (default: "
         "downloaded)"),
        ("cache", os.path.relpath(Path(__file__).parent / "data" / "cache"), "path",
         "where downloads and the scores of random weights are kept"),
    ],
    "Recipe": [  # one for every arm and task; data/results/recipe.md says how it was chosen
        ("epochs", 0, "0 or more", "passes over the training rows; 0: 3, with --freeze 10"),
        ("batch-size", 16, "above 0", "rows in an update"),
        ("lr", None, "above 0", "peak learning rate of runs (default: see RATES in glue.py)"),
        ("embedding-lr", None, "above 0", "that of the token embeddings (default: see RATES)"),
        ("warmup-frac", 0.1, "from 0 to below 1", "share of the updates over which the rate "
         "rises; then it falls to 0"),
        ("weight-decay", 0.01, "0 or more", "of matrices and embeddings; biases and LayerNorm "
         "have none"),
        ("dropout", 0.0, "from 0 to below 1", "in the encoder and on the sentence vector, "
         "whatever pretraining had"),
        ("clip", 1.0, "above 0", "largest norm of the gradient"),
        ("max-len", 128, "from 16 to 65536", "tokens in a row, and no more than the model reads; "
         "of a pair the longer is cut"),
        ("max-train", 20_000, "0 or more", "only so many training rows a task, always the same; "
         "0: all"),
        ("pool-output", "pair", ("pair", "mean", "cls"), "sentence vector: the mean over the "
         "tokens of each sentence and their difference; mean, over all tokens; cls, that of [CLS]"),
        ("freeze", False, None, "keep the encoder as it is and train the last layer alone"),
    ],
    "Machine": MACHINE_FLAGS + JOB_FLAGS,
    "Table": [
        ("baseline", "random", None, "the arm that others are compared with: the name of its run "
         "folders without -SEED"),
        ("table", False, None, "only print what is already scored, a table for each recipe; the "
         "flags that are given choose recipes, tasks, seeds (else all), device and dtype"),
        ("json", False, None, "print the tables for a program"),
        ("jsonl", "", None, "print every score instead, a line of JSON with all that is kept of "
         "it, under this name of a study: so it is added to a file of data/results"),
    ],
}
RECIPE_NAMES = list(defaults({"": FLAGS["Recipe"]}))
# (random weights?, width >= 256?) -> learning rate, that of the token embeddings. The embeddings of
# a trained model are several times larger than random ones, and a wide model needs lower rates.
# All four were chosen on development rows of SST-2, QNLI, MNLI and QQP: those of runs on the random
# arm, those of random weights as the best that was tried for them, so that a rate that suits only
# trained weights does not look like a gain of pretraining. data/results/recipe.md has the numbers.
RATES = {
    (False, False): (1e-3, 1e-3),
    (False, True): (6e-4, 6e-5),
    (True, False): (5e-4, 5e-4),
    (True, True): (1.5e-4, 1.5e-4),
}
FROZEN_RATE = 3e-3  # of the last layer alone, whatever the weights below it; no other was tried


def parse_args(argv=None):
    """The command line -> (the flags; the names of those that were given)."""
    parser = flag_parser("python glue.py RUN [RUN ...] [FLAGS]", __doc__, FLAGS)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="finished run folders of train.py")
    typed = vars(parser.parse_args(argv))
    args = Namespace(**{**defaults(FLAGS), "runs": [], **typed})
    check_ranges(args, FLAGS)
    args.epochs = args.epochs or (10 if args.freeze else 3)
    names = {name.lower(): name for name in TASKS}
    asked = [task.strip() for task in args.tasks.split(",")]
    if unknown := [task for task in asked if task.lower() not in names]:
        raise UserError(f"--tasks: there is no task {unknown[0] or 'without a name'}; the tasks "
                        f"are {','.join(TASKS)}")
    args.tasks = [task for task in TASKS if task in {names[name.lower()] for name in asked}]
    if args.freeze and args.embedding_lr:
        raise UserError("--freeze trains the last layer alone: leave out --embedding-lr")
    if args.json and args.jsonl:
        raise UserError("give --json or --jsonl, not both")
    if not args.runs:
        raise UserError("give the run folders to score:  python glue.py runs/random-0 runs/self-0")
    args.runs = list(dict.fromkeys(os.path.normpath(os.path.expanduser(run)) for run in args.runs))
    return args, set(typed)


def recipe_of(model, args):
    """The recipe for this model, as it is kept with its scores. --lr and --embedding-lr are for
    runs: random weights keep their own rates. With --freeze there is one rate for both. No row is
    longer than the model reads."""
    usual, embeddings = RATES[model.pretraining is None, model.shape.width >= 256]
    lr = args.lr if args.lr and model.pretraining else usual
    # The ratio of the two stays. Rounded: a tenth of 6e-4 is to be shown as 6e-05.
    embedding_lr = float(f"{lr * embeddings / usual:.12g}")
    if args.embedding_lr and model.pretraining:
        embedding_lr = args.embedding_lr
    if args.freeze:
        lr = embedding_lr = args.lr or FROZEN_RATE
    return {name: getattr(args, name) for name in RECIPE_NAMES} | {
        "lr": lr, "embedding_lr": embedding_lr,
        "max_len": min(args.max_len, model.shape.seq_len)}


if __name__ == "__main__":
    run_script(main)
