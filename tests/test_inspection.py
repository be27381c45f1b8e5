"""What a strategy masks, on a model and a run made by hand.

    python -m pytest tests/test_inspection.py -q
"""

import re
import shutil

import numpy as np
import pytest
import torch

import masking as M
from data import corpus as corpora
from data.inspection import (
    DIAGNOSIS_SEED, diagnose, dose, exact_entropy, explain, neighbour, strategies_of, token_kinds,
)
from data.tokenizer import CLS, MASK, N_SPECIAL, SEP
from data.vocabulary import VocabularyMean
from masking import Strategy
from model import Bert, Shape, load
from tests import helpers
from tests.helpers import T, V, call, save_run, small_model, write_corpus

SENTENCE = "the model reads <every> token & learns to guess what is hidden from it"


def rows_of(n):
    """(n, T) tokens between [CLS] and [SEP], with a [SEP] inside every second row."""
    tokens = helpers.rows_of(n)
    tokens[::2, 7] = SEP
    return tokens


def entropy_alone(model, row, place):
    """Nats, in float64, by the definition: one token masked, everything else as it is."""
    masked = row.clone()
    masked[place] = MASK
    with torch.no_grad():
        p = model(masked[None])[0, place].double().softmax(-1)
    return -(p * p.log()).sum().item()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspection")
    source = write_corpus(folder / "text.txt")
    text = corpora.load(corpora.prepare(str(source), 600, folder / "cache"), 64)
    torch.manual_seed(0)
    return save_run(folder / "run", Bert(Shape(600, 2, 64, 64, init_std=0.3)), text.tokenizer_path)


# ---- for the log


def test_the_diagnosis_of_a_known_strategy():
    """A strategy that takes the numbers: their share is 1, and it repeats itself."""
    model, tokens = small_model(init_std=0.3), rows_of(10)
    pieces = [f"▁{i}" if i % 3 == 0 else "▁word" if i % 3 == 1 else "ing" for i in range(V)]
    kinds = token_kinds(pieces, np.arange(V))
    for kind, which in (("rare", range(100)), ("frequent", range(200, 300))):
        assert kinds[kind].nonzero().flatten().tolist() == list(which)
    H = kinds["number"].float()[tokens]
    ordinary = tokens >= N_SPECIAL
    k = int((H * ordinary).sum(1).min())

    strategy = Strategy(reads=lambda model, tokens, places: H.gather(1, places))
    found = diagnose(model, tokens, k, strategy, kinds)
    assert not model.training and "dose" not in found and "rank_correlation" not in found
    share = (tokens[ordinary] % 3 == 0).float().mean().item()
    assert found["number"] == pytest.approx([1.0, share])
    share = (tokens[ordinary] % 3 == 2).float().mean().item()
    assert found["word_internal"] == pytest.approx([0.0, share])
    masked_share = 10 * k / ordinary.sum().item()
    assert found["rate"] == pytest.approx(masked_share)
    assert found["overlap"][1] == pytest.approx(masked_share)
    assert found["overlap"][0] > 2 * masked_share
    chosen = strategy(tokens, k, M.draw(DIAGNOSIS_SEED, 0, 10, T))
    assert H.gather(1, chosen).all()
    pairs = [a + 1 == b for row in chosen.tolist() for a, b in zip(row, row[1:])]
    assert found["neighbour"] == pytest.approx(sum(pairs) / chosen.numel()) and sum(pairs)
    with torch.no_grad():
        logits = model(tokens.scatter(1, chosen, MASK), chosen)
    p, answers = logits.double().softmax(-1), tokens.gather(1, chosen)
    assert found["entropy"][0] == pytest.approx(-(p * p.log()).sum(-1).mean().item(), abs=1e-4)
    assert found["accuracy"][0] == (logits.argmax(-1) == answers).float().mean().item()


def test_under_static_masks_a_block_is_chosen_again_as_it_was():
    model, tokens, kinds = small_model(init_std=0.3), rows_of(
        10), token_kinds(["▁a"] * V, np.ones(V))
    overlap = {static: diagnose(model, tokens, 5, Strategy(), kinds, static=static)["overlap"]
               for static in (True, False)}
    assert overlap[True][0] == 1 and overlap[False][0] < 0.4
    assert overlap[True][1] == overlap[False][1] == pytest.approx(5 / 31.5)


