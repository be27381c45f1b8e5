"""The campaign that shows what people can rely on: real scripts, real faults, nothing lost.

    python -m tests.faults                            # all but the load
    python -m tests.faults --only load                # 1 GB of text, and 20 000 steps
    python -m tests.faults --only kill,text --tries 5

Prints a table (fault, tries, survived, lost, exit statuses) and ends with status 1 if anything was
lost. *Survived* means: work that goes on ends in the very files of work that nothing happened to;
no finished score is lost or computed again; bad input is refused in one line with status 2; and no
script ever shows a traceback. Exit statuses: 0; 1 a loss that is not finite; 2 a mistake of the
user's; 128 + n stopped by signal n; -n killed by it.

Each try is a forked process, in which torch is imported already: it takes a second. Random moments
come from --seed, but what a kill interrupts depends on the machine.
"""

import contextlib
import copy
import functools
import gzip
import json
import os
import random
import resource
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
from model import read_model
from tests.helpers import (
    LABELS, ROOT, WORDS, command, finish, packed_tar, packed_zip, send, start, wait_for,
    what_was_logged, write_corpus, write_task,
)
from tests.test_download import DATA, SHA, serve
from tests.test_mistakes import wrong_lines

STEPS = 24  # of a toy run, which takes a second
MEMORY = 12 << 30  # bytes of addresses, of which torch's libraries take some


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
    "self": ["--masking", "self", "--init-frac", "0.3", "--score-input", "masked"],
    "vocabulary": ["--masking", "self", "--init-frac", "0.2"],
    "entropy": ["--masking", "entropy", "--distill", "complete", "--teacher"],
}
# begin(out) -> what to do, again(out) -> how to go on: both write in the folder `out` alone.
# `whole` is what stands there when nothing happened, after so many `seconds`.
Work = namedtuple("Work", "name begin again whole seconds")


def toy(folder, out, *flags):
    return command(folder, out, "--checkpoint-every", "2", *flags)


def glue_command(folder, run, cache, *flags):
    return ["glue.py", run, "--glue-dir", folder / "GLUE", "--cache", cache, "--tasks", "CoLA,RTE",
            "--epochs", "3", "--threads", "1", *flags]


