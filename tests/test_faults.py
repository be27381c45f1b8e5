"""What machines do to work, and nothing is lost: kills, signals, a full disk, two processes on one
folder, damaged files. And archives of strangers that would do harm.

    python -m pytest tests/test_faults.py -q
    TRIES=20 python -m pytest tests/test_faults.py -q       # each fault at 20 random moments

After a fault the work goes on, and must end in the very files of work that nothing happened to. No
finished score is lost or computed again, a damaged file is read or refused in one line, and no
script shows a traceback. What a kill interrupts at a random moment depends on the machine.
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
import tarfile
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest

import glue
from data import corpus, runs, scores, tasks
from data.files import UserError, load_tensors, read_json, save_tensors, write_json
from data.text import read_documents
from model import read_model
from tests.helpers import (
    LABELS, WORDS, command, finish, packed_tar, packed_zip, send, start, wait_for, what_was_logged,
    write_corpus, write_task,
)

TRIES = int(os.environ.get("TRIES", 1))
ARMS = {
    "random": ["--masking", "random"],
    "self": ["--masking", "self", "--init-frac", "0.3", "--score-input", "masked"],
    "vocabulary": ["--masking", "self", "--init-frac", "0.2", "--score-input", "vocabulary"],
    "entropy": ["--masking", "entropy", "--distill", "complete", "--teacher"],
}
WORKS = [*ARMS, "glue", "preparation"]  # a try takes the next of them


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy corpus, plain and packed, and GLUE files."""
    folder, rng = tmp_path_factory.mktemp("faults"), random.Random(0)
    plain = write_corpus(folder / "text.txt", documents=300).read_bytes()
    write_corpus(folder / "larger.txt", documents=2000)
    for name, data in (("a.txt", plain), ("a.gz", gzip.compress(plain)),
                       ("a.zip", packed_zip({"a.txt": plain}))):
        (folder / name).write_bytes(data)
    for task in ("CoLA", "RTE"):
        rows = [(" ".join(rng.choices(WORDS, k=9)), " ".join(rng.choices(WORDS, k=7)),
                 LABELS[task][i % 2]) for i in range(80)]
        write_task(folder / "GLUE", task, rows, n_dev=20)
    return folder


# ---- work that ends well when nothing happens


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
    assert result.status == 0, result.text
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


# ---- what happens to it: (folder, name of a work, out, rng) -> the Result of what met the fault


def refused(result):
    lines = [line for line in result.text.splitlines() if line.startswith("error")]
    return result.status == 2 and len(lines) == 1


def begin_and_wait(folder, name, out, rng):
    """Until train.py has written some lines of its log; the others for a share of their time."""
    _, seconds = undisturbed(folder, name)
    process = start(work(folder, name, out))
    if name not in ARMS:
        time.sleep(rng.random() * seconds)
        return process
    log, lines = out / "run" / "log.jsonl", rng.randrange(6)
    wait_for(process, lambda: log.exists() and log.read_bytes().count(b"\n") >= lines)
    time.sleep(rng.random() * 0.05)
    return process


def kill(folder, name, out, rng):
    return send(begin_and_wait(folder, name, out, rng), signal.SIGKILL)


def kill_in_checkpoint(folder, name, out, rng):
    process = begin_and_wait(folder, name, out, rng)
    wait_for(process, lambda: list((out / "run").glob("checkpoint.new.pt*")))
    return send(process, signal.SIGKILL)


def stop(folder, name, out, rng, times=1):
    """train.py ends its step, saves, and says how to go on; the others have nothing to save. A
    second signal of the kind ends it at once."""
    number = rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    process = begin_and_wait(folder, name, out, rng)
    if name in ARMS:
        wait_for(process, (out / "run" / "checkpoint.pt").exists)
    result = send(process, *[number] * times, pause=rng.uniform(0, 0.01))
    if name in ARMS and times == 1 and result.status:
        assert result.status == 128 + number and "--resume" in result.text
    assert result.status in (0, 128 + number, -number)
    return result


def stop_twice(folder, name, out, rng):
    return stop(folder, name, out, rng, times=2)


