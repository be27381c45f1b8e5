"""The campaign that shows what people can rely on: real scripts, real faults, nothing lost.

    python -m tests.faults                            # all but the load
    python -m tests.faults --only load                # 1 GB of text, and 20 000 steps
    python -m tests.faults --only kill,text --tries 5

Prints a table (fault, tries, survived, lost, exit statuses) and ends with status 1 if anything was
lost. *Survived* means: work that goes on ends in the very files of work that nothing happened to (a
run: weights and log, bit for bit); no finished score is lost or computed again; bad input is
refused in one line with status 2; and no script ever shows a traceback. Exit statuses: 0; 1 a loss
that is not finite; 2 a mistake of the user's; 128 + n stopped by signal n; -n killed by it.

Each try is a forked process of its own, in which torch is imported already: it takes a second.
Random moments come from --seed, but what a kill interrupts depends on the machine. Small
filesystems need root: where they cannot be mounted, that is said.
"""

import bz2
import contextlib
import copy
import fcntl
import functools
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from argparse import Namespace
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import glue
import train
from data import corpus, download, runs, scores, tasks
from data.files import (
    UserError, load_tensors, read_json, run_script, save_tensors, sha256_file, write_json,
)
from data.flags import check_ranges, defaults, flag_parser
from data.text import read_documents
from data.tokenizer import CLS, MASK, PAD, SEP, UNK, Tokenizer
from model import load, read_model
from tests.test_data import WORDS, write_corpus
from tests.test_download import DATA, SHA, serve
from tests.test_glue_data import LABELS, write_task

ROOT = Path(__file__).parent.parent
GLUE_TASKS = ("CoLA", "RTE")
STEPS = 40  # of a toy run, which takes a second or two
MEMORY = 12 << 30  # bytes of addresses, of which torch's libraries take some
SECONDS = 20  # for one damaged file; the slowest takes well under one
Result = namedtuple("Result", "status text")
fork = multiprocessing.get_context("fork")

# --------------------------------------------------------------------------------------------------
# processes


def start(what, limit=None, value=0):
    """Do `what` in a process of its own: a command line without its `python`, or a function.

    limit, value: what setrlimit takes. RLIMIT_FSIZE: no file may grow beyond so many bytes, as on a
    disk that is full.
    """
    reading, writing = os.pipe()
    if hasattr(fcntl, "F_SETPIPE_SZ"):  # on Linux; nobody reads before the end
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 1 << 20)

    def child():
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", errors="replace") for n in (1, 2))
        torch.set_num_threads(1)
        os.chdir(ROOT)
        if limit is not None:
            resource.setrlimit(limit, (value, value))
        if callable(what):
            return run_script(what)
        sys.argv = [str(word) for word in what]
        runpy.run_path(sys.argv[0], run_name="__main__")

    process = fork.Process(target=child)
    process.start()
    os.close(writing)
    process.reading = reading
    return process


def result_of(process, seconds=900):
    """Wait for its end -> its exit status ("hung" after so many seconds) and what it printed."""
    process.join(seconds)
    status = process.exitcode
    if status is None:
        process.kill()
        process.join()
        status = "hung"
    os.set_blocking(process.reading, False)
    with os.fdopen(process.reading, "rb") as f:
        text = (f.read() or b"").decode(errors="replace").replace("\r", "\n")
    return Result(status, text)


def finish(what, limit=None, value=0, seconds=900):
    return result_of(start(what, limit, value), seconds)


def send(process, *numbers, pause=0):
    """Send it these signals -> its exit status and what it printed."""
    for number in numbers:
        if process.exitcode is None:  # else its number may be another process's by now
            os.kill(process.pid, number)
        time.sleep(pause)
    return result_of(process)


def wait_for(process, condition):
    while process.is_alive() and not condition():
        time.sleep(0.001)


def refused(result, word=""):
    """"" for one line with `word` in it and status 2; else what was seen instead."""
    lines = [line for line in result.text.splitlines() if line.startswith("error")]
    if result.status == 2 and len(lines) == 1 and word in lines[0] and (
            "Traceback" not in result.text):
        return ""
    return f"status {result.status}: {result.text.strip()[-400:]}"


def fine(result):
    """"" where it was done, or refused in one line; else what was seen instead."""
    return "" if result.status == 0 and "Traceback" not in result.text else refused(result)


# --------------------------------------------------------------------------------------------------
# what is done: a toy corpus, GLUE files, and work that is known to end well when nothing happens

ARMS = {
    "random": ["--masking", "random"],
    "self": ["--masking", "self", "--init-frac", "0.3"],
    "vocabulary": ["--masking", "self", "--init-frac", "0.2", "--score-input", "vocabulary"],
    "entropy": ["--masking", "entropy", "--distill", "complete", "--teacher", "TEACHER"],
}
CLOCK = ("tokens_per_s", "seconds", "peak_memory_mb")  # may differ between two equal runs
# begin(out) -> what to do, again(out) -> how to go on: both write in the folder `out` alone.
# `whole` is what stands there when nothing happened, after so many `seconds`.
Work = namedtuple("Work", "name begin again whole seconds")