def contents(out):
    """What stands in a folder: of a run its log without the clock and its weights, of scores all
    but the time they took, of any other file its hash."""
    found = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file() and p.name != ".lock"):
        name = str(path.relative_to(out))
        if ".building-" in name:  # what a kill left of a corpus: it is removed after a day
            continue
        if path.name == "log.jsonl":
            found[name] = what_was_logged(path.parent)
        elif path.name == "glue.json":
            found[name] = [(e["task"], e["seed"], e["parts"]) for e in read_json(path)["scores"]]
        elif path.name == "model.pt":  # without its hash of config.json, which has the clock
            found[name] = {key: value.numpy().tobytes()
                           for key, value in load_tensors(path)["model"].items()}
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
    for task in ("CoLA", "RTE"):
        rows = [(" ".join(rng.choices(WORDS, k=9)), " ".join(rng.choices(WORDS, k=7)),
                 LABELS[task][i % 2]) for i in range(80)]
        write_task(folder / "GLUE", task, rows, n_dev=20)
    trained = folder / "random" / "run"

    def training(arm, out):
        return toy(folder, out / "run", *ARMS[arm], *[trained] * ("--teacher" in ARMS[arm]))

    def going_on(arm, out):  # as a person does it: --resume, or the command again
        run = out / "run"
        begun = (run / "config.json").exists()
        return ["train.py", "--resume", run] if begun else training(arm, out)

    def scoring(out):
        if not (out / "run").exists():
            shutil.copytree(trained, out / "run")
        return glue_command(folder, out / "run", out / "cache")

    def exporting(out):
        shutil.rmtree(out / "export", ignore_errors=True)  # half of one is not written over
        return ["model.py", trained, "--export", out / "export"]

    commands = {arm: (partial(training, arm), partial(going_on, arm)) for arm in ARMS}
    commands |= {name: (begin, begin) for name, begin in {
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


def begin_and_wait(work, out, rng):
    """Until train.py has written so many lines of its log; the others for a share of their time."""
    process = start(work.begin(out))
    if work.name not in ARMS:
        time.sleep(rng.random() * work.seconds)
        return process
    log, lines = out / "run" / "log.jsonl", rng.randrange(STEPS // 4)
    wait_for(process, lambda: log.exists() and log.read_bytes().count(b"\n") >= lines)
    time.sleep(rng.random() * 0.05)
    return process


def kill(folder, work, out, rng, in_checkpoint=False):
    """At any moment, or while a checkpoint is being written."""
    process = begin_and_wait(work, out, rng)
    if in_checkpoint:
        wait_for(process, lambda: list((out / "run").glob("checkpoint.new.pt*")))
    return send(process, signal.SIGKILL), ""


def stop(folder, work, out, rng, times=1):
    """train.py ends its step, saves, and says how to go on; the others have nothing to save."""
    number, waits = rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP]), work.name in ARMS
    process = begin_and_wait(work, out, rng)
    if waits:
        wait_for(process, (out / "run" / "checkpoint.pt").exists)
    result = send(process, *[number] * times, pause=rng.uniform(0, 0.01))
    good = result.status == 128 + number and (times == 2 or not waits or "--resume" in result.text)
    good = good or result.status == -number and not (waits and times == 1)
    return result, "" if good else str(result)


def full_disk(folder, work, out, rng):
    """No file may grow beyond so many bytes, fewer than the largest has at the end."""
    what, whole = work.begin(out), folder / work.name
    largest = max(p.stat().st_size for p in whole.rglob("*")
                  if p.is_file() and not (out / p.relative_to(whole)).exists())
    limit = rng.choice([largest - 1, rng.randrange(largest), int(largest ** rng.random())])
    result = finish(what, resource.RLIMIT_FSIZE, limit)
    return result, fine(result)


class CannotMount(Exception):
    pass


def read_only(folder, work, out, rng):
    """The folder turns read-only while the work is under way. Needs root."""
    send(begin_and_wait(work, out, rng), signal.SIGKILL)
    for options in (["--bind", out, out], ["-o", "remount,ro,bind", out]):
        if subprocess.run(["mount", *options], capture_output=True).returncode:
            raise CannotMount
    try:
        result = finish(work.again(out))
    finally:
        subprocess.run(["umount", "-l", out], check=True)
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
    data, at = newest.read_bytes(), rng.randrange(newest.stat().st_size)
    rng.choice([
        lambda: newest.write_bytes(data[:at]),
        lambda: newest.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1:]),
        lambda: save_tensors(newest, {**load_tensors(newest), "config_sha256": "0" * 64})])()
    result = finish(work.again(out))
    newest.unlink()  # as the line says
    return result, refused(result, "checkpoint")


def not_finite(folder, work, out, rng):
    """Loss and weights become NaN or infinite at a step: it is named, and nothing of it is kept."""
    at, update = rng.randrange(STEPS), train.update

    def faulty_update(args, job, step):
        loss = update(args, job, step)
        if step == at:
            job.model.head_bias.data *= rng.choice([float("nan"), float("inf")])
        return loss * float("nan") if step == at else loss

    def faulty_training():
        train.update, sys.argv = faulty_update, [str(word) for word in work.begin(out)]
        train.main()

    result = finish(faulty_training)
    good = result.status == 1 and f"not finite at step {at + 1};" in result.text
    return result, "" if good else f"step {at + 1}: {result}"


OTHERS = ("preparation", "download", "export", "page")
TRAIN = {"train.py": ARMS}
ALL = {"train.py": ARMS, "glue.py": ["glue"], ", ".join(OTHERS): OTHERS}
STRIKES = {  # name -> (fault, strike, works that meet it, in turn)
    "kill": ("kill -9", kill, ALL),
    "checkpoint": ("kill -9 while a checkpoint is written", partial(kill, in_checkpoint=True),
                   TRAIN),
    "signal": ("SIGINT, SIGTERM, SIGHUP", stop, ALL),
    "twice": ("the same twice: it does not wait", partial(stop, times=2), TRAIN),
    "disk": ("full disk", full_disk, ALL),
    "readonly": ("folder turned read-only", read_only, ALL),
    "two": ("two processes on one folder, one dies", two_processes, TRAIN),
    "damage": ("checkpoint cut, flipped, of another run", damaged_checkpoint, TRAIN),
    "loss": ("a loss that is NaN or infinite", not_finite, TRAIN),
}


