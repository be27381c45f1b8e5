"""Damaged files for every reader: each is read rightly, or refused in one line.

    python -m tests.fuzz                           # 2400 files, a minute or two
    python -m tests.fuzz --reader glue.json --files 1000 --seed 7

A reader is given files that are whole but for what a seeded generator did to their bytes. It must
return, or raise UserError, which scripts print as one line with exit status 2. Where a file has a
checksum it must be refused; the `forged` ones have a right checksum, as a stranger's may, and
another value or none in one place. Anything else is a find: another exception, a hang (20 seconds),
memory without bound, a dead interpreter. Each reader runs in a process of its own, so that the last
two are seen too.
"""

import argparse
import bz2
import copy
import gzip
import io
import json
import lzma
import random
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import traceback
import zipfile
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from data.files import (
    UserError, check_range, load_tensors, read_json, refuse_command, run_script, save_tensors,
    write_json,
)

ROOT = Path(__file__).parent.parent
SECONDS = 20  # for one file; the slowest takes well under one
MEMORY = 12 << 30  # bytes of addresses: torch alone maps some, the largest mutant has some MB

# --------------------------------------------------------------------------------------------------
# mutations: bytes -> bytes

NASTY = ["-1", "0", "1e999", "NaN", "null", "true", "[]", "{}", '""', '"x"', "1" * 40, "0.5",
         "[" * 2000, '"\\ud800"']


def flip(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 8])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def cut(data, rng):
    return data[:rng.randrange(len(data))]


def remove(data, rng):
    first = rng.randrange(len(data))
    return data[:first] + data[first + rng.choice([1, 10, 1000]):]


def insert(data, rng):
    first = rng.randrange(len(data))
    what = rng.choice([rng.randbytes(rng.choice([1, 10, 1000])), b"\0", b"\n", b"\t", b"\r\n",
                       b"\xff\xfe", "\u2028\u0085\U0001f600".encode(), b'"'])
    return data[:first] + what + data[first:]


def repeat(data, rng):
    first = rng.randrange(len(data))
    last = first + rng.choice([1, 10, 1000])
    return data[:last] + data[first:last] * rng.choice([1, 3]) + data[last:]


def overwrite(data, rng):
    first = rng.randrange(len(data))
    n = rng.choice([1, 4, 100])
    return data[:first] + rng.choice([bytes(n), b"\xff" * n, rng.randbytes(n)]) + data[first + n:]


def value(data, rng):
    """One value of a JSON text, or one field of a table, becomes something that is none."""
    places = [i for i in range(len(data)) if data[i:i + 1] in (b":", b"\t", b",")]
    if not places:
        return insert(data, rng)
    first = rng.choice(places) + 1
    last = first
    while last < len(data) and data[last:last + 1] not in (b",", b"\n", b"\t", b"}"):
        last += 1
    return data[:first] + rng.choice(NASTY).encode() + data[last:]


MUTATIONS = [flip, cut, remove, insert, repeat, overwrite, value, value]


def forge(whole, rng):
    """Nested dicts and lists -> a copy in which one thing is another, or is gone."""
    forged = copy.deepcopy(whole)
    places, todo = [], [forged]
    while todo:
        box = todo.pop()
        keys = list(box) if isinstance(box, dict) else range(len(box))
        places += [(box, key) for key in keys]
        todo += [box[key] for key in keys if isinstance(box[key], (dict, list))]
    box, key = rng.choice(places)
    if rng.random() < 0.3:
        del box[key]
    else:
        box[key] = rng.choice([-1, 0, 64, 10**6, 10**40, 0.5, float("nan"), float("inf"), None,
                               True, [], {}, "", "x", "\ud800", [[1]], box])
        if box[key] is box:  # nested, but not without end
            box[key] = copy.deepcopy(whole)
    return forged

# --------------------------------------------------------------------------------------------------
# readers: name -> make(folder), which writes whole files there and returns
#   [(path, read(), is there a checksum?)]. That of a JSON file is about its content, not its bytes.
# Where the name of a reader ends in "forged", the checksum is made to fit.


