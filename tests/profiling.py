"""Where does the time of a training step go, and which change would take it away?

    python -m tests.profiling                # on a GPU: both presets, some four minutes
    python -m tests.profiling --cases laptop-long,self --variants eager --flags="--size mini"

For every case, a preset and a --masking, on random tokens:
1. the parts of train.update: what the host spends in each, and how long the device is at it;
2. what the device computes, by torch.profiler, and how long it waits;
3. the variants of tests/variants.py, beginning with train.update without and with --compile. Each
   must have the losses of the first, to rounding.

--flags are of train.py and apply to all cases. Each case is a process of its own. A variant that
fails says why and the next one follows; one that would begin too late is left out.
"""

import gc
import os
import re
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

import masking
import train
from data import corpus
from data.files import run_script
from data.flags import check_ranges, defaults, flag_parser
from data.machine import MACHINE_FLAGS, Machine
from tests.bench import peak, random_job
from tests.variants import VARIANTS

ROOT = Path(__file__).parent.parent
FLAGS = {"Profiling": [
    ("cases", "gpu,random gpu,self laptop-long,random laptop-long,self", None,
     "PRESET,MASKING of each"),
    ("variants", "", None, "only these, for example eager,graph"),
    ("flags", "", None, "of train.py, for all cases"),
    ("steps", 20, "above 0", "steps that are timed at once, three times"),
    ("seconds", 240.0, "above 0", "for all cases together"),
], "Machine": MACHINE_FLAGS}
GROUPS = {  # what a kernel (or, on a CPU, an operator) is for, by its name
    "copies between host and device": "memcpy (htod|dtoh)",
    "attention": "flash|fmha|attention|sdpa",
    "matrix products": "gemm|nvjet|cutlass|xmma|::(add|b|badd)?mm$|mkldnn.*linear",
    "sorting": "sort|topk|radix|scan",
    "optimiser and clipping": "adam|multi_tensor|foreach|lpnorm",
}


def wait(machine):
    if machine.device.type == "cuda":
        torch.cuda.synchronize()


# --------------------------------------------------------------------------------------------------
# the step as it is


def parts(args, job, count):
    """Print what the host spends in every part of train.update, and the device from the part's
    first kernel to its last, pauses included."""
    of = {"batch and noise (numpy)": [(corpus, "block_order"), (corpus, "with_ends"),
                                      (masking, "draw")],
          "choose": [(train, "where_to_mask")], "corrupt": [(masking, "corrupt")],
          "forward": [(job, "forward")], "loss": [(F, "cross_entropy")],
          "backward": [(torch.Tensor, "backward")], "clip": [(train.nn.utils, "clip_grad_norm_")],
          "optimiser": [(job.optimizer, "step"), (job.optimizer, "zero_grad")]}
    spans = {name: [] for name in [*of, "whole step"]}

    def mark():
        if job.machine.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(name, function):
        def inside(*a, **k):
            began, first = time.perf_counter(), mark()
            value = function(*a, **k)
            spans[name].append((1e3 * (time.perf_counter() - began), first, mark()))
            return value
        return inside

    with ExitStack() as stack:
        for name, places in of.items():
            for owner, attribute in places:
                stack.enter_context(mock.patch.object(
                    owner, attribute, timed(name, getattr(owner, attribute))))
        update = timed("whole step", train.update)
        wait(job.machine)
        for step in range(count):
            update(args, job, step)
        wait(job.machine)
    print("\n| part | host, ms | device, ms |\n|---|---|---|")
    for name, found in spans.items():
        host = sum(spent for spent, *_ in found) / count
        device = sum(a.elapsed_time(b) if hasattr(a, "elapsed_time") else 1e3 * (b - a)
                     for _, a, b in found) / count
        print(f"| {name} | {host:.2f} | {device:.2f} |")
    return spans