def strike(name, folder, works, tries, rng):
    """Yield (fault, what was lost or "", exit status) of so many tries for each kind of work."""
    fault, strike_at, groups = STRIKES[name]
    for script, names in groups.items():
        done, out = 0, folder / "struck"
        while done < tries:
            work = works(list(names)[done % len(names)])
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            result, lost = strike_at(folder, work, out, rng)
            if result.status == 0:  # the work was done before the fault came
                continue
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


def flags(folder, works, tries, rng):
    """Wrong, contradicting and misspelt flags: refused before any work begins."""
    for line, argv, word in wrong_lines(folder, folder / "random" / "run"):
        result = finish(argv)
        lost = refused(result, word) or (folder / "refused").exists() * "it began to work"
        yield "wrong flags: all scripts", lost and f"{line}: {lost}", result.status


def kinds_of_text(plain, large):
    """{name: (content, is it trained on? None: either)}"""
    kinds = {
        "CRLF": (plain.replace("\n", "\r\n"), True),
        "CR": (plain.replace("\n", "\r"), True),
        "BOM": ("\ufeff" + plain, True),
        "emoji": (plain.replace("the", "😀👩‍👩‍👧‍👦🇩🇪"), True),
        "right to left": (plain.replace("a", "שלום ").replace("e", "مرحبا "), True),
        "special tokens": (plain.replace("mask", "[MASK] [CLS] <s> <unk> <0x41> ▁[MASK]▁"), True),
        "no blank line": (plain.replace("\n\n", "\n"), True),
        "combining marks": (plain.replace("o", "o\u0301\u0323\u0300" * 5), True),
        "soft hyphens": (plain.replace("e", "\u00ade\u200b"), True),
        "JSON lines": ('{"text": "A line of it."}\n' * 1000, False),
        "Latin-1": (plain.replace("e", "é").encode("latin-1", "replace"), False),
        "UTF-16": (plain.encode("utf-16"), False),
        "control characters": (plain.replace(" ", " \x0b\x1c\x85\u2028"), None),
        "one word repeated": ("word " * 50_000, None),
        "surrogates": (plain.encode().replace(b"the", b"\xed\xa0\x80"), False),
        "only blank lines": ("\n" * 1000, False), "binary": (bytes(range(1, 256)) * 2000, False),
    }
    if large:
        kinds |= {"one line of 100 MB": (("word and another " * 6_000_000)[:100_000_000], None),
                  "one word of 100 MB": ("abc" * 33_000_000, None),
                  "10 million empty lines": (plain + "\n" * 10_000_000 + plain, True)}
    return kinds


def train_on(folder, path):
    """Two steps on this text, from a cache of its own, in bounded memory."""
    out = folder / "other-text"
    shutil.rmtree(out, ignore_errors=True)
    return finish([*toy(folder, out / "run", *ARMS["random"], "--steps", 2), "--corpus", path,
                   "--vocab-size", "900", "--cache", out / "cache"], resource.RLIMIT_AS, MEMORY)


def text(folder, works, tries, rng):
    """Text of every kind is trained on or refused in one line."""
    kinds, path = kinds_of_text((folder / "text.txt").read_text(), tries >= 20), folder / "kind.txt"
    for name, (content, trained) in kinds.items():
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        result = train_on(folder, path)
        lost = fine(result)
        if trained is not None and (result.status == 0) != trained:
            lost = lost or f"status {result.status}: {result.text[-300:]}"
        yield "text of every kind", lost and f"{name}: {lost}", result.status


HOSTILE = "a pickle with code in it, an archive that would write elsewhere, a bomb"


def hostile(*given):
    """Files of strangers that would do harm."""
    yield from archives(*given)
    yield from pickles(*given)


def pickles(folder, works, tries, rng):
    """A pickle that would run a command, with and without our checksum."""
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch '{folder}/executed'",)

    run = folder / "payload"
    shutil.copytree(folder / "random" / "run", run)
    student = toy(folder, folder / "student", "--masking", "entropy", "--teacher", run)
    for name, *commands in (
            ("model.pt", ["train.py", "--eval", run], ["masking.py", run, "a b c"], student,
             ["model.py", run, "--fill", "a [MASK]"], glue_command(folder, run, folder / "cache")),
            ("checkpoint.pt", ["train.py", "--resume", run])):
        for save in (lambda value, path: save_tensors(path, value), torch.save):
            save({**load_tensors(folder / "random" / "run" / name), "step": Payload()}, run / name)
            for argv in commands:
                result = finish(argv)
                lost = (folder / "executed").exists() * "its code ran" or refused(result)
                yield HOSTILE, lost, result.status
        (run / name).unlink()