def text_readers(folder):
    from data import corpus
    from tests.test_data import write_corpus

    plain = write_corpus(folder / "text.txt", documents=120).read_bytes()
    packed = {"text.txt": plain, "text.gz": gzip.compress(plain), "text.xz": lzma.compress(plain),
              "text.bz2": bz2.compress(plain)}
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as z:
        for part in ("train", "valid", "test"):
            z.writestr(f"wikitext/wiki.{part}.raw", b" = Title = \n\n" + plain)
    packed["wiki.zip"] = archive.getvalue()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:bz2") as tar:
        member = tarfile.TarInfo("books.txt")
        member.size = len(plain)
        tar.addfile(member, io.BytesIO(plain))
    packed["books.tar.bz2"] = archive.getvalue()
    readers = []
    for name, data in packed.items():
        path = folder / name
        path.write_bytes(data)
        kind = {"wiki.zip": "wikitext2", "books.tar.bz2": "bookcorpus"}.get(name, "")
        readers.append((path, lambda path=path, kind=kind: [
            document for document in corpus.read_documents([path], kind)], False))
    readers.append((folder / "text.txt", lambda: corpus.load(
        corpus.prepare(str(folder / "text.txt"), 600, folder / "cache"), 34), False))
    return readers


def glue_file_readers(folder):
    from data.tasks import TASKS, read_task
    from tests.test_glue_data import LABELS, write_task

    readers = []
    for task in TASKS:
        labels = LABELS[task]
        write_task(folder, task, [(f"a {i} \"quoted", f"b {i}", labels[i % len(labels)])
                                  for i in range(12)])
        for path in sorted((folder / task).iterdir()):
            readers.append((path, lambda task=task: read_task(task, str(folder), ""), False))
    return readers


def run_readers(folder):
    """Files of a run folder, and those of the cache."""
    import glue
    import train
    from data import corpus, runs
    from data.compare import group_arms, make_tables
    from data.files import sha256_file
    from data.tables import show_tables
    from data.tasks import TASKS
    from model import Bert, Shape, load, read_model
    from tests.test_data import write_corpus

    write_corpus(folder / "text.txt")
    cache = corpus.prepare(str(folder / "text.txt"), 600, folder / "cache")
    run = folder / "run"
    run.mkdir()
    (run / "tokenizer.model").write_bytes((cache / "tokenizer.model").read_bytes())
    flags = {**train.DEFAULTS, "steps": 20, "corpus": str(folder / "text.txt"), "out": str(run)}
    runs.check_flags(flags, set())
    write_json(run / "config.json", {
        "flags": flags, "corpus_sha256": "c", "tokenizer_sha256": sha256_file(
            run / "tokenizer.model"), "teacher_sha256": "", "origin_sha256": "",
        "unigram_entropy": 5.0, "flops": 10,
        "teacher_flops": 0, "dtype": "float32"})
    (run / "log.jsonl").write_text("".join(
        json.dumps({"step": step, "tokens": 10 * step, "train_loss": 4.0, "seconds": 1.5,
                    "val_loss": 4.0}) + "\n" for step in (0, 10, 20)))
    model = Bert(Shape(600, 1, 64, 34))
    save_tensors(run / "model.pt", {"shape": asdict(model.shape), "model": model.state_dict()})
    runs.save_checkpoint(run, {"step": 10, "model": model.state_dict()})
    sha256 = sha256_file(run / "model.pt")
    for task in ("CoLA", "MRPC", "MNLI"):
        parts, rows = TASKS[task].parts, [10] + [5] * len(TASKS[task].dev)
        runs.add_score(run, {
            "task": task, "seed": 0, "recipe": {"lr": 1e-3}, "data": "d", "model": sha256,
            "score": 50.0, "parts": dict.fromkeys(parts, 50.0), "trained_on": 10,
            "majority": dict.fromkeys(parts, 40.0), "rows": rows, "official": rows})

    def resume():
        finished = run / "model.pt"
        finished.rename(run / "aside")
        try:
            runs.open_run({**train.DEFAULTS, "resume": str(run)}, {"resume"}, train.HOW_NOT_WHAT)
        finally:
            (run / "aside").rename(finished)

    def table():
        subject = glue.open_subject(str(run))
        subject.entries = runs.read_scores(run, subject.model)
        group_arms([subject])
        json.dumps(tables := make_tables([subject], {}))
        show_tables(tables, parts=True)

    def log():
        runs.read_log(run)
        runs.open_log(run, 10, 10)[0].close()

    readers = {
        "config.json": [(run / "config.json", resume, True), (run / "config.json", table, True),
                        (run / "config.json", lambda: load(run), True)],
        "log.jsonl": [(run / "log.jsonl", log, False), (run / "log.jsonl", table, False)],
        "glue.json": [(run / "glue.json", table, True)],
        "tokenizer.model": [(run / "tokenizer.model", lambda: load(run), True)],
        "model.pt": [(run / "model.pt", lambda: read_model(run / "model.pt"), True)],
        "checkpoint.pt": [(run / "checkpoint.pt", lambda: runs.load_checkpoint(run), True)],
        "cache": [(cache / name, lambda: corpus.load(cache, 34), True)
                  for name in (*corpus.PARTS, "meta.json")],
    }
    for name in FORGED:
        readers[f"{name}, forged"] = readers[name]
    return readers


