"""glue.py end to end, on small files.   python -m pytest tests/test_glue.py -q"""

import contextlib
import json
import random
import re
import signal
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
import torch.nn.functional as F

import glue
from data.arms import WHERE
from data.files import UserError, lock_folder, read_json
from data.metrics import measure
from data.tasks import TASKS
from data.tokenizer import Tokenizer, train_tokenizer
from model import Bert, Shape, copy_token_type
from tests.helpers import (
    LABELS, call, refused, result_of, save_run, send, start, wait_for, write_task,
)

CPU = torch.device("cpu")


def words(count, seed):
    random.seed(seed)
    return ["".join(random.choice("bdfgklmnprst") + random.choice("aeiou") for _ in range(3))
            for _ in range(count)]


# Two topics: a sentence has words of one of them alone.
TOPICS = words(60, 1), words(60, 2)


def sentence(topic, rng, vocabulary=slice(None)):
    return " ".join(rng.choice(TOPICS[topic][vocabulary]) for _ in range(8))


def make_run(path, tokenizer, seed=0, width=64, weights=None, **flags):
    """A run folder as train.py leaves it, without any training."""
    shape = Shape(Tokenizer(tokenizer).vocab_size, layers=1, width=width, seq_len=32)
    torch.manual_seed(100 + seed)  # not the weights that a run of this seed begins with
    bert = Bert(shape)
    if weights:
        weights(bert)
    copy_token_type(bert.state_dict())
    save_run(path, bert, tokenizer, **{
        **train.DEFAULTS, "seed": seed, "seq_len": 32, "width": width, **flags})
    lines = [{"step": 0, "tokens": 0, "flops": 0, "flops_with_teacher": 0, "val_loss": 7.0},
             {"step": 10, "flops": 500},
             {"step": 250, "tokens": 9000, "flops": 1000, "flops_with_teacher": 1000,
              "seconds": 9.5, "val_loss": 4.0}]
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """GLUE's files (small), two vocabularies, and two finished runs of one seed: random and self.
    """
    folder = tmp_path_factory.mktemp("glue")
    rng = random.Random(0)
    texts = [sentence(i % 2, rng) for i in range(1200)]
    train_tokenizer(texts, 700, folder / "tokenizer.model")
    train_tokenizer(texts, 320, folder / "small.model")
    for task in TASKS:
        rows = [(sentence(0, rng), sentence(1, rng), LABELS[task][i % 2]) for i in range(40)]
        write_task(folder / "GLUE", task, rows, n_dev=20)
    make_run(folder / "random-0", folder / "tokenizer.model", masking="random")
    make_run(folder / "self-0", folder / "tokenizer.model", masking="self", width=128)
    return folder


@pytest.fixture(autouse=True)
def no_score_is_left_from_another_test(folder):
    for path in [*folder.glob("*/glue.json"), *folder.glob("cache/glue/*/glue.json")]:
        path.unlink()


def command(folder, *argv, runs=("random-0", "self-0")):
    return ["glue.py", *(folder / run for run in runs), "--glue-dir", folder / "GLUE",
            "--cache", folder / "cache", "--threads", "1", "--dtype", "float32", *argv]


def scores(run):
    return read_json(run / "glue.json")["scores"]


def test_all_nine_tasks_from_runs_to_table(folder, monkeypatch, capsys):
    flags = ["--epochs", "1", "--json"]
    call(command(folder, *flags), monkeypatch)
    out = capsys.readouterr()
    tables = json.loads(out.out)  # the widths differ: two tables, each with its random weights
    assert [[row["name"] for row in table["rows"]] for table in tables] == [
        ["majority class", "random weights", name] for name in ("random", "self")]
    assert [table["baseline"] for table in tables] == ["random", None]
    for row in tables[0]["rows"] + tables[1]["rows"]:
        assert {*TASKS, "primary", "GLUE (8)", "MNLI matched", "QQP f1"} <= set(row["scores"])
        assert all(np.isfinite(v["mean"]) for v in row["scores"].values())
    assert set(tables[0]["rows"][1]["against"]) == {"primary", "GLUE (8)"}
    assert "MNLI: 40 of 392702 training rows, 20 of 9815, 20 of 9832 development rows" in (
        tables[0]["notes"])
    assert len(re.findall("CoLA: 40 of 40 training rows, for example .CLS.▁", out.err)) == 1
    # The same command again computes nothing: the files do not change, the table is the same.
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("glue.json")}
    monkeypatch.setattr(glue, "score", None)
    call(command(folder, *flags), monkeypatch)
    out = capsys.readouterr()
    assert json.loads(out.out) == tables and "for example" not in out.err
    call(["glue.py", folder / "random-0", folder / "self-0", "--cache", folder / "cache",
          "--table", "--json"], monkeypatch)
    assert json.loads(capsys.readouterr().out) == tables
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("glue.json")}
    # Any other arm can be the baseline, by its name.
    call(["glue.py", folder / "self-0", "--cache", folder / "cache", "--table", "--baseline",
          "self"], monkeypatch)
    assert "Against self, paired by pretraining seed." in capsys.readouterr().out


