"""The loop, end to end on a toy corpus.   python -m pytest tests/test_train.py -q

Most runs go through runpy in this process, because importing torch anew takes seconds; what must be
killed is a process of its own.
"""

import gc
import importlib.util
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from data import corpus as corpora
from data.files import UserError, load_tensors, lock_folder, read_json, write_json
from data.runs import check_flags, read_log
from model import fill_mask, load
from tests.test_data import write_corpus

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    write_corpus(folder / "text.txt", documents=300)
    return folder


@pytest.fixture(autouse=True)
def restore_signals():
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def command(folder, out, *flags):
    return ["train.py", "--corpus", str(folder / "text.txt"), "--cache", str(folder / "cache"),
            "--vocab-size", "600", "--layers", "2", "--width", "64", "--seq-len", "34",
            "--batch-size", "8", "--steps", "24", "--log-every", "4", "--eval-every", "8",
            "--eval-blocks", "16", "--checkpoint-every", "5", "--threads", "1",
            "--out", str(folder / out), *flags]


def call(argv, monkeypatch):
    """Run a script in this process, as `python train.py ...` would."""
    gc.collect()  # a refusal's traceback may still hold the lock of its run folder
    monkeypatch.setattr(sys, "argv", [str(a) for a in argv])
    runpy.run_path(str(ROOT / argv[0]), run_name="__main__")


