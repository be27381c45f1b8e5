"""Are all variants of a step that step?   python -m pytest tests/test_profiling.py -q"""

from argparse import Namespace

import pytest

from data.flags import defaults
from data.machine import Machine
from tests import profiling
from tests.variants import VARIANTS

SMALL = "--size tiny --vocab-size 600 --seq-len 32 --batch-size 8 --dropout 0 --no-compile"
GPU_ALONE = {"graph", "graph-compiled", "everything"}


def flags(**changes):
    return Namespace(**{**defaults(profiling.FLAGS), "flags": SMALL, "steps": 2, "device": "cpu",
                        "threads": 1, **changes})


@pytest.mark.parametrize("method", ["random", "self"])
def test_variants_learn_as_train_py_does(method, monkeypatch):
    """The compiler itself takes minutes: what is left out here is that alone."""
    monkeypatch.setattr(Machine, "compile", lambda self, function: function)
    args, words = flags(), ["--preset", "gpu", "--masking", method, *SMALL.split(),
                            *["--init-frac", "0", "--score-input", "masked"] * (method == "self")]
    losses = {name: profiling.time_variant(name, args, Machine(args), words)[1:]
              for name in VARIANTS if name not in GPU_ALONE | {"reduce-overhead"}}
    plain = losses["eager"]
    assert plain[1] < plain[0] - 0.3
    assert {name for name, found in losses.items() if found != plain} == {"on-device"}
    assert losses["on-device"][0] == plain[0]
    assert profiling.same("on-device", losses["on-device"], plain)
    assert not profiling.same("ahead", (plain[0], 1.1 * plain[1]), plain)


def test_a_variant_that_fails_does_not_end_the_rest(capsys):
    profiling.measure_case(flags(cases="laptop-long,random", variants="graph,eager,nonsense"))
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert "| graph | failed: UserError: needs a GPU" in out and "nonsense | failed" in out
    assert [row for row in rows if row.startswith("| eager |") and row.endswith("| same |")]
    shares = {row.split(" | ")[0]: float(row.split(" | ")[-1].strip(" |")) for row in rows
              if row.startswith(("| matrix products", "| attention", "| the rest", "| sorting",
                                 "| copies between", "| optimiser and"))}
    assert len(shares) == 6 and sum(shares.values()) == pytest.approx(1, abs=0.04)
    parts = {row.split(" | ")[0][2:]: float(row.split(" | ")[1]) for row in rows
             if row.count("|") == 4 and not row.startswith(("| part", "| `", "| kernel",
                                                            "| computed"))}
    assert 0 < sum(parts[name] for name in ("choose", "corrupt", "forward", "loss", "backward",
                                            "optimiser")) < parts["whole step"]


def test_no_variant_begins_after_the_end(capsys):
    profiling.measure_case(flags(cases="laptop-long,random", variants="eager", seconds=1e-9))
    assert "| eager | left out: 0 s are over" in capsys.readouterr().out
