"""The loop, end to end on a toy corpus.   python -m pytest tests/test_train.py -q

Most runs are in this process; what must be killed is forked from it, since importing torch anew
takes seconds.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch

import train
from data import corpus as corpora
from data.files import load_tensors, lock_folder, read_json, write_json
from data.runs import about_context, read_config, read_log
from masking import SELECT, Strategy, draw, masked
from model import load
from tests.helpers import (
    ROOT, call, command, refused, same_weights, send, start, wait_for_step, what_was_logged,
    write_corpus,
)


# ---- resuming

ARMS = {
    "self": ["--score-input", "masked", "--init-frac", "0.3", "--micro-batch", "4", "--distill",
             "complete"],
    "vocabulary": ["--score-input", "vocabulary", "--select", "sample", "--init-frac", "0.2"],
    "error": ["--score-input", "error", "--select", "sample", "--micro-batch", "2"],
    "context": ["--score-input", "context", "--init-frac", "0.2", "--micro-batch", "4"],
    "unmasked": ["--score-input", "unmasked", "--pool", "0", "--select", "mid", "--dtype",
                 "bfloat16"],
    "static": ["--masking", "entropy", "--static", "--mask-rate", "0.3", "--mask-rate-end", "0.15"],
    "entropy": ["--masking", "entropy", "--distill", "after-init", "--init-frac", "0.3",
                "--select", "high", "--dropout", "0.1"],
}


@pytest.mark.parametrize("arm", ARMS)
def test_a_killed_run_resumes_bit_for_bit(arm, folder, teacher, monkeypatch):
    flags = ARMS[arm] + ["--teacher", teacher] * (arm in ("self", "entropy", "static"))
    flags += ["--init-from", teacher] * (arm == "entropy")
    whole, killed = folder / f"{arm}-whole", folder / f"{arm}-killed"
    call(command(folder, whole.name, *flags), monkeypatch)
    process = start(command(folder, killed.name, *flags))
    wait_for_step(process, killed, 8)  # after the checkpoint of step 5
    assert send(process, signal.SIGKILL).status == -9 and not (killed / "model.pt").exists()
    call(["train.py", "--resume", killed], monkeypatch)
    assert same_weights(whole, killed)
    assert what_was_logged(whole) == what_was_logged(killed)
    assert [line["step"] for line in read_log(killed)] == [0, 4, 8, 12, 16, 20, 24]


@pytest.mark.parametrize("lost", [["checkpoint.pt"], ["checkpoint.pt", "checkpoint.prev.pt"]])
def test_a_log_that_was_torn_is_written_anew(lost, folder, tmp_path, monkeypatch):
    """What it had at the checkpoint is in the checkpoint; before the first a run starts over."""
    run = tmp_path / "torn"
    flags = command(folder, run)
    call(flags, monkeypatch)
    whole = what_was_logged(run)
    for name in ["model.pt", *lost]:
        (run / name).unlink()
    (run / "log.jsonl").write_bytes(b'{"step": 0}\nnot a line\n{"step"')
    call([*flags, "--resume"], monkeypatch)  # the same flags are no conflict
    assert what_was_logged(run) == whole


def test_a_run_goes_on_with_its_own_text_and_says_what_changed(
        folder, tmp_path, monkeypatch, capsys):
    """The text is in the cache, by its hash: the file may be another one by now, or gone."""
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_bytes((folder / "text.txt").read_bytes())
    call(command(tmp_path, run), monkeypatch)
    loss, config = read_log(run)[-1]["val_loss"], read_json(run / "config.json")
    (run / "model.pt").unlink()
    config["starts"][0] |= {"torch": "1.0", "machine": "abacus"}
    write_json(run / "config.json", config)
    text.write_text("something else\n\nand more")
    capsys.readouterr()
    call(["train.py", "--resume", run], monkeypatch)
    out = capsys.readouterr().out
    assert "(before: abacus)" in out and "(before: 1.0)" in out and "not bit for bit" in out
    assert [start["torch"] for start in read_config(run)["starts"]] == ["1.0", torch.__version__]
    text.unlink()
    call(["train.py", "--eval", run], monkeypatch)
    assert f"held-out loss {loss:.4f} nats" in capsys.readouterr().out
    for cache in tmp_path.glob("cache/*/meta.json"):
        cache.unlink()
    line = refused(["train.py", "--eval", run], monkeypatch, capsys)
    assert "if it has moved, say where with --corpus" in line
    write_corpus(text, documents=200)
    line = refused(["train.py", "--eval", run], monkeypatch, capsys)
    assert "is another text" in line and "--corpus" in line


# ---- starting from a finished run


def test_init_from_takes_the_weights_alone_and_counts_what_they_cost(
        folder, teacher, monkeypatch, capsys):
    call(command(folder, "from", "--masking", "random", "--seed", "5", "--init-from", teacher),
         monkeypatch)
    first, last = read_log(folder / "from")[0], read_log(teacher)[-1]
    assert first["step"] == 0 and first["val_loss"] == last["val_loss"]
    assert first["flops"] == last["flops"]
    config = read_config(folder / "from")
    assert config["flops"] == read_log(folder / "from")[-1]["flops"] == 2 * last["flops"]
    capsys.readouterr()
    call(command(folder, "again", "--seed", "1", "--steps", "1", "--init-from", teacher),
         monkeypatch)
    assert "has --seed 1, too" in capsys.readouterr().out


def test_another_text_is_read_with_the_tokenizer_of_the_run(folder, teacher, monkeypatch, capsys):
    """To evaluate on it, and to go on with it; the run's own text is known by its hash."""
    write_corpus(folder / "other.txt", documents=300, seed=9)
    shutil.copy(folder / "text.txt", folder / "moved.txt")

    def evaluate(*flags):
        capsys.readouterr()
        call(["train.py", "--eval", teacher, *flags], monkeypatch)
        return capsys.readouterr().out

    own, moved = evaluate(), evaluate("--preset", "gpu", "--corpus", folder / "moved.txt")
    other = evaluate("--corpus", folder / "other.txt")
    assert f"note: --preset gpu changes nothing, {teacher} has its own flags" in moved
    loss = [float(re.search(r"held-out loss ([\d.]+)", out)[1]) for out in (own, moved, other)]
    assert loss[0] == loss[1] == pytest.approx(read_log(teacher)[-1]["val_loss"], abs=1e-4)
    assert loss[2] != loss[0] and f"{teacher} on {folder / 'other.txt'}: held-out loss" in other
    (folder / "short.txt").write_text("\n\n".join(["The model reads every token of it."] * 9))
    assert f"on {folder / 'short.txt'}: held-out loss" in evaluate("--corpus", folder / "short.txt")
    flags = command(folder, "goes-on", "--seed", "5", "--init-from", teacher)
    flags[2] = folder / "other.txt"
    call(flags, monkeypatch)
    config = read_config(folder / "goes-on")
    assert config["tokenizer_sha256"] == read_config(teacher)["tokenizer_sha256"]
    assert config["corpus_sha256"] != read_config(teacher)["corpus_sha256"]
    (folder / "goes-on" / "model.pt").unlink()  # unfinished, and the prepared text is lost
    call(["train.py", "--resume", folder / "goes-on", "--cache", folder / "empty"], monkeypatch)
    assert (folder / "goes-on" / "model.pt").exists()
    assert "has 600 pieces" in refused(
        command(folder, "never", "--init-from", teacher, "--vocab-size", "700"), monkeypatch,
        capsys)