def kernels(args, job, count):
    """Print what the device computes in a step of train.update."""
    on_gpu = job.machine.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    began = time.perf_counter()
    with torch.profiler.profile(activities=kinds) as profiler:
        for step in range(count):
            train.update(args, job, step)
        wait(job.machine)
        seconds = time.perf_counter() - began
    rows = [(e.key, (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e3 / count,
             e.count / count) for e in profiler.key_averages()
            if (e.device_type == DeviceType.CPU) != on_gpu
            and not getattr(e, "is_user_annotation", False)]
    groups = dict.fromkeys([*GROUPS, "the rest"], 0.0)
    for name, ms, _ in rows:
        groups[next((group for group, words in GROUPS.items() if re.search(words, name, re.I)),
                    "the rest")] += ms
    busy = sum(groups.values())
    print(f"\nbusy {busy:.2f} ms of a step, which the profiler stretches to "
          f"{1e3 * seconds / count:.2f} ms; kernels {sum(n for *_, n in rows):.0f}\n")
    print("| computed | ms | share |\n|---|---|---|")
    for name, ms in groups.items():
        print(f"| {name} | {ms:.2f} | {ms / busy:.2f} |")
    print("\n| kernel | ms | times |\n|---|---|---|")
    for name, ms, times in sorted(rows, key=lambda row: -row[1])[:16]:
        print(f"| `{name[:90].replace('|', '/')}` | {ms:.3f} | {times:.1f} |")


def time_variant(variant, args, machine, words):
    """-> (seconds of a step, the loss of the first step, the mean of the last five)"""
    flags, job = random_job(words, machine, warmup_frac=0.0)
    with ExitStack() as stack:
        step = VARIANTS[variant](flags, job, stack)
        losses, seconds = [step(number) for number in range(5)], []
        for _ in range(3):
            wait(machine)
            began = time.perf_counter()
            for _ in range(args.steps):
                losses.append(step(len(losses)))
            wait(machine)
            seconds.append((time.perf_counter() - began) / args.steps)
        losses = torch.stack(losses)[:, 0].tolist()
    return statistics.median(seconds), losses[0], statistics.mean(losses[-5:])


def same(variant, losses, expected):
    """Are these, the first and a late loss, those of the plain step, to what bfloat16 and other
    draws of dropout change?"""
    count = 1 if variant == "on-device" else 2
    return all(abs(a - b) < 0.02 * b for a, b in zip(losses[:count], expected))


def measure_case(args):
    """Print all tables of the case --cases, measured in this process."""
    end, machine = time.perf_counter() + args.seconds, Machine(args)
    preset, method = args.cases.split(",")
    words = ["--preset", preset, "--masking", method, *args.flags.split()]
    words += ["--init-frac", "0", "--score-input", "masked"] * (method == "self")
    flags, job = random_job(words, machine)
    per_step = flags.batch_size * flags.seq_len
    flops = train.count_flops(flags, job.model.shape, None, [0])
    multiply, _, products = peak(args, machine)
    fastest = float("inf")
    for _ in range(20):
        wait(machine)
        began = time.perf_counter()
        multiply()
        wait(machine)
        fastest = min(fastest, time.perf_counter() - began)
    top = products / fastest
    print(f"\n## {preset}, {method}\n\n{machine.about}, torch {torch.__version__}, "
          f"{flags.batch_size} rows of {flags.seq_len}, {flops / per_step / 1e6:.1f} MFLOP a token,"
          f" peak {top / 1e12:.2f} TFLOP/s, {time.strftime('%Y-%m-%d')}")
    for look in (parts, kernels):
        try:
            for step in range(5):  # warm up
                train.update(flags, job, step)
            look(flags, job, args.steps)
        except Exception as error:
            print(f"\n{look.__name__}: {type(error).__name__}: {error}")
    del job
    print("\n| variant | ms a step | tokens/s | TFLOP/s | share of peak | first loss | last loss | "
          "losses |\n" + "|---" * 8 + "|")
    expected = None
    for variant in args.variants.split(",") if args.variants else VARIANTS:
        gc.collect()
        torch.compiler.reset()
        if time.perf_counter() > end:
            print(f"| {variant} | left out: {args.seconds:.0f} s are over{' | -' * 6} |")
            continue
        try:
            seconds, *losses = time_variant(variant, args, machine, words)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:150]
            print(f"| {variant} | failed: {text.replace('|', '/')}{' | -' * 6} |", flush=True)
            continue
        expected = expected or losses
        print(f"| {variant} | {1e3 * seconds:.2f} | {per_step / seconds:.0f} | "
              f"{flops / seconds / 1e12:.2f} | {flops / seconds / top:.2f} | {losses[0]:.3f} | "
              f"{losses[1]:.3f} | {'same' if same(variant, losses, expected) else 'OTHER'} |",
              flush=True)


def main():
    parser = flag_parser("python -m tests.profiling [FLAGS]", __doc__, FLAGS)
    parser.add_argument("--case", action="store_true", help="used by the script itself")
    typed = vars(parser.parse_args())
    case = typed.pop("case", False)
    args = Namespace(**{**defaults(FLAGS), **typed})
    check_ranges(args, FLAGS)
    if case:
        return measure_case(args)
    end, cases, failed = time.perf_counter() + args.seconds, args.cases.split(), False
    for i, name in enumerate(cases):
        seconds = max(1.0, (end - time.perf_counter()) / (len(cases) - i))
        given = {**typed, "cases": name, "seconds": seconds}
        done = subprocess.run(
            [sys.executable, "-m", "tests.profiling", "--case",
             *(f"--{key}={value}" for key, value in given.items())], cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(args.threads or os.cpu_count())})
        if done.returncode:
            print(f"{name} ended with status {done.returncode}", flush=True)
            failed = True
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_script(main)
