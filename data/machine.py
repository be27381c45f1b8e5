"""Where a script runs: device, number format, threads, and the other processes of torchrun.

    torchrun --nproc-per-node=2 train.py --masking self

Each process holds the whole model and takes an equal share of the rows of every batch; gradients
are averaged (torch's DistributedDataParallel). All draws are functions of the row's number in the
whole batch, so N processes do what one does with --micro-batch (batch size / N), but for the order
in which gradients, and what is learned of vocabulary items, are summed. Process 0 alone writes;
several machines need a shared folder.
"""

import ctypes
import functools
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data.files import UserError

# Only torchrun's own start means several processes: RANK alone may be left over from another job.
LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
WORLD = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1
HERE = int(os.environ["LOCAL_WORLD_SIZE"]) if LAUNCHED else 1  # of them, on this machine
# For one process to prepare a large corpus while the others wait. A process that dies is noticed
# at once, since its connections close.
PATIENCE = timedelta(hours=2)

MACHINE_FLAGS = [  # of train.py and glue.py alike
    ("device", "auto", ("auto", "cpu", "cuda"), "auto: a GPU where there is one"),
    ("dtype", "auto", ("auto", "float32", "bfloat16"),
     "auto: bfloat16 on GPUs that have it, and on CPUs with AVX512_BF16"),
    ("threads", 0, "from 0 to 1024", "CPU threads; 0: as many as this process has cores"),
]


def cores():
    """How many CPU cores this process has: fewer than the machine in a container, under taskset or
    a batch system, with OMP_NUM_THREADS, and beside other processes of torchrun."""
    allowed = getattr(os, "sched_getaffinity", lambda pid: range(os.cpu_count() or 1))(0)
    count = min(len(allowed), cgroup_quota()) / HERE
    asked = re.match("[1-9][0-9]*", os.environ.get("OMP_NUM_THREADS", ""))
    if asked and not (LAUNCHED and asked[0] == "1"):  # where nobody has, torchrun sets it to 1
        count = min(count, int(asked[0]))
    return max(1, int(count))


def cgroup_quota(root="/sys/fs/cgroup", groups="/proc/self/cgroup"):
    """How many cores the quota of a container or batch job is worth; inf where there is none."""
    try:
        lines = Path(groups).read_text().splitlines()
    except OSError:  # not Linux
        return math.inf
    quotas = [math.inf]
    for _, controllers, name in (line.split(":", 2) for line in lines):
        group = Path(root, controllers, name.lstrip("/"))  # the second version has no controllers
        for folder in (group, *group.parents):
            for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
                try:
                    quota, period = " ".join((folder / f).read_text() for f in files).split()
                    quotas.append(int(quota) / int(period) if int(quota) > 0 else math.inf)
                except (OSError, ValueError):  # not here; "max"
                    pass
    return min(quotas)


def busy():
    """How many threads but ours want a core just now; 0 where the system does not say.
    (os.getloadavg() would still count our last run, which ended a minute ago.)"""
    try:
        return max(0, int(re.search(r"(\d+)/", Path("/proc/loadavg").read_text())[1]) - HERE)
    except OSError:
        return 0


