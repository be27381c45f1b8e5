"""Jobs side by side, each in a process of its own with one thread, and folders that they share.

A process is a fork: it has all that this one has read, so that nothing is read, encoded or sent
anew. Its value comes back through a pipe. That takes no semaphores, which some systems lack.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from multiprocessing.connection import wait
from pathlib import Path

import torch

from data.files import UserError, lock_folder, on_signals

RETRY = 1.0  # seconds until a folder that was in use is tried again
JOB_FLAGS = [
    ("jobs", 0, "0 or more", "fine-tunings at a time; 0: as many as --threads and memory "
     "allow; unless it is 1, each has one thread; beside a GPU, or not on Linux, always 1"),
]


def bytes_of(shape, tokens):
    """Bytes, roughly, that the training of a model takes, with so many tokens at once."""
    parameters = shape.vocab_size * shape.width + 12 * shape.layers * shape.width**2
    # Weights, gradients, two moments; some 40 vectors of each token and block; torch itself.
    return 4 * (4 * parameters + 40 * tokens * shape.width * shape.layers) + (300 << 20)


def free_memory():
    """Bytes that this process may still take: of the machine, or of the container."""
    with open("/proc/meminfo") as f:
        fields = dict(line.split(":") for line in f)
    free = int(fields["MemAvailable"].split()[0]) << 10
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def processes_for(machine, asked, sizes):
    """How many jobs, of these sizes in bytes, may run side by side on this Machine: as many as are
    `asked` for, or (0) as fit its cores and memory. Unless one is asked for, each has one thread,
    however many fit: the number of threads changes how sums are rounded."""
    if torch.cuda.is_available() or sys.platform != "linux":
        return 1  # a GPU is one, and what has looked for one, or is no Linux, cannot be forked
    processes = asked or max(1, min(machine.threads, free_memory() // max(sizes, default=1)))
    if asked != 1:
        machine.threads = 1
        torch.set_num_threads(1)  # more would wait in a fork for threads that it does not have
    if processes > 1:
        print(f"{processes} at a time, each with one thread")
    return processes


@contextlib.contextmanager
def signals_later():
    """Signals wait until the end of this block. One that is raised within a fork is swallowed by
    Python's own handlers there, and one that comes while a score is written would lose it."""
    came = []  # a mask would not do: another thread would take the signal
    before = on_signals(lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in came:
        signal.raise_signal(number)


def run_jobs(function, jobs, processes, folder_of=lambda job: None):
    """Yield (job, function(job)) for all jobs, in the order in which they end, so many at a time;
    with one process: in this one. What function raises is raised here.

    The folder of a job is held as long as one of its jobs runs, and until the last value of it was
    taken. A folder that another command holds is passed over and come back to; when all that is
    left are such folders, this waits for the first of them. None: no folder.
    """
    todo, running, locks = list(jobs), {}, {}

    def hold(job, wait=False):
        folder = folder_of(job)
        with contextlib.suppress(UserError):  # in use
            if folder and folder not in locks:
                locks[folder] = lock_folder(folder, wait and f"it works in {folder}, too")
            return True

    try:
        while todo or running:
            room = len(running) < processes
            job = next(filter(hold, todo), None) if room else None
            if job is None and not running and hold(todo[0], wait=True):
                job = todo[0]
            if job is not None:
                todo.remove(job)
                if processes > 1:
                    with signals_later():
                        running.update([start(function, job, locks)])
                    continue
                yield job, function(job)
            else:
                for pipe in wait(running, RETRY if room and todo else None):
                    process, job = running.pop(pipe)
                    yield job, value_of(pipe, process)
            for folder in locks.keys() - {folder_of(job) for _, job in running.values()}:
                locks.pop(folder).close()
    finally:
        for process, _ in running.values():
            process.kill()
            process.join()
        for lock in locks.values():
            lock.close()


def start(function, job, locks):
    """Begin function(job) in a fork -> (the pipe that its value comes from, (process, job))."""
    fork = multiprocessing.get_context("fork")
    pipe, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=child, args=(function, job, sender, locks, os.getpid()),
                           daemon=True)
    process.start()
    sender.close()  # the fork has the only one: when it dies, the pipe ends
    return pipe, (process, job)


def child(function, job, sender, locks, parent):
    """What a fork does: it ends when its parent does, and leaves signals and locks to it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    for lock in locks.values():  # or this would hold the folder as long as it lives
        lock.close()
    try:
        value, error = function(job), None
    except Exception as caught:
        value, error = None, caught
        error.add_note(traceback.format_exc())  # a traceback does not pass through a pipe
    sender.send((value, error))


def value_of(pipe, process):
    """What a fork sent; what it raised is raised."""
    try:
        value, error = pipe.recv()
    except EOFError:
        process.join()
        if process.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"a job ended without a value, with status {process.exitcode}")
        raise UserError("a process was killed from outside, for want of memory perhaps: give the "
                        "command again, with fewer --jobs")
    pipe.close()
    process.join()
    if error:
        raise error
    return value