def toy(folder, out, *flags, steps=STEPS):
    """The command of a run that takes a second."""
    return ["train.py", "--corpus", folder / "text.txt", "--cache", folder / "cache",
            "--vocab-size", "600", "--layers", "2", "--width", "64", "--seq-len", "34",
            "--batch-size", "8", "--steps", steps, "--log-every", "4", "--eval-every", "20",
            "--eval-blocks", "16", "--checkpoint-every", "2", "--threads", "1", "--out", out,
            *(folder / "random" / "run" if flag == "TEACHER" else flag for flag in flags)]


def glue_command(folder, run, cache, *flags):
    return ["glue.py", run, "--glue-dir", folder / "GLUE", "--cache", cache, "--tasks",
            ",".join(GLUE_TASKS), "--epochs", "3", "--threads", "1", *flags]


def contents(out):
    """What stands in a folder: of a run its weights and log without the clock, of scores all but
    the time they took, of any other file its hash."""
    found = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file() and p.name != ".lock"):
        name = str(path.relative_to(out))
        if ".building-" in name:  # what a kill left of a corpus: it is removed after a day
            continue
        if path.name == "model.pt":
            weights = load_tensors(path)["model"]
            found[name] = {key: hashlib.sha256(value.numpy()).digest()
                           for key, value in weights.items()}
        elif path.name == "log.jsonl":
            found[name] = [{k: v for k, v in line.items() if k not in CLOCK}
                           for line in runs.read_log(path.parent)]
        elif path.name == "glue.json":
            found[name] = [(e["task"], e["seed"], e["parts"]) for e in read_json(path)["scores"]]
        elif "checkpoint" not in path.name and path.name != "config.json":
            found[name] = sha256_file(path)
    return found


def differs(out, work):
    """"" where `out` holds what undisturbed work has made, else what is different."""
    found = contents(out)
    wrong = [name for name in {**found, **work.whole} if found.get(name) != work.whole.get(name)]
    return f"other {', '.join(sorted(wrong))}" if wrong else ""


def all_works(folder, url):
    """Make the inputs -> work(name), which does it once, undisturbed, when it is first asked for.
    url: of a server of DATA."""
    write_corpus(folder / "text.txt", documents=300)
    write_corpus(folder / "larger.txt", documents=2000)
    rng = random.Random(0)
    for task in GLUE_TASKS:
        rows = [(" ".join(rng.choices(WORDS, k=9)), " ".join(rng.choices(WORDS, k=7)),
                 LABELS[task][i % 2]) for i in range(80)]
        write_task(folder / "GLUE", task, rows, n_dev=20)
    trained = folder / "random" / "run"

    def training(arm):
        def begin(out):
            return toy(folder, out / "run", *ARMS[arm])

        def again(out):  # as a person does it: --resume, or the command again
            run = out / "run"
            return ["train.py", "--resume", run] if (run / "config.json").exists() else begin(out)

        return begin, again

    def scoring(out):
        if not (out / "run").exists():
            shutil.copytree(trained, out / "run")
        return glue_command(folder, out / "run", out / "cache")

    def exporting(out):
        shutil.rmtree(out / "export", ignore_errors=True)  # half of one is not written over
        return ["model.py", trained, "--export", out / "export"]

    commands = {arm: training(arm) for arm in ARMS} | {name: (begin, begin) for name, begin in {
        "glue": scoring, "export": exporting,
        "preparation": lambda out: partial(
            corpus.prepare, str(folder / "larger.txt"), 600, str(out), 1),
        "download": lambda out: fetch(out / "file", url + "slow"),
        "page": lambda out: ["masking.py", trained, "the model reads", "--html", out / "page.html"],
    }.items()}

    @functools.cache
    def work(name):
        begin, again = commands[name]
        (out := folder / name).mkdir()
        what, began = begin(out), time.time()
        result = finish(what)
        if result.status:
            raise UserError(f"{name} does not even work undisturbed: {result.text[-500:]}")
        return Work(name, begin, again, contents(out), time.time() - began)

    work("random")  # whose model the others use
    return work


def fetch(target, *urls):
    def fetch_it():
        download.TIMEOUT = 1
        download.download(list(urls), len(DATA), SHA, target)

    return fetch_it


# --------------------------------------------------------------------------------------------------
# what happens to a machine: (folder, work, out, rng) -> the Result of what met the fault, and what
# is wrong with that, or "". Then the work goes on, and must end as if nothing had happened.