def keep_memory():
    """Let memory that was freed stay with the process: on Linux, the large tensors of every step
    are otherwise given back and mapped again, page by page."""
    mallopt = sys.platform == "linux" and getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    if mallopt and mallopt(M_MMAP_THRESHOLD, 1 << 30):  # an old glibc refuses so much
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def processor(device):
    """The name of the GPU or CPU, as its maker prints it; of a CPU with family and model, since
    some makers give several the same name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        found = dict(re.findall(r"(model name|cpu family|model)\t+: (.*)", first))
        return "{model name}, family {cpu family}, model {model}".format(**found)
    except (OSError, KeyError):  # not Linux, or not a PC
        return platform.processor() or platform.machine()


@functools.cache  # of what began, whatever is checked out meanwhile
def commit():
    """The commit of this checkout, with -dirty where files were changed since; "" without git."""
    git = Path(__file__).parent.parent / ".git"  # this one, whatever is around it
    if not git.exists() or not shutil.which("git"):
        return ""
    return subprocess.run(
        ["git", "--git-dir", git, "--work-tree", git.parent, "describe", "--always", "--dirty",
         "--exclude=*", "--abbrev=40"], capture_output=True, text=True).stdout.strip()


class Machine:
    """Device, dtype ("float32" or "bfloat16") and threads, from the flags in `args`."""

    def __init__(self, args):
        keep_memory()
        self.threads = args.threads or cores()
        torch.set_num_threads(self.threads)
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: this torch finds no GPU; use --device cpu")
        use_gpu = args.device != "cpu" and torch.cuda.is_available()
        self.device = torch.device("cuda" if use_gpu else "cpu")
        has_bfloat16 = (  # in hardware: emulated on a CPU, it is 17 times slower than float32
            torch.cuda.is_bf16_supported(including_emulation=False) if use_gpu else
            getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())  # CPUs with AMX have it, too
        auto = "bfloat16" if has_bfloat16 else "float32"
        self.dtype = auto if args.dtype == "auto" else args.dtype
        if WORLD > 1:
            self.join()
            if self.max(self.dtype == "float32"):  # one of several machines has no bfloat16
                self.dtype = "float32"
        self.name = processor(self.device)
        self.about = f"{self.name}, {self.threads} threads, {self.dtype}"
        if self.dtype == "bfloat16" and not has_bfloat16:
            self.about += "; torch knows no hardware for that here, so it may be slow"
        if not use_gpu and self.threads > 1 and busy() + self.threads * HERE > os.cpu_count():
            self.about += "; other processes are busy, so --threads 1 is faster now"

    def record(self):
        """What config.json and glue.json say of where a start or a score was made."""
        return {"machine": self.name, "device": self.device.type, "dtype": self.dtype,
                "torch": torch.__version__, "threads": self.threads, "processes": WORLD,
                "commit": commit()}

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")

    def peak_memory(self):
        """Bytes: on a GPU what torch allocated there, else the process's largest resident size."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def compile(self, model):
        """torch.compile(model). UserError where the compiler that it calls is missing."""
        if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "gcc", "clang"))):
            raise UserError("--compile needs a C++ compiler, for example g++, and there is none: "
                            "install one, or leave the flag out")
        return torch.compile(model)

    # ---- several processes: where there is one, these do nothing

    def join(self):
        """Meet the other processes."""
        if RANK:
            sys.stdout = open(os.devnull, "w")  # process 0 speaks for all
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        dist.init_process_group("gloo" if self.device.type == "cpu" else "cpu:gloo,cuda:nccl",
                                timeout=PATIENCE)

    def leave(self):
        if WORLD > 1:
            dist.barrier()
            dist.destroy_process_group()

    def in_turn(self, function):
        """function() in process 0, then, when that is through, in the others -> its value. Where it
        fails in process 0, the others end without a word."""
        if RANK:
            if self.max(False):
                sys.exit(2)
            return function()
        try:
            value = function()
        except BaseException:
            self.max(True)
            raise
        self.max(False)
        return value

    def parallel(self, model):
        """A model whose backward averages the gradients over the processes."""
        if WORLD == 1:
            return model
        self.ddp = DistributedDataParallel(model, forward_sync_buffers=False)
        return self.ddp

    def micro_batches(self, batch_size, size):
        """Yield this process's rows of a batch, `size` at a time (0: all): (slice, weight), where
        the weight is their share of the process's rows. Gradients are averaged over the processes
        once: in the backward of the last."""
        share = batch_size // WORLD
        size = size or share
        assert share * WORLD == batch_size and share % size == 0, "rows would be left out"
        for first in range(RANK * share, (RANK + 1) * share, size):
            if WORLD > 1:
                self.ddp.require_backward_grad_sync = first + size == (RANK + 1) * share
            yield slice(first, first + size), size / share

    def max(self, number):
        """The largest over the processes; of flags: is one true? All must do the same next, or they
        would wait for each other for ever."""
        if WORLD > 1:
            number = torch.tensor(int(number))
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)

    def sum(self, x):
        """The sum of a tensor over the processes, in its place."""
        if WORLD > 1:
            dist.all_reduce(x)
        return x
