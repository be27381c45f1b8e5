"""Several processes on one run, on this machine's CPU.   python -m pytest tests/test_ranks.py -q

A run on two processes must be the run on one, to rounding, in whatever it draws and sums.
"""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from data.files import load_tensors, read_json
from data.runs import load_checkpoint, read_log
from tests.test_data import write_corpus
from tests.test_train import ROOT, call, command, refused

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_corpus(folder / "text.txt", documents=300)
    with pytest.MonkeyPatch.context() as patch:  # so that no later run has to prepare the corpus
        call(command(folder, "first", "--steps", "1", "--masking", "random"), patch)
    return folder


@pytest.fixture(autouse=True)
def restore_signals():
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def on_two(argv):
    return subprocess.Popen([*TORCHRUN, *map(str, argv)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finish(job):
    out = job.communicate(timeout=120)[0]
    assert job.returncode == 0, out[-3000:]
    return out


def flags(folder, out, *more):
    return command(folder, out, "--dropout", "0", "--steps", "20", "--log-every", "1",
                   "--eval-every", "0", "--checkpoint-every", "10", *more)


def test_two_processes_follow_one(folder, monkeypatch):
    jobs = {"random": on_two(flags(folder, "random-2", "--masking", "random"))}
    own = ("--masking", "self", "--init-frac", "0", "--select", "high")
    jobs["self"] = on_two(flags(folder, "self-2", *own))
    call(flags(folder, "random-1", "--masking", "random"), monkeypatch)
    call(flags(folder, "self-1", *own), monkeypatch)
    call(flags(folder, "type-1", *own[:2], "--score-input", "type", "--micro-batch", "4"),
         monkeypatch)
    out = {name: finish(job) for name, job in jobs.items()}
    finish(on_two(flags(folder, "type-2", *own[:2], "--score-input", "type")))
    assert "machine: 2 x cpu" in out["random"]
    assert out["random"].count("held-out loss") == 3  # process 0 alone speaks

    def losses(run):
        return [line["train_loss"] for line in read_log(folder / run) if line["step"]]

    one, two = losses("random-1"), losses("random-2")
    assert len(one) == len(two) == 20 and max(abs(a - b) for a, b in zip(one, two)) < 1e-4
    a, b = (load_tensors(folder / run / "model.pt")["model"] for run in ("random-1", "random-2"))
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-4
    # An entropy that rounds differently may choose another token: later steps may part.
    assert abs(losses("self-1")[0] - losses("self-2")[0]) < 1e-5
    assert abs(losses("type-1")[3] - losses("type-2")[3]) < 1e-4
    a, b = (load_checkpoint(folder / run)["types"] for run in ("type-1", "type-2"))
    assert abs(a[1].sum() - b[1].sum()) == 0 and a[1].sum() > 0  # both saw all sightings
    assert read_json(folder / "random-2" / "config.json")["processes"] == 2


def test_a_run_of_one_process_goes_on_in_two(folder, monkeypatch):
    call(flags(folder, "whole", "--masking", "random"), monkeypatch)
    half = folder / "half"
    shutil.copytree(folder / "whole", half)  # as it was after step 10
    (half / "model.pt").unlink()
    (half / "checkpoint.pt").unlink()
    out = finish(on_two(["train.py", "--resume", half]))
    assert "going on after step 10" in out
    a, b = read_log(folder / "whole"), read_log(half)
    assert [x["step"] for x in a] == [x["step"] for x in b]
    assert all(abs(x["train_loss"] - y["train_loss"]) < 1e-4 for x, y in zip(a[1:], b[1:]))
    a, b = (load_tensors(r / "model.pt")["model"] for r in (folder / "whole", half))
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-4


def children(pid):
    out = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(p) for p in out.stdout.split()]


def started(job, run):
    """Until the run has a checkpoint -> the process ids of its two workers."""
    for _ in range(1200):
        if (run / "checkpoint.pt").exists():
            return sorted(children(job.pid))[-2:]
        time.sleep(0.05)
    job.kill()
    raise AssertionError(job.communicate()[0])


def test_when_a_process_dies_the_others_end_with_a_line(folder):
    run = folder / "dies"
    job = on_two(command(folder, "dies", "--masking", "random", "--steps", "100000"))
    workers, began = started(job, run), time.time()
    os.kill(workers[1], signal.SIGKILL)
    out = job.communicate(timeout=60)[0]
    assert job.returncode and time.time() - began < 60
    assert "because another one has died" in out and not (run / "model.pt").exists()
    assert load_checkpoint(run)["step"] >= 5


def test_a_signal_stops_all_after_the_same_step(folder):
    run = folder / "stopped"
    job = on_two(command(folder, "stopped", "--masking", "random", "--steps", "100000"))
    workers = started(job, run)
    os.kill(workers[1], signal.SIGTERM)  # not even the one that writes
    out = job.communicate(timeout=60)[0]
    assert "go on with:  python train.py --resume" in out
    step = int(out.partition("stopped after step ")[2].partition(";")[0])
    assert load_checkpoint(run)["step"] == step


def test_a_batch_that_cannot_be_split_is_refused(folder, monkeypatch, capsys):
    import data.runs
    monkeypatch.setattr(data.runs, "WORLD", 3)
    line = refused(command(folder, "odd"), monkeypatch, capsys)
    assert "--batch-size 8 cannot be split evenly over 3 processes" in line
    monkeypatch.setattr(data.runs, "WORLD", 2)
    line = refused(command(folder, "odd", "--micro-batch", "8"), monkeypatch, capsys)
    assert "--micro-batch 8 does not divide --batch-size 8 over 2 processes" in line
    assert not (folder / "odd").exists()
