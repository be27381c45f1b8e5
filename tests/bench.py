"""How fast is it, next to what the machine can do and next to others?

    python -m tests.bench              # 15 minutes on two cores, no data needed
    python -m tests.bench --full       # every shape: tiny and mini, vocabularies of 8192 and 30522
    python -m tests.bench --only training --vocab-size 30522    # one table, at one shape
    python -m tests.bench --dtype bfloat16      # where the CPU multiplies it
    python -m tests.bench --json       # for a program

Training is measured by running train.py as it is, on a text made of random words, and reading
tokens/s from its log: nothing is timed that a user does not run. Each variant is a process of its
own, so each has its own peak memory; they take turns, and the figures are medians over the rounds.
Ratios are taken within a round: on a machine that is shared they mean more than the figures.

`peak` is the product of 1024 x 1024 matrices in the same --dtype, measured in every round. The
share of it counts the matrix-product FLOPs that a variant really executes (model.forward_flops):
one that computes logits which nobody reads has a high share and is slow all the same.

Where Hugging Face transformers is installed its BERT of the same shape runs too: SDPA, the same
dropout, threads, batch, fused AdamW and clipping, 80/10/10 masking as its collator does it.
`as it is`: logits for every token, labels of -100 where nothing is masked. `gathered`: the rows of
masked tokens are picked before the head.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from tqdm import tqdm

from data.files import UserError, check_range, refuse_command, run_script
from data.tables import grid
from tests.bench_steps import BATCH, LENGTHS, SEQ_LEN, timed

ROOT = Path(__file__).parent.parent
TEACHER = "TEACHER"  # stands for the teacher's run folder
ARMS = {
    "random": ["--masking", "random"],
    "entropy": ["--masking", "entropy", "--teacher", TEACHER],
    "self, masked": ["--masking", "self"],
    "self, clear": ["--masking", "self", "--score-input", "clear"],
    "self, type": ["--masking", "self", "--score-input", "type"],
    "self + distillation": ["--masking", "self", "--teacher", TEACHER, "--distill", "complete"],
}
SHAPES = {"tiny": (2, 128), "mini": (4, 256)}


# --------------------------------------------------------------------------------------------------
# processes


def run_child(function, threads, **arguments):
    """function(**arguments) of bench_steps.py, in a process of its own -> the dict it returns."""
    code = f"from tests import bench_steps as b; b.reply(b.{function}(**{arguments!r}))"
    return json.loads(spawn([sys.executable, "-c", code], threads).splitlines()[-1])


def spawn(argv, threads):
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(map(str, argv))[:200]} failed: {done.stderr[-500:]}")
    return done.stdout


# --------------------------------------------------------------------------------------------------
# the runs


def write_text(path, megabytes, types=60_000):
    """A text of random words with frequencies as in a language (Zipf), documents of some lines."""
    rng = random.Random(0)
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(types)]
    weights = [1 / (rank + 2.7) for rank in range(types)]
    with open(path, "w") as f:
        while f.tell() < megabytes * 1e6:
            drawn = rng.choices(words, weights, k=5000)
            for first in range(0, 5000, 50):
                f.write(" ".join(drawn[first:first + 50]) + ("\n\n" if first % 500 == 0 else "\n"))


def take_turns(variants, rounds):
    """{name: function() -> dict} -> {name: [what each round gave]}, all of them in every round."""
    results = {name: [] for name in variants}
    with tqdm(total=rounds * len(variants), unit=" runs") as bar:
        for name in list(variants) * rounds:
            bar.set_description(name)
            results[name].append(variants[name]())
            bar.update()
    return results


def median(results, key, against=None):
    """The median of a figure over the rounds, or of its ratio to another variant's, by round."""
    against = against or [1] * len(results)
    return statistics.median(result[key] / other for result, other in zip(results, against))