def test_every_tokenizer_shows_a_row_in_its_own_pieces(folder, tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "small", folder / "small.model", masking="random")
    call(command(folder, "--tasks", "CoLA", "--epochs", "1", runs=(tmp_path / "small", "random-0")),
         monkeypatch)
    shown = re.findall(r"CoLA: .*for example (.*) -> ", capsys.readouterr().err)
    assert len(shown) == 2 and shown[0] != shown[1]
    text = (folder / "GLUE" / "CoLA" / "train.tsv").read_text().replace(" ", "▁")
    for pieces in shown:  # the beginning of a sentence of the file: no other pieces give that
        assert pieces.removeprefix("[CLS]▁").replace("[SEP]", "") in text


def test_scores_are_pure_in_run_recipe_rows_and_seed(folder, monkeypatch, capsys):
    flags = ["--tasks", "rte, CoLA", "--epochs", "2", "--seeds", "2"]
    call(command(folder, *flags), monkeypatch)
    first = sorted(scores(folder / "self-0"), key=lambda e: e["task"])
    assert [(e["task"], e["seed"]) for e in first] == [
        ("CoLA", 0), ("CoLA", 1), ("RTE", 0), ("RTE", 1)]
    (folder / "self-0" / "glue.json").unlink()
    # The order of the tasks, the other runs and what else is computed do not matter.
    call(command(folder, "--tasks", "RTE", *flags[2:], runs=["self-0"]), monkeypatch)
    again = scores(folder / "self-0")
    assert [e["parts"] for e in again] == [e["parts"] for e in first[2:]]
    # Another recipe is computed beside the first, and --table shows both.
    more = ["--tasks", "RTE", "--epochs", "1", "--max-train", "10"]
    call(command(folder, *more, runs=["self-0"]), monkeypatch)
    assert len(scores(folder / "self-0")) == 3
    assert "RTE: 10 of 2490 training rows" in capsys.readouterr().out
    call(command(folder, "--table", runs=["self-0"]), monkeypatch)
    assert "2 tables" in capsys.readouterr().out
    call(command(folder, "--table", "--epochs", "1", runs=["self-0"]), monkeypatch)
    assert "tables" not in capsys.readouterr().out
    for more, seeds in ([], 2), (["--seeds", "1"], 1):
        call(command(folder, "--table", "--epochs", "2", *more, runs=["self-0"]), monkeypatch)
        assert f"fine-tuning seeds: {seeds}\n" in capsys.readouterr().out
    argv = command(folder, "--table", "--dtype", "bfloat16", runs=["self-0"])
    assert "nothing is scored yet" in refused(argv, monkeypatch, capsys)
    # Other rows are other scores.
    write_task(folder / "GLUE2", "RTE", [("a b", "c d", LABELS["RTE"][i % 2]) for i in range(12)])
    call(command(folder, *flags[2:], "--tasks", "RTE", "--glue-dir", folder / "GLUE2"), monkeypatch)
    assert len(scores(folder / "self-0")) == 5 and "12 of 2490" in capsys.readouterr().out


