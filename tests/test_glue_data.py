"""GLUE's files and metrics, by hand.   python -m pytest tests/test_glue_data.py -q"""

import hashlib
import math

import numpy as np
import pytest
import torch

from data import metrics as m
from data import tasks as G
from data.files import UserError
from tests.helpers import HEADERS, LABELS, line, packed_zip, write_task
from tests.test_download import serve

ROWS = [('a " stray quote', "one \x85 two", 0), ("b", 'c"', 1), ("it 's, fine", "d", 0)]


@pytest.mark.parametrize("task", G.TASKS)
def test_every_task_is_read_from_the_official_layout(task, tmp_path):
    labels = LABELS[task]
    write_task(tmp_path, task, [(a, b, labels[y]) for a, b, y in ROWS])
    train, devs, sha256 = G.read_task(task, tmp_path, "")
    assert len(devs) == len(G.TASKS[task].dev) and len(sha256) == 64
    for part, more in ((train, ""), *((dev, " indeed") for dev in devs)):
        assert [list(row) for row in zip(*part.sentences)] == [
            [a + more, b][:len(part.sentences)] for a, b, _ in ROWS]
        wanted = {"STS-B": [0.0, 3.8, 0.0], "MNLI": [2, 1, 2]}.get(task, [0, 1, 0])
        assert part.labels == wanted
    assert len(train.sentences) == (1 if task in ("CoLA", "SST-2") else 2)
    assert (train.official, *[d.official for d in devs]) == G.TASKS[task].rows


def test_mrpc_from_the_original_release(tmp_path):
    (tmp_path / "MRPC").mkdir()
    rows = [f"{i % 2}\t{i}\t{i + 100}\tsentence {i}\tother {i}" for i in range(6)]
    (tmp_path / "MRPC" / "msr_paraphrase_train.txt").write_text(
        "\n".join([HEADERS["MRPC"], *rows]) + "\n", encoding="utf-8")
    ids = tmp_path / "MRPC" / "mrpc_dev_ids.tsv"
    ids.write_text("4\t104\n1\t101\n")
    train, (dev,), _ = G.read_task("MRPC", tmp_path, "")
    assert dev.sentences[0] == ["sentence 1", "sentence 4"] and dev.labels == [1, 0]
    assert train.sentences[1] == ["other 0", "other 2", "other 3", "other 5"]
    assert train.labels == [0, 0, 1, 1] and (train.official, dev.official) == (3668, 408)
    assert (train.in_file, dev.in_file) == (4, 2)
    ids.write_text("4\t104\n1\t999\n")
    with pytest.raises(UserError, match="names 2 pairs .* has 1"):
        G.read_task("MRPC", tmp_path, "")


