"""What several test files need: the scripts as a user types them, on a toy corpus."""

import fcntl
import gc
import importlib
import io
import multiprocessing
import os
import random
import resource
import runpy
import signal
import sys
import tarfile
import threading
import time
import zipfile
from argparse import Namespace
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import train
from data import files
from data.files import load_tensors, run_script, save_tensors, sha256_file, write_json
from data.machine import Machine
from data.runs import config_sha256, read_config, read_log
from data.tasks import TASKS
from data.tokenizer import CLS, N_SPECIAL, SEP
from model import Bert, Shape

ROOT = Path(__file__).parent.parent
Result = namedtuple("Result", "status text")
fork = multiprocessing.get_context("fork")
gc.freeze()  # what is imported by now need not be searched by every gc.collect()


def command(folder, out, *flags):
    """A training run of a toy model on folder/text.txt, which takes a second."""
    return ["train.py", "--corpus", str(folder / "text.txt"), "--cache", str(folder / "cache"),
            "--vocab-size", "600", "--layers", "2", "--width", "64", "--seq-len", "34",
            "--batch-size", "8", "--steps", "24", "--log-every", "4", "--eval-every", "8",
            "--eval-blocks", "16", "--checkpoint-every", "5", "--threads", "1",
            "--dtype", "float32", "--out", str(folder / out), *map(str, flags)]


def call(argv, monkeypatch):
    """Run a script in this process, as `python train.py ...` would."""
    gc.collect()  # a refusal's traceback may still hold the lock of its run folder
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [str(a) for a in argv])
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, getattr(sys, name))  # run_script wraps them
        run_script(importlib.import_module(argv[0].removesuffix(".py").replace("/", ".")).main)


def refused(argv, monkeypatch, capsys):
    """Run a script, expect status 2 and one line on stderr; return that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(argv, monkeypatch)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1 and error.endswith(lines[0] + "\n")
    assert "Traceback" not in error
    return lines[0]


def start(what, limit=None, value=0):
    """Do `what` in a process of its own: a command line without its `python`, or a function.

    limit, value: what setrlimit takes. RLIMIT_FSIZE: no file may grow beyond so many bytes, as on a
    disk that is full.
    """
    gc.collect()  # as in call(): a lock that is still open here would be open there, too
    reading, writing = os.pipe()
    if hasattr(fcntl, "F_SETPIPE_SZ"):  # on Linux; nobody reads before the end
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 1 << 20)

    def child():
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", errors="replace") for n in (1, 2))
        torch.set_num_threads(1)
        tqdm.set_lock(threading.RLock())  # else a kill could leave one locked that all share
        os.chdir(ROOT)
        if limit is not None:
            resource.setrlimit(limit, (value, value))
        # Before a script has begun an interrupt is Python's own matter, which prints a traceback.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        files.run_script = begin
        if callable(what):
            return begin(what)
        sys.argv = [str(word) for word in what]
        runpy.run_path(sys.argv[0], run_name="__main__")

    def begin(main):
        run_script(lambda: (signal.signal(signal.SIGINT, signal.default_int_handler), main())[1])

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


def finish(what, limit=None, value=0):
    return result_of(start(what, limit, value))


def send(process, *numbers, pause=0):
    """Send it these signals -> its exit status and what it printed."""
    for number in numbers:
        if process.exitcode is None:  # else its number may be another process by now
            os.kill(process.pid, number)
        time.sleep(pause)
    return result_of(process)


def wait_for(process, condition):
    while process.is_alive() and not condition():
        time.sleep(0.005)


def wait_for_step(process, run, step):
    wait_for(process, lambda: any(line["step"] >= step for line in read_log(run)))


def same_weights(run, other):
    a, b = (load_tensors(r / "model.pt")["model"] for r in (run, other))
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def what_was_logged(run):
    """The log without the clock: what must not depend on interruptions."""
    clock = ("tokens_per_s", "seconds", "peak_memory_mb")
    return [{k: v for k, v in line.items() if k not in clock} for line in read_log(run)]


def write_config(run, flags, tokenizer_sha256="", unigram_entropy=6.0):
    """A config.json as train.py writes it."""
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "config.json", {
        "flags": {"score_input": "masked", **flags}, "experiment": sorted(train.EXPERIMENT),
        "corpus_sha256": "c" * 64, "tokenizer_sha256": tokenizer_sha256,
        "teacher_sha256": "", "origin_sha256": "", "parameters": 1, "flops": 1000,
        "teacher_flops": 0, "unigram_entropy": unigram_entropy,
        "starts": [{"date": "2026-11-29 12:00", **Machine(
            Namespace(device="auto", dtype="auto", threads=1)).record()}]})


def save_run(run, model, tokenizer_path, **flags):
    """A finished run folder as train.py leaves it."""
    write_config(run, flags, sha256_file(tokenizer_path))
    (run / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    save_tensors(run / "model.pt", {"shape": asdict(model.shape), "model": model.state_dict(),
                                    "config_sha256": config_sha256(read_config(run))})
    return run


# ---- a small model and rows for it

V, T = 300, 34  # pieces; tokens of a row


def small_model(**changes):
    torch.manual_seed(0)
    return Bert(Shape(**{"vocab_size": V, "layers": 2, "width": 64, "seq_len": T, **changes}))


def rows_of(n, length=T, seed=0, separators=0):
    """(n, length) tokens between [CLS] and [SEP], so many [SEP]s inside each row."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(N_SPECIAL, V, (n, length), generator=generator)
    tokens[:, 0], tokens[:, -1] = CLS, SEP
    for _ in range(separators):
        tokens[torch.arange(n), torch.randint(1, length - 1, (n,), generator=generator)] = SEP
    return tokens