# ---- a run


def test_a_run_leaves_what_the_readme_says(teacher):
    config, log = read_config(teacher), read_log(teacher)
    assert config["flags"]["masking"] == "random" and config["flags"]["init_frac"] == 0
    assert log[-1]["tokens"] == 24 * 8 * 34 and log[-1]["flops"] == config["flops"]
    assert {"train_loss", "grad_norm", "lr", "tokens_per_s", "val_loss", "val_accuracy", "masked",
            "peak_memory_mb"} <= set(log[-1])
    assert ["loss_by_frequency" in line for line in log] == [False] * 6 + [True]
    assert ["dose" in line.get("masked", {}) for line in log] == [False] * 6 + [True]
    assert log[-1]["masked"]["rate"] == pytest.approx(5 / 32, rel=0.1)
    saved = load_tensors(teacher / "checkpoint.pt")
    decayed, plain = saved["optimizer"]["param_groups"]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)
    model, _ = load(teacher)
    names = [n for n, p in model.named_parameters() if p.dim() >= 2]
    assert len(decayed["params"]) == len(names)
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    assert not any("norm" in n or "bias" in n for n in names)
    assert torch.equal(model.type_embedding.weight[0], model.type_embedding.weight[1])


SECOND = ["pa", "re", "si", "to"]
PIECES = 334  # so many that each word is one


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A run on a language of known entropy: words in pairs. The first is drawn uniformly from 40,
    so that it keeps ln 10 nats where the second is seen; the second, one of four, follows from it.
    """
    folder, rng = tmp_path_factory.mktemp("known"), np.random.default_rng(0)
    first = [a + b for a in "bdfgklmn" for b in "aeiou"]
    lines = [" ".join(f"{first[i]} {SECOND[i % 4]}" for i in rng.integers(0, 40, 60))
             for _ in range(400)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        call(command(folder, "run", "--vocab-size", PIECES, "--steps", 700, "--eval-blocks", 200,
                     "--lr", "5e-3", "--masking", "random", "--eval-every", 0), patch)
    return folder


def test_it_learns_below_the_unigram_entropy(known):
    unigram = read_config(known / "run")["unigram_entropy"]
    last = read_log(known / "run")[-1]
    assert last["val_loss"] < unigram - 1.0
    # What follows from a word is lost with it: half of the words, by some of ln 10.
    assert 0.3 < last["context_gain"]


@pytest.mark.parametrize("gains, words", [
    ([0.0, 0.1, 0.2], "uses no context yet"), ([0.0, 0.4, 0.2], "uses no context yet"),
    ([0.0, 0.4, 0.2, 0.3, 0.9], "used context since step 30: with that of another text its loss is "
     "0.90 nats higher"),
    ([0.0, 0.26], "since step 10"), ([0.3, 0.3], "since step 0"),
    ([None, None], "takes two held-out blocks")])
def test_the_end_says_since_when_context_is_used(gains, words):
    log = [{"step": 10 * i, "context_gain": gain} for i, gain in enumerate(gains)]
    assert words in about_context([{"step": 5}, *log])


def test_high_masks_what_cannot_be_known_and_low_what_can(known, monkeypatch):
    """The whole way from the text to the mask: the model learns which words follow from the one
    before, its entropies say so, and the rules choose by them."""
    model, tokenizer = load(known / "run")
    text = corpora.load(corpora.prepare(str(known / "text.txt"), PIECES, known / "cache"), 34)
    tokens = corpora.with_ends(text.valid[:100])
    known_ids = torch.tensor([p[1:] in SECOND for p in tokenizer.pieces])
    assert known_ids[tokens[:, 1:-1]].float().mean() == pytest.approx(0.5, abs=0.02)
    share = {}
    strategies = {name: Strategy(model, masked, SELECT[name], 2) for name in ("high", "low")}
    for name, strategy in {"random": Strategy(), **strategies}.items():
        positions = strategy(tokens, 5, draw(0, 0, *tokens.shape))
        share[name] = 1 - known_ids[tokens.gather(1, positions)].float().mean().item()
    assert share["high"] > 0.75 and share["low"] < 0.3, share
    assert share["random"] == pytest.approx(0.5, abs=0.1)


def test_arms_with_one_seed_share_weights_data_and_first_masks(folder, teacher, monkeypatch):
    """Self-masking within its random phase is the random arm, bit for bit."""
    call(command(folder, "self", "--seed", "1", "--init-frac", "0.99"), monkeypatch)
    a, b = ([line["val_loss"] for line in read_log(run) if "val_loss" in line]
            for run in (teacher, folder / "self"))
    assert a == b and len(a) == 4


def test_equal_compute_trains_for_the_flops_of_another_run(folder, monkeypatch):
    call(command(folder, "costly", "--score-input", "masked", "--init-frac", "0", "--mask-rate-end",
                 "0.1"), monkeypatch)
    flags = command(folder, "equal", "--masking", "random", "--flops-of", folder / "costly")
    i = flags.index("--steps")
    call(flags[:i] + flags[i + 2:], monkeypatch)
    spent, equal = (read_log(folder / n)[-1]["flops"] for n in ("costly", "equal"))
    steps = read_json(folder / "equal" / "config.json")["flags"]["steps"]
    assert steps > 24 and abs(spent - equal) <= spent / steps


def test_a_loss_that_is_not_finite_stops_the_run(folder, capsys, monkeypatch):
    """The update of step 7 has no finite loss; the checkpoint of step 6 is what is left."""
    run, update = folder / "nan", train.update
    with monkeypatch.context() as patch:
        patch.setattr(train, "update", lambda args, job, step: update(args, job, step) * (
            float("nan") if step == 7 else 1))
        with pytest.raises(SystemExit) as stop:
            call(command(folder, "nan", "--masking", "random", "--checkpoint-every", "3"), patch)
    assert stop.value.code == 1
    del stop  # it holds the lock of the run
    assert "not finite at step 8" in capsys.readouterr().err
    saved = load_tensors(run / "checkpoint.pt")
    assert saved["state"]["step"] == 6 and not (run / "model.pt").exists()
    call(["train.py", "--resume", run], monkeypatch)
    assert read_log(run)[-1]["step"] == 24


def test_without_memory_the_next_command_is_said(folder, capsys, monkeypatch):
    def update(args, job, step):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(train, "update", update)
        line = refused(command(folder, "big run"), patch, capsys)
    assert f"--resume '{folder / 'big run'}' --micro-batch 1" in line
    call(["train.py", "--resume", folder / "big run", "--micro-batch", "1"], monkeypatch)
    assert read_log(folder / "big run")[-1]["step"] == 24


# ---- what is refused


def test_right_flags_that_no_run_here_has(teacher):
    for flags in ({"score_input": "error", "pool": 0},
                  {"masking": "random", "distill": "after-init", "teacher": teacher,
                   "init_frac": 0.1}):
        args = Namespace(**{**train.DEFAULTS, **flags})
        train.settle(args)
        train.check_flags(args, set(flags))


@pytest.mark.parametrize("flags, lr", [
    ({}, 3e-3), ({"size": "wide"}, 1e-3), ({"size": "base", "width": 192}, 3e-3),
    ({"size": "small", "lr": 2e-3}, 2e-3)], ids=str)
def test_the_default_rate_follows_the_width(flags, lr):
    args = Namespace(**{**train.DEFAULTS, "masking": "random", **flags})
    train.settle(args)
    assert args.lr == lr


def test_run_folders_are_never_overwritten(folder, teacher, tmp_path, monkeypatch, capsys):
    before = {p.name: p.read_bytes() for p in teacher.iterdir()}
    again = command(folder, "teacher")
    line = refused(again, monkeypatch, capsys)
    assert "is finished" in line and "teacher-b" in line
    assert before == {p.name: p.read_bytes() for p in teacher.iterdir()}
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("tokenizer.model", "log.jsonl", "model.pt"):
        (mine / name).touch()
        assert f"has a {name} and is no run folder" in refused(
            command(folder, mine), monkeypatch, capsys)
        (mine / name).unlink()
    (mine / "train.log").write_text("what tee writes")
    (mine / ".lock").touch()  # a start that was killed before config.json leaves these two
    (mine / "tokenizer.model").write_bytes(b"half")
    call(command(folder, mine, "--steps", "1"), monkeypatch)
    assert (mine / "model.pt").exists()
    assert (mine / "train.log").read_text() == "what tee writes"


def test_an_unfinished_run_is_only_resumed_whole_and_unchanged(folder, monkeypatch, capsys):
    run = folder / "half"
    call(command(folder, "half"), monkeypatch)
    (run / "model.pt").unlink()
    resume = ["train.py", "--resume", run]
    assert "unfinished: continue" in refused(command(folder, "half"), monkeypatch, capsys)
    assert "cannot change" in refused([*resume, "--lr", "1"], monkeypatch, capsys)
    assert "does not divide" in refused([*resume, "--micro-batch", "3"], monkeypatch, capsys)
    assert "not finished" in refused(["train.py", "--eval", run], monkeypatch, capsys)
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
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace('"lr": 0.003', '"lr": 0.004'))
    assert "does not belong" in refused(resume, monkeypatch, capsys)  # changed by hand
    (run / "config.json").write_text(config)
    call(resume, monkeypatch)
    assert read_log(run)[-1]["step"] == 24


def test_config_of_another_version_is_refused(folder, teacher, tmp_path, monkeypatch, capsys):
    resume, good = ["train.py", "--resume", tmp_path], read_json(teacher / "config.json")
    for content in ("{", "[]", '{"flags": {"lr": 1}}', '{"flags": 3}',
                    json.dumps({**good, "starts": [1]})):
        (tmp_path / "config.json").write_text(content)
        assert "config.json is damaged" in refused(resume, monkeypatch, capsys)
    for flags in ({"lr": 1}, {**good["flags"], "steps": "9"}, {**good["flags"], "new": 1}):
        write_json(tmp_path / "config.json", {**good, "flags": flags})
        assert "of another version of train.py" in refused(resume, monkeypatch, capsys)


@pytest.mark.parametrize("closed", ["", ">&- 2>&-"])
def test_output_never_ends_the_work(closed, folder, tmp_path):
    """Closed, or for a terminal that knows ASCII alone: the corpus' name is not. And the variables
    of another launcher do not matter."""
    (tmp_path / "é.txt").write_bytes((folder / "text.txt").read_bytes())
    argv = command(folder, tmp_path / "run", "--masking", "random", "--corpus", tmp_path / "é.txt")
    words = " ".join(f"'{word}'" for word in [sys.executable, *argv])
    done = subprocess.run(["bash", "-c", f"exec {words} {closed}"], cwd=ROOT, timeout=120,
                          capture_output=True, text=True, env={
                              **os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0",
                              "RANK": "gold", "WORLD_SIZE": ""})
    assert done.returncode == 0 and (tmp_path / "run" / "model.pt").exists(), done.stderr
    assert closed or "machine: 1 x" in done.stdout


def test_help_is_printed(capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        call(["train.py", "--help"], monkeypatch)
    assert stop.value.code == 0 and "--checkpoint-every" in capsys.readouterr().out


def test_a_home_folder_is_expanded():
    """bash leaves the ~ of --out=~/run to us."""
    args, *_ = train.parse_args(["--masking", "random", "--out=~/run"])
    assert args.out == os.path.expanduser("~/run")