def go_on_for_a_while(process, work, out, rng):
    """Until train.py has written so many lines of its log; the others for a share of their time."""
    if work.name in ARMS:
        log, lines = out / "run" / "log.jsonl", rng.randrange(STEPS // 4)
        wait_for(process, lambda: log.exists() and log.read_bytes().count(b"\n") >= lines)
    time.sleep(rng.random() * (0.05 if work.name in ARMS else work.seconds))


def kill(folder, work, out, rng):
    process = start(work.begin(out))
    go_on_for_a_while(process, work, out, rng)
    return send(process, signal.SIGKILL), ""


def kill_in_checkpoint(folder, work, out, rng):
    """While a checkpoint is being written."""
    process = start(work.begin(out))
    go_on_for_a_while(process, work, out, rng)
    wait_for(process, lambda: list((out / "run").glob("checkpoint.new.pt*")))
    return send(process, signal.SIGKILL), ""


def signal_once(folder, work, out, rng, times=1):
    """train.py ends its step, saves, and says how to go on; the others have nothing to save."""
    number, trains = rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP]), work.name in ARMS
    process = start(work.begin(out))
    if trains:
        wait_for(process, (out / "run" / "checkpoint.pt").exists)
    go_on_for_a_while(process, work, out, rng)
    result = send(process, *[number] * times, pause=rng.uniform(0, 0.01))
    waits = trains and times == 1
    good = result.status in ({128 + number} if waits else {128 + number, -number})
    return result, "" if good and (not waits or "--resume" in result.text) else str(result)


signal_twice = partial(signal_once, times=2)


def to_write(folder, work, out):
    """The sizes of the files that the work has yet to write."""
    whole = folder / work.name
    return [p.stat().st_size for p in whole.rglob("*")
            if p.is_file() and not (out / p.relative_to(whole)).exists()]


def full_disk(folder, work, out, rng):
    """No file may grow beyond so many bytes, fewer than the largest has at the end."""
    what = work.begin(out)
    largest = max(to_write(folder, work, out))
    limit = rng.choice([largest - 1, rng.randrange(largest), int(largest ** rng.random())])
    result = finish(what, resource.RLIMIT_FSIZE, limit)
    return result, fine(result)


class CannotMount(Exception):
    pass


def mount(path, *options):
    if subprocess.run(["mount", *options, path], capture_output=True).returncode:
        raise CannotMount


@contextlib.contextmanager
def filesystem(path):
    """One of 40 MB."""
    mount(path, "-t", "tmpfs", "-o", "size=40m", "tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def small_disk(folder, work, out, rng):
    """A filesystem with less room than the work takes."""
    what, filler = work.begin(out), out / "filler"
    room = rng.randrange(sum(to_write(folder, work, out)))
    filler.write_bytes(bytes(shutil.disk_usage(out).free - (room >> 12 << 12)))
    result = finish(what)
    filler.unlink()
    return result, fine(result)


def read_only(folder, work, out, rng):
    """A filesystem that turned read-only while the work was under way."""
    process = start(work.begin(out))
    go_on_for_a_while(process, work, out, rng)
    send(process, signal.SIGKILL)
    mount(out, "-o", "remount,ro")
    result = finish(work.again(out))
    mount(out, "-o", "remount,rw")
    return result, fine(result)


def two_processes(folder, work, out, rng):
    """On one run folder; then the first dies, and its lock must not stay."""
    first = start(work.begin(out))
    wait_for(first, (out / "run" / "log.jsonl").exists)
    os.kill(first.pid, signal.SIGSTOP)  # it must not finish in the meantime
    results = [finish(argv) for argv in (work.again(out), work.begin(out))]
    send(first, signal.SIGKILL)
    return results[0], "".join(map(refused, results))


def damaged_checkpoint(folder, work, out, rng):
    """Cut, with one bit flipped, or of another run: refused, and the one before is still there."""
    shutil.copytree(folder / work.name, out, dirs_exist_ok=True)
    (out / "run" / "model.pt").unlink()
    newest = out / "run" / "checkpoint.pt"
    data, at = bytearray(newest.read_bytes()), rng.randrange(newest.stat().st_size)
    fault = rng.randrange(3)
    if fault == 0:
        newest.write_bytes(data[:at])
    elif fault == 1:
        newest.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:])
    else:
        save_tensors(newest, {**load_tensors(newest), "config_sha256": "0" * 64})
    result = finish(work.again(out))
    newest.unlink()  # as the line says
    return result, refused(result, "checkpoint")


def not_finite(folder, work, out, rng):
    """Loss and weights become NaN or infinite at a step: it is named, and nothing of it is kept."""
    at, value, update = rng.randrange(STEPS), rng.choice([float("nan"), float("inf")]), train.update

    def faulty_update(args, job, step):
        result = update(args, job, step)
        if step == at:
            for weights in job.model.parameters():
                weights.data *= value
        return result * value if step == at else result

    def faulty_training():
        train.update, sys.argv = faulty_update, [str(word) for word in work.begin(out)]
        train.main()

    result = finish(faulty_training)
    good = result.status == 1 and f"not finite at step {at + 1};" in result.text
    return result, "" if good else f"step {at + 1}: {result}"


