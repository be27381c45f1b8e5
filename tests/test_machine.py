"""Several processes on one run, on this machine's CPU.   python -m pytest tests/test_machine.py -q

A run on two processes must be the run on one, to rounding, in whatever it draws and sums.
"""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch

import train
from data import machine as M
from data.files import UserError, load_tensors
from data.machine import Machine
from data.runs import read_config, read_log
from tests.helpers import ROOT, call, command, refused

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


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
    """Scores of the model and of the vocabulary; random masking is the next test's."""
    own = ("--masking", "self", "--score-input", "masked", "--init-frac", "0", "--select", "high")
    means = ("--masking", "self", "--score-input", "vocabulary")
    jobs = [on_two(flags(folder, "self-2", *own)), on_two(flags(folder, "vocabulary-2", *means))]
    call(flags(folder, "self-1", *own), monkeypatch)
    call(flags(folder, "vocabulary-1", *means, "--micro-batch", "4"), monkeypatch)
    out, _ = (finish(job) for job in jobs)
    assert "machine: 2 x " in out and out.count("held-out loss") == 3  # process 0 alone speaks

    def losses(run):
        return [line["train_loss"] for line in read_log(folder / run) if line["step"]]

    # An entropy that rounds differently may choose another token: later steps may part.
    assert abs(losses("self-1")[0] - losses("self-2")[0]) < 1e-5
    assert abs(losses("vocabulary-1")[3] - losses("vocabulary-2")[3]) < 1e-4
    a, b = (load_tensors(folder / run / "checkpoint.pt")["means"]
            for run in ("vocabulary-1", "vocabulary-2"))
    assert abs(a[1].sum() - b[1].sum()) == 0 and a[1].sum() > 0  # both saw all sightings
    assert read_config(folder / "self-2")["starts"][0]["processes"] == 2


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


def test_a_signal_stops_all_after_the_same_step(folder):
    run = folder / "stopped"
    job = on_two(command(folder, "stopped", "--masking", "random", "--steps", "100000"))
    while job.poll() is None and not (run / "checkpoint.pt").exists():
        time.sleep(0.05)
    os.kill(max(children(job.pid)), signal.SIGTERM)  # not even the one that writes
    out = job.communicate(timeout=60)[0]
    assert "go on with:  python train.py --resume" in out
    step = int(out.partition("stopped after step ")[2].partition(";")[0])
    assert load_tensors(run / "checkpoint.pt")["state"]["step"] == step


def test_a_batch_that_cannot_be_split_is_refused(folder, monkeypatch, capsys):
    monkeypatch.setattr(train, "WORLD", 3)
    line = refused(command(folder, "odd"), monkeypatch, capsys)
    assert "--batch-size 8 cannot be split evenly over 3 processes" in line
    monkeypatch.setattr(train, "WORLD", 2)
    line = refused(command(folder, "odd", "--micro-batch", "8"), monkeypatch, capsys)
    assert "--micro-batch 8 does not divide --batch-size 8 over 2 processes" in line
    assert not (folder / "odd").exists()


# ---- one process


def machine(**flags):
    return Machine(Namespace(**{"device": "cpu", "dtype": "auto", "threads": 1, **flags}))


def test_bfloat16_is_chosen_where_a_cpu_has_it_in_hardware(monkeypatch):
    for has in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has, raising=False)
        assert machine().dtype == ("bfloat16" if has else "float32")
        asked = machine(dtype="bfloat16")
        assert asked.dtype == "bfloat16" and ("no hardware" in asked.about) != has
        assert machine(dtype="float32").about.endswith("float32")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")  # an older or a later torch
    assert machine().dtype == "float32"
    with pytest.raises(UserError, match="no GPU"):
        machine(device="cuda")