def test_the_dose_is_that_of_a_loop():
    """Token by token, row by row; more than a batch of forwards, [SEP]s inside."""
    model, tokens = small_model(init_std=0.3).eval(), rows_of(4)
    positions = torch.tensor([[1, 2, 9], [4, 8, 30], [3, 15, 16], [10, 20, 21]])
    amounts = []
    for row, chosen in zip(tokens, positions.tolist()):
        H = {t: entropy_alone(model, row, t) for t in range(T) if row[t] >= N_SPECIAL}
        mean, deviation = np.mean(list(H.values())), np.std(list(H.values()))
        amounts += [(H[t] - mean) / deviation for t in chosen]
    assert dose(model.train(), tokens, positions) == pytest.approx(np.mean(amounts), abs=1e-4)
    assert neighbour(positions) == pytest.approx(3 / 12)
    kinds = token_kinds(["▁a"] * V, np.ones(V))
    found = diagnose(model, tokens, 3, lambda *asked: positions, kinds, with_dose=True)
    assert found["dose"] == pytest.approx(np.mean(amounts), abs=1e-4)


def test_the_rank_correlation_of_a_free_score():
    """One that knows nothing has none; one that knows the entropies of a lone token has a high one.
    """
    model, tokens = small_model(init_std=0.3), rows_of(8)
    kinds = token_kinds(["▁a"] * V, np.ones(V))
    means = VocabularyMean(None, 1.0, V)
    strategy = Strategy(None, means, M.high, 2)
    assert diagnose(model, tokens, 5, strategy, kinds, means)["rank_correlation"] == 0
    means.mean[:] = 0
    for row, H in zip(tokens, exact_entropy(model, tokens)):
        means.mean[row] = torch.where(row >= N_SPECIAL, H, means.mean[row])
    assert diagnose(model, tokens, 5, strategy, kinds, means)["rank_correlation"] > 0.2


# ---- one sentence


def test_the_table_has_a_line_per_token_and_k_marks_a_column(run, monkeypatch, capsys):
    call(["data/inspection.py", run, SENTENCE, "--mask-rate", "0.2"], monkeypatch)
    out = capsys.readouterr().out
    model, tokenizer = load(run)
    strategies = strategies_of(model)
    rows = explain(model, tokenizer, SENTENCE, strategies, 0.2, 0)
    k = round(0.2 * len(rows))
    assert list(strategies) == ["random", "high", "low", "mid", "sample", "mix",
                                "high-unmasked"]
    for name in strategies:
        assert sum(row["masked"][name] for row in rows) == k
    pool = {i for i, row in enumerate(rows) if row["H"]["pool"] is not None}
    assert len(pool) == 2 * k
    for where, name, among in (("pool", "high", pool),
                               ("unmasked", "high-unmasked", range(len(rows)))):
        best = sorted(among, key=lambda i: -rows[i]["H"][where])[:k]
        assert {i for i, row in enumerate(rows) if row["masked"][name]} == set(best)
    tokens = torch.tensor([[CLS, *tokenizer.encode(SENTENCE), SEP]])
    exact = exact_entropy(model, tokens)[0, 1:-1].tolist()
    assert [row["H"]["alone"] for row in rows] == pytest.approx(exact, abs=1e-4)
    table = out.split("best guesses")[1].rstrip().splitlines()[1:]
    assert len(table) == len(rows)
    for row in rows:
        guesses = row["guesses"]
        assert f" {row['H']['alone']:.1f} " in out and len(guesses) == 5
        assert sum(p for _, p in guesses) <= 1.0001
        assert all(p >= q for (_, p), (_, q) in zip(guesses, guesses[1:]))


def test_the_page_is_whole_and_overwrites_nothing(run, monkeypatch, capsys, tmp_path):
    page = tmp_path / "a page.html"
    run = shutil.copytree(run, tmp_path / "na\u00efve \n[x]*?%s{0}")
    call(["data/inspection.py", run, SENTENCE, "--html", page], monkeypatch)
    html = page.read_text()
    assert "&lt;" in html and "&amp;" in html and "<every>" not in html
    assert "prefers-color-scheme: dark" in html
    assert not re.search(r"(src|href)=|@import|url\(", html)
    model, tokenizer = load(run)
    rows = explain(model, tokenizer, SENTENCE, strategies_of(model), 0.15, 0)
    k = round(0.15 * len(rows))
    assert html.count("<tr>") == len(rows) + 1 and html.count("●") == k * len(rows[0]["masked"])
    assert "$" not in html  # every placeholder was filled
    call(["data/inspection.py", run, SENTENCE, "--html", page], monkeypatch)  # its own: made anew
    page.write_text("a diary")
    with pytest.raises(SystemExit):
        call(["data/inspection.py", run, SENTENCE, "--html", page], monkeypatch)
    assert page.read_text() == "a diary"
    assert "name another" in capsys.readouterr().err