READERS = ["corpus text", "GLUE files", "config.json", "log.jsonl", "glue.json", "tokenizer.model",
           "model.pt", "checkpoint.pt", "cache"]
FORGED = ["config.json", "glue.json", "model.pt"]
READERS += [f"{name}, forged" for name in FORGED]


def make_readers(name, folder):
    if name == "corpus text":
        return text_readers(folder)
    if name == "GLUE files":
        return glue_file_readers(folder)
    return run_readers(folder)[name]


# --------------------------------------------------------------------------------------------------


class TooSlow(BaseException):
    pass


def same(path, mutant, whole):
    """Do two versions of a file say the same?"""
    if path.suffix == ".json":
        mutant, whole = json.loads(mutant), json.loads(whole)
    return mutant == whole


def fuzz(name, count, seed):
    """-> {"read", "refused": counts, "lost": [what went wrong]}"""
    def too_slow(number, frame):
        raise TooSlow

    signal.signal(signal.SIGALRM, too_slow)
    result = {"read": 0, "refused": 0, "lost": []}
    with tempfile.TemporaryDirectory() as folder:
        readers = make_readers(name, Path(folder))
        for _, read, _ in readers:
            read()  # whole files are read
        for i in range(count):
            path, read, has_checksum = readers[i % len(readers)]
            rng = random.Random(f"{name} {seed} {i}")
            whole, mutation = path.read_bytes(), rng.choice(MUTATIONS)
            if name.endswith("forged"):
                has_checksum, mutation = False, forge
                if path.suffix == ".json":
                    write_json(path, forge(read_json(path), rng))
                else:
                    save_tensors(path, forge(load_tensors(path), rng))
            else:
                path.write_bytes(mutation(whole, rng))
            mutant = path.read_bytes()
            where = f"{name}, file {i} (seed {seed}), {path.name}, {mutation.__name__}: "
            signal.alarm(SECONDS)
            try:
                read()
                if has_checksum and not same(path, mutant, whole):
                    result["lost"].append(where + "read in spite of its checksum")
                else:
                    result["read"] += 1
            except UserError as error:
                if str(error).strip():
                    result["refused"] += 1
                else:
                    result["lost"].append(where + "refused without a word")
            except TooSlow:
                result["lost"].append(where + f"not done in {SECONDS} seconds")
            except BaseException:  # whatever it is, it is what we look for, and it is reported
                last = traceback.format_exc().strip().splitlines()
                result["lost"].append(where + last[-1] + " <- " + last[-3].strip())
            signal.alarm(0)
            path.write_bytes(whole)
    return result


def fuzz_apart(name, count, seed):
    """fuzz() in a process of its own, with bounded memory: a crash is a result too."""
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    call = f"fuzz.fuzz({name!r}, {count}, {seed})"
    code = f"import json; from tests import fuzz; print(json.dumps({call}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          preexec_fn=limit)
    if done.returncode:
        why = (done.stderr.strip() or "no word").splitlines()[-1]
        return {"read": 0, "refused": 0,
                "lost": [f"{name}: the process ended with status {done.returncode}: {why}"]}
    return json.loads(done.stdout.splitlines()[-1])


def campaign(box, tries, rng):
    """For tests/faults.py: (what was damaged, what went wrong or "", status) a file."""
    for name in READERS:
        result = fuzz_apart(name, max(20, 10 * tries), rng.randrange(1 << 30))
        for status in ["read"] * result["read"] + [2] * result["refused"]:
            yield f"damaged {name}", "", status
        for lost in result["lost"]:
            yield f"damaged {name}", lost, "?"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", choices=READERS, help="only this one")
    parser.add_argument("--files", type=int, default=2400, help="in all (default 2400)")
    parser.add_argument("--seed", type=int, default=0, help="another one, other damage (default 0)")
    parser.error = refuse_command
    a = parser.parse_args()
    check_range(vars(a), "files", lambda v: v > 0, "above 0")
    names = [a.reader] if a.reader else READERS
    lost = []
    for name in tqdm(names, unit=" readers"):
        result = fuzz_apart(name, -(-a.files // len(names)), a.seed)
        tqdm.write(f"{name:20} read {result['read']:5}  refused {result['refused']:5}  "
                   f"lost {len(result['lost']):3}", file=sys.stdout)
        lost += result["lost"]
    for line in lost:
        print(line, file=sys.stderr)
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    run_script(main)