# ---- text and tasks

WORDS = ("the a model reads every token of text and learns to guess what is hidden from it by all "
         "the words around while masks move with each step so that nothing is seen twice").split()


def write_corpus(path, documents=120, seed=0, words=40):
    """Documents of two paragraphs of random words, each document with a number of its own."""
    rng = random.Random(seed)
    text = "\n\n".join(
        f"Document {i}: " + " ".join(rng.choices(WORDS, k=words))
        + ".\n" + " ".join(rng.choices(WORDS, k=words)).capitalize() + "."
        for i in range(documents))
    path.write_text(text + "\n")
    return path


def packed_zip(members):
    """{name or ZipInfo: data} -> the bytes of an archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def packed_tar(members, mode, kind=tarfile.REGTYPE):
    """The same; all but text.txt are of this kind, and link to that."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            if name != "text.txt":
                member.type, member.linkname = kind, "text.txt"
            member.size = len(data) if member.isfile() else 0
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


HEADERS = {
    "SST-2": "sentence\tlabel",
    "MRPC": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "STS-B": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\t"
             "sentence1\tsentence2\tscore",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "QNLI": "index\tquestion\tsentence\tlabel",
    "RTE": "index\tsentence1\tsentence2\tlabel",
    "WNLI": "index\tsentence1\tsentence2\tlabel",
}
MNLI = ("index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
        "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\t")
LABELS = {"CoLA": "01", "SST-2": "01", "MRPC": "01", "QQP": "01", "WNLI": "01",
          "STS-B": ["0.000", "3.800", "5.000"], "QNLI": ["entailment", "not_entailment"],
          "RTE": ["entailment", "not_entailment"],
          "MNLI": ["contradiction", "neutral", "entailment"]}


def line(task, file, a, b, label):
    """A row as the official files have it."""
    return {
        "CoLA": f"gj04\t{label}\t*\t{a}", "SST-2": f"{a}\t{label}",
        "MRPC": f"{label}\t1\t2\t{a}\t{b}",
        "STS-B": f"7\tnews\tf\t2012\t0001\tnone\tnone\t{a}\t{b}\t{label}",
        "QQP": f"1\t2\t3\t{a}\t{b}\t{label}",
        "MNLI": f"0\t1\t1n\tslate\t( x )\t( y )\t(ROOT)\t(ROOT)\t{a}\t{b}\tneutral\t"
        + ("" if file == "train" else "neutral\tneutral\tneutral\tneutral\t") + label,
    }.get(task, f"0\t{a}\t{b}\t{label}")


def write_task(folder, task, sentences, n_dev=None, dev=None):
    """A task in the official layout: rows (a, b, label) in train.tsv; the development files have
    rows of their own, or the same sentences with one word more."""
    dev = dev or [(f"{a} indeed", b, label) for a, b, label in sentences[:n_dev]]
    (folder / task).mkdir(parents=True, exist_ok=True)
    for file in ("train", *TASKS[task].dev):
        header = HEADERS.get(task)
        if task == "MNLI":
            header = MNLI + ("gold_label" if file == "train" else
                             "label2\tlabel3\tlabel4\tlabel5\tgold_label")
        rows = sentences if file == "train" else dev
        lines = ([header] if header else []) + [line(task, file, *row) for row in rows]
        (folder / task / f"{file}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