def archives(folder, works, tries, rng):
    """Archives that would write elsewhere, through names or links; and bombs."""
    plain, evil, hostile = (folder / "text.txt").read_bytes(), "../../evil.txt", {}
    link = zipfile.ZipInfo("link.txt")
    link.external_attr = 0o120777 << 16
    for i, name in enumerate(("../evil.txt", evil, f"{folder}/evil.txt", "a/" + evil, "..\\evil")):
        hostile[f"name-{i}.zip"] = packed_zip({"text.txt": plain, name: plain})
        hostile[f"link-{i}.zip"] = packed_zip({"text.txt": plain, link: name, "link.txt/x": plain})
    for kind in (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE,
                 tarfile.CHRTYPE):
        hostile[f"{kind.decode()}.tar"] = packed_tar({"text.txt": plain, evil: plain}, "w", kind)
    for name, data in hostile.items():
        (folder / name).write_bytes(data)
        before = set(folder.parent.rglob("*"))
        result = train_on(folder, folder / name)
        written = {p for p in set(folder.parent.rglob("*")) - before
                   if folder / "other-text" not in (p, *p.parents)}
        yield HOSTILE, fine(result) or (f"it wrote {written}" if written else ""), result.status
    for bomb in (bytes(1 << 30), b"a" * (30 << 20), b"a b\n\n" * (2 << 20)):
        (folder / "bomb.zip").write_bytes(packed_zip({"text.txt": bomb}))
        result = train_on(folder, folder / "bomb.zip")
        yield HOSTILE, refused(result), result.status


# --------------------------------------------------------------------------------------------------
# damaged files: each reader reads them rightly, or refuses them in one line. (What has a checksum
# is damaged in test_data.py.)

NASTY = [-1, 0, 64, 10**40, 0.5, float("nan"), float("inf"), None, True, [], {}, "", "x", "\ud800",
         [[1]]]


def damage(data, rng):
    """Do something to the bytes of a file."""
    first = rng.randrange(len(data))
    part = data[first:first + rng.choice([1, 10, 1000])]
    return data[:first] + rng.choice([
        b"", part * 3, bytes(len(part)), rng.randbytes(len(part)), b"\n" + part, b"\t" + part,
        bytes([part[0] ^ 1 << rng.randrange(8)]) + part[1:], "\u2028\U0001f600".encode() + part,
        json.dumps(rng.choice(NASTY)).encode(), b"[" * 2000,
    ]) + data[first + len(part):] * (rng.random() < 0.8)  # else it is cut short


def forge(whole, rng):
    """Put another thing in the place of one, somewhere in nested dicts and lists."""
    key = rng.choice(list(whole) if isinstance(whole, dict) else range(len(whole)))
    if isinstance(whole[key], (dict, list)) and whole[key] and rng.random() < 0.8:
        return forge(whole[key], rng)
    if rng.random() < 0.3:
        del whole[key]
    else:
        whole[key] = copy.deepcopy(rng.choice(NASTY))


def readers(folder, works):
    """{name: (files, read(file))}"""
    run = folder / "glue" / "run"
    works("glue")
    plain = (folder / "text.txt").read_bytes()
    for name, data in (("a.txt", plain), ("a.gz", gzip.compress(plain)),
                       ("a.zip", packed_zip({"a.txt": plain}))):
        (folder / name).write_bytes(data)

    def score_table(path):
        model = glue.open_run(str(run))
        model.scores = scores.read_scores(run, model.sha256)
        scores.show_tables(scores.make_tables([model], model.arm))

    return {
        "corpus text": (folder.glob("a.*"), lambda path: list(read_documents([path]))),
        "GLUE files": ((folder / "GLUE").glob("*/*.tsv"), lambda path: tasks.read_task(
            path.parent.name, str(folder / "GLUE"), "")),
        "log.jsonl": ([run / "log.jsonl"], lambda path: runs.read_log(run)),
        "config.json": ([run / "config.json"], score_table),
        "glue.json": ([run / "glue.json"], score_table),
        "model.pt": ([run / "model.pt"], read_model),
    }


