"""The campaign that shows what people can rely on: real scripts, real faults, nothing lost.

    python -m tests.faults
    python -m tests.faults --only kill,disk --tries 5

Prints a table (fault, tries, survived, lost, exit statuses) and ends with status 1 if anything was
lost. *Survived* means: work that goes on ends in the very files of work that nothing happened to;
no finished score is lost or computed again; a damaged file is read rightly or refused in one line
with status 2; and no script ever shows a traceback. Exit statuses: 0; 2 a mistake of the user's;
128 + n stopped by signal n; -n killed by it.

Each try is a forked process, in which torch is imported already: it takes a second. Random moments
come from --seed, but what a kill interrupts depends on the machine.
"""

import functools
import gzip
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import glue
from data import corpus, runs, scores, tasks
from data.files import (
    UserError, load_tensors, read_json, run_script, save_tensors, write_json,
)
from data.flags import check_ranges, defaults, flag_parser
from data.text import read_documents
from model import read_model
from tests.helpers import (
    LABELS, ROOT, WORDS, command, finish, packed_zip, send, start, wait_for, what_was_logged,
    write_corpus, write_task,
)

STEPS = 24  # of a toy run, which takes a second
ARMS = {
    "random": ["--masking", "random"],
    "self": ["--masking", "self", "--init-frac", "0.3", "--score-input", "masked"],
    "vocabulary": ["--masking", "self", "--init-frac", "0.2", "--score-input", "vocabulary"],
    "entropy": ["--masking", "entropy", "--distill", "complete", "--teacher"],
}
WORKS = {"train.py": list(ARMS), "glue.py": ["glue"], "preparation": ["preparation"]}


# --------------------------------------------------------------------------------------------------
# work that ends well when nothing happens


def write_inputs(folder):
    """A toy corpus, and GLUE files."""
    write_corpus(folder / "text.txt", documents=300)
    write_corpus(folder / "larger.txt", documents=2000)
    rng = random.Random(0)
    for task in ("CoLA", "RTE"):
        rows = [(" ".join(rng.choices(WORDS, k=9)), " ".join(rng.choices(WORDS, k=7)),
                 LABELS[task][i % 2]) for i in range(80)]
        write_task(folder / "GLUE", task, rows, n_dev=20)


def work(folder, name, out):
    """What is to be done in the folder `out`, at first and after a fault, as a person would do it.
    """
    run, trained = out / "run", folder / "random" / "run"
    if name == "preparation":
        return partial(corpus.prepare, str(folder / "larger.txt"), 600, str(out), 1)
    if name == "glue":
        if not run.exists():
            shutil.copytree(trained, run)
        return ["glue.py", run, "--glue-dir", folder / "GLUE", "--cache", out / "cache", "--tasks",
                "CoLA,RTE", "--epochs", "3", "--threads", "1"]
    if (run / "config.json").exists():
        return ["train.py", "--resume", run]
    return command(folder, run, "--checkpoint-every", "2", *ARMS[name],
                   *[trained] * ("--teacher" in ARMS[name]))


@functools.cache
def undisturbed(folder, name):
    """Do a work once -> what then stands in its folder, and how many seconds it took."""
    if name != "random":  # whose model the others use
        undisturbed(folder, "random")
    (out := folder / name).mkdir()
    what, began = work(folder, name, out), time.time()
    result = finish(what)
    if result.status:
        raise UserError(f"{name} does not even work undisturbed: {result.text[-500:]}")
    return contents(out), time.time() - began


READ = {  # what is compared of a file: all of it, but without the clock
    "log.jsonl": lambda path: what_was_logged(path.parent),
    "glue.json": lambda path: [(e["task"], e["seed"], e["parts"])
                               for e in read_json(path)["scores"]],
    "model.pt": lambda path: {name: value.numpy().tobytes()
                              for name, value in load_tensors(path)["model"].items()},
}


def contents(out):
    """{file: what is compared of it}. Checkpoints and config.json have the clock in them, and of a
    corpus a kill leaves a half, which goes after a day."""
    files = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    return {name: READ.get(path.name, Path.read_bytes)(path) for name, path in files.items()
            if not re.search(r"checkpoint|config\.json|\.lock|\.building", name)}


# --------------------------------------------------------------------------------------------------
# what happens to a machine: (folder, name of a work, out, rng) -> the Result of what met the fault,
# and is that as it should be


def refused(result):
    lines = [line for line in result.text.splitlines() if line.startswith("error")]
    return result.status == 2 and len(lines) == 1


