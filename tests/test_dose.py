"""How strongly rules select.   python -m pytest tests/test_dose.py -q"""

import re

import pytest

from data.inspection import exact_entropy, neighbour, strategies_of
from data.results.dose import own_strategy, print_doses, report_doses, rules_of
from data.tokenizer import SEP
from model import forward_flops, load
from tests import helpers
from tests.helpers import T, call, command, refused, small_model, write_corpus


def rows_of(n):
    """(n, T) tokens between [CLS] and [SEP], with a [SEP] inside every second row."""
    tokens = helpers.rows_of(n)
    tokens[::2, 7] = SEP
    return tokens


def test_doses_of_all_rules_are_ordered_as_they_must_be(capsys):
    model, tokens = small_model(init_std=0.3), rows_of(120)
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
    model, tokens = small_model(init_std=0.3), rows_of(2)
    reports = {report["rule"]: report for report in report_doses(model, tokens, rules_of(model))}
    update = [3 * forward_flops(model.shape, T, k) for k in (5, 10)]
    for rule, scored in (("high", (10, 20)), ("high-unmasked", (32, 32))):
        assert reports[rule]["flops"] == pytest.approx(
            [1 + forward_flops(model.shape, T, c) / whole for c, whole in zip(scored, update)])
    assert reports["random"]["flops"] == [1, 1]
    four = reports["high-unmasked, pool 4"]
    assert four["flops"][0] > 1 and four["flops"][1] is four["neighbour"][1] is None


def test_runs_choose_by_their_own_model_and_means_beside_the_rules(tmp_path, monkeypatch, capsys):
    write_corpus(tmp_path / "text.txt")
    for out, flags in (("random-0", ["--masking", "random"]),
                       ("error-0", ["--score-input", "error", "--select", "high"]),
                       ("entropy-0", ["--masking", "entropy", "--teacher", tmp_path / "random-0",
                                      "--layers", "1"])):
        call(command(tmp_path, out, *flags), monkeypatch)
    reference, error, entropy = (tmp_path / name for name in ("random-0", "error-0", "entropy-0"))
    capsys.readouterr()
    call(["data/results/dose.py", reference, error, entropy, "--blocks", "2"], monkeypatch)
    out = capsys.readouterr().out
    model, tokenizer = load(reference)
    assert "2 held-out blocks" in out
    for rule in (*rules_of(model), str(error), str(entropy)):
        assert re.search(rf"^\| {rule} \|.* \d\.\d\d \|", out, re.M), rule
    rows = {line.split("|")[1].strip(): line.split("|")[2:]
            for line in out.splitlines() if line[0] == "|"}
    # The reference taught it; its own model is smaller, so asking costs more beside an update.
    (*same, flops), (*as_mix, flops_of_mix) = (
        [cells[i] for i in (0, 1, 2, 3)] for cells in (rows[str(entropy)], rows["mix"]))
    assert same == as_mix and float(flops) > float(flops_of_mix)
    assert own_strategy(error, tokenizer)[0].reads.seen.sum() > 0
    (error / "checkpoint.pt").unlink()
    line = refused(["data/results/dose.py", reference, error], monkeypatch, capsys)
    assert "checkpoint.pt, which is gone" in line
