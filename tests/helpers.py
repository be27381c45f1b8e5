"""What several test files need: the scripts as a user types them, on a toy corpus."""

import gc
import importlib
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from data.files import load_tensors, run_script, save_tensors, sha256_file, write_json
from data.runs import config_sha256, read_config, read_log

ROOT = Path(__file__).parent.parent


def command(folder, out, *flags):
    """A training run of a toy model on folder/text.txt, which takes a second."""
    return ["train.py", "--corpus", str(folder / "text.txt"), "--cache", str(folder / "cache"),
            "--vocab-size", "600", "--layers", "2", "--width", "64", "--seq-len", "34",
            "--batch-size", "8", "--steps", "24", "--log-every", "4", "--eval-every", "8",
            "--eval-blocks", "16", "--checkpoint-every", "5", "--threads", "1",
            "--out", str(folder / out), *map(str, flags)]


def call(argv, monkeypatch):
    """Run a script in this process, as `python train.py ...` would."""
    gc.collect()  # a refusal's traceback may still hold the lock of its run folder
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [str(a) for a in argv])
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, getattr(sys, name))  # run_script wraps them
        run_script(importlib.import_module(Path(argv[0]).stem).main)


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


def spawn(argv, **how):
    """Run a script in a process of its own."""
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, **how)


def wait_for_step(run, step):
    """Until the run's log has reached `step`."""
    for _ in range(2400):
        if any(line["step"] >= step for line in read_log(run)):
            return
        time.sleep(0.025)
    raise AssertionError(f"{run} never reached step {step}")


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
        "flags": flags, "corpus_sha256": "", "tokenizer_sha256": tokenizer_sha256,
        "teacher_sha256": "", "origin_sha256": "", "parameters": 1, "flops": 1, "teacher_flops": 0,
        "unigram_entropy": unigram_entropy, "starts": []})


def save_run(run, model, tokenizer_path, **flags):
    """A finished run folder as train.py leaves it."""
    write_config(run, flags, sha256_file(tokenizer_path))
    (run / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    save_tensors(run / "model.pt", {"shape": asdict(model.shape), "model": model.state_dict(),
                                    "config_sha256": config_sha256(read_config(run))})
    return run