def train_arm(folder, flags, threads, steps):
    """train.py with these flags -> tokens/s and memory as its log has them, FLOPs of a step."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        spawn([sys.executable, "train.py", *flags, "--steps", str(steps), "--log-every", "5",
               "--out", f"{out}/run"], threads)
        log = [json.loads(line) for line in open(f"{out}/run/log.jsonl")]
        flops = json.load(open(f"{out}/run/config.json"))["flops"] / steps
    # The first steps map memory and the last line begins before the final evaluation: left out.
    speeds = [line["tokens_per_s"] for line in log[2:] if "tokens_per_s" in line]
    return {"tokens_per_s": statistics.median(speeds), "flops_per_step": flops,
            "memory_mb": log[-1]["peak_memory_mb"]}


def bench_training(folder, size, vocab_size, a, peers):
    """-> rows of the table for all arms at one shape, and for transformers."""
    layers, width = SHAPES[size]
    common = ["--corpus", f"{folder}/text.txt", "--cache", f"{folder}/cache", "--size", size,
              "--vocab-size", str(vocab_size), "--eval-every", "0", "--eval-blocks", "16",
              "--threads", str(a.threads), "--dtype", a.dtype]
    teacher = f"{folder}/teacher-{size}-{vocab_size}"
    spawn([sys.executable, "train.py", *common, "--masking", "random", "--steps", "1",
           "--out", teacher], a.threads)
    variants = {"peak": lambda: run_child("matrix_peak", a.threads, dtype=a.dtype)}
    for name, flags in ARMS.items():
        flags = [teacher if flag == TEACHER else flag for flag in flags]
        if name != "random":
            flags += ["--init-frac", "0"]
        variants[name] = partial(train_arm, folder, common + flags, a.threads, a.steps)
    for gathered in (False, True) if peers else ():
        name = f"transformers, {'gathered' if gathered else 'as it is'}"
        variants[name] = lambda gathered=gathered: run_child(
            "peer_step", a.threads, layers=layers, width=width, vocab_size=vocab_size,
            gathered=gathered, steps=a.steps, dtype=a.dtype)
    results = take_turns(variants, a.rounds)
    peak = [r["flops_per_s"] for r in results.pop("peak")]
    first = results["random"]
    for runs in results.values():
        for run in runs:
            run["flops_per_s"] = run["flops_per_step"] * run["tokens_per_s"] / (BATCH * SEQ_LEN)
    return [{
        "size": size, "vocab_size": vocab_size, "step": name,
        "tokens_per_s": round(median(runs, "tokens_per_s")),
        "time": 1 / median(runs, "tokens_per_s", [r["tokens_per_s"] for r in first]),
        "flops": runs[0]["flops_per_step"] / first[0]["flops_per_step"],
        "share_of_peak": median(runs, "flops_per_s", peak),
        "memory_mb": round(median(runs, "memory_mb")),
        "peak_gflops": round(statistics.median(peak) / 1e9, 1),
    } for name, runs in results.items()]


def bench_tuning(task, size, a, peers):
    """-> rows of the table: examples/s on rows as long as the task's."""
    shape = dict(zip(("layers", "width"), SHAPES[size]), task=task, count=a.examples, dtype=a.dtype)
    variants = {"glue.py": lambda: run_child("tune", a.threads, **shape)}
    for padded in (True, False) if peers else ():
        name = "transformers, padded to " + ("128" if padded else "the batch")
        variants[name] = partial(run_child, "tune_peer", a.threads, padded=padded, **shape)
    results = take_turns(variants, a.rounds)
    ours = [r["examples_per_s"] for r in results["glue.py"]]
    return [{"size": size, "task": task, "loop": name,
             "examples_per_s": round(median(runs, "examples_per_s")),
             "times_slower": 1 / median(runs, "examples_per_s", ours),
             "memory_mb": round(median(runs, "memory_mb"))} for name, runs in results.items()]


def bench_preparation(folder, a):
    """-> rows of the table: MB/s of encoding a text, and of one four times as long."""
    variants, tokenizer = {}, f"{folder}/tokenizer.model"
    run_child("make_tokenizer", a.threads, text=f"{folder}/text.txt", path=tokenizer)
    for megabytes in (a.megabytes, 4 * a.megabytes):
        text = f"{folder}/text-{megabytes}.txt"
        write_text(text, megabytes)
        for name, function in (("data/corpus.py", "prepare_text"),
                               ("sentencepiece", "prepare_peer")):
            variants[f"{name}, {megabytes} MB"] = lambda function=function, text=text: run_child(
                function, a.threads, text=text, tokenizer=tokenizer)
    results = take_turns(variants, a.rounds)
    rows = []
    for name, runs in results.items():
        peer = results["sentencepiece," + name.partition(",")[2]]
        rows.append({"encoder": name, "mb_per_s": median(runs, "mb_per_s"),
                     "share": median(runs, "mb_per_s", [r["mb_per_s"] for r in peer]),
                     "memory_mb": round(median(runs, "memory_mb"))})
    return rows


