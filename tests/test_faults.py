"""What machines do to work, and nothing is lost: kills, signals, a full disk, two processes on one
folder, damaged files. And archives of strangers that would do harm.

    python -m pytest tests/test_faults.py -q
    TRIES=20 python -m pytest tests/test_faults.py -q       # each fault at 20 random moments

After a fault a run goes on, and must end in the weights and the log of one that nothing happened
to. A damaged file is read or refused in one line, and no script shows a traceback. What a kill
interrupts at a random moment depends on the machine.
"""

import gzip
import itertools
import json
import os
import random
import resource
import shutil
import signal
import tarfile
import time
import zipfile

import pytest

import glue
from data import corpus, runs, scores, tasks
from data.files import UserError, load_tensors, read_json, save_tensors, write_json
from data.text import read_documents
from model import read_model
from tests.helpers import (
    LABELS, WORDS, command, finish, packed_tar, packed_zip, same_weights, send, start, wait_for,
    what_was_logged, write_corpus, write_task,
)

TRIES = int(os.environ.get("TRIES", 1))


def work(folder, run):
    """What a person would type, at first and after a fault."""
    if (run / "config.json").exists():
        return ["train.py", "--resume", run]
    return command(folder, run, "--masking", "random", "--checkpoint-every", "2")


@pytest.fixture(scope="module")
def folder(folder):
    """A toy corpus, plain and packed, GLUE files, a run, and one that glue.py has scored."""
    rng, plain = random.Random(0), (folder / "text.txt").read_bytes()
    for name, data in (("a.txt", plain), ("a.gz", gzip.compress(plain)),
                       ("a.zip", packed_zip({"a.txt": plain}))):
        (folder / name).write_bytes(data)
    for task in ("CoLA", "RTE"):
        rows = [(" ".join(rng.choices(WORDS, k=9)), " ".join(rng.choices(WORDS, k=7)),
                 LABELS[task][i % 2]) for i in range(80)]
        write_task(folder / "GLUE", task, rows, n_dev=20)
    assert finish(work(folder, folder / "whole")).status == 0
    shutil.copytree(folder / "whole", folder / "scored")
    assert finish(["glue.py", folder / "scored", "--glue-dir", folder / "GLUE", "--cache",
                   folder / "cache", "--tasks", "CoLA,RTE", "--epochs", "1", "--threads", "1"]
                  ).status == 0
    return folder


# ---- what happens to a run: (folder, run, rng) -> the Result of what met the fault


def refused(result):
    lines = [line for line in result.text.splitlines() if line.startswith("error")]
    return result.status == 2 and len(lines) == 1


def begin_and_wait(folder, run, rng):
    """Until it has written some lines of its log."""
    process, lines = start(work(folder, run)), rng.randrange(6)
    wait_for(process, lambda: len(runs.read_log(run)) >= lines)
    time.sleep(rng.random() * 0.05)
    return process


def kill_in_checkpoint(folder, run, rng):
    process = begin_and_wait(folder, run, rng)
    wait_for(process, lambda: list(run.glob("checkpoint.new.pt*")))
    return send(process, signal.SIGKILL)


def stop(folder, run, rng, times=1):
    """It ends its step, saves, and says how to go on. A second signal ends it at once."""
    number = rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    process = begin_and_wait(folder, run, rng)
    wait_for(process, (run / "checkpoint.pt").exists)
    result = send(process, *[number] * times, pause=rng.uniform(0, 0.01))
    if times == 1 and result.status:
        assert result.status == 128 + number and "--resume" in result.text
    assert result.status in (0, 128 + number, -number)
    return result


def stop_twice(folder, run, rng):
    return stop(folder, run, rng, times=2)


def full_disk(folder, run, rng):
    """No file may grow beyond so many bytes, fewer than the largest has at the end."""
    largest = max(p.stat().st_size for p in (folder / "whole").iterdir())
    limit = rng.choice([largest - 1, rng.randrange(largest), int(largest ** rng.random())])
    result = finish(work(folder, run), resource.RLIMIT_FSIZE, limit)
    assert result.status == 0 or refused(result), result
    return result


def two_processes(folder, run, rng):
    """On one run folder; then the first dies, and its lock must not stay."""
    first = start(work(folder, run))
    wait_for(first, (run / "log.jsonl").exists)
    os.kill(first.pid, signal.SIGSTOP)  # it must not finish in the meantime
    second = finish(work(folder, run))
    send(first, signal.SIGKILL)
    assert refused(second), second
    return second


@pytest.mark.parametrize("number", range(TRIES))
@pytest.mark.parametrize("fault", [kill_in_checkpoint, stop, stop_twice, full_disk, two_processes])
def test_a_run_goes_on_after_a_fault_as_if_nothing_had_happened(fault, number, folder, tmp_path):
    rng = random.Random(f"{fault.__name__} {number}")
    for attempt in range(20):
        run = tmp_path / f"run{attempt}"
        result = fault(folder, run, rng)
        if result.status != 0:  # else it was through before the fault came
            break
    assert result.status != 0
    after = finish(work(folder, run))
    assert after.status == 0 and "Traceback" not in result.text + after.text, (result, after)
    assert same_weights(folder / "whole", run)
    assert what_was_logged(folder / "whole") == what_was_logged(run)
    names = [sorted(p.name for p in r.glob("[!c.]*")) for r in (folder / "whole", run)]
    assert names[0] == names[1]  # but for checkpoints, config.json and .lock


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
    ("scored/log.jsonl", show_scores, damage),
    ("scored/config.json", show_scores, forge), ("scored/glue.json", show_scores, forge),
    ("scored/model.pt", read_model, forge)])
def test_a_damaged_file_is_read_or_refused_in_words(files, read, spoil, folder):
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


@pytest.mark.parametrize("pack", [
    lambda text: packed_zip({"text.txt": text, EVIL: text, "/tmp/evil.txt": text}),
    lambda text: packed_zip({"text.txt": text, **link_to(EVIL)}),
    lambda text: packed_tar({"text.txt": text, EVIL: text}, "w"),
    lambda text: packed_tar({"text.txt": text, EVIL: text}, "w", tarfile.SYMTYPE)])
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