def full_disk(folder, name, out, rng):
    """No file may grow beyond so many bytes, fewer than the largest has at the end."""
    undisturbed(folder, name)
    what, whole = work(folder, name, out), folder / name
    largest = max(p.stat().st_size for p in whole.rglob("*")
                  if p.is_file() and not (out / p.relative_to(whole)).exists())
    limit = rng.choice([largest - 1, rng.randrange(largest), int(largest ** rng.random())])
    result = finish(what, resource.RLIMIT_FSIZE, limit)
    assert result.status == 0 or refused(result), result
    return result


def two_processes(folder, name, out, rng):
    """On one run folder; then the first dies, and its lock must not stay."""
    first = start(work(folder, name, out))
    wait_for(first, (out / "run" / "log.jsonl").exists)
    os.kill(first.pid, signal.SIGSTOP)  # it must not finish in the meantime
    second = finish(work(folder, name, out))
    send(first, signal.SIGKILL)
    assert second.status == 0 or refused(second), second
    return second


@pytest.mark.parametrize("number", range(TRIES))
@pytest.mark.parametrize("fault, works", [
    (kill, WORKS), (kill_in_checkpoint, [*ARMS]), (stop, WORKS), (stop_twice, [*ARMS]),
    (full_disk, WORKS), (two_processes, [*ARMS])])
def test_work_goes_on_after_a_fault_and_nothing_is_lost(fault, works, number, folder, tmp_path):
    name, rng = works[number % len(works)], random.Random(f"{fault.__name__} {number}")
    for out in map(tmp_path.joinpath, map(str, itertools.count())):
        out.mkdir()
        result = fault(folder, name, out, rng)
        if result.status != 0:  # else the work was done before the fault came
            break
    after = finish(work(folder, name, out))
    assert after.status == 0 and "Traceback" not in result.text + after.text, (result, after)
    assert contents(out) == undisturbed(folder, name)[0]


# ---- damaged files: each reader reads them rightly, or refuses them in one line. What has a
# checksum or is JSON was damaged in test_data.py; here it is whole, and something in it is wrong

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


def show_scores(path):
    model = glue.open_run(str(path.parent))
    model.scores = scores.read_scores(path.parent, model.sha256)
    scores.show_tables(scores.make_tables([model], model.arm))


@pytest.mark.parametrize("files, read, spoil", [
    ("a.*", lambda path: list(read_documents([path])), damage),
    ("GLUE/*/*.tsv", lambda path: tasks.read_task(path.parent.name, path.parent.parent, ""),
     damage),
    ("glue/run/log.jsonl", lambda path: runs.read_log(path.parent), damage),
    ("glue/run/config.json", show_scores, forge), ("glue/run/glue.json", show_scores, forge),
    ("glue/run/model.pt", read_model, forge)])
def test_a_damaged_file_is_read_or_refused_in_words(files, read, spoil, folder):
    undisturbed(folder, "glue")
    rng = random.Random(files)
    for path in itertools.islice(itertools.cycle(sorted(folder.glob(files))), 15 * TRIES):
        whole = path.read_bytes()
        spoil(path, rng)
        try:
            read(path)
        except (UserError, OSError) as error:  # an OSError is told in one line, too
            assert str(error).strip()
        finally:
            path.write_bytes(whole)


# ---- archives


def link_to(target):
    link = zipfile.ZipInfo("link.txt")
    link.external_attr = 0o120777 << 16
    return {link: target, "link.txt/x": b"text"}


EVIL = "../../evil.txt"
TYPES = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE


@pytest.mark.parametrize("pack", [
    *(lambda text, name=name: packed_zip({"text.txt": text, name: text})
      for name in (EVIL, "/tmp/evil.txt", "a/" + EVIL, "..\\evil")),
    lambda text: packed_zip({"text.txt": text, **link_to(EVIL)}),
    *(lambda text, kind=kind: packed_tar({"text.txt": text, EVIL: text}, "w", kind)
      for kind in TYPES)])
def test_an_archive_writes_nowhere_else(pack, tmp_path):
    text = write_corpus(tmp_path / "text.txt", documents=300).read_bytes()
    (inner := tmp_path / "a" / "b").mkdir(parents=True)
    (inner / "archive").write_bytes(pack(text))
    try:
        corpus.prepare(str(inner / "archive"), 600, inner / "cache", 1)
    except UserError as error:
        assert str(error)
    assert {p.name for p in tmp_path.iterdir()} == {"text.txt", "a"}
    assert {p.name for p in inner.iterdir()} == {"archive", "cache"}
    assert not [p for p in inner.rglob("*") if "evil" in p.name or p.is_symlink()]