def test_what_is_cut_is_said_and_kept(folder, tmp_path, monkeypatch, capsys):
    """Rows of 100 tokens, [CLS] and two [SEP] included, for a model that reads 32: --max-len 512
    changes nothing."""
    tokenizer = Tokenizer(folder / "tokenizer.model")
    piece = next(w for w in TOPICS[0] if len(tokenizer.encode(w + " " + w)) == 2)
    rows = [(" ".join([piece] * 50), " ".join([piece] * 47), label) for label in LABELS["RTE"]]
    short = [(piece, f"{piece} {piece}", label) for label in LABELS["RTE"]]
    write_task(tmp_path, "RTE", rows + rows, dev=short)
    flags = ["--tasks", "RTE", "--epochs", "1", "--glue-dir", tmp_path]
    call(command(folder, *flags, "--max-len", "512", runs=["self-0"]), monkeypatch)
    out = capsys.readouterr()
    assert f"RTE: {4 / 6:.1%} of the rows are cut at 32 tokens, which loses " + (
        f"{4 * 68 / (4 * 100 + 2 * 6):.1%} of all tokens") in out.err
    assert "max-len 32," in out.out
    (kept,), before = scores(folder / "self-0"), (folder / "self-0" / "glue.json").read_bytes()
    assert kept["recipe"]["max_len"] == 32
    call(command(folder, *flags, runs=["self-0"]), monkeypatch)
    assert (folder / "self-0" / "glue.json").read_bytes() == before
    write_task(tmp_path, "RTE", short, dev=[(f"{piece} {piece}", piece, LABELS["RTE"][0])])
    call(command(folder, *flags, runs=["self-0"]), monkeypatch)
    assert "cut" not in capsys.readouterr().err


def test_all_that_is_kept_of_a_score_can_be_kept_elsewhere(folder, monkeypatch, capsys):
    call(command(folder, "--tasks", "RTE,SST-2", "--epochs", "1", "--jsonl", "gate"), monkeypatch)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line.pop("study") for line in lines} == {"gate"}
    assert sorted((line.pop("run"), line["task"]) for line in lines) == [
        (run, task) for run in ("random weights-0", "random-0", "self-0")
        for task in ("RTE", "SST-2") for _ in range(2 if run == "random weights-0" else 1)]
    assert lines[-2:] == scores(folder / "self-0")
    assert {"device", "dtype", "torch", "machine", "commit"} <= set(lines[0])
    assert {len(line["correct"]) for line in lines if line["task"] == "SST-2"} == {20}


@pytest.mark.parametrize("what", ["dtype", "machine"])
def test_a_score_of_another_machine_is_no_score(what, folder, monkeypatch, capsys):
    flags = ["--tasks", "RTE", "--epochs", "1"]
    call(command(folder, *flags, runs=["random-0"]), monkeypatch)
    path = folder / "random-0" / "glue.json"
    path.write_text(path.read_text().replace(f'"{what}": "', f'"{what}": "another '))
    capsys.readouterr()
    call(command(folder, "--table", "--dtype", "auto", runs=["random-0"]), monkeypatch)
    note = "left out of the difference, for want of a partner"
    assert (note in capsys.readouterr().out) == (what == "dtype")
    call(command(folder, *flags, runs=["random-0"]), monkeypatch)
    old, new = scores(folder / "random-0")
    assert old["parts"] == new["parts"] and old[what] == f"another {new[what]}"
    assert note not in capsys.readouterr().out
    call(command(folder, *flags, runs=["random-0"]), monkeypatch)
    assert len(scores(folder / "random-0")) == 2


def test_what_a_run_knows_carries_over(folder, tmp_path, monkeypatch, capsys):
    """Which topic does a sentence have? Training rows and development rows share no word, so only
    what the weights know about words can carry over: here embeddings that tell the topics apart.
    As SST-2, fine-tuned and frozen."""
    tokenizer = Tokenizer(folder / "tokenizer.model")

    def knowing(bert):
        for sign, vocabulary in zip((1, -1), TOPICS):
            for word in vocabulary:
                for i in tokenizer.encode(word):
                    bert.token_embedding.weight.data[i, :8] += 0.2 * sign

    make_run(tmp_path / "random-0", folder / "tokenizer.model", weights=knowing)
    rng = random.Random(3)
    rows = [[(sentence(i % 2, rng, half), "", str(i % 2)) for i in range(n)]
            for half, n in ((slice(0, 30), 120), (slice(30, 60), 200))]
    write_task(tmp_path, "SST-2", rows[0], dev=rows[1])
    for flags in (["--epochs", "5"], ["--freeze"]):
        call(command(folder, "--tasks", "SST-2", "--glue-dir", tmp_path, "--json", *flags,
                     runs=[tmp_path / "random-0"]), monkeypatch)
        table, = json.loads(capsys.readouterr().out)
        majority, weights, run = (row["scores"]["SST-2"]["mean"] for row in table["rows"])
        assert majority == 50 and abs(weights - 50) < 15  # cannot know the unseen words
        assert run > 90


