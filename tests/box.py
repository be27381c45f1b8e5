"""What the fault campaign stands on: the real scripts as subprocesses, in a folder (the box) that
holds a toy corpus, GLUE files, a teacher, and an uninterrupted run of every arm to compare with.
"""

import contextlib
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import torch

from data.files import UserError, load_tensors
from data.runs import read_log
from tests.test_data import WORDS, write_corpus
from tests.test_glue_data import LABELS, write_task

ROOT = Path(__file__).parent.parent
CLOCK = ("tokens_per_s", "seconds", "peak_memory_mb")  # what may differ between two equal runs
ARMS = {
    "random": ["--masking", "random"],
    "self": ["--masking", "self", "--init-frac", "0.3"],
    "type": ["--masking", "self", "--init-frac", "0.2", "--score-input", "type"],
    "entropy": ["--masking", "entropy", "--distill", "complete", "--teacher", "TEACHER"],
}
GLUE_TASKS = ("CoLA", "SST-2", "MRPC", "RTE")


def start(argv, **how):
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace",
           **how}
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT, **how,
                            env={**os.environ, "OMP_NUM_THREADS": "1",
                                 "CUDA_VISIBLE_DEVICES": ""})  # runs are compared bit for bit


def start_mute(argv):
    """One that will be killed: its pipes would be nobody's."""
    return start(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finish(argv, seconds=900, **how):
    """Run to the end -> (status, stdout, stderr)."""
    process = start(argv, **how)
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return "hung", *process.communicate()
    return process.returncode, out, err


def not_refused(result, word=""):
    """"" for one line with `word` in it and status 2; else what was seen instead."""
    status, _, err = result
    lines = [x for x in err.replace("\r", "\n").splitlines() if x.startswith("error")]
    if status == 2 and len(lines) == 1 and word in lines[0] and "Traceback" not in err:
        return ""
    return f"status {status}: {err.strip()[-400:]}"


def not_fine(result):
    """"" where it was done or refused in one line; else what was seen instead."""
    return "" if result[0] == 0 and "Traceback" not in result[2] else not_refused(result)


def toy(box, out, *flags, steps=60):
    """The command of a run that takes a second, beside the imports."""
    return ["train.py", "--corpus", box / "text.txt", "--cache", box / "cache", "--vocab-size",
            "600", "--layers", "2", "--width", "64", "--seq-len", "34", "--batch-size", "8",
            "--steps", steps, "--log-every", "4", "--eval-every", "20", "--eval-blocks", "16",
            "--checkpoint-every", "2", "--threads", "1", "--out", out,
            *(box / "teacher" if flag == "TEACHER" else flag for flag in flags)]


def glue(box, run, *flags, cache="cache"):
    return ["glue.py", run, "--glue-dir", box / "GLUE", "--cache", box / cache, "--tasks",
            ",".join(GLUE_TASKS), "--epochs", "6", "--threads", "1", *flags]


def go_on(argv, run):
    """Do what a person does after an interruption: --resume, or the command again."""
    if (run / "model.pt").exists():
        return 0, "", ""
    return finish(["train.py", "--resume", run] if (run / "config.json").exists() else argv)


def differs(run, whole):
    """"" where weights and log are, bit for bit, those of the run that nothing happened to."""
    if not (run / "model.pt").exists():
        return "it did not finish"
    a, b = (load_tensors(r / "model.pt")["model"] for r in (run, whole))
    if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in a):
        return "other weights"
    a, b = ([{k: v for k, v in line.items() if k not in CLOCK} for line in read_log(r)]
            for r in (run, whole))
    return "" if a == b else f"another log, of steps {[line['step'] for line in a]}"


def limit_files(size):
    """For preexec_fn: no file may grow beyond so many bytes, as on a disk that is full."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def limit_memory(size):
    """For preexec_fn: so many bytes of addresses, of which torch's libraries take some GB."""
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size))


def can_mount(box):
    try:
        with small_disk(box / "try", 100):
            return True
    except (UserError, OSError):
        return False


@contextlib.contextmanager
def small_disk(path, kilobytes):
    """A filesystem of this size at `path`; UserError where this process may not mount one."""
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", path],
                      capture_output=True).returncode:
        raise UserError("cannot mount a filesystem here")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", path],
                                             check=True)
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def fill_box(box, arms=ARMS):
    """Make all of it in the empty folder `box`; UserError where a run fails undisturbed."""
    write_corpus(box / "text.txt", documents=300)
    rng = random.Random(0)
    for task in GLUE_TASKS:
        rows = [(" ".join(rng.choices(WORDS, k=9)), " ".join(rng.choices(WORDS, k=7)),
                 LABELS[task][i % 2]) for i in range(80)]
        write_task(box / "GLUE", task, rows, n_dev=20)
    teacher = {"teacher": [*ARMS["random"], "--seed", "1"]} if "entropy" in arms else {}
    for out, flags in {**teacher, **{arm: ARMS[arm] for arm in arms}}.items():
        status, _, err = finish(toy(box, box / out, *flags))
        if status:
            raise UserError(f"{out} does not even train undisturbed: {err[-500:]}")