OTHERS = ("preparation", "download", "export", "page")
TRAIN = {"train.py": ARMS}
ALL = {"train.py": ARMS, "glue.py": ["glue"], ", ".join(OTHERS): OTHERS}
NOWHERE = contextlib.nullcontext
STRIKES = {  # name -> (fault, strike, works that meet it, in turn, where)
    "kill": ("kill -9", kill, ALL, NOWHERE),
    "checkpoint": ("kill -9 while a checkpoint is written", kill_in_checkpoint, TRAIN, NOWHERE),
    "signal": ("SIGINT, SIGTERM, SIGHUP", signal_once, ALL, NOWHERE),
    "twice": ("the same twice: it does not wait", signal_twice, TRAIN, NOWHERE),
    "disk": ("full disk", full_disk, ALL, NOWHERE),
    "small": ("small filesystem", small_disk, ALL, filesystem),
    "readonly": ("filesystem turned read-only", read_only, ALL, filesystem),
    "two": ("two processes on one folder, one dies", two_processes, TRAIN, NOWHERE),
    "damage": ("checkpoint cut, flipped, of another run", damaged_checkpoint, TRAIN, NOWHERE),
    "loss": ("a loss that is NaN or infinite", not_finite, TRAIN, NOWHERE),
}


def strike(name, folder, works, tries, rng):
    """Yield (fault, what was lost or "", exit status) of so many tries for each kind of work."""
    fault, strike_at, groups, where = STRIKES[name]
    for script, names in groups.items():
        done, out = 0, folder / "struck"
        while done < tries:
            work = works(list(names)[done % len(names)])
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            with where(out):
                result, lost = strike_at(folder, work, out, rng)
                if result.status != 0:  # else the work was done before the fault came
                    lost = lost or ("a traceback" if "Traceback" in result.text else "")
                    lost = lost or fine(finish(work.again(out))) or differs(out, work)
                    yield f"{fault}: {script}", lost and f"{work.name}: {lost}", result.status
                    done += 1


# --------------------------------------------------------------------------------------------------
# what people type, and what files from strangers hold. Generators of (fault, lost, exit status)


def servers(folder, works, tries, rng):
    """Every way in which a server can fail: never taken for whole, then fetched rightly."""
    faults = ("cut", "short", "long", "wrong", "403", "404", "500", "stall", "nowhere")
    for server in serve():
        for i in range(max(tries, len(faults))):
            what = faults[i % len(faults)]
            url = "http://127.0.0.1:9/" if what == "nowhere" else server.url + what
            target = folder / f"{what}-{i}"
            result = finish(fetch(target, url))
            lost = refused(result, str(target)) or target.exists() * "it was taken for whole"
            lost = lost or fine(finish(fetch(target, url, server.url + "moved")))
            lost = lost or (target.read_bytes() != DATA) * "another file"
            yield "a server that fails, then one that does not", lost, result.status


# Wrong lines, each with the word that the answer must have: the last flag, but for "->".
WRONG = """
train.py --batch-size 0; train.py --batch-size -3; train.py --batch-size x; train.py --lr 0
train.py --mask-rate 1.5; train.py --mask-rate nan; train.py --mask-rate-end 2; train.py --pool 9
train.py --pool 1; train.py --pool -1; train.py --seq-len 4; train.py --steps -1; train.py --lr inf
train.py --steps 1e3; train.py --seed x; train.py --seed 99999999999999999999; train.py --dropout 1
train.py --clip 0; train.py --distill complete --tau 0; train.py --distill complete --alpha 2
train.py --distill complete -> --teacher; train.py --vocab-size 10; train.py --vocab-size 70000
train.py --width 100; train.py --layers -1; train.py --size huge; train.py --micro-batch 3
train.py --preset lap; train.py --stray; train.py --score-input masked --pool 0
train.py --masking random --select high; train.py --masking entropy -> --teacher
train.py --masking random --init-frac 0.1; train.py --alpha 0.5; train.py --teacher nowhere
train.py --flops-of nowhere; train.py --steps 5 --flops-of nowhere; train.py --init-from nowhere
train.py --corpus nowhere; train.py --corpus; train.py --maskin self; train.py --log-every 0
train.py --resume nowhere -> nowhere; train.py --eval nowhere -> nowhere; train.py --device tpu
train.py --resume nowhere --eval nowhere; train.py --dtype float16; train.py --checkpoint-every 0
train.py --positions learned --rotary-base 10; train.py --positions absolute; train.py --threads -1
train.py --eval-blocks 0; train.py --corpus-tokens -1; train.py --init-frac 1; train.py --init-std 0
train.py --warmup-frac 1; train.py --weight-decay -1; train.py --local-start -1; train.py x -> x
train.py --resume nowhere --steps 9 -> nowhere; train.py --batch-size 999999999 -> less than a batch
glue.py RUN --tasks X; glue.py RUN --lr 0; glue.py RUN --tabel; glue.py RUN --epochs x
glue.py RUN --seeds 0; glue.py RUN --max-len 2; glue.py RUN --dropout 1; glue.py RUN --batch-size 0
glue.py -> run folder; glue.py nowhere -> nowhere; glue.py RUN --glue-dir nowhere -> nowhere
masking.py nowhere a -> nowhere; masking.py RUN a b -> unrecognized
masking.py RUN abc --mask-rate 2; masking.py RUN abc --seed -1; masking.py RUN abc --seed x
model.py RUN -> what to do; model.py --fill x -> run folder; model.py RUN --fill x -> no [MASK]
model.py nowhere --fill [MASK] -> nowhere; data/plot.py nowhere -> nowhere
"""