def test_threads_are_what_was_asked_for_or_the_cores_of_this_process(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(M, "cgroup_quota", lambda: math.inf)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)  # a large machine, of which little is ours
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 9}, raising=False)
    assert (machine(threads=0).threads, torch.get_num_threads()) == (3, 3)
    assert (machine(threads=2).threads, torch.get_num_threads()) == (2, 2)
    torch.set_num_threads(before)


@pytest.mark.parametrize("quota, omp, processes, cores", [
    (2.5, "", 1, 2), (0.3, "", 1, 1), (math.inf, "4,2", 1, 4), (math.inf, "99", 1, 16),
    (math.inf, "all", 1, 16), (math.inf, "0", 1, 16), (math.inf, "1", 8, 2),  # torchrun's own 1
    (math.inf, "3", 2, 3), (6, "", 4, 1)])
def test_cores_are_the_smallest_of_what_is_allowed(quota, omp, processes, cores, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.setattr(M, "cgroup_quota", lambda: quota)
    monkeypatch.setattr(M, "HERE", processes)
    monkeypatch.setattr(M, "LAUNCHED", processes > 1)
    monkeypatch.setenv("OMP_NUM_THREADS", omp)
    assert M.cores() == cores


@pytest.mark.parametrize("groups, files, quota", [
    ("0::/job/7", {"job/7/cpu.max": "150000 100000", "job/cpu.max": "max 100000"}, 1.5),
    ("0::/job/7", {"job/7/cpu.max": "max 100000", "job/cpu.max": "400000 100000"}, 4),
    ("0::/", {"cpu.max": "200000 100000"}, 2), ("0::/", {"cpu.max": "max 100000"}, math.inf),
    ("4:memory:/a\n3:cpu,cpuacct:/docker/a", {"cpu,cpuacct/cpu.cfs_quota_us": "50000",
                                              "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 0.5),
    ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
    (None, {}, math.inf)])
def test_the_quota_of_a_container_counts(groups, files, quota, tmp_path):
    if groups is not None:
        (tmp_path / "groups").write_text(groups + "\n")
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text + "\n")
    assert M.cgroup_quota(tmp_path / "cgroup", tmp_path / "groups") == quota


def test_beside_busy_processes_one_thread_is_advised(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for threads, others, advised in ((2, 2, False), (2, 3, True), (1, 9, False)):
        monkeypatch.setattr(M, "busy", lambda: others)
        assert ("--threads 1 is faster" in machine(threads=threads).about) == advised
    torch.set_num_threads(before)


@pytest.mark.skipif(not os.path.exists("/proc/loadavg"), reason="not Linux")
def test_a_process_that_is_busy_is_seen(monkeypatch):
    monkeypatch.setattr(M.Path, "read_text", lambda path: "0.2 1.18 1.1 21/999 123")
    assert M.busy() == 20  # beside us


def test_bfloat16_is_chosen_where_a_gpu_has_it_in_hardware(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(M, "processor", lambda device: "a GPU")
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation=True: has or including_emulation)
        assert machine(device="auto").dtype == ("bfloat16" if has else "float32")


def test_compile_without_a_compiler_is_one_line(folder, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    line = refused(command(folder, "compiled", "--compile"), monkeypatch, capsys)
    assert "--compile needs a C++ compiler" in line and not (folder / "compiled").exists()


def test_the_commit_is_that_of_this_checkout(tmp_path, monkeypatch):
    commit = M.commit.__wrapped__  # not what was cached
    here = commit()
    assert len(here.removesuffix("-dirty")) == (40 if (ROOT / ".git").exists() else 0)
    monkeypatch.setenv("GIT_DIR", "/of/another/repository")  # as within a hook of git
    assert commit() == here
    monkeypatch.setattr(M, "__file__", str(tmp_path / "data" / "machine.py"))  # no checkout
    assert commit() == ""
    monkeypatch.setattr(M, "__file__", str(ROOT / "data" / "machine.py"))
    monkeypatch.setenv("PATH", "/nowhere")
    assert commit() == ""