# ---- pieces


def rows_of(lengths, split=None):
    rng = np.random.default_rng(0)
    return [(rng.integers(5, 99, n).astype(np.uint16), split or n) for n in lengths]


@pytest.mark.parametrize("pool", ["pair", "mean", "cls"])
def test_the_sentence_vector_ignores_padding(pool):
    torch.manual_seed(0)
    model = glue.Classifier(Bert(Shape(99, 2, 64, 32, init_std=0.3)), 2, pool).eval()
    rows = rows_of([9, 20, 14], 5)
    tokens, types, attend = glue.collate(rows, CPU)
    assert tokens.shape == (3, 20) and attend.sum(1).tolist() == [9, 20, 14]
    assert types.sum(1).tolist() == [4, 15, 9] and (tokens[0, 9:] == 0).all()
    together = model.vector(tokens, types, attend)
    for i, row in enumerate(rows):
        tokens, types, attend = glue.collate([row], CPU)
        alone = model.vector(tokens, types, attend)
        torch.testing.assert_close(together[i:i + 1], alone, rtol=0, atol=1e-5)
        hidden = model.bert.encode(tokens, None, types)[0]
        u, v = hidden[:5].mean(0), hidden[5:].mean(0)
        expected = {"pair": torch.cat((u, v, (u - v).abs())), "mean": hidden.mean(0),
                    "cls": hidden[0]}[pool]
        torch.testing.assert_close(alone[0], expected, rtol=0, atol=1e-5)


RECIPE = Namespace(epochs=1, batch_size=4, lr=1e-3, embedding_lr=1e-4, warmup_frac=0.1,
                   weight_decay=0.0, clip=1.0)
HERE = SimpleNamespace(device=CPU, autocast=contextlib.nullcontext)


def classifier(outputs):
    torch.manual_seed(0)
    bert = Bert(Shape(99, 1, 64, 32))
    torch.manual_seed(5)
    return glue.Classifier(bert, outputs, "mean")


def test_a_regression_is_learned(monkeypatch):
    monkeypatch.setattr(glue, "EVAL_TOKENS", 60)  # some rows at a time, the longest first
    labels = [float(i % 6) for i in range(30)]
    rows, model = rows_of([6 + i % 5 for i in range(30)]), classifier(1)
    glue.fine_tune(model, rows, labels, Namespace(**{**vars(RECIPE), "epochs": 60}), 1, HERE)
    out = glue.predict(model, rows, HERE)
    assert out.shape == (30, 1)
    measured = measure(TASKS["STS-B"], [out], [SimpleNamespace(labels=labels)])
    assert measured["pearson"] > 90 and measured["spearman"] > 90


@pytest.mark.parametrize("fit", [glue.fine_tune, glue.fit_head])
def test_a_frozen_encoder_stays_bit_for_bit_and_a_free_one_does_not(fit):
    model, rows = classifier(2), rows_of([6 + i % 5 for i in range(20)])
    before = {n: p.clone() for n, p in model.bert.state_dict().items()}
    fit(model, rows, [0, 1] * 10, RECIPE, 1, HERE)
    same = all(torch.equal(before[n], p) for n, p in model.bert.state_dict().items())
    assert same == (fit is glue.fit_head) and glue.predict(model, rows, HERE).shape == (20, 2)


def test_a_frozen_encoder_gives_vectors_of_one_scale():
    """fit_head by hand: one step on standardised vectors, then the scale goes into the layer."""
    rows, labels = rows_of([6, 9, 12, 7]), torch.tensor([0, 1, 1, 0])
    model, twin = classifier(2), classifier(2)
    recipe = Namespace(**{**vars(RECIPE), "clip": 1e9})
    glue.fit_head(model, rows, labels.tolist(), recipe, 1, HERE)
    x = glue.vectors(twin.eval(), rows, HERE).detach()
    z = (x - x.mean(0)) / x.std(0, correction=0)
    adam = torch.optim.AdamW(twin.head.parameters(), lr=1e-3, eps=1e-6, weight_decay=0.0)
    F.cross_entropy(twin.head(z), labels).backward()
    adam.step()
    torch.testing.assert_close(glue.predict(model, rows, HERE), twin.head(z), rtol=0, atol=2e-5)


