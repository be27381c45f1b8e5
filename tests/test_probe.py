"""What tests/probe.py says of a model.   python -m pytest tests/test_probe.py -q"""

import re
import sys

import pytest
import torch
import torch.nn.functional as F

import train
from data.corpus import with_ends
from data.machine import Machine
from data.runs import read_config
from data.tokenizer import MASK
from masking import evaluate, mask_for_evaluation
from model import Bert, Shape, load
from tests import probe
from tests.test_data import write_corpus


def small_model():
    torch.manual_seed(0)
    return Bert(Shape(600, 2, 64, 64, init_std=0.3)).eval()


def test_a_window_hides_what_is_outside_and_nothing_else():
    model, tokens = small_model(), torch.randint(5, 600, (3, 40))
    positions, inputs, labels = mask_for_evaluation(tokens, 600)
    whole = probe.losses(model, inputs, positions, labels, 0)
    with torch.no_grad():
        expected = F.cross_entropy(model(inputs, positions).flatten(0, 1), labels.flatten())
    assert whole.mean().item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(probe.losses(model, inputs, positions, labels, 40), whole, atol=1e-5)
    near = probe.losses(model, inputs, positions, labels, 4)
    assert not torch.allclose(near, whole, atol=1e-3)
    other = inputs.clone()  # only what no window of the first masked token can see; [CLS] it can
    outside = (torch.arange(40) - positions[:, :1]).abs() > 4
    outside[:, 0] = False
    other[outside] = 7
    assert torch.allclose(probe.losses(model, other, positions, labels, 4)[:, 0], near[:, 0],
                          atol=1e-5)


def test_a_token_that_stands_elsewhere_is_repeated_or_near_and_else_single():
    inputs = torch.full((1, 24), 9)
    positions = torch.tensor([[2, 4, 6]])
    inputs[0, [2, 4, 6]] = MASK
    inputs[0, 20], inputs[0, 5] = 50, 51  # 18 places from the first, one from the second
    again, once = probe.elsewhere(inputs, positions, torch.tensor([[50, 51, 52]]))
    assert again.tolist() == [[True, False, False]] and once.tolist() == [[False, False, True]]


def test_both_tables_of_a_run(tmp_path, monkeypatch, capsys):
    source, run = write_corpus(tmp_path / "text.txt"), tmp_path / "run"
    monkeypatch.setattr(sys, "argv", [
        "train.py", "--corpus", str(source), "--cache", str(tmp_path / "cache"), "--vocab-size",
        "600", "--layers", "1", "--width", "64", "--seq-len", "34", "--steps", "2", "--threads",
        "1", "--masking", "random", "--eval-blocks", "8", "--out", str(run)])
    train.main()
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["probe.py", str(run), "--blocks", "8"])
    probe.main()
    tables = capsys.readouterr().out.split("\n\n")
    rows = [[cell.strip() for cell in line.split("|")] for line in tables[1].splitlines()]
    assert [row[1] for row in rows[2:]] == ["+-2", "+-8", "+-32", "everything"]
    args = train.Namespace(**read_config(run)["flags"])
    machine = Machine(args)
    text = train.load_text(args, None, machine)
    loss, _ = evaluate(load(run)[0], with_ends(text.valid[:8]), machine)
    assert float(rows[-1][2]) == pytest.approx(loss, abs=6e-3)
    names = re.findall(r"^\| (\w+)[^|]*\|", tables[2], re.M)
    assert names == ["entropy", "masked", "masked", "masked", "masked", "unmasked", "exact"]
    for line in tables[2].splitlines()[2:-1]:
        assert all(-1 <= float(value) <= 1 for value in line.split("|")[3:5])
