"""python masking.py RUN "..." on a run made by hand.   python -m pytest tests/test_demo.py -q"""

import re
import runpy
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import masking as M
from data import corpus as corpora
from data import reach
from data.files import read_json, save_tensors, write_json
from data.tokenizer import CLS, MASK, SEP
from model import Bert, Shape, load
from tests.test_data import write_corpus

ROOT = Path(__file__).parent.parent
SENTENCE = "the model reads <every> token & learns to guess what is hidden from it"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    source = write_corpus(folder / "text.txt")
    text = corpora.load(corpora.prepare(str(source), 600, folder / "cache"), 64)
    torch.manual_seed(0)
    model = Bert(Shape(600, 2, 64, 64, init_std=0.3))
    run = folder / "run"
    run.mkdir()
    (run / "tokenizer.model").write_bytes(text.tokenizer_path.read_bytes())
    flags = {"corpus": str(source), "vocab_size": 600, "cache": str(folder / "cache"),
             "masking": "random", "seq_len": 64, "corpus_tokens": 0}
    write_json(run / "config.json", {"flags": flags, "tokenizer_sha256": text.tokenizer.sha256,
                                     "corpus_sha256": text.sha256})
    save_tensors(run / "model.pt", {"shape": asdict(model.shape), "model": model.state_dict()})
    return run


def test_a_window_hides_what_is_outside_and_nothing_else(run):
    model, _ = load(run)
    tokens = torch.randint(5, 600, (3, 40))
    positions, inputs, labels = M.mask_for_evaluation(tokens, 600)
    whole = reach.losses(model, inputs, positions, labels, 0)
    with torch.no_grad():
        expected = F.cross_entropy(model(inputs, positions).flatten(0, 1), labels.flatten())
    assert whole.mean().item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(reach.losses(model, inputs, positions, labels, 40), whole, atol=1e-5)
    near = reach.losses(model, inputs, positions, labels, 4)
    assert not torch.allclose(near, whole, atol=1e-3)
    other = inputs.clone()  # only what no window of the first masked token can see; [CLS] it can
    outside = (torch.arange(40) - positions[:, :1]).abs() > 4
    outside[:, 0] = False
    other[outside] = 7
    assert torch.allclose(reach.losses(model, other, positions, labels, 4)[:, 0], near[:, 0],
                          atol=1e-5)


def test_a_token_that_stands_elsewhere_is_repeated_or_near_and_else_single():
    inputs = torch.full((1, 24), 9)
    positions = torch.tensor([[2, 4, 6]])
    inputs[0, [2, 4, 6]] = MASK
    inputs[0, 20], inputs[0, 5] = 50, 51  # 18 places from the first, one from the second
    again, once = reach.elsewhere(inputs, positions, torch.tensor([[50, 51, 52]]))
    assert again.tolist() == [[True, False, False]] and once.tolist() == [[False, False, True]]


def test_reach_prints_a_line_per_window(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reach", str(run), "--blocks", "4"])
    reach.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["+-2", "+-8", "+-32", "everything"]
    text = corpora.load(corpora.prepare(str(run.parent / "text.txt"), 600, run.parent / "cache"),
                        64)
    loss, _ = M.evaluate(load(run)[0], corpora.with_ends(text.valid[:4]), nullcontext)
    assert float(lines[-1].split()[1]) == pytest.approx(loss, abs=6e-3)


def call(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["masking.py", *map(str, argv)])
    runpy.run_path(str(ROOT / "masking.py"), run_name="__main__")


def test_exact_entropy_is_one_token_masked_at_a_time(run):
    model, tokenizer = load(run)
    tokens = torch.tensor([CLS, *tokenizer.encode(SENTENCE), SEP])
    H, logits = M.exact_entropy(model, tokens)
    assert len(H) == len(tokens) - 2
    for i in (1, 4, len(tokens) - 2):
        masked = tokens.clone()
        masked[i] = MASK
        with torch.no_grad():
            p = model(masked[None])[0, i].double().softmax(-1)
        assert H[i - 1].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-4)