STS_B = HEADERS["STS-B"] + "\n"
BAD = {  # what is wrong -> (task, text of train.tsv, the message)
    "header": ("SST-2", "text\tlabel\nx\t1\n",
               "line 1: a header .* sentence is not in 'text, label'"),
    "columns": ("SST-2", "sentence\tlabel\nfine\t1\nnot fine\n", "line 3: 2 tab-sep.* not 1"),
    "label": ("RTE", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n",
              "line 2: the label entailment or not_entailment was expected, not 'maybe'"),
    "unlabelled": ("SST-2", "sentence\tlabel\nfine\t-1\n", "line 2.*have no labels"),
    "score": ("STS-B", STS_B + line("STS-B", "train", "a", "b", "nan"),
              "line 2: the label a number from 0 to 5"),
    "bytes": ("SST-2", b"sentence\tlabel\nfine\t1\n\xff\xfe\t1\n", "line 3: not UTF-8"),
    # What people's own copies have been through.
    "a header for CoLA": ("CoLA", "source\tlabel\tmark\tsentence\ng\t1\t\ta b\n",
                          "line 1: .* is a header, where none"),
    "pandas' numbers for CoLA": ("CoLA", "0\t1\t2\t3\ng\t1\t\ta b\n",
                                 "line 1 is a header, where none"),
    "all is quoted": ("SST-2", '"sentence"\t"label"\n"a"\t"1"\n',
                      "line 1: a header .* in quote marks, as a spreadsheet .*QUOTE_NONE"),
    "a spreadsheet's commas": ("CoLA", 'g\t1\t\tno comma\n' + 'g\t1\t\t"a, b."\n' * 3,
                               "line 2: its fields are in quote marks"),
    "pandas' quote marks": (
        "RTE", "index\tsentence1\tsentence2\tlabel\n0\ta, b\tc\tentailment\n"
        + '0\tb\t"He said ""yes"" to it."\tentailment\n' * 3, "line 3: its fields are in quote"),
    "too many rows": ("WNLI", HEADERS["WNLI"] + "\n" + "0\ta\tb\t1\n" * 636,
                      "has 636 rows, and GLUE's own file 635"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_wrong_file_is_named_with_its_line(what, tmp_path):
    task, text, message = BAD[what]
    (tmp_path / task).mkdir()
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / task / "train.tsv").write_bytes(data)
    with pytest.raises(UserError, match=message):
        G.read_task(task, tmp_path, "")


def test_development_rows_in_the_training_file_are_refused_or_counted(tmp_path):
    rows = [(f"a {i}", f"b {i}", "1") for i in range(60)]
    write_task(tmp_path, "MRPC", rows, dev=rows[40:])
    with pytest.raises(UserError, match="MRPC/dev.tsv: 20 of its 20 rows are in.* 'a 40'"):
        G.read_task("MRPC", tmp_path, "")
    # The official files of CoLA and STS-B share a few.
    write_task(tmp_path, "MRPC", rows, dev=[rows[0], *((a, "c", "0") for a, _, _ in rows[:39])])
    _, (dev,), _ = G.read_task("MRPC", tmp_path, "")
    assert dev.shared == 1


def test_quote_marks_of_the_official_files_are_not_a_spreadsheet_s(tmp_path):
    """Sentences that are quotations, and QQP, which is quoted where there is a quote mark."""
    rows = [('"It is late, I go."', "He went, as he said.", "1")] * 3
    write_task(tmp_path, "MRPC", rows + [('The "thing", he said', "a, b", "0")] * 3)
    train, _, _ = G.read_task("MRPC", tmp_path, "")
    assert train.sentences[0][0] == '"It is late, I go."'
    write_task(tmp_path, "QQP", [('"What is ""it""?"', "What, then, is it?", "1")] * 9)
    assert len(G.read_task("QQP", tmp_path, "")[0]) == 9


def test_a_subset_of_the_training_rows_is_always_the_same(tmp_path):
    rows = [(f"a {i}", f"b {i}", "01"[i % 2]) for i in range(50)]
    write_task(tmp_path, "WNLI", rows)
    train, (dev,), sha256 = G.read_task("WNLI", tmp_path, "", max_train=20)
    assert (len(train), train.in_file, len(dev), dev.in_file) == (20, 50, 50, 50)
    fewer, _, _ = G.read_task("WNLI", tmp_path, "", max_train=10)
    assert len(set(train.sentences[0])) == 20 and fewer.sentences[0] == train.sentences[0][:10]
    assert all(int(a.split()[1]) % 2 == y for a, y in zip(train.sentences[0], train.labels))


def test_malformed_rows_of_qqp_are_left_out_and_counted(tmp_path, capsys):
    rows = [("a", "b", "1")] * 2000
    write_task(tmp_path, "QQP", rows)
    path = tmp_path / "QQP" / "train.tsv"
    path.write_text(path.read_text() + "17\t18\tcut in the\n19\t20\n")
    train, _, _ = G.read_task("QQP", tmp_path, "")
    assert len(train) == 2000 and "2 malformed rows left out" in capsys.readouterr().err
    path.write_text(path.read_text() + "x\n" * 10)
    with pytest.raises(UserError, match="line 2004: 6 tab-separated columns"):
        G.read_task("QQP", tmp_path, "")


# ---- downloads


def offer(monkeypatch, server, task, files):
    """Serve {name: bytes} as the archives of `task`."""
    server.files.update(files)
    monkeypatch.setitem(G.FILES, task, [
        (f"{server.url}{name}", len(data), hashlib.sha256(data).hexdigest())
        for name, data in files.items()])


@pytest.fixture()
def server():
    yield from serve({})


SST = b"sentence\tlabel\nfine\t1\nbad\t0\n"
SST_DEV = SST.replace(b"fine", b"very fine").replace(b"bad", b"very bad")


def test_an_archive_is_downloaded_once_and_read_in_place(server, tmp_path, monkeypatch, capsys):
    evil = {"../evil.tsv": b"x", "/tmp/evil.tsv": b"x", "SST-2/../../evil.tsv": b"x"}
    data = packed_zip({"SST-2/train.tsv": SST, "SST-2/dev.tsv": SST_DEV, **evil})
    offer(monkeypatch, server, "SST-2", {"SST-2.zip": data})
    for _ in range(2):
        train, (dev,), _ = G.read_task("SST-2", "", tmp_path / "cache")
        assert train.labels == dev.labels == [1, 0]
    assert len(server.seen) == 1
    out = capsys.readouterr().out
    assert f"{server.url}SST-2.zip" in out and "MB" in out
    written = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert written == {"SST-2.zip", ".lock"}  # nothing was unpacked, inside or outside


# ---- rows and batches


class Letters:
    """A tokenizer with a token per letter: a is 5."""

    def encode(self, texts, threads=1):
        return [[ord(c) - ord("a") + 5 for c in text] for text in texts]


def test_encoding_cuts_the_longer_sentence_and_keeps_every_sep():
    ((ids, first),), uncut = G.encode_rows(Letters(), [["abc"]], 16)
    assert ids.tolist() == [2, 5, 6, 7, 3] and first == 5 and uncut.tolist() == [5]
    ((ids, first),), uncut = G.encode_rows(Letters(), [["abc"], ["de"]], 16)
    assert ids.tolist() == [2, 5, 6, 7, 3, 8, 9, 3] and first == 5 and uncut.tolist() == [8]
    rows = [("a" * 50, "bcd"), ("a", "b" * 50), ("a" * 50, "b" * 50), ("a" * 50, "")]
    encoded, uncut = G.encode_rows(Letters(), list(zip(*rows)), 20)
    assert uncut.tolist() == [56, 54, 103, 53]
    for (a, b), (ids, first) in zip(rows, encoded):
        ids = ids.tolist()
        assert len(ids) == 20 and ids.count(3) == 2 and ids[first - 1] == ids[-1] == 3
        kept_a, kept_b = first - 2, 20 - first - 1
        assert kept_a == len(a) or kept_b == len(b) or abs(kept_a - kept_b) <= 1
    ((ids, _),), _ = G.encode_rows(Letters(), [["a" * 50]], 20)
    assert len(ids) == 20 and ids[-1] == 3


def test_batches_hold_every_row_once_and_are_of_like_length():
    lengths = np.random.default_rng(0).integers(5, 100, 1003)
    first = G.batches(lengths, 8, 1, 0)
    assert sorted(np.concatenate(first)) == list(range(1003)) and len(first) == math.ceil(1003 / 8)
    padded = sum(len(b) * lengths[b].max() for b in first)
    assert padded < 1.1 * lengths.sum()
    again, other = G.batches(lengths, 8, 1, 0), G.batches(lengths, 8, 1, 1)
    assert all((a == b).all() for a, b in zip(first, again))
    assert any((a != b).any() for a, b in zip(first, other) if len(a) == len(b))
    of_batches = [lengths[b].mean() for b in first]
    assert abs(np.corrcoef(of_batches, range(len(first)))[0, 1]) < 0.3  # not from short to long


# ---- metrics


def test_metrics_by_hand():
    guess, truth = torch.tensor([1, 1, 0, 0, 1, 0]), torch.tensor([1, 0, 0, 1, 1, 0])
    # true positives 2, false positives 1, false negatives 1, true negatives 2
    assert m.accuracy(guess, truth) == pytest.approx(4 / 6)
    assert m.f1(guess, truth) == pytest.approx(2 / 3)
    assert m.matthews(guess, truth) == pytest.approx((2 * 2 - 1 * 1) / 9)
    a, b = torch.tensor([1.0, 2, 3, 4]), torch.tensor([2.0, 1, 4, 3])
    assert m.pearson(a, b) == pytest.approx(0.6) and m.spearman(a, b) == pytest.approx(0.6)
    assert m.spearman(a, b.exp()) == pytest.approx(0.6) != pytest.approx(m.pearson(a, b.exp()))
    # ties: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4
    assert m.spearman(torch.tensor([1.0, 2, 2, 3]), a) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert m.mean_ranks(torch.tensor([7.0, 1, 7, 7, 0])).tolist() == [4, 2, 4, 4, 1]


def test_which_rows_are_correct_and_what_the_majority_scores():
    sst2, stsb, dev = G.TASKS["SST-2"], G.TASKS["STS-B"], G.Rows([], [1, 0, 0, 1, 1], 5)
    outputs = torch.tensor([[0., 1], [0, 1], [1, 0], [0, 1], [1, 0]])  # predictions 1, 1, 0, 1, 0
    data = dev, [dev], "the files' hash"
    assert m.measured(sst2, [outputs], data)["correct"] == "10110"
    assert m.measured(sst2, [-outputs], data)["correct"] == "01001"
    assert m.measured(stsb, [outputs[:, :1]], data)["correct"] == ""
    assert m.majority_class(sst2, [0, 1, 1], [dev]) == {"accuracy": 60}
    assert m.majority_class(G.TASKS["MRPC"], [0, 0, 1], [dev]) == {"accuracy": 40, "f1": 0}


def test_metrics_are_exact_in_float64():
    random = np.random.default_rng(0)
    x, y = random.normal(size=500), random.normal(size=500)
    ours = m.pearson(torch.tensor(x), torch.tensor(y))
    assert ours == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-14)
    p, t = random.integers(0, 2, (2, 500))
    tp, tn = ((p == 1) & (t == 1)).sum(), ((p == 0) & (t == 0)).sum()
    fp, fn = ((p == 1) & (t == 0)).sum(), ((p == 0) & (t == 1)).sum()
    by_formula = (tp * tn - fp * fn) / math.sqrt(
        float(tp + fp) * float(tp + fn) * float(tn + fp) * float(tn + fn))
    assert m.matthews(torch.tensor(p), torch.tensor(t)) == pytest.approx(by_formula, abs=1e-14)


def test_degenerate_predictions_score_0():
    zeros, ones, mixed = torch.zeros(4).long(), torch.ones(4).long(), torch.tensor([0, 1, 1, 0])
    assert m.f1(zeros, mixed) == m.f1(zeros, zeros) == 0 and m.f1(ones, mixed) == 2 / 3
    assert m.matthews(zeros, mixed) == m.matthews(mixed, ones) == 0
    score = torch.tensor([1.0, 2, 3, 4])
    constant = torch.full((4,), 0.1)  # its mean is not exactly 0.1
    broken = torch.tensor([1.0, math.nan, 2, 3])
    for metric in (m.pearson, m.spearman):
        assert metric(constant, score) == metric(score, constant) == metric(broken, score) == 0
    tiny = torch.tensor([0, 1e-200, 0, 1e-200], dtype=torch.float64)
    assert m.pearson(tiny, tiny) == pytest.approx(1)