def bench_help(a):
    return timed(lambda: spawn([sys.executable, "train.py", "--help"], a.threads), 1, 2 * a.rounds)


# --------------------------------------------------------------------------------------------------


def show(rows, markdown):
    """Rows (dicts with the same keys) -> a table as text."""
    names = {"tokens_per_s": "tokens/s", "time": "time / random", "flops": "FLOPs / random",
             "share_of_peak": "share of peak", "memory_mb": "memory (MB)", "mb_per_s": "MB/s",
             "examples_per_s": "examples/s", "times_slower": "time / glue.py",
             "share": "speed / sentencepiece", "peak_gflops": "peak (GFLOP/s)"}
    header = [names.get(key, key.replace("_", " ")) for key in rows[0]]
    cells = [[f"{value:.2f}" if isinstance(value, float) else str(value)
              for value in row.values()] for row in rows]
    return grid([header, *cells], markdown)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every shape, not only one")
    parser.add_argument("--size", choices=SHAPES, help="one shape (default mini)")
    parser.add_argument("--vocab-size", type=int, metavar="X",
                        help="pieces, where it trains (default 8192)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="of the matrix products, also of transformers' (default float32)")
    parser.add_argument("--only", choices=("training", "tuning", "preparation"),
                        help="one table, not all three")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", action="store_true", help="print tables for a README")
    for name, default, text in (
            ("threads", os.cpu_count(), "CPU threads"),
            ("rounds", 3, "how often every variant runs"),
            ("steps", 20, "updates of a training run"),
            ("examples", 1600, "rows of a fine-tuning epoch"),
            ("megabytes", 10, "size of the text to prepare, and a quarter of the larger one")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="X",
                            help=f"{text} (default {default})")
    parser.error = refuse_command
    a = parser.parse_args()
    check_range(vars(a), "threads rounds examples megabytes", lambda v: v > 0, "above 0")
    if a.full and (a.size or a.vocab_size is not None):
        raise UserError("--full is every shape: leave out --size and --vocab-size")
    sizes = list(SHAPES) if a.full else [a.size or "mini"]
    vocab_sizes = (8192, 30522) if a.full else (8192 if a.vocab_size is None else a.vocab_size,)
    check_range({"vocab_size": vocab_sizes[0]}, "vocab_size",
                lambda v: 600 <= v <= 65536, "from 600 to 65536")
    check_range(vars(a), "steps", lambda v: v >= 15, "at least 15, of which 10 are measured")
    peers = importlib.util.find_spec("transformers") is not None
    if not peers:
        print("transformers is not installed: its rows are left out", file=sys.stderr)

    result = {
        "machine": f"{os.cpu_count()} x {cpu_name()}", "threads": a.threads, "dtype": a.dtype,
        "python": platform.python_version(), "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers") if peers else None,
        "help_seconds": round(bench_help(a), 3)}
    if not a.json:
        print(", ".join(f"{key} {value}" for key, value in result.items()), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        write_text(f"{folder}/text.txt", 12)  # enough for 30522 pieces
        tables = {
            "training": lambda: [row for size in sizes for vocab_size in vocab_sizes
                                 for row in bench_training(folder, size, vocab_size, a, peers)],
            "tuning": lambda: [row for size in sizes for task in LENGTHS
                               for row in bench_tuning(task, size, a, peers)],
            "preparation": lambda: bench_preparation(folder, a)}
        for name in [a.only] if a.only else tables:
            result[name] = tables[name]()
            if not a.json:  # told at once: what is measured later may be interrupted
                print(f"\n{show(result[name], a.markdown)}", flush=True)
    if a.json:
        print(json.dumps(result, indent=1))


def cpu_name():
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = info.partition("model name")[2].partition(":")[2].partition("\n")[0].strip()
    return name or platform.processor() or platform.machine()


if __name__ == "__main__":
    run_script(main)