def test_a_loss_that_is_not_finite_ends_the_job_and_keeps_the_scores(folder, monkeypatch, capsys):
    call(command(folder, "--tasks", "CoLA", "--epochs", "1", runs=["self-0"]), monkeypatch)
    with pytest.raises(SystemExit) as stop:
        call(command(folder, "--tasks", "RTE", "--lr", "1e38", "--clip", "1e38", runs=["self-0"]),
             monkeypatch)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "error: self-0, RTE, seed 0: the loss is not finite" in error
    assert "finished scores are kept" in error and len(scores(folder / "self-0")) == 1
    with pytest.raises(SystemExit) as stop:  # the only update breaks the weights, after its loss
        call(command(folder, "--tasks", "RTE", "--lr", "1e20", "--epochs", "1", "--max-train", "16",
                     runs=["self-0"]), monkeypatch)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "RTE, seed 0: an output is not finite" in error


def test_updates_are_those_of_torch():
    """Four steps of fine_tune against four written out: gradient, clipping, schedule, AdamW, decay,
    and a tenth of the rate for the token embeddings."""
    labels = [0, 1, 1, 0]
    rows = rows_of([7, 7, 7, 7], 4)
    model = classifier(2)
    torch.manual_seed(0)
    twin = Bert(Shape(99, 1, 64, 32))
    glue.fine_tune(model, rows, labels, Namespace(**{
        **vars(RECIPE), "epochs": 4, "warmup_frac": 0.25, "clip": 0.01, "weight_decay": 0.1}), 5,
        HERE)
    torch.manual_seed(5)
    head = torch.nn.Linear(64, 2)
    torch.nn.init.normal_(head.weight, std=0.02)
    torch.nn.init.zeros_(head.bias)
    tokens = torch.tensor(np.stack([ids for ids, _ in rows]).astype(np.int64))
    types = torch.tensor([[0, 0, 0, 0, 1, 1, 1]] * 4)
    parameters = [*twin.parameters(), *head.parameters()]
    embeddings = twin.token_embedding.weight
    groups = [{"params": [p for p in parameters if (p.dim() > 1) == decays and p is not embeddings],
               "weight_decay": 0.1 * decays} for decays in (True, False)]
    groups.append({"params": [embeddings], "weight_decay": 0.1})
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-6)
    for rate in (1e-3, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3):  # one step of warm-up, then down to 0
        loss = F.cross_entropy(head(twin.encode(tokens, None, types).mean(1)), torch.tensor(labels))
        adam.zero_grad()
        loss.backward()
        norm = sum(p.grad.square().sum() for p in parameters if p.grad is not None) ** 0.5
        for p in parameters:
            if p.grad is not None:
                p.grad *= 0.01 / norm
        for group, factor in zip(adam.param_groups, (1, 1, 0.1)):
            group["lr"] = rate * factor
        adam.step()
    for (name, p), q in zip(model.bert.named_parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5, msg=name)


def test_random_weights_are_the_run_before_its_first_update(folder, tmp_path):
    run = glue.open_run(str(folder / "random-0"))
    weights, = glue.random_weights([run], tmp_path)
    start = glue.build(weights, dropout=0.2)
    torch.manual_seed(run.seed)
    expected = Bert(run.shape)
    for (name, p), q in zip(start.named_parameters(), expected.named_parameters()):
        q = q[1]
        if name == "type_embedding.weight":
            q = q[:1].repeat(2, 1)
        assert torch.equal(p, q), name
    assert start.shape.dropout == 0.2 and glue.build(run, 0.3).shape.dropout == 0.3
    # One for each seed and shape, whatever the arm.
    other = replace(run, arm="self", seed=1)
    models = glue.random_weights([run, other, replace(other, arm="random")], tmp_path)
    assert [m.seed for m in models] == [0, 1] and len({m.sha256 for m in models}) == 2