def refused(argv, monkeypatch, capsys):
    """Run a script, expect status 2 and one line on stderr; return that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(argv, monkeypatch)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


def spawn(argv):
    return subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


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


@pytest.fixture(scope="module")
def teacher(folder):
    patch = pytest.MonkeyPatch()
    call(command(folder, "teacher", "--masking", "random", "--seed", "1"), patch)
    patch.undo()
    return folder / "teacher"


# ---- resuming

ARMS = {
    "random": ["--masking", "random", "--mask-rate", "0.3", "--mask-rate-end", "0.15"],
    "self": ["--init-frac", "0.3", "--micro-batch", "4", "--distill", "complete"],
    "type": ["--score-input", "type", "--select", "sample", "--init-frac", "0.2"],
    "clear": ["--score-input", "clear", "--pool", "0", "--select", "mid", "--dtype", "bfloat16"],
    "entropy": ["--masking", "entropy", "--distill", "after-init", "--init-frac", "0.3",
                "--init-from-teacher", "--select", "high"],
}


@pytest.mark.parametrize("arm", ARMS)
def test_a_killed_run_resumes_bit_for_bit(arm, folder, teacher, monkeypatch):
    flags = ARMS[arm] + ["--teacher", str(teacher)] * ("--distill" in ARMS[arm])
    whole, killed = folder / f"{arm}-whole", folder / f"{arm}-killed"
    call(command(folder, whole.name, *flags), monkeypatch)
    process = spawn(command(folder, killed.name, *flags))
    wait_for_step(killed, 8)  # after the checkpoint of step 5
    process.kill()
    process.wait()
    process.stdout.close()
    assert not (killed / "model.pt").exists()
    call(["train.py", "--resume", killed], monkeypatch)
    assert same_weights(whole, killed)
    assert what_was_logged(whole) == what_was_logged(killed)
    assert [line["step"] for line in read_log(killed)] == [0, 4, 8, 12, 16, 20, 24]


def test_sigterm_saves_and_says_how_to_go_on(folder, monkeypatch):
    run = folder / "stopped"
    process = spawn(command(folder, run.name, "--steps", "4000", "--checkpoint-every", "10000"))
    wait_for_step(run, 8)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert f"python train.py --resume {run}" in output and "Traceback" not in output
    assert load_tensors(run / "checkpoint.pt")["step"] >= 8


def test_resume_before_the_first_checkpoint_starts_over(folder, monkeypatch):
    call(command(folder, "early"), monkeypatch)
    run = folder / "early-killed"
    call(command(folder, run.name), monkeypatch)
    for name in ("model.pt", "checkpoint.pt", "checkpoint.prev.pt"):
        (run / name).unlink()
    with open(run / "log.jsonl", "a") as log:
        log.write('{"step": 99, "cut in ha')
    call([*command(folder, run.name), "--resume"], monkeypatch)  # the same flags are no conflict
    assert same_weights(folder / "early", run)


@pytest.mark.parametrize("flags", [["--masking", "random"], ["--score-input", "type"]])
def test_a_run_of_constant_rate_is_continued_bit_for_bit(flags, folder, monkeypatch):
    """Two updates of warm-up, 9 of constant rate; then 13 more, of which the last 6 decay."""
    name = flags[-1]
    call(command(folder, f"{name}-at-once", *flags, "--warmup-frac", "0.0833", "--decay-frac",
                 "0.25", "--init-frac", "0"), monkeypatch)
    origin, run = folder / f"{name}-origin", folder / f"{name}-continued"
    call(command(folder, origin.name, *flags, "--warmup-frac", "0.182", "--decay-frac", "0",
                 "--steps", "11", "--init-frac", "0"), monkeypatch)
    call(command(folder, run.name, *flags, "--warmup-frac", "0.0833", "--decay-frac", "0.25",
                 "--init-frac", "0", "--begin-from", origin), monkeypatch)
    assert same_weights(folder / f"{name}-at-once", run)
    at_once = [x for x in what_was_logged(folder / f"{name}-at-once") if x["step"] > 12]
    assert [x for x in what_was_logged(run) if x["step"] > 12] == at_once
    for file in ("model.pt", "checkpoint.pt", "checkpoint.prev.pt"):
        (run / file).unlink()  # killed before its first checkpoint: it begins at the origin again
    call(["train.py", "--resume", run], monkeypatch)
    assert same_weights(folder / f"{name}-at-once", run)


def test_a_continuation_counts_what_was_spent_before(folder, teacher, monkeypatch, capsys):
    """It may mask otherwise from then on: self-masking after a run of random masks."""
    refuse = refused(command(folder, "x", "--begin-from", teacher, "--seed", "1", "--steps", "36"),
                     monkeypatch, capsys)
    assert "rate has fallen" in refuse
    origin = folder / "before"
    call(command(folder, origin.name, "--masking", "random", "--decay-frac", "0"), monkeypatch)
    flags = command(folder, "after", "--steps", "36", "--init-frac", "0", "--begin-from", origin)
    call(flags, monkeypatch)
    log, before = read_log(folder / "after"), read_log(origin)[-1]
    assert (log[0]["step"], log[0]["flops"]) == (24, before["flops"])
    assert log[0]["val_loss"] == before["val_loss"]
    each = [b["flops"] - a["flops"] for a, b in zip(log, log[1:])]
    assert len(set(each)) == 1 and each[0] > before["flops"] / 6  # 4 steps here, 24 there
    assert log[-1]["flops"] == read_json(folder / "after" / "config.json")["flops"]
    for flags, word in ((["--seed", "1"], "--seed"), ([], "--steps"),
                        (["--steps", "36", "--width", "128"], "--width"),
                        (["--steps", "36", "--warmup-frac", "0.9"], "--warmup-frac"),
                        (["--begin-from", folder / "nowhere"], "not a finished run")):
        error = refused(command(folder, "x", "--begin-from", origin, *flags), monkeypatch, capsys)
        assert word in error and not (folder / "x").exists()
    for path in (folder / "after" / "model.pt", *(folder / "after").glob("checkpoint*"),
                 origin / "checkpoint.pt"):
        path.unlink()  # neither of the two has anything to go on from: not from random weights
    error = refused(["train.py", "--resume", folder / "after"], monkeypatch, capsys)
    assert "no checkpoint of its last step" in error


# ---- a run


def test_a_run_leaves_what_the_readme_says(folder, teacher, capsys, monkeypatch):
    config, log = read_json(teacher / "config.json"), read_log(teacher)
    assert config["flags"]["masking"] == "random" and config["flags"]["init_frac"] == 0
    assert log[-1]["tokens"] == 24 * 8 * 34 and log[-1]["flops"] == config["flops"]
    assert {"train_loss", "grad_norm", "lr", "tokens_per_s", "val_loss", "val_accuracy", "masked",
            "peak_memory_mb"} <= set(log[-1])
    assert log[-1]["masked"]["rate"] == pytest.approx(5 / 32, rel=0.1)
    saved = load_tensors(teacher / "checkpoint.pt")
    decayed, plain = saved["optimizer"]["param_groups"]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)
    model, tokenizer = load(teacher)
    names = [n for n, p in model.named_parameters() if p.dim() >= 2]
    assert len(decayed["params"]) == len(names)
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    assert not any("norm" in n or "bias" in n for n in names)
    assert torch.equal(model.type_embedding.weight[0], model.type_embedding.weight[1])
    guesses = fill_mask(model, tokenizer, "the [MASK] reads a [MASK].")
    assert len(guesses) == 2 and len(guesses[0]) == 5
    assert all(p >= q for g in guesses for (_, p), (_, q) in zip(g, g[1:]))
    capsys.readouterr()
    call(["train.py", "--eval", teacher, "--threads", "1"], monkeypatch)
    assert f"held-out loss {log[-1]['val_loss']:.4f} nats" in capsys.readouterr().out


def test_it_learns_below_the_unigram_entropy(tmp_path, monkeypatch):
    """Text in which every second word follows from the one before."""
    rng = np.random.default_rng(0)
    words = [a + b for a in "bdfgklmn" for b in ("a", "e", "i", "o", "u")]
    text = "\n\n".join(" ".join(f"{words[i]} {words[-i]}" for i in rng.integers(0, 40, 60))
                       for _ in range(400))
    (tmp_path / "text.txt").write_text(text)
    call(command(tmp_path, "run", "--vocab-size", "320", "--steps", "150", "--eval-blocks", "200",
                 "--lr", "5e-3", "--dropout", "0"), monkeypatch)
    unigram = read_json(tmp_path / "run" / "config.json")["unigram_entropy"]
    assert read_log(tmp_path / "run")[-1]["val_loss"] < unigram - 1.0


def test_arms_with_one_seed_share_weights_data_and_first_masks(folder, teacher, monkeypatch):
    """Self-masking within its random phase is the random arm, bit for bit."""
    for name, flags in (("a", ["--masking", "random"]), ("b", ["--init-frac", "0.99"])):
        call(command(folder, f"pair-{name}", "--seed", "1", *flags), monkeypatch)
    a, b = (read_log(folder / f"pair-{n}") for n in "ab")
    assert a[:-1] and [x["val_loss"] for x in a if "val_loss" in x] == [
        x["val_loss"] for x in b if "val_loss" in x]
    assert what_was_logged(teacher) == what_was_logged(folder / "pair-a")  # and runs repeat


def test_micro_batches_only_cut_the_batch_up(folder, monkeypatch):
    for name, micro in (("one", "0"), ("four", "2")):
        call(command(folder, f"micro-{name}", "--dropout", "0", "--micro-batch", micro,
                     "--masking", "random"), monkeypatch)
    one, four = (read_log(folder / f"micro-{n}")[1:] for n in ("one", "four"))
    for a, b in zip(one, four):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_equal_compute_trains_for_the_flops_of_another_run(folder, monkeypatch):
    call(command(folder, "costly", "--init-frac", "0", "--mask-rate-end", "0.1"), monkeypatch)
    flags = command(folder, "equal", "--masking", "random", "--flops-of", folder / "costly")
    i = flags.index("--steps")
    call(flags[:i] + flags[i + 2:], monkeypatch)
    spent, equal = (read_log(folder / n)[-1]["flops"] for n in ("costly", "equal"))
    steps = read_json(folder / "equal" / "config.json")["flags"]["steps"]
    assert steps > 24 and abs(spent - equal) <= spent / steps


def test_a_loss_that_is_not_finite_stops_the_run(folder, capsys, monkeypatch):
    """Step 8 is made to overflow; the checkpoint of step 6 is what is left."""
    run = folder / "nan"
    script = (ROOT / "train.py").read_text().replace(
        'group["lr"] = lr_at(', 'group["lr"] = float("inf") if step == 7 else lr_at(')
    assert script.count('float("inf") if step') == 1
    monkeypatch.setattr(sys, "argv", list(map(str, command(folder, "nan", "--masking", "random",
                                                           "--checkpoint-every", "3"))))
    with pytest.raises(SystemExit) as stop:
        names = {"__name__": "__main__", "__file__": str(ROOT / "train.py")}
        exec(compile(script, "train.py", "exec"), names)
    assert stop.value.code == 1
    del stop, names  # they hold the lock of the run
    assert re.search(r"not finite at step (8|9)", capsys.readouterr().err)
    saved = load_tensors(run / "checkpoint.pt")
    assert saved["step"] == 6 and all(w.isfinite().all() for w in saved["model"].values())
    assert not (run / "model.pt").exists()
    call(["train.py", "--resume", run], monkeypatch)
    assert read_log(run)[-1]["step"] == 24


# ---- what is refused


@pytest.mark.parametrize("flags", [
    {"batch_size": 0}, {"steps": -1}, {"steps": 0}, {"lr": 0.0}, {"lr": float("nan")},
    {"mask_rate": 1.5}, {"mask_rate": 0.0}, {"mask_rate_end": 2.0}, {"seq_len": 4}, {"seed": -1},
    {"pool": 7}, {"pool": -1}, {"pool": 0}, {"dropout": 1.0}, {"init_frac": 1.0}, {"clip": 0.0},
    {"warmup_frac": -0.1}, {"micro_batch": 3}, {"masking": "entropy"}, {"distill": "complete"},
    {"init_from_teacher": True}, {"teacher": "x"}, {"masking": "random", "select": "high"},
    {"masking": "random", "pool": 3}, {"masking": "random", "init_frac": 0.2},
    {"masking": "entropy", "teacher": "x", "score_input": "type"}, {"alpha": 0.3}, {"tau": 3.0},
    {"distill": "after-init", "teacher": "x", "init_frac": 0.0}, {"steps": 5, "flops_of": "x"},
    {"positions": "learned", "rotary_base": 10.0}, {"mask_rate": 0.5}, {"corpus_tokens": -1},
    {"corpus": "nowhere"}, {"corpus": ""}, {"pool": 1}, {"width": 100}, {"seed": 2**64},
    {"flops_of": "nowhere"}, {"threads": -1},
], ids=str)
def test_wrong_and_contradicting_flags(flags, teacher):
    flags = {n: str(teacher) if v == "x" else v for n, v in flags.items()}
    with pytest.raises(UserError):
        check_flags({**train.DEFAULTS, **flags}, set(flags))


@pytest.mark.parametrize("flags", [
    {}, {"masking": "random"}, {"score_input": "clear", "pool": 0}, {"score_input": "type"},
    {"masking": "entropy", "teacher": "x", "distill": "complete", "alpha": 1.0},
    {"masking": "random", "distill": "after-init", "teacher": "x", "init_frac": 0.1},
    {"micro_batch": 4}, {"positions": "learned"}, {"mask_rate": 0.3, "mask_rate_end": 0.15},
], ids=str)
def test_right_flags(flags, teacher):
    flags = {n: str(teacher) if v == "x" else v for n, v in flags.items()}
    check_flags({**train.DEFAULTS, **flags}, set(flags))


@pytest.mark.parametrize("flags, lr", [
    ({}, 3e-3), ({"size": "mini"}, 1e-3), ({"size": "wide"}, 1e-3),
    ({"size": "base", "width": 192}, 3e-3), ({"width": 256}, 1e-3),
    ({"size": "small", "lr": 2e-3}, 2e-3)], ids=str)
def test_the_default_rate_follows_the_width(flags, lr):
    settled = {**train.DEFAULTS, "masking": "random", **flags}
    check_flags(settled, set(flags))
    assert settled["lr"] == lr


def test_run_folders_are_never_overwritten(folder, teacher, tmp_path, monkeypatch, capsys):
    before = {p.name: p.read_bytes() for p in teacher.iterdir()}
    again = command(folder, "teacher")
    assert "is finished" in refused(again, monkeypatch, capsys)
    assert "nothing to resume" in refused(["train.py", "--resume", teacher], monkeypatch, capsys)
    assert before == {p.name: p.read_bytes() for p in teacher.iterdir()}
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    other = ["train.py", "--out", tmp_path / "photos"]
    assert "no run folder" in refused(other, monkeypatch, capsys)
    for flag in ("--resume", "--eval"):
        nowhere = ["train.py", flag, tmp_path / "photos"]
        assert "not a run folder" in refused(nowhere, monkeypatch, capsys)


def test_an_unfinished_run_is_only_resumed_whole_and_unchanged(folder, monkeypatch, capsys):
    run = folder / "half"
    call(command(folder, "half"), monkeypatch)
    (run / "model.pt").unlink()
    resume = ["train.py", "--resume", run]
    assert "unfinished: continue" in refused(command(folder, "half"), monkeypatch, capsys)
    assert "cannot change" in refused([*resume, "--lr", "1"], monkeypatch, capsys)
    assert "does not divide" in refused([*resume, "--micro-batch", "3"], monkeypatch, capsys)
    assert "not finished" in refused(["train.py", "--eval", run], monkeypatch, capsys)
    assert "--eval" in refused(["train.py", "--eval", ""], monkeypatch, capsys)
    lock = lock_folder(run)
    assert "in use" in refused(resume, monkeypatch, capsys)
    lock.close()
    good = (run / "checkpoint.pt").read_bytes()
    (run / "checkpoint.pt").write_bytes(good[:1000] + bytes([good[1000] ^ 1]) + good[1001:])
    message = refused(resume, monkeypatch, capsys)
    assert "checkpoint.pt is damaged" in message and "checkpoint.prev.pt is intact" in message
    (run / "checkpoint.pt").write_bytes((folder / "teacher" / "checkpoint.pt").read_bytes())
    assert "does not belong" in refused(resume, monkeypatch, capsys)
    (run / "checkpoint.pt").unlink()  # as the first message advises
    call(resume, monkeypatch)
    assert read_log(run)[-1]["step"] == 24


def test_teachers_that_do_not_fit(folder, teacher, tmp_path, monkeypatch, capsys):
    use = ["--masking", "entropy", "--teacher"]
    for unfinished in (tmp_path / "none", tmp_path):
        flags = command(folder, "x", *use, unfinished)
        assert "not a finished run" in refused(flags, monkeypatch, capsys)
    other = command(folder, "x", *use, teacher, "--vocab-size", "560")
    corpora.prepare(str(folder / "text.txt"), 560, folder / "cache")  # without its bar below
    assert "another tokenizer" in refused(other, monkeypatch, capsys)
    assert not (folder / "x").exists()


def test_a_small_corpus_a_typo_and_no_run_to_equal(
        folder, teacher, tmp_path, monkeypatch, capsys):
    typo = refused(["train.py", "--mask-ratee", "1"], monkeypatch, capsys)
    assert "--mask-ratee" in typo and "--help" in typo
    mps = refused(["train.py", "--device", "mps"], monkeypatch, capsys)
    assert "invalid choice: 'mps'" in mps
    missing = refused(["train.py", "--corpus", tmp_path / "none"], monkeypatch, capsys)
    assert "no such file" in missing
    too_big = command(folder, "x", "--batch-size", "4096")
    assert "less than a batch" in refused(too_big, monkeypatch, capsys)
    flags = command(folder, "x", "--flops-of", tmp_path)
    i = flags.index("--steps")
    assert "not a finished run" in refused(flags[:i] + flags[i + 2:], monkeypatch, capsys)
    assert not (folder / "x").exists()


def test_config_of_another_version_is_refused(folder, tmp_path, monkeypatch, capsys):
    resume = ["train.py", "--resume", tmp_path]
    for content in ("{", "[]", '{"flags": {"lr": 1}}'):
        (tmp_path / "config.json").write_text(content)
        assert "config.json is damaged" in refused(resume, monkeypatch, capsys)
    for content in ({"flags": 3}, {"flags": {"lr": 1}}):
        write_json(tmp_path / "config.json", content)
        assert "or of another version of train.py" in refused(resume, monkeypatch, capsys)


def test_help_comes_without_torch():
    began = time.perf_counter()
    out = subprocess.run([sys.executable, "-X", "importtime", "train.py", "--help"], cwd=ROOT,
                         capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})
    assert out.returncode == 0 and "--score-input" in out.stdout and "torch" not in out.stderr
    assert time.perf_counter() - began < 3  # on a busy machine; a quiet one takes 0.1 s


def test_tensorboard_mirrors_the_log_or_says_what_is_missing(folder, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name: None if name == "tensorboard" else find_spec(name))
    line = refused(command(folder, "tb", "--tensorboard"), monkeypatch, capsys)
    assert "pip install tensorboard" in line and not (folder / "tb").exists()
    monkeypatch.undo()
    pytest.importorskip("tensorboard")
    call(command(folder, "tb", "--tensorboard"), monkeypatch)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder / "tb" / "tensorboard")).Reload()
    log = read_log(folder / "tb")
    losses = [(e.step, e.value) for e in events.Scalars("train_loss")]
    assert losses == [(x["step"], pytest.approx(x["train_loss"])) for x in log[1:]]
    assert events.Scalars("masked/entropy_all")[-1].value == pytest.approx(
        log[-1]["masked"]["entropy"][1])