def flags(folder, works, tries, rng):
    """Wrong, contradicting and misspelt flags: refused before any work begins."""
    for case in WRONG.strip().replace("\n", "; ").split("; "):
        line, _, word = case.partition(" -> ")
        script, *words = line.split()
        out = folder / "refused"
        if script == "train.py":
            words = ["--corpus", folder / "text.txt", "--cache", out / "cache", "--vocab-size",
                     "600", "--out", out / "run", *words]
        words = [folder / "random" / "run" if word == "RUN" else word for word in words]
        result = finish([script, *words])
        flag = [w for w in line.split() if w.startswith("--")]
        lost = refused(result, word or flag[-1])
        if list(out.rglob("*.bin")) and "batch" not in word:  # it must see how large the text is
            lost = lost or "it began to work"
        shutil.rmtree(out, ignore_errors=True)
        yield f"wrong flags: {script}", lost and f"{line}: {lost}", result.status


def names(folder, works, tries, rng):
    """A corpus, a run and a page with odd names: the same weights, and glue.py reads them."""
    for name in ("with space", "quo'te\"s", "new\nline", "naïve-日本語", "[x]*?", "%s{0}", "~", "\\n",
                 "-dash", os.fsdecode(b"latin-\xe4"), "a" * 200):
        (out := folder / "odd" / name).mkdir(parents=True)
        run = out / "run"
        shutil.copy(folder / "text.txt", out / f"{name}.txt")
        results = [finish([*toy(folder, run, *ARMS["random"]), "--corpus", out / f"{name}.txt"]),
                   finish(["train.py", "--eval", run]),
                   finish(glue_command(folder, run, folder / "cache", "--tasks", "CoLA")),
                   finish(["masking.py", run, "the model reads", "--html", out / "page.html"])]
        (out / f"{name}.txt").unlink()
        lost = next((result.text[-300:] for result in results if result.status), "")
        if contents(run).get("model.pt") != works("random").whole["run/model.pt"]:
            lost = lost or "other weights"
        yield "odd file names", lost and f"{name!r}: {lost}", results[0].status


SPECIAL = "[MASK] [SEP] [CLS] [PAD] [UNK] <s> </s> <unk> <pad> <0x41> ▁ \u2581[MASK]\u2581"


def kinds_of_text(plain, large):
    """{name: (content, is it trained on? None: either)}"""
    kinds = {
        "CRLF": (plain.replace("\n", "\r\n"), True),
        "CR": (plain.replace("\n", "\r"), True),
        "BOM": ("\ufeff" + plain, True),
        "emoji": (plain.replace("the", "😀👩‍👩‍👧‍👦🇩🇪"), True),
        "right to left": (plain.replace("a", "שלום ").replace("e", "مرحبا "), True),
        "special tokens": (plain.replace("mask", SPECIAL), True),
        "no blank line": (plain.replace("\n\n", "\n"), True),
        "combining marks": (plain.replace("o", "o\u0301\u0323\u0300" * 5), True),
        "control characters": (plain.replace(" ", " \x0b\x1c\x85\u2028"), None),
        "one word repeated": ("word " * 50_000, None),
        "zero bytes": (plain[:500] + "\0" + plain[500:], False),
        "UTF-16": (plain.encode("utf-16"), False),
        "latin-1": (plain.replace("a", "\xe4").encode("latin-1"), False),
        "surrogates": (plain.encode().replace(b"the", b"\xed\xa0\x80"), False),
        "empty": ("", False), "one letter": ("a", False), "only blank lines": ("\n" * 1000, False),
        "binary": (bytes(range(1, 256)) * 2000, False),
    }
    if large:
        kinds |= {"one line of 100 MB": (("word and another " * 6_000_000)[:100_000_000], None),
                  "one word of 100 MB": ("abc" * 33_000_000, None),
                  "10 million empty lines": (plain + "\n" * 10_000_000 + plain, True)}
    return kinds


def text(folder, works, tries, rng):
    """Text of every kind is trained on or refused in one line, in bounded memory."""
    kinds = kinds_of_text((folder / "text.txt").read_text(), large=tries >= 20)
    for name, (content, trained) in kinds.items():
        path, out = folder / "kind.txt", folder / "kind"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        argv = [*toy(folder, out / "run", *ARMS["random"], steps=2), "--corpus", path,
                "--vocab-size", "900", "--cache", out / "cache"]
        result = finish(argv, resource.RLIMIT_AS, MEMORY)
        lost = fine(result)
        if trained is not None and not lost and (result.status == 0) != trained:
            lost = "trained on" if result.status == 0 else f"refused: {result.text[-300:]}"
        if name == "special tokens" and not lost:
            lost = became_special(out / "cache", content.count("[MASK]"))
        what = "trained on" if result.status == 0 else "refused"
        yield f"text of every kind: {what}", lost and f"{name}: {lost}", result.status
        shutil.rmtree(out, ignore_errors=True)


