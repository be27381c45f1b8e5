"""glue.py end to end, on small files of the official layout.

    python -m pytest tests/test_glue.py -q
"""

import gc
import json
import random
import re
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import glue
from data.files import lock_folder, read_json, write_json
from data.runs import read_log
from data.tasks import TASKS
from model import Bert, Shape
from tests.test_glue_data import LABELS, write_task
from tests.test_train import call, refused, spawn

CPU = torch.device("cpu")


def words(count, seed):
    random.seed(seed)
    return ["".join(random.choice("bdfgklmnprst") + random.choice("aeiou") for _ in range(3))
            for _ in range(count)]


# Two topics: a sentence has words of one of them alone. Which topic a word belongs to can only be
# learned from the company that it keeps: all words are made of the same syllables.
TOPICS = words(60, 1), words(60, 2)


def sentence(topic, rng, vocabulary=slice(None)):
    return " ".join(rng.choice(TOPICS[topic][vocabulary]) for _ in range(8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus, GLUE's files (small), and two finished runs of one seed: random and self."""
    folder = tmp_path_factory.mktemp("glue")
    rng = random.Random(0)
    documents = ["\n".join(sentence(i % 2, rng) for _ in range(4)) for i in range(1200)]
    (folder / "text.txt").write_text("\n\n".join(documents) + "\n")
    for task in TASKS:
        rows = [(sentence(0, rng), sentence(1, rng), LABELS[task][i % 2]) for i in range(40)]
        write_task(folder / "GLUE", task, rows, n_dev=20)
    with pytest.MonkeyPatch.context() as patch:
        for masking in ("random", "self"):
            call(["train.py", "--corpus", folder / "text.txt", "--cache", folder / "cache",
                  "--vocab-size", "700", "--layers", "1", "--width", "64", "--seq-len", "32",
                  "--batch-size", "16", "--steps", "250", "--eval-blocks", "32", "--threads", "1",
                  "--masking", masking, "--out", folder / masking], patch)
    return folder


@pytest.fixture(autouse=True)
def fresh(folder):
    """Signal handlers as they were, and no score left from another test."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for path in [*folder.glob("*/glue.json"), *folder.glob("cache/glue/*/glue.json")]:
        path.unlink()
    gc.collect()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def command(folder, *argv, runs=("random", "self")):
    return ["glue.py", *(folder / run for run in runs), "--glue-dir", folder / "GLUE",
            "--cache", folder / "cache", "--threads", "1", *argv]


def scores(run):
    return read_json(run / "glue.json")["scores"]


def test_all_nine_tasks_from_runs_to_table(folder, monkeypatch, capsys):
    call(command(folder, "--epochs", "1", "--json"), monkeypatch)
    out = capsys.readouterr()
    table, = json.loads(out.out)
    assert table["tasks"] == list(TASKS) and table["baseline"] == "random"
    assert [row["name"] for row in table["floors"] + table["rows"]] == [
        "majority class", "random weights", "random", "self"]
    for row in table["floors"] + table["rows"]:
        assert set(row["tasks"]) == set(TASKS) and {"primary", "glue"} == set(row["ends"])
        assert all(np.isfinite(v["mean"]) for v in row["tasks"].values())
    assert set(table["rows"][1]["against"]) == {"primary", "glue"}
    assert any("MNLI 40 of 392702 (training), 20 of 9815, 20 of 9832" in n for n in table["notes"])
    assert "CoLA: 40 of 40 training rows, for example [CLS]▁" in out.err
    for run in ("random", "self"):
        entries = scores(folder / run)
        assert [e["task"] for e in entries] == list(TASKS)
        assert set(entries[5]["parts"]) == {"matched", "mismatched"}
        assert set(entries[2]["parts"]) == {"accuracy", "f1"}
        for e in entries:
            assert e["score"] == pytest.approx(np.mean(list(e["parts"].values())))
            accuracy = e["parts"].get("accuracy", e["parts"].get("matched"))
            if accuracy is not None:
                assert int(e["right"], 16).bit_count() == pytest.approx(accuracy / 100 * 20)
        assert entries[3]["task"] == "STS-B" and entries[3]["right"] == ""

    # The same command again computes nothing: the files do not change, the table is the same.
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("glue.json")}
    monkeypatch.setattr(glue, "fine_tune", None)
    call(command(folder, "--epochs", "1", "--json"), monkeypatch)
    assert json.loads(capsys.readouterr().out) == [table]
    call(["glue.py", folder / "random", folder / "self", "--cache", folder / "cache", "--table",
          "--json"], monkeypatch)
    assert json.loads(capsys.readouterr().out) == [table]
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("glue.json")}
    call(["glue.py", folder / "self", "--cache", folder / "cache", "--table", "--markdown",
          "--parts"], monkeypatch)
    out = capsys.readouterr().out
    assert "| self | 1 |" in out and "MRPC f1" in out and "there is no random arm" in out


def test_every_tokenizer_shows_a_row_in_its_own_pieces(folder, tmp_path, monkeypatch, capsys):
    call(["train.py", "--corpus", folder / "text.txt", "--cache", folder / "cache", "--vocab-size",
          "320", "--layers", "1", "--width", "64", "--seq-len", "32", "--batch-size", "4",
          "--steps", "2", "--threads", "1", "--masking", "random", "--out", tmp_path / "small"],
         monkeypatch)
    few = ["--tasks", "CoLA", "--epochs", "1"]
    for runs in ((tmp_path / "small", "random"), ("random", tmp_path / "small")):
        capsys.readouterr()
        call(command(folder, *few, runs=runs), monkeypatch)
        shown = re.findall(r"CoLA: .*for example (.*) -> ", capsys.readouterr().out)
        assert len(shown) == 2 and shown[0] != shown[1]
        text = (folder / "GLUE" / "CoLA" / "train.tsv").read_text().replace(" ", "▁")
        for pieces in shown:  # the beginning of a sentence of the file: no other pieces give that
            assert pieces.removeprefix("[CLS]▁").replace("[SEP]", "") in text
        (folder / "random" / "glue.json").unlink()


def test_scores_are_pure_in_run_recipe_rows_and_seed(folder, monkeypatch, capsys):
    flags = ["--tasks", "rte, CoLA", "--epochs", "2", "--seeds", "2"]
    call(command(folder, *flags), monkeypatch)
    first = scores(folder / "self")
    assert [(e["task"], e["seed"]) for e in first] == [
        ("CoLA", 0), ("CoLA", 1), ("RTE", 0), ("RTE", 1)]
    (folder / "self" / "glue.json").unlink()
    # The order of the tasks, the other runs and what else is computed do not matter.
    call(command(folder, "--tasks", "RTE", *flags[2:], runs=["self"]), monkeypatch)
    again = scores(folder / "self")
    assert [e["parts"] for e in again] == [e["parts"] for e in first[2:]]
    # Another recipe is computed beside the first, and --table shows both.
    call(command(folder, "--tasks", "RTE", "--epochs", "1", "--max-train", "10"), monkeypatch)
    assert len(scores(folder / "self")) == 3
    assert "RTE 10 of 2490 (training)" in capsys.readouterr().out
    call(command(folder, "--table"), monkeypatch)
    assert "2 tables" in capsys.readouterr().out
    call(command(folder, "--table", "--epochs", "1"), monkeypatch)
    assert "tables" not in capsys.readouterr().out
    # Other rows are other scores.
    write_task(folder / "GLUE2", "RTE", [("a b", "c d", LABELS["RTE"][i % 2]) for i in range(12)])
    call(command(folder, *flags[2:], "--tasks", "RTE", "--glue-dir", folder / "GLUE2"), monkeypatch)
    assert len(scores(folder / "self")) == 5 and "12 of 2490" in capsys.readouterr().out


def test_pretraining_clears_the_floor_where_it_must(folder, tmp_path, monkeypatch, capsys):
    """Which topic does a sentence have? Training rows and development rows share no word, so only
    what pretraining knows about words can carry over. As SST-2, fine-tuned and frozen."""
    rng = random.Random(3)
    seen, unseen = slice(0, 30), slice(30, 60)
    train = [(sentence(i % 2, rng, seen), "", str(i % 2)) for i in range(120)]
    dev = [(sentence(i % 2, rng, unseen), "", str(i % 2)) for i in range(200)]
    write_task(tmp_path, "SST-2", train)
    text = (tmp_path / "SST-2" / "train.tsv").read_text().splitlines()[0]
    lines = [text, *(f"{a}\t{y}" for a, _, y in dev)]
    (tmp_path / "SST-2" / "dev.tsv").write_text("\n".join(lines) + "\n")
    for flags in (["--epochs", "5"], ["--freeze"]):
        call(command(folder, "--tasks", "SST-2", "--glue-dir", tmp_path, "--json", *flags,
                     runs=["random"]), monkeypatch)
        table, = json.loads(capsys.readouterr().out)
        majority, floor, run = (row["tasks"]["SST-2"]["mean"]
                                for row in (*table["floors"], *table["rows"]))
        assert majority == 50 and abs(floor - 50) < 15  # cannot know the unseen words
        assert run > 90


# --------------------------------------------------------------------------------------------------
# pieces


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


def test_a_single_sentence_has_no_second_one():
    model = glue.Classifier(Bert(Shape(99, 2, 64, 32)), 2, "pair").eval()
    tokens, types, attend = glue.collate(rows_of([9, 20]), CPU)
    u, v, difference = model.vector(tokens, types, attend).chunk(3, dim=1)
    assert (v == 0).all() and (difference == u.abs()).all() and u.isfinite().all()


def test_outputs_come_back_in_the_order_of_the_rows(monkeypatch):
    rows = rows_of([5, 31, 8, 8, 20, 3, 30])
    monkeypatch.setattr(glue, "EVAL_TOKENS", 60)
    seen = []
    out = glue.over_rows(lambda tokens, types, attend: attend.sum(1, keepdim=True), rows, CPU,
                         seen.extend)
    assert out.squeeze(1).tolist() == [5, 31, 8, 8, 20, 3, 30] and len(seen) == 7


def options(**changes):
    return SimpleNamespace(**{**dict(
        epochs=1, batch_size=4, lr=1e-3, embedding_lr=1e-4, warmup_frac=0.1, weight_decay=0.0,
        clip=1.0, pool_output="mean", freeze=False), **changes})


def tune(outputs, labels, devs=(), **changes):
    torch.manual_seed(0)
    bert = Bert(Shape(99, 1, 64, 32, dropout=0.0))
    before = {n: p.clone() for n, p in bert.state_dict().items()}
    rows = rows_of([6 + i % 5 for i in range(len(labels))])
    done = glue.fine_tune(bert, outputs, rows, labels, [rows, *devs], options(**changes), 1, CPU,
                          torch.no_grad if changes.get("no_grad") else glue.contextlib.nullcontext,
                          lambda rows, updates=0: None)
    return done, before, bert


def test_a_regression_is_learned_in_the_units_of_its_labels_correlation():
    labels = [float(i % 6) for i in range(30)]
    (out,), _, _ = tune(1, labels, epochs=60)
    assert out.shape == (30, 1)
    measured = glue.measure(TASKS["STS-B"], [out], [SimpleNamespace(labels=labels)])
    assert measured["pearson"] > 90 and measured["spearman"] > 90


def test_a_frozen_encoder_stays_bit_for_bit_and_a_free_one_does_not():
    for freeze in (True, False):
        (out,), before, bert = tune(2, [0, 1] * 10, freeze=freeze)
        same = all(torch.equal(before[n], p) for n, p in bert.state_dict().items())
        assert same == freeze and out.shape == (20, 2)


def test_a_loss_that_is_not_finite_ends_the_job_and_keeps_the_scores(folder, monkeypatch, capsys):
    call(command(folder, "--tasks", "CoLA", "--epochs", "1", runs=["self"]), monkeypatch)
    with pytest.raises(SystemExit) as stop:
        call(command(folder, "--tasks", "RTE", "--lr", "1e38", "--clip", "1e38", runs=["self"]),
             monkeypatch)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "self, RTE, seed 0: the loss is not finite" in error
    assert len(scores(folder / "self")) == 1


def test_updates_are_those_of_torch():
    """Four steps of fine_tune against plain ones: gradient, clipping, schedule, AdamW, decay, and
    a tenth of the rate for the token embeddings."""
    labels = [0, 1, 1, 0]
    rows = rows_of([7, 7, 7, 7], 4)
    torch.manual_seed(0)
    bert = Bert(Shape(99, 1, 64, 32, dropout=0.0))
    torch.manual_seed(0)
    twin = Bert(Shape(99, 1, 64, 32, dropout=0.0))
    glue.fine_tune(bert, 2, rows, labels, [], options(
        epochs=4, warmup_frac=0.25, clip=0.01, weight_decay=0.1), 5, CPU,
        glue.contextlib.nullcontext, lambda *_: None)
    torch.manual_seed(5)
    head = torch.nn.Linear(64, 2)
    torch.nn.init.normal_(head.weight, std=0.02)
    torch.nn.init.zeros_(head.bias)
    tokens = torch.tensor(np.stack([ids for ids, _ in rows]).astype(np.int64))
    types = torch.tensor([[0, 0, 0, 0, 1, 1, 1]] * 4)
    parameters = [*twin.parameters(), *head.parameters()]
    words = twin.token_embedding.weight
    groups = [{"params": [p for p in parameters if (p.dim() > 1) == decays and p is not words],
               "weight_decay": 0.1 * decays} for decays in (True, False)]
    groups.append({"params": [words], "weight_decay": 0.1})
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-6)
    for rate in (1e-3, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3):  # one step of warm-up, then down to 0
        loss = F.cross_entropy(head(twin.encode(tokens, None, types).mean(1)), torch.tensor(labels))
        adam.zero_grad()
        loss.backward()
        norm = sum(p.grad.square().sum() for p in parameters if p.grad is not None) ** 0.5
        for p in parameters:
            if p.grad is not None:
                p.grad *= 0.01 / norm
        for group, share in zip(adam.param_groups, (1, 1, 0.1)):
            group["lr"] = rate * share
        adam.step()
    for (name, p), q in zip(bert.named_parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5, msg=name)


def test_the_floor_is_the_run_before_its_first_update(folder):
    run = glue.open_subject(str(folder / "random"))
    floor = glue.build(glue.make_floor(run, run.seed, folder), dropout=0.2)
    torch.manual_seed(run.seed)
    start = Bert(run.shape)
    for (name, p), q in zip(floor.named_parameters(), start.parameters()):
        if name == "type_embedding.weight":
            q = q[:1].repeat(2, 1)
        assert torch.equal(p, q), name
    assert floor.shape.dropout == 0.2 and glue.build(run, 0.3).shape.dropout == 0.3
    log, config = read_log(folder / "random"), read_json(folder / "random" / "config.json")
    assert run.margin == pytest.approx(0.9 * config["unigram_entropy"] - log[-1]["val_loss"])
    assert glue.make_floor(run, 0, folder).model != glue.make_floor(run, 1, folder).model


def test_streams_differ_by_seed_and_task():
    streams = {glue.stream_of(s, f, t) for s in range(5) for f in range(5) for t in TASKS}
    assert len(streams) == 5 * 5 * 9


@pytest.mark.parametrize("flags, rates, floors", [  # by width: --lr, --embedding-lr
    ([], {128: (1e-3, 1e-3), 256: (6e-4, 6e-5)}, {128: (5e-4, 5e-4), 256: (1.5e-4, 1.5e-4)}),
    (["--lr", "2e-3"], {128: (2e-3, 2e-3), 256: (2e-3, 2e-4)}, {256: (2e-3, 2e-3)}),
    (["--embedding-lr", "3e-4"], {128: (1e-3, 3e-4), 256: (6e-4, 3e-4)}, {256: (1.5e-4, 3e-4)}),
    (["--freeze"], {128: (3e-3, 3e-3), 256: (3e-3, 3e-4)}, {256: (3e-3, 3e-3)})])
def test_the_default_rates_follow_the_weights(flags, rates, floors, folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(x) for x in command(folder, *flags)])
    a, _ = glue.parse_flags()
    for is_floor, expected in ((False, rates), (True, floors)):
        for width, both in expected.items():
            subject = SimpleNamespace(shape=Shape(99, 1, width), is_floor=is_floor)
            recipe = glue.recipe_of(subject, a)
            assert (recipe["lr"], recipe["embedding_lr"]) == both
            assert list(recipe) == glue.RECIPE_NAMES
    # What is kept beside a score is what it was made with.
    call(command(folder, "--tasks", "RTE", "--epochs", "1", *flags, runs=["self"]), monkeypatch)
    assert [(e["recipe"]["lr"], e["recipe"]["embedding_lr"])
            for e in scores(folder / "self")] == [rates[128]]
    # Scores of before 2026-11-26, which had one rate for all, are those of equal rates.
    if rates[128][0] == rates[128][1]:
        saved = scores(folder / "self")
        del saved[0]["recipe"]["embedding_lr"]
        write_json(folder / "self" / "glue.json", {"scores": saved})
        monkeypatch.setattr(glue, "fine_tune", None)
        call(command(folder, "--tasks", "RTE", "--epochs", "1", *flags, runs=["self"]), monkeypatch)
        assert scores(folder / "self") == saved


# --------------------------------------------------------------------------------------------------
# faults and mistakes


def test_a_killed_job_goes_on_where_it_was(folder, monkeypatch, capsys):
    flags = ["--tasks", "CoLA,SST-2,MRPC,QNLI", "--epochs", "40"]
    job = spawn([str(a) for a in command(folder, *flags)])
    for _ in range(1200):
        if (folder / "self" / "glue.json").exists() and len(scores(folder / "self")) >= 2:
            break
        time.sleep(0.05)
    job.kill()
    job.wait()
    kept = scores(folder / "self")
    assert 2 <= len(kept) < 4
    call(command(folder, *flags), monkeypatch)
    entries = scores(folder / "self")
    assert entries[:len(kept)] == kept and len(entries) == 4  # nothing computed again, or lost
    assert [e["task"] for e in entries] == ["CoLA", "SST-2", "MRPC", "QNLI"]
    for run in ("random", "self"):  # and an uninterrupted job gives the same
        for e in scores(folder / run):
            assert e["seed"] == 0 and len([x for x in scores(folder / run)
                                           if x["task"] == e["task"]]) == 1
    (folder / "self" / "glue.json").unlink()
    call(command(folder, *flags, runs=["self"]), monkeypatch)
    assert [e["parts"] for e in scores(folder / "self")] == [e["parts"] for e in entries]
    capsys.readouterr()


@pytest.mark.parametrize("argv, message", [
    ([], "give the run folders to score"),
    (["RANDOM", "--tasks", "SNLI"], "there is no task SNLI; the tasks are CoLA,"),
    (["RANDOM", "--tasks", ""], "there is no task without a name"),
    (["RANDOM", "--lr", "0"], "--lr 0.0: must be above 0"),
    (["RANDOM", "--seeds", "0"], "--seeds 0: must be above 0"),
    (["RANDOM", "--epochs", "x"], "invalid int value: 'x'"),
    (["RANDOM", "--max-len", "4"], "--max-len 4: must be at least 16"),
    (["RANDOM", "--dropout", "1"], "--dropout 1.0: must be from 0 to below 1"),
    (["RANDOM", "--markdown", "--json"], "give --markdown or --json, not both"),
    (["RANDOM", "--tabel"], "unrecognized arguments: --tabel"),
    (["NOWHERE"], "is not a run folder"),
    (["RANDOM", "--glue-dir", "NOWHERE", "--tasks", "RTE"], "cannot read .*RTE/train.tsv"),
    (["RANDOM", "--table"], "nothing is scored yet"),
    (["RANDOM", "RANDOM2", "--tasks", "RTE", "--epochs", "1"], "the same arm and seed"),
])
def test_mistakes_are_one_line(argv, message, folder, monkeypatch, capsys):
    if "RANDOM2" in argv:  # a run that was copied
        (folder / "copy").mkdir(exist_ok=True)
        for name in ("config.json", "tokenizer.model", "model.pt", "log.jsonl"):
            (folder / "copy" / name).write_bytes((folder / "random" / name).read_bytes())
    names = {"RANDOM": folder / "random", "RANDOM2": folder / "copy", "NOWHERE": folder / "nowhere"}
    argv = ["glue.py", *(names.get(a, a) for a in argv)]
    if argv[1:] and "--glue-dir" not in argv:
        argv += ["--glue-dir", folder / "GLUE", "--cache", folder / "cache"]
    assert re.search(message, refused(argv, monkeypatch, capsys).replace("\n", " "))


def test_an_unfinished_run_is_refused_but_does_not_hide_a_table(folder, monkeypatch, capsys):
    call(command(folder, "--tasks", "RTE", "--epochs", "1"), monkeypatch)
    unfinished = folder / "unfinished"
    unfinished.mkdir(exist_ok=True)
    (unfinished / "config.json").write_bytes((folder / "self" / "config.json").read_bytes())
    line = refused(command(folder, runs=["random", "unfinished"]), monkeypatch, capsys)
    assert "is not finished: continue with python train.py --resume" in line
    call(command(folder, "--table", runs=["random", "unfinished"]), monkeypatch)
    out = capsys.readouterr()
    assert "left out: " in out.err and "random" in out.out


def test_a_damaged_glue_json_or_a_run_in_use_is_refused(folder, monkeypatch, capsys):
    path = folder / "self" / "glue.json"
    for content in ("{", "[]", {"scores": 3}, {"scores": [{"task": "RTE"}]}):
        path.write_text(content) if isinstance(content, str) else write_json(path, content)
        before = path.read_bytes()
        line = refused(command(folder, "--tasks", "RTE"), monkeypatch, capsys)
        assert "is damaged" in line and path.read_bytes() == before
    path.unlink()
    gc.collect()
    lock = lock_folder(folder / "self")
    assert "in use by another process" in refused(command(folder), monkeypatch, capsys)
    lock.close()


def test_help_comes_before_torch():
    text = spawn(["-X", "importtime", "glue.py", "--help"]).communicate()[0]
    assert "--freeze" in text and "data.tasks" in text and "torch._C" not in text