def test_the_table_has_a_line_per_token_and_k_marks_a_column(run, monkeypatch, capsys):
    call(monkeypatch, run, SENTENCE, "--mask-rate", "0.2")
    out = capsys.readouterr().out
    model, tokenizer = load(run)
    rows = M.explain(model, tokenizer, SENTENCE, M.DEMO, 0.2, 0)
    k = round(0.2 * len(rows))
    assert "\033" not in out  # not a terminal: no colour
    for name in M.DEMO:
        assert sum(row["masked"][name] for row in rows) == k
    pool = {i for i, row in enumerate(rows) if row["pool"] is not None}
    assert len(pool) == 2 * k and all(row["clear"] > 0 for row in rows)
    high = sorted(pool, key=lambda i: -rows[i]["pool"])[:k]
    assert {i for i, row in enumerate(rows) if row["masked"]["high"]} == set(high)
    table = out.split("best guesses")[1].rstrip().splitlines()[1:]
    assert len(table) == len(rows)
    for row in rows:
        guesses = row["guesses"]
        assert f"[{row['alone']:.1f}]" in out and len(guesses) == 5
        assert sum(p for _, p in guesses) <= 1.0001
        assert all(p >= q for (_, p), (_, q) in zip(guesses, guesses[1:]))


def test_a_run_with_type_scores_has_a_column_for_them(run, monkeypatch, capsys, tmp_path):
    for path in run.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = read_json(run / "config.json")
    config["flags"]["score_input"] = "type"
    write_json(tmp_path / "config.json", config)
    model, tokenizer = load(run)
    sentence = "the model reads every token"
    ids = tokenizer.encode(sentence)
    types = M.TypeEntropy(600)
    types.mean[:] = 0
    types.mean[ids[3]] = 5.0
    save_tensors(tmp_path / "checkpoint.pt", {"types": torch.stack([types.mean, types.seen])})
    call(monkeypatch, tmp_path, sentence)
    assert re.search(r"alone .* mix type ", capsys.readouterr().out)
    strategies = {"type": ("high", lambda model, *where: types(*where), 0)}
    rows = M.explain(model, tokenizer, sentence, strategies, 0.1, 0)
    assert [row["masked"]["type"] for row in rows] == [i == 3 for i in range(len(rows))]


def test_colour_follows_the_terminal_and_no_color(run, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    call(monkeypatch, run, SENTENCE)
    assert "\033[48;2;" in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    call(monkeypatch, run, SENTENCE)
    assert "\033" not in capsys.readouterr().out


def test_the_page_is_whole_and_overwrites_nothing(run, monkeypatch, capsys, tmp_path):
    page = tmp_path / "a page.html"
    call(monkeypatch, run, SENTENCE, "--html", page)
    html = page.read_text()
    assert "&lt;" in html and "&amp;" in html and "<every>" not in html
    assert "prefers-color-scheme: dark" in html
    assert not re.search(r"(src|href)=|@import|url\(", html)
    model, tokenizer = load(run)
    rows = M.explain(model, tokenizer, SENTENCE, M.DEMO, 0.15, 0)
    k = round(0.15 * len(rows))
    assert html.count("<tr>") == len(rows) + 1 and html.count("●") == k * len(M.DEMO)
    assert "$" not in html  # every placeholder was filled
    call(monkeypatch, run, SENTENCE, "--html", page)  # its own page may be made anew
    page.write_text("a diary")
    with pytest.raises(SystemExit):
        call(monkeypatch, run, SENTENCE, "--html", page)
    assert page.read_text() == "a diary"
    assert "name another" in capsys.readouterr().err


def test_scores_are_compared_with_exact_entropies(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare_scores", str(run), "3"])
    runpy.run_module("tests.compare_scores", run_name="__main__")
    out = capsys.readouterr().out
    assert "3 held-out sentences" in out
    for line in ("masked and clear", "masked and exact", "clear and exact"):
        values = re.search(line + r" +(-?\d\.\d+) +(-?\d\.\d+)", out).groups()
        assert all(-1 <= float(v) <= 1 for v in values)


@pytest.mark.parametrize("argv, message", [
    ([], "python train.py --masking self"),
    (["RUN"], "give a sentence"),
    (["RUN", "a"], "from 2 to 62"),
    (["RUN", "token " * 100], "from 2 to 62"),
    (["RUN", "a b c d", "--mask-rate", "0.9"], "--mask-rate"),
    (["RUN", "the model reads", "--html", "/"], "name another"),
    (["RUN", "the", "model", "reads"], "unrecognized arguments"), (["a sentence"], "RUN"),
    (["nowhere", "a b c d"], "give a run folder"), ([ROOT, "a b c d"], "not a run folder"),
])
def test_mistakes_are_one_line(run, argv, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *[run if a == "RUN" else a for a in argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