def became_special(cache, occurrences):
    """"" where the text "[MASK]" and its like are ordinary tokens in the prepared corpus."""
    [prepared] = cache.glob("*/train.bin")
    tokenizer = Tokenizer(prepared.with_name("tokenizer.model"))
    tokens = np.concatenate([np.fromfile(prepared.with_name(f"{name}.bin"), np.uint16)
                             for name in ("train", "valid")])
    if found := set(tokens.tolist()) & {PAD, UNK, CLS, MASK}:
        return f"special ids {found} in the corpus"
    if (seen := tokenizer.decode(tokens).count("[mask]")) != occurrences:
        return f"{occurrences} times [MASK] in the text, {seen} times in the tokens"
    return "special ids" if set(tokenizer.encode(SPECIAL)) & {PAD, UNK, CLS, SEP, MASK} else ""


def pickles(folder, works, tries, rng):
    """A pickle that would run a command, with and without our checksum."""
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch '{folder}/executed'",)

    whole, run = folder / "random" / "run", folder / "payload"
    shutil.copytree(whole, run)
    student = [*toy(folder, folder / "student", "--masking", "entropy"), "--teacher", run]
    readers = {"model.pt": [["train.py", "--eval", run], ["masking.py", run, "a b c"], student,
                            ["model.py", run, "--fill", "a [MASK]"],
                            glue_command(folder, run, folder / "cache")],
               "checkpoint.pt": [["train.py", "--resume", run]]}
    for name, commands in readers.items():
        for save in (lambda value, path: save_tensors(path, value), torch.save):
            for key in ("model", "config_sha256"):
                save({**load_tensors(whole / name), key: Payload()}, run / name)
                for argv in commands:
                    result = finish(argv)
                    lost = (folder / "executed").exists() * "its code ran" or refused(result)
                    yield "a pickle with code in it", lost, result.status
        (run / name).unlink()


