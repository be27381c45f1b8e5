"""Jobs in processes side by side.   python -m pytest tests/test_jobs.py -q"""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from data import jobs as J
from data.files import UserError, lock_folder
from model import Shape
from tests.helpers import send, start, wait_for


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def folder_of(tmp_path):
    """The folder of a job (its name up to the dash)."""
    def find(job):
        folder = tmp_path / job.partition("-")[0]
        folder.mkdir(exist_ok=True)
        return folder
    return find


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_every_job_is_done_once_and_its_value_comes_back(processes, tmp_path, monkeypatch):
    monkeypatch.setattr("_multiprocessing.SemLock", None)  # as where there is no /dev/shm
    weights = torch.randn(300, 300)

    def work(job):
        x = weights @ weights * int(job[2:])
        x.requires_grad_().sum().backward()
        return x.sum().item(), os.getpid(), "x" * 200_000  # more than a pipe holds

    jobs = ["a-1", "a-2", "b-3", "a-4"]
    found = dict(J.run_jobs(work, jobs, processes, folder_of(tmp_path)))
    assert found.keys() == set(jobs)
    for job, (value, pid, long) in found.items():
        assert value == (weights @ weights * int(job[2:])).sum().item() and len(long) == 200_000
        assert (pid == os.getpid()) == (processes == 1)
    lock_folder(tmp_path / "a")  # is free again


@pytest.mark.parametrize("processes", [1, 2])
def test_what_a_job_raises_is_raised(processes, tmp_path):
    def work(job):
        if job == "a-1":
            raise FloatingPointError("not finite")
        time.sleep(0.5 if processes == 1 else 60)

    began = time.monotonic()
    with pytest.raises(FloatingPointError, match="not finite"):
        dict(J.run_jobs(work, ["a-1", "a-2"], processes, folder_of(tmp_path)))
    assert time.monotonic() - began < 30  # the other was not waited for
    lock_folder(tmp_path / "a")


def test_a_process_that_is_killed_is_told(tmp_path):
    with pytest.raises(UserError, match="killed from outside.*fewer --jobs"):
        dict(J.run_jobs(lambda job: os.kill(os.getpid(), 9), ["a-1"], 2, folder_of(tmp_path)))


def test_a_signal_within_a_fork_is_not_swallowed(tmp_path, monkeypatch):
    """Python runs handlers of its own at a fork (logging has some), and ignores what they raise."""
    begin, forks = J.start, []

    def interrupted(*how):
        forks.append(begin(*how))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # here Python would raise it, were it not held back
        forks.append("through")
        return forks[0]

    monkeypatch.setattr(J, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dict(J.run_jobs(lambda job: time.sleep(60), ["a-1"], 2, folder_of(tmp_path)))
    (_, (process, _)), through = forks
    assert through == "through" and process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("processes", [1, 2])
def test_a_folder_in_use_is_passed_over_and_come_back_to(processes, tmp_path, capsys):
    find = folder_of(tmp_path)

    def hold():
        lock = lock_folder(find("a-1"))
        (tmp_path / "held").touch()
        time.sleep(60)
        lock.close()

    wait_for(other := start(hold), (tmp_path / "held").exists)
    order = []
    for job, _ in J.run_jobs(str, ["a-1", "b-2", "a-3", "c-4"], processes, find):
        order.append(job)
        if len(order) == 2:
            assert "waiting for another process" not in capsys.readouterr().err
            send(other, 9)
    assert set(order[:2]) == {"b-2", "c-4"} and set(order[2:]) == {"a-1", "a-3"}


def test_the_number_of_processes_fits_cores_and_memory(monkeypatch):
    def processes(asked, threads=4, gpu=False, free=10):
        monkeypatch.setattr(J, "free_memory", lambda: free)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        machine = SimpleNamespace(threads=threads)
        count = J.processes_for(machine, asked, [1, 3])
        assert machine.threads == (threads if gpu or asked == 1 else 1)  # rounding follows it
        return count

    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    assert processes(0) == 3 and processes(0, free=99) == 4  # memory; cores
    assert processes(7) == 7 and processes(1) == 1
    assert processes(0, free=1) == processes(0, threads=1) == 1
    assert processes(7, gpu=True) == 1
    monkeypatch.undo()
    assert J.free_memory() > 1 << 20
    assert J.bytes_of(Shape(30522, 12, 768), 32 * 512) > 16 * 108e6