def read_damaged(paths, read, forged, count, seed):
    """Print a line for each file: read, refused, or what went wrong."""
    for i in range(count):
        path = paths[i % len(paths)]
        whole, rng = path.read_bytes(), random.Random(f"{path.name} {seed} {i}")
        if forged:
            read_it, save = ((read_json, write_json) if path.suffix == ".json" else
                             (load_tensors, save_tensors))
            forge(content := read_it(path), rng)
            save(path, content)
        else:
            path.write_bytes(damage(whole, rng))
        try:
            read(path)
            said = "read"
        except (UserError, OSError) as error:  # an OSError is told in one line, too
            said = "refused" if str(error).strip() else f"file {i}: refused without a word"
        except BaseException:  # whatever it is, it is what we look for, and it is reported
            last = traceback.format_exc().strip().splitlines()
            said = f"file {i}: {last[-1]} <- {last[-3].strip()}"
        print(said, flush=True)
        path.write_bytes(whole)


def damaged(folder, works, tries, rng):
    """Many files for each reader, in a process of its own with bounded memory: a hang or a crash
    is a result, too. Forged ones are whole, with another value or none in one place."""
    count = 15 * tries
    for name, (paths, read) in readers(folder, works).items():
        paths = sorted(paths)
        for kind in ["damaged"] + ["forged"] * (paths[0].suffix in (".json", ".pt")):
            batch = partial(read_damaged, paths, read, kind == "forged", count, rng.random())
            result = finish(batch, resource.RLIMIT_AS, MEMORY)
            lines = result.text.splitlines()
            for line in lines if len(lines) == count else [str(result)]:
                yield (f"{kind} files: {name}", "" if line in ("read", "refused") else line,
                       {"read": "read", "refused": 2}.get(line, "?"))


# --------------------------------------------------------------------------------------------------


def big(folder, works, tries, rng):
    """A corpus of 1 GB in less than 1.5 GB of memory; 20 000 steps without growth."""
    path, run, long = folder / "gigabyte.txt", folder / "gigabyte", folder / "long"
    words = ["".join(rng.choices("etaoinshrdlucmfw", k=rng.randint(2, 9))) for _ in range(50_000)]
    weights = [1 / (rank + 2.7) for rank in range(len(words))]
    lines = [" ".join(rng.choices(words, weights, k=60)) for _ in range(20_000)]
    with open(path, "w") as f:
        while f.tell() < 1e9:
            rng.shuffle(lines)
            f.writelines("\n".join(lines[i:i + 5]) + "\n\n" for i in range(0, len(lines), 5))
    result = finish(["train.py", "--corpus", path, "--cache", folder / "cache", "--masking",
                     "random", "--steps", 200, "--threads", "1", "--out", run], seconds=7200)
    path.unlink()
    memory = [line["peak_memory_mb"] for line in runs.read_log(run) if "peak_memory_mb" in line]
    yield (f"a corpus of 1 GB, 200 steps: {memory[-1:]} MB", fine(result) or (
        "" if memory and memory[-1] < 1500 else "too much memory"), result.status)
    result = finish([*toy(folder, long, "--masking", "self", "--steps", 20_000, "--eval-every",
                          "1000"), "--checkpoint-every", "1000"], seconds=7200)
    log = runs.read_log(long)
    memory = [line["peak_memory_mb"] for line in log if "peak_memory_mb" in line]
    # The self-masked steps, in quarters. The quickest lines of each: others use the machine too.
    speeds = [line["tokens_per_s"] for line in log if line["step"] > 6000]
    size = len(speeds) // 4
    first, *_, last = [sorted(speeds[i * size:(i + 1) * size])[int(0.9 * size)] for i in range(4)]
    figures = f"20 000 steps: {memory[1]} -> {memory[-1]} MB, {first} -> {last} tokens/s"
    grows = memory[-1] > 1.03 * memory[1] or last < 0.9 * first
    yield figures, fine(result) or grows * figures, result.status


CASES = {**{name: partial(strike, name) for name in STRIKES}, "servers": servers, "flags": flags,
         "text": text, "hostile": hostile, "damaged": damaged, "load": big}
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
