"""What a strategy masks, by hand.   python -m pytest tests/test_inspection.py -q"""

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
from data.results.dose import own_strategy, print_doses, report_doses, rules_of
from data.tokenizer import CLS, MASK, N_SPECIAL, SEP
from masking import Strategy
from model import Bert, Shape, forward_flops, load
from tests.helpers import T, V, call, command, refused, rows_of, save_run, small_model

SENTENCE = "the model reads <every> token & learns to guess what is hidden from it"


def entropy_alone(model, row, place):
    """Nats, in float64, by the definition: one token masked, everything else as it is."""
    masked = row.clone()
    masked[place] = MASK
    with torch.no_grad():
        p = model(masked[None])[0, place].double().softmax(-1)
    return -(p * p.log()).sum().item()


@pytest.fixture(scope="module")
def run(folder):
    text = corpora.load(corpora.prepare(str(folder / "text.txt"), 600, folder / "cache"), 64)
    torch.manual_seed(0)
    return save_run(folder / "run", Bert(Shape(600, 2, 64, 64, init_std=0.3)), text.tokenizer_path)


# ---- for the log


def test_the_diagnosis_of_a_known_strategy():
    """A strategy that takes the numbers: their share is 1, and it repeats itself."""
    model, tokens = small_model(init_std=0.3), rows_of(10, separators=1)
    pieces = [f"▁{i}" if i % 3 == 0 else "▁word" if i % 3 == 1 else "ing" for i in range(V)]
    kinds = token_kinds(pieces, np.arange(V))
    for kind, which in (("rare", range(100)), ("frequent", range(200, 300))):
        assert kinds[kind].nonzero().flatten().tolist() == list(which)
    H = kinds["number"].float()[tokens]
    ordinary = tokens >= N_SPECIAL
    k = int((H * ordinary).sum(1).min())

    strategy = Strategy(reads=lambda model, tokens, places: H.gather(1, places))
    found = diagnose(model, tokens, k, strategy, kinds)
    assert not model.training and "dose" not in found
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
    model, tokens = small_model(init_std=0.3), rows_of(10, separators=1)
    kinds = token_kinds(["▁a"] * V, np.ones(V))
    overlap = {static: diagnose(model, tokens, 5, Strategy(), kinds, static=static)["overlap"]
               for static in (True, False)}
    assert overlap[True][0] == 1 and overlap[False][0] < 0.4
    assert overlap[True][1] == overlap[False][1] == pytest.approx(5 / 31)


def test_the_dose_is_that_of_a_loop():
    """Token by token, row by row; more than a batch of forwards, [SEP]s inside."""
    model, tokens = small_model(init_std=0.3).eval(), rows_of(4)
    tokens[:, 7] = SEP
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


# ---- the doses of all rules


def test_doses_of_all_rules_are_ordered_as_they_must_be(capsys):
    model, tokens = small_model(init_std=0.3), rows_of(120, separators=1)
    reports = report_doses(model, tokens, strategies_of(model))
    print_doses(reports)
    by_rule = {report["rule"]: report for report in reports}
    assert list(by_rule) == [*strategies_of(model), "exact"]
    for i, k in enumerate((5, 10)):
        doses = {rule: report["dose"][i] for rule, report in by_rule.items()}
        assert doses["exact"] == max(doses.values()) and doses["low"] == min(doses.values())
        assert doses["high"] > doses["mix"] > doses["random"] + 0.05 and abs(doses["random"]) < 0.1
        H = exact_entropy(model, tokens).nan_to_num(-1)
        best = H.topk(k).indices.sort(1).values
        assert by_rule["exact"]["neighbour"][i] == pytest.approx(neighbour(best))
        assert by_rule["exact"]["rank_correlation"][i] == pytest.approx(1)
        assert by_rule["random"]["rank_correlation"][i] is None
        assert 0.1 < by_rule["high"]["rank_correlation"][i] < 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(reports) and f"| {reports[0]['dose'][0]:+.2f} |" in lines[2]


def test_what_a_rule_costs_and_where_its_pool_does_not_fit():
    """Of 32 tokens 5 or 10 are masked; a pool of four times 10 is more than there are."""
    model, tokens = small_model(init_std=0.3), rows_of(2, separators=1)
    reports = {report["rule"]: report for report in report_doses(model, tokens, rules_of(model))}
    update = [3 * forward_flops(model.shape, T, k) for k in (5, 10)]
    for rule, scored in (("high", (10, 20)), ("high-unmasked", (32, 32))):
        assert reports[rule]["flops"] == pytest.approx(
            [1 + forward_flops(model.shape, T, c) / whole for c, whole in zip(scored, update)])
    assert reports["random"]["flops"] == [1, 1]
    four = reports["high-unmasked, pool 4"]
    assert four["flops"][0] > 1 and four["flops"][1] is four["neighbour"][1] is None


def test_runs_choose_by_their_own_means_beside_the_rules(folder, teacher, monkeypatch, capsys):
    error = folder / "error-0"
    call(command(folder, error, "--score-input", "error", "--select", "high"), monkeypatch)
    capsys.readouterr()
    call(["data/results/dose.py", teacher, error, "--blocks", "2"], monkeypatch)
    out = capsys.readouterr().out
    model, tokenizer = load(teacher)
    assert "2 held-out blocks" in out
    for rule in (*rules_of(model), str(error)):
        assert re.search(rf"^\| {rule} \|.* \d\.\d\d \|", out, re.M), rule
    assert own_strategy(error, tokenizer)[0].reads.seen.sum() > 0
    (error / "checkpoint.pt").unlink()
    line = refused(["data/results/dose.py", teacher, error], monkeypatch, capsys)
    assert "checkpoint.pt, which is gone" in line


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