def test_what_a_table_is_told_of_a_run(folder, tmp_path):
    tokenizer = folder / "tokenizer.model"
    make_run(tmp_path / "my-arm-7", tokenizer, 7, teacher="some/where", steps=3, batch_size=5)
    run = glue.open_run(tmp_path / "my-arm-7")
    assert (run.arm, run.seed, run.shape.width) == ("my-arm", 7, 64)
    made = run.pretraining
    assert [line["step"] for line in made.evaluations] == [0, 250] and set(made.start) == set(WHERE)
    # Paths are compared by what they are; how and where it was run is not in it.
    assert made.experiment["corpus"] == "c" * 64 and made.experiment["teacher"] == 0
    assert made.experiment["init_from"] == "" and made.experiment["flops_of"] is False
    assert not {"seed", "out", "device", "log_every", "cache"} & set(made.experiment)
    make_run(tmp_path / "rate-15", tokenizer, 8, init_from="x")  # 15 is not its seed
    assert glue.open_run(tmp_path / "rate-15").arm == "rate-15"
    log = tmp_path / "rate-15" / "log.jsonl"
    for lines, message in (('{"step": 0}\n', "15 has no log.jsonl with an evaluation: the whole"),
                           ('{"step": 0, "val_loss": 7.0}\n', "is damaged, or of another version"),
                           ('{"step": 0, "val_loss": 7.0, "tokens": 1, "flops": "x", '
                            '"flops_with_teacher": 1}\n', "is damaged, or of another version")):
        log.write_text(lines)
        with pytest.raises(UserError, match=message):
            glue.open_run(tmp_path / "rate-15")


def test_random_numbers_differ_by_seed_and_task():
    numbers = {glue.seed_of(glue.Job(SimpleNamespace(seed=s), t, f, ()))
               for s in range(5) for f in range(5) for t in TASKS}
    assert len(numbers) == 5 * 5 * 9


@pytest.mark.parametrize("flags, of_runs, of_random_weights", [  # by width: --lr, --embedding-lr
    ([], {128: (1e-3, 1e-3), 256: (6e-4, 6e-5)}, {128: (5e-4, 5e-4), 256: (1.5e-4, 1.5e-4)}),
    (["--lr", "2e-3"], {128: (2e-3, 2e-3), 256: (2e-3, 2e-4)}, {256: (1.5e-4, 1.5e-4)}),
    (["--embedding-lr", "3e-4"], {128: (1e-3, 3e-4), 256: (6e-4, 3e-4)}, {128: (5e-4, 5e-4)}),
    (["--freeze"], {128: (3e-3, 3e-3), 256: (3e-3, 3e-3)}, {256: (3e-3, 3e-3)})])
def test_the_rates_follow_the_weights(flags, of_runs, of_random_weights, folder, monkeypatch):
    args, _ = glue.parse_args([str(x) for x in command(folder, *flags)[1:]])
    for pretraining, expected in ((True, of_runs), (None, of_random_weights)):
        for width, both in expected.items():
            model = SimpleNamespace(shape=Shape(99, 1, width), pretraining=pretraining)
            recipe = glue.recipe_of(model, args)
            assert (recipe["lr"], recipe["embedding_lr"]) == both
            assert list(recipe) == glue.RECIPE_NAMES and recipe["epochs"] == (
                10 if "--freeze" in flags else 3)
    # What is kept beside a score is what it was made with.
    call(command(folder, "--tasks", "RTE", "--epochs", "1", *flags, runs=["self-0"]), monkeypatch)
    kept, = scores(folder / "self-0")
    assert (kept["recipe"]["lr"], kept["recipe"]["embedding_lr"]) == of_runs[128]


# ---- faults and mistakes


def scored(run, count):
    return lambda: (run / "glue.json").exists() and len(scores(run)) >= count


def test_a_job_that_was_stopped_goes_on_where_it_was(folder, monkeypatch):
    run = folder / "random-0"
    argv = command(folder, "--tasks", "CoLA,SST-2,MRPC,QNLI", "--epochs", "5", runs=["random-0"])
    job = start(argv)
    wait_for(job, scored(run, 1))
    assert send(job, signal.SIGKILL).status == -9
    job = start(argv)
    wait_for(job, scored(run, 2))
    result = send(job, signal.SIGTERM)
    assert result.status == 143 and "Traceback" not in result.text
    assert result.text.splitlines()[-1] == (
        "stopped; finished scores are kept: give the same command again to go on")
    kept = scores(run)
    assert 2 <= len(kept) < 4
    call(argv, monkeypatch)
    entries = scores(run)
    assert entries[:len(kept)] == kept  # nothing computed again, or lost
    assert {e["task"] for e in entries} == {"CoLA", "SST-2", "MRPC", "QNLI"}
    (run / "glue.json").unlink()  # and an uninterrupted job gives the same
    call(argv, monkeypatch)
    assert [e["parts"] for e in scores(run)] == [e["parts"] for e in entries]


