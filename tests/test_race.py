"""Does the race time both sides truly?   python -m pytest tests/test_race.py -q"""

from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.flags import defaults
from tests import race
from tests.helpers import write_corpus


def test_both_sides_read_the_text_and_stop_where_they_should(tmp_path):
    write_corpus(tmp_path / "text.txt", documents=300)
    args = Namespace(**{
        **defaults(race.FLAGS), "corpus": str(tmp_path / "text.txt"), "cache": str(tmp_path / "c"),
        "vocab_size": 600, "seq_len": 34, "batch_size": 8, "every": 2, "eval_blocks": 16,
        "losses": "6.3,0.1", "device": "cpu", "threads": 1})
    ours = race.race(args, race.OURS, 0.0, 3.0)
    assert ours["rate"] == 3e-3 and len(ours["reached"]) == 1 and ours["seconds"] >= 3
    assert ours["steps"] % 2 == 0 and ours["lowest"] < 6.3  # 0.1 is out of reach
    pytest.importorskip("transformers")
    firsts = []
    for side in (race.GATHERED, race.AS_IT_IS):
        args.losses = "99"  # the first evaluation is below it
        theirs = race.race(args, side, 1e-3, 3.0)
        assert theirs["reached"] == [[theirs["seconds"], 2]] and theirs["rate"] == 1e-3
        firsts.append(theirs["lowest"])
    assert firsts[0] == pytest.approx(firsts[1], abs=1e-3)  # only their speed differs


def test_their_rate_rises_and_then_stays(monkeypatch):
    pytest.importorskip("transformers")
    rates, text = [], SimpleNamespace(train=np.full((64, 32), 9, dtype=np.uint16),
                                      tokenizer=SimpleNamespace(vocab_size=300))
    monkeypatch.setattr(race, "their_update", lambda _, optimizer, *others: rates.append(
        optimizer.param_groups[0]["lr"]))
    args = Namespace(**{**defaults(race.FLAGS), "seq_len": 34, "batch_size": 8})
    flags = Namespace(weight_decay=0.01, warmup_frac=0.1, steps=100)
    _, update = race.their_side(args, flags, Namespace(device="cpu"), text, 1e-3, True)
    for step in (0, 9, 50, 101, 5000):
        update(step)
    assert rates == pytest.approx([1e-4, 1e-3, 1e-3, 1e-3, 1e-3])


def test_their_model_is_evaluated_as_it_would_predict_itself():
    pytest.importorskip("transformers")
    args = Namespace(size="tiny", seq_len=34)
    model = race.Theirs(args, 300).eval()
    inputs = torch.randint(5, 300, (3, 34))
    positions = torch.tensor([[1, 7], [2, 9], [3, 30]])
    whole = model.bert(inputs).logits
    rows = torch.arange(3)[:, None]
    torch.testing.assert_close(model(inputs, positions), whole[rows, positions])


def test_the_table_names_what_was_not_reached():
    def run(side, reached, rate=3e-3):
        return {"side": side, "rate": rate, "reached": reached, "lowest": 5.5, "seconds": 100.0,
                "steps": 1000, "batch_tokens": 2048}

    ours, theirs = run("train.py", [[10.0, 100], [20.0, 200]]), run("theirs", [[35.0, 300]])
    lines = race.table([ours, theirs], ["6.0", "5.0"])
    assert lines[2] == ("| train.py | 0.003 | 20480 | 10.0 | 100 | 0.20 M | 1.0 | 20.0 | 200 | "
                        "0.41 M | 1.0 | 5.50 |")
    assert lines[3] == ("| theirs | 0.003 | 20480 | 35.0 | 300 | 0.61 M | 3.5 | "
                        "not reached in 100 s | - | - | - | 5.50 |")
    assert len({line.count("|") for line in lines}) == 1
    assert race.progress_of(ours) < race.progress_of(theirs) < race.progress_of(run("none", []))