def begin_and_wait(folder, name, out, rng):
    """Until train.py has written so many lines of its log; the others for a share of their time."""
    _, seconds = undisturbed(folder, name)
    process = start(work(folder, name, out))
    if name not in ARMS:
        time.sleep(rng.random() * seconds)
        return process
    log, lines = out / "run" / "log.jsonl", rng.randrange(STEPS // 4)
    wait_for(process, lambda: log.exists() and log.read_bytes().count(b"\n") >= lines)
    time.sleep(rng.random() * 0.05)
    return process


def kill(folder, name, out, rng, in_checkpoint=False):
    """At any moment, or while a checkpoint is being written."""
    process = begin_and_wait(folder, name, out, rng)
    if in_checkpoint:
        wait_for(process, lambda: list((out / "run").glob("checkpoint.new.pt*")))
    return send(process, signal.SIGKILL), True


def stop(folder, name, out, rng, times=1):
    """train.py ends its step, saves, and says how to go on; the others have nothing to save. A
    second signal of the kind ends it at once."""
    number = rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    process = begin_and_wait(folder, name, out, rng)
    if name in ARMS:
        wait_for(process, (out / "run" / "checkpoint.pt").exists)
    result = send(process, *[number] * times, pause=rng.uniform(0, 0.01))
    if name in ARMS and times == 1:
        return result, result.status == 128 + number and "--resume" in result.text
    return result, result.status in (128 + number, -number)


def full_disk(folder, name, out, rng):
    """No file may grow beyond so many bytes, fewer than the largest has at the end."""
    undisturbed(folder, name)
    what, whole = work(folder, name, out), folder / name
    largest = max(p.stat().st_size for p in whole.rglob("*")
                  if p.is_file() and not (out / p.relative_to(whole)).exists())
    limit = rng.choice([largest - 1, rng.randrange(largest), int(largest ** rng.random())])
    result = finish(what, resource.RLIMIT_FSIZE, limit)
    return result, result.status == 0 or refused(result)


def two_processes(folder, name, out, rng):
    """On one run folder; then the first dies, and its lock must not stay."""
    first = start(work(folder, name, out))
    wait_for(first, (out / "run" / "log.jsonl").exists)
    os.kill(first.pid, signal.SIGSTOP)  # it must not finish in the meantime
    second = finish(work(folder, name, out))
    send(first, signal.SIGKILL)
    return second, refused(second)


STRIKES = {  # name -> (fault, strike, what meets it)
    "kill": ("kill -9", kill, WORKS),
    "checkpoint": ("kill -9 while a checkpoint is written", partial(kill, in_checkpoint=True),
                   ["train.py"]),
    "signal": ("SIGINT, SIGTERM, SIGHUP", stop, WORKS),
    "twice": ("the same twice: it does not wait", partial(stop, times=2), ["train.py"]),
    "disk": ("full disk", full_disk, WORKS),
    "two": ("two processes on one folder, one dies", two_processes, ["train.py"]),
}


def strike(kind, folder, tries, rng):
    """Yield (fault, what was lost or "", exit status) of so many tries for each script. After the
    fault the work goes on, and must end as if nothing had happened."""
    fault, strike_at, scripts = STRIKES[kind]
    for script in scripts:
        done, out = 0, folder / "struck"
        while done < tries:
            name = WORKS[script][done % len(WORKS[script])]
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            result, good = strike_at(folder, name, out, rng)
            if result.status == 0:  # the work was done before the fault came
                continue
            after = finish(work(folder, name, out))
            whole, found = undisturbed(folder, name)[0], contents(out)
            other = sorted(n for n in {**whole, **found} if whole.get(n) != found.get(n))
            good = good and after.status == 0 and "Traceback" not in result.text + after.text
            lost = "" if good and not other else f"{name}: {result}, then {after}; other: {other}"
            yield f"{fault}: {script}", lost, result.status
            done += 1


# --------------------------------------------------------------------------------------------------
# damaged files: each reader reads them rightly, or refuses them in one line. What has a checksum or
# is JSON was damaged in test_data.py; here it is whole, and something in it is wrong

NASTY = [-1, 0, 64, 10**40, 0.5, float("nan"), float("inf"), None, True, [], {}, "", "x", "\ud800",
         [[1]]]


def damage(path, rng):
    """Do something to the bytes of a file."""
    data = path.read_bytes()
    first = rng.randrange(len(data))
    part = data[first:first + rng.choice([1, 10, 1000])]
    path.write_bytes(data[:first] + rng.choice([
        b"", part * 3, bytes(len(part)), rng.randbytes(len(part)), b"\n" + part, b"\t" + part,
        bytes([part[0] ^ 1 << rng.randrange(8)]) + part[1:], "\u2028\U0001f600".encode() + part,
        json.dumps(rng.choice(NASTY)).encode(), b"[" * 2000,
    ]) + data[first + len(part):] * (rng.random() < 0.8))  # else it is cut short


def forge(path, rng):
    """Put another thing, or none, in the place of one, somewhere in nested dicts and lists."""
    read, save = (read_json, write_json) if path.suffix == ".json" else (load_tensors, save_tensors)
    inner = content = read(path)
    while True:
        key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        if not isinstance(inner[key], (dict, list)) or not inner[key] or rng.random() < 0.2:
            break
        inner = inner[key]
    if rng.random() < 0.3:
        del inner[key]
    else:
        inner[key] = rng.choice(NASTY)
    save(path, content)


def readers(folder):
    """{name: (files, read(file), what is done to them)}"""
    run, plain = folder / "glue" / "run", (folder / "text.txt").read_bytes()
    undisturbed(folder, "glue")
    for name, data in (("a.txt", plain), ("a.gz", gzip.compress(plain)),
                       ("a.zip", packed_zip({"a.txt": plain}))):
        (folder / name).write_bytes(data)

    def score_table(path):
        model = glue.open_run(str(run))
        model.scores = scores.read_scores(run, model.sha256)
        scores.show_tables(scores.make_tables([model], model.arm))

    return {
        "corpus text": (folder.glob("a.*"), lambda path: list(read_documents([path])), damage),
        "GLUE files": ((folder / "GLUE").glob("*/*.tsv"), lambda path: tasks.read_task(
            path.parent.name, str(folder / "GLUE"), ""), damage),
        "log.jsonl": ([run / "log.jsonl"], lambda path: runs.read_log(run), damage),
        "config.json": ([run / "config.json"], score_table, forge),
        "glue.json": ([run / "glue.json"], score_table, forge),
        "model.pt": ([run / "model.pt"], read_model, forge),
    }


def damaged(folder, tries, rng):
    """Yield (fault, what was lost or "", exit status) of many files for each reader."""
    for name, (paths, read, spoil) in readers(folder).items():
        for path in itertools.islice(itertools.cycle(sorted(paths)), 15 * tries):
            whole, lost, status = path.read_bytes(), "", 2
            spoil(path, rng)
            try:
                read(path)
                status = "read"
            except (UserError, OSError) as error:  # an OSError is told in one line, too
                lost = "" if str(error).strip() else f"{path.name}: refused without a word"
            except Exception:  # whatever it is, it is what we look for, and it is reported
                lost = f"{path.name}: {traceback.format_exc()}"
            path.write_bytes(whole)
            yield f"damaged files: {name}", lost, status


# --------------------------------------------------------------------------------------------------

CASES = {**{name: partial(strike, name) for name in STRIKES}, "damaged": damaged}
FLAGS = {"Campaign": [
    ("only", ",".join(CASES), None, "the faults"),
    ("tries", 20, "above 0", "of each fault"),
    ("seed", 0, "0 or more", "of the random moments"),
]}


def main():
    parser = flag_parser("python -m tests.faults [FLAGS]", __doc__, FLAGS)
    args = Namespace(**{**defaults(FLAGS), **vars(parser.parse_args())})
    check_ranges(args, FLAGS)
    if unknown := set(args.only.split(",")) - set(CASES):
        raise UserError(f"--only: there is no {unknown.pop()}; they are {', '.join(CASES)}")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True,
                            capture_output=True).stdout.strip()
    print(f"`python -m tests.faults {' '.join(sys.argv[1:])}`, commit {commit}, "
          f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, seed {args.seed}\n\n"
          "| fault | tries | survived | lost | exit statuses |\n|---|---|---|---|---|", flush=True)
    tqdm.monitor_interval = 0  # no thread beside this one when it forks
    any_lost = False
    with tempfile.TemporaryDirectory() as root:
        write_inputs(Path(root))
        for name in args.only.split(","):
            rows, rng = {}, random.Random(f"{args.seed} {name}")
            for fault, lost, status in CASES[name](Path(root), args.tries, rng):
                rows.setdefault(fault, []).append((bool(lost), str(status)))
                if lost:
                    print(f"LOST {fault}: {lost}", file=sys.stderr, flush=True)
            for fault, found in rows.items():
                losses = sum(lost for lost, _ in found)
                print(f"| {fault} | {len(found)} | {len(found) - losses} | {losses} | "
                      f"{', '.join(sorted({status for _, status in found}))} |", flush=True)
                any_lost = any_lost or losses > 0
    sys.exit(any_lost)


if __name__ == "__main__":
    run_script(main)