def test_processes_side_by_side_give_the_same_bits(folder, monkeypatch, capsys):
    flags = ["--epochs", "2", "--jsonl", "x", "--tasks", "CoLA,MNLI,STS-B,QQP"]
    found = []
    for jobs in ("1", "2"):
        call(command(folder, "--jobs", jobs, *flags), monkeypatch)
        out = capsys.readouterr()
        assert ("2 at a time" in out.err) == (jobs == "2")
        lines = [json.loads(line) for line in out.out.splitlines()]
        assert len(lines) == 4 * 4 and all(line.pop("seconds") >= 0 for line in lines)
        found.append(sorted(lines, key=json.dumps))
        for path in [*folder.glob("*/glue.json"), *folder.glob("cache/glue/*/glue.json")]:
            path.unlink()
    assert found[0] == found[1]


def workers_of(process):
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return path.read_text().split() if path.exists() else []


@pytest.mark.skipif(sys.platform != "linux", reason="one process elsewhere")
@pytest.mark.parametrize("number, status", [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_no_process_is_left_behind_and_no_score_lost(number, status, folder, monkeypatch):
    run = folder / "self-0"  # the larger: its jobs are the first
    job = start(command(folder, "--tasks", "SST-2,QNLI", "--epochs", "10", "--seeds", "5",
                        "--jobs", "2"))
    wait_for(job, lambda: scored(run, 1)() and len(workers_of(job)) == 2)
    workers = workers_of(job)
    result = send(job, number)
    assert result.status == status and "Traceback" not in result.text
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers):  # the kernel takes its time
        assert time.monotonic() < deadline, "a process lives on"
        time.sleep(0.01)
    assert 1 <= len(scores(run)) < 10
    with lock_folder(run):  # is free
        pass


def test_commands_side_by_side_share_their_random_weights(folder, tmp_path):
    """What another command holds is passed over, and waited for only when nothing else is left."""
    weights, = glue.random_weights([glue.open_run(folder / "random-0")], folder / "cache")
    weights.folder.mkdir(parents=True, exist_ok=True)

    def hold():
        lock = lock_folder(weights.folder)
        (tmp_path / "held").touch()
        time.sleep(60)
        lock.close()

    wait_for(first := start(hold), (tmp_path / "held").exists)
    job = start(command(folder, "--tasks", "RTE,CoLA", "--epochs", "1", runs=["random-0"]))
    wait_for(job, scored(folder / "random-0", 2))
    assert not (weights.folder / "glue.json").exists()
    send(first, signal.SIGKILL)
    result = result_of(job)
    assert f"waiting for another process: it works in {weights.folder}, too" in result.text
    assert "| RTE " in result.text and len(scores(weights.folder)) == 2


def test_a_score_that_another_command_made_meanwhile_is_not_made_again(folder, monkeypatch):
    argv = command(folder, "--tasks", "RTE", "--epochs", "1", runs=["self-0"])
    call(argv, monkeypatch)
    kept = (folder / "self-0" / "glue.json").read_bytes()
    (folder / "self-0" / "glue.json").unlink()
    begin = glue.run_jobs

    def late(*how):  # the other command ends when this one has looked what is missing
        (folder / "self-0" / "glue.json").write_bytes(kept)
        return begin(*how)

    monkeypatch.setattr(glue, "run_jobs", late)
    call(argv, monkeypatch)
    assert (folder / "self-0" / "glue.json").read_bytes() == kept


def test_an_unfinished_run_does_not_hide_a_table(folder, tmp_path, monkeypatch, capsys):
    call(command(folder, "--tasks", "RTE", "--epochs", "1"), monkeypatch)
    (tmp_path / "config.json").write_bytes((folder / "self-0" / "config.json").read_bytes())
    line = refused(command(folder, runs=["random-0", tmp_path]), monkeypatch, capsys)
    assert "is not finished: continue it with python train.py --resume" in line
    call(command(folder, "--table", runs=["random-0", tmp_path]), monkeypatch)
    out = capsys.readouterr()
    assert "left out: " in out.err and "random" in out.out