def archives(folder, works, tries, rng):
    """Archives that would write elsewhere, through names or links; and bombs."""
    plain, packed = (folder / "text.txt").read_bytes(), folder / "packed"
    packed.mkdir()

    def make_zip(name, members):
        with zipfile.ZipFile(packed / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, data in members:
                archive.writestr(member, data)

    def make_tar(name, kind, member):
        with tarfile.open(packed / name, "w:bz2") as tar:
            for info in (tarfile.TarInfo("text.txt"), tarfile.TarInfo(member)):
                if info.name == member:
                    info.type, info.linkname = kind, str(folder / "text.txt")
                info.size = len(plain) if info.isfile() else 0
                tar.addfile(info, io.BytesIO(plain) if info.isfile() else None)

    link = zipfile.ZipInfo("link.txt")
    link.external_attr = 0o120777 << 16
    for i, name in enumerate(("../evil.txt", "../../evil.txt", f"{folder}/evil.txt",
                              "a/../../evil.txt", "..\\evil.txt")):
        make_zip(f"name-{i}.zip", [("text.txt", plain), (name, plain)])
        make_zip(f"link-{i}.zip", [("text.txt", plain), (link, name), ("link.txt/x.txt", plain)])
    for kind in (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE,
                 tarfile.CHRTYPE):
        make_tar(f"{kind.decode()}.tar.bz2", kind, "../../evil.txt")
    for path in sorted(packed.iterdir()):
        before, out = set(folder.parent.rglob("*")), folder / "unpacked"
        result = finish([*toy(folder, out / "run", *ARMS["random"], steps=1), "--corpus", path,
                         "--cache", out / "cache"])
        written = {p for p in set(folder.parent.rglob("*")) - before if out not in (p, *p.parents)}
        yield ("an archive that would write elsewhere",
               fine(result) or (f"it wrote {written}" if written else ""), result.status)
        shutil.rmtree(out, ignore_errors=True)
    for fill_with, megabytes in ((b"\0", 1000), (b"a", 30), (b"a b\n\n", 10)):
        bomb = packed / "bomb.zip"
        with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(
                "text.txt", "w", force_zip64=True) as f:
            for _ in range(megabytes):
                f.write(fill_with * ((1 << 20) // len(fill_with)))
        argv = [*toy(folder, folder / "bombed", *ARMS["random"], steps=1), "--corpus", bomb]
        result = finish(argv, resource.RLIMIT_AS, MEMORY)
        yield "an archive bomb", refused(result), result.status


# --------------------------------------------------------------------------------------------------
# damaged files: each reader reads them rightly, or refuses them in one line

NASTY = ["-1", "0", "1e999", "NaN", "null", "true", "[]", "{}", '""', '"x"', "1" * 40, "0.5",
         "[" * 2000, '"\\ud800"']


def damage(data, rng):
    """Do something to the bytes of a file."""
    fields = [m.span() for m in re.finditer(rb"(?<=[:\t,])[^:\t,\n}]+", data[:1 << 16])]
    if fields and rng.random() < 0.3:  # of JSON or a table
        first, last = rng.choice(fields)
        return data[:first] + rng.choice(NASTY).encode() + data[last:]
    first = rng.randrange(len(data))
    part = data[first:first + rng.choice([1, 10, 1000])]
    return data[:first] + rng.choice([
        b"", part * 3, bytes(len(part)), b"\xff" * len(part), rng.randbytes(len(part)),
        bytes([part[0] ^ 1 << rng.randrange(8)]) + part[1:], b"\n" + part, b"\t" + part,
        "\u2028\u0085\U0001f600".encode() + part,
    ]) + data[first + len(part):] * (rng.random() < 0.8)  # else it is cut short


def forge(whole, rng):
    """Nested dicts and lists -> a copy in which one thing is another, or is gone."""
    forged, places = copy.deepcopy(whole), []
    todo = [forged]
    while todo:
        inside = todo.pop()
        keys = list(inside) if isinstance(inside, dict) else range(len(inside))
        places += [(inside, key) for key in keys]
        todo += [inside[key] for key in keys if isinstance(inside[key], (dict, list))]
    inside, key = rng.choice(places)
    if rng.random() < 0.3:
        del inside[key]
    else:
        inside[key] = rng.choice([-1, 0, 64, 10**6, 10**40, 0.5, float("nan"), float("inf"), None,
                                  True, [], {}, "", "x", "\ud800", [[1]], copy.deepcopy(whole)])
    return forged


def readers(folder, works):
    """{name: [(path, read(), what its bytes mean, where damage to that must be refused)]}"""
    run, unfinished = folder / "glue" / "run", folder / "unfinished"
    works("glue")
    shutil.copytree(folder / "random" / "run", unfinished)
    (unfinished / "model.pt").unlink()
    [cache] = {p.parent for p in (folder / "cache").glob("*/train.bin")}
    plain = (folder / "text.txt").read_bytes()
    texts = {folder / "a.txt": plain, folder / "a.gz": gzip.compress(plain),
             folder / "a.bz2": bz2.compress(plain)}
    for path, data in texts.items():
        path.write_bytes(data)
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", plain)

    def decisive(data):
        return {k: v for k, v in json.loads(data).items() if k != "starts"}

    def resume():
        args, config = train.parse_args(["--resume", str(unfinished)])
        runs.load_checkpoint(unfinished, config)

    return {
        "corpus text": [(path, lambda path=path: list(read_documents([path])), None)
                        for path in (*texts, folder / "a.zip")],
        "GLUE files": [(path, partial(tasks.read_task, path.parent.name, str(folder / "GLUE"), ""),
                        None) for path in sorted((folder / "GLUE").glob("*/*.tsv"))],
        "config.json": [(run / "config.json", lambda: load(run), decisive),
                        (unfinished / "config.json", resume, decisive)],
        "log.jsonl": [(run / "log.jsonl", lambda: runs.read_log(run), None)],
        "glue.json": [(run / "glue.json", lambda: score_table(run), None)],
        "tokenizer.model": [(run / "tokenizer.model", lambda: load(run), bytes)],
        "model.pt": [(run / "model.pt", lambda: read_model(run / "model.pt"), bytes)],
        "checkpoint.pt": [(unfinished / "checkpoint.pt", resume, bytes)],
        "cache": [(cache / name, lambda: corpus.load(cache, 34), bytes)
                  for name in ("train.bin", "valid.bin", "tokenizer.model")],
    }


def score_table(run):
    model = glue.open_run(str(run))
    model.scores = scores.read_scores(run, model.sha256)
    json.dumps(tables := scores.make_tables([model], model.arm))
    scores.show_tables(tables)


class TooSlow(BaseException):
    pass


def read_damaged(cases, count, seed, forged):
    """Print a line for each file: read, refused, or what went wrong."""
    def too_slow(number, frame):
        raise TooSlow

    signal.signal(signal.SIGALRM, too_slow)
    for i in range(count):
        path, read, meaning = cases[i % len(cases)]
        whole, rng = path.read_bytes(), random.Random(f"{path.name} {seed} {i}")
        if not forged:
            path.write_bytes(damage(whole, rng))
        elif path.suffix == ".json":
            write_json(path, forge(read_json(path), rng))
        else:
            save_tensors(path, forge(load_tensors(path), rng))
        signal.alarm(SECONDS)
        try:
            read()
            same = forged or not meaning or meaning(path.read_bytes()) == meaning(whole)
            said = "read" if same else f"file {i}: read in spite of its checksum"
        except (UserError, OSError) as error:  # an OSError is told in one line, too
            said = "refused" if str(error).strip() else f"file {i}: refused without a word"
        except BaseException:  # whatever it is, it is what we look for, and it is reported
            last = traceback.format_exc().strip().splitlines()
            said = f"file {i}: {last[-1]} <- {last[-3].strip()}"
        signal.alarm(0)
        print(said)
        path.write_bytes(whole)


def damaged(folder, works, tries, rng):
    """Many files for each reader, in a process of its own with bounded memory: a hang or a crash
    is a result, too. Forged ones have a right checksum, and another value or none in one place."""
    found, count = readers(folder, works), 15 * tries
    for name, forged in [(name, False) for name in found] + [
            (name, True) for name in ("config.json", "glue.json", "model.pt")]:
        batch = partial(read_damaged, found[name], count, rng.randrange(1 << 30), forged)
        result = finish(batch, resource.RLIMIT_AS, MEMORY)
        lines = result.text.splitlines()
        for line in lines if len(lines) == count else [str(result)]:
            good = line in ("read", "refused")
            yield (f"{'forged' if forged else 'damaged'} files: {name}", "" if good else line,
                   {"read": "read", "refused": 2}.get(line, "?"))


# --------------------------------------------------------------------------------------------------


def big(folder, works, tries, rng):
    """A corpus of 1 GB in less than 1.5 GB of memory; 20 000 steps without growth."""
    path, run = folder / "gigabyte.txt", folder / "gigabyte"
    words = ["".join(rng.choices("etaoinshrdlucmfw", k=rng.randint(2, 9))) for _ in range(50_000)]
    weights = [1 / (rank + 2.7) for rank in range(len(words))]
    lines = [" ".join(rng.choices(words, weights, k=60)) for _ in range(20_000)]
    with open(path, "w") as f:
        while f.tell() < 1e9:
            rng.shuffle(lines)
            for i in range(0, len(lines), 5):
                f.write("\n".join(lines[i:i + 5]) + "\n\n")
    result = finish(["train.py", "--corpus", path, "--cache", folder / "cache", "--masking",
                     "random", "--steps", 200, "--threads", "1", "--out", run], seconds=7200)
    path.unlink()
    memory = [line["peak_memory_mb"] for line in runs.read_log(run) if "peak_memory_mb" in line]
    yield (f"a corpus of 1 GB, 200 steps: {memory[-1:]} MB", fine(result) or (
        "" if memory and memory[-1] < 1500 else "too much memory"), result.status)
    run = folder / "long"
    argv = [*toy(folder, run, "--masking", "self", steps=20_000), "--eval-every", "1000",
            "--checkpoint-every", "1000"]
    result, log = finish(argv, seconds=7200), runs.read_log(run)
    memory = [line["peak_memory_mb"] for line in log if "peak_memory_mb" in line]
    # The self-masked steps, in quarters. The quickest lines of each: others use the machine too.
    speeds = [line["tokens_per_s"] for line in log if line["step"] > 6000]
    size = len(speeds) // 4
    first, *_, last = [sorted(speeds[i * size:(i + 1) * size])[int(0.9 * size)] for i in range(4)]
    figures = f"20 000 steps: {memory[1]} -> {memory[-1]} MB, {first} -> {last} tokens/s"
    grows = memory[-1] > 1.03 * memory[1] or last < 0.9 * first
    yield figures, fine(result) or grows * figures, result.status


CASES = {**{name: partial(strike, name) for name in STRIKES}, "servers": servers, "flags": flags,
         "names": names, "text": text, "pickles": pickles, "archives": archives,
         "damaged": damaged, "load": big}
FLAGS = {"Campaign": [
    ("only", "", None, f"some of {','.join(CASES)}"),
    ("tries", 20, "above 0", "of each fault"),
    ("seed", 0, "0 or more", "of the random moments"),
]}


def campaign(chosen, tries, seed):
    """Go through the chosen CASES, print the rows of the table -> was anything lost?"""
    tqdm.monitor_interval = 0  # no thread beside this one when it forks
    any_lost = False
    with tempfile.TemporaryDirectory() as root, contextlib.closing(serve()) as servers_:
        (folder := Path(root) / "toy").mkdir()
        works = all_works(folder, next(servers_).url)
        for name in chosen:
            rows, rng = {}, random.Random(f"{seed} {name}")
            try:
                for fault, lost, status in CASES[name](folder, works, tries, rng):
                    count, losses, statuses = rows.get(fault, (0, 0, set()))
                    rows[fault] = count + 1, losses + bool(lost), statuses | {str(status)}
                    if lost:
                        print(f"LOST {fault}: {lost}", file=sys.stderr, flush=True)
            except CannotMount:
                print(f"{name}: not tried, this process may not mount", file=sys.stderr)
            for fault, (count, losses, statuses) in rows.items():
                print(f"| {fault} | {count} | {count - losses} | {losses} | "
                      f"{', '.join(sorted(statuses))} |", flush=True)
                any_lost = any_lost or losses > 0
    return any_lost


def main():
    parser = flag_parser("python -m tests.faults [FLAGS]", __doc__, FLAGS)
    args = Namespace(**{**defaults(FLAGS), **vars(parser.parse_args())})
    check_ranges(args, FLAGS)
    chosen = args.only.split(",") if args.only else [name for name in CASES if name != "load"]
    if unknown := set(chosen) - set(CASES):
        raise UserError(f"--only: there is no {unknown.pop()}; they are {', '.join(CASES)}")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True,
                            capture_output=True).stdout.strip()
    print(f"`python -m tests.faults {' '.join(sys.argv[1:])}`, commit {commit}, "
          f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, seed {args.seed}\n\n"
          "| fault | tries | survived | lost | exit statuses |\n|---|---|---|---|---|", flush=True)
    sys.exit(campaign(chosen, args.tries, args.seed))


if __name__ == "__main__":
    run_script(main)
