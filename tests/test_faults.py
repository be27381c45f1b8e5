"""The quick part of the fault campaign: python -m tests.faults has the long one.

    python -m pytest tests/test_faults.py -q
"""

import itertools
import os
import random
import resource
import signal
import time

import pytest
from tqdm import tqdm

from data import corpus, runs
from data.files import UserError, run_script
from tests import faults
from tests.test_download import serve


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "toy"
    folder.mkdir()
    for server in serve():
        yield folder, faults.all_works(folder, server.url)


@pytest.mark.parametrize("name, count, statuses", [
    ("kill", 1, {-9}), ("checkpoint", 1, {-9}), ("signal", 1, {129, 130, 143}), ("disk", 1, {2}),
    ("two", 1, {2}), ("damage", 1, {2}), ("loss", 1, {1}), ("pickles", 3, {2}),
    ("archives", 2, {0}), ("damaged", 300, {"read", 2})])
def test_a_few_tries_of(name, count, statuses, toy):
    folder, works = toy
    tries = 2 if name == "damaged" else 1
    tried = list(itertools.islice(
        faults.CASES[name](folder, works, tries, random.Random(0)), count))
    assert len(tried) == count and [row for row in tried if row[1]] == []
    assert {status for *_, status in tried} <= statuses


def test_a_loss_is_seen(toy, monkeypatch):
    """A run that goes on with weights that are a little off is lost, and is said to be."""
    restore = runs.Run.restore

    def bad_restore(self, job, state):
        state = restore(self, job, state)
        job.model.head_bias.data += 1e-6 * (state.step > 0)
        return state

    monkeypatch.setattr(runs.Run, "restore", bad_restore)
    [(fault, lost, status)] = faults.CASES["checkpoint"](*toy, 1, random.Random(0))
    assert "other" in lost and "model.pt" in lost and status == -9


def test_what_a_process_did_is_told(tmp_path):
    def complain():
        raise UserError("no room")

    def sleep():
        time.sleep(60)

    assert faults.refused(faults.finish(complain), "room") == ""
    assert "status 2" in faults.refused(faults.finish(complain), "another word")
    assert "Traceback" in faults.fine(faults.finish(lambda: 1 / 0))
    assert faults.fine(faults.finish(lambda: print("done"))) == ""
    assert faults.finish(sleep, seconds=0.2).status == "hung"
    assert faults.send(faults.start(sleep), signal.SIGKILL).status == -9
    assert faults.finish(lambda: os._exit(7)).status == 7
    limited = faults.finish(lambda: (tmp_path / "file").write_bytes(bytes(10)),
                            resource.RLIMIT_FSIZE, 3)
    assert faults.refused(limited, "make room") == ""


@pytest.mark.parametrize("kind", faults.kinds_of_text("", large=False))
def test_text_with(kind, toy, tmp_path):
    content, trained = faults.kinds_of_text((toy[0] / "text.txt").read_text(), large=False)[kind]
    path = tmp_path / "text.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        folder = corpus.prepare(str(path), 900, tmp_path / "cache", 1)
        assert trained is not False and len(corpus.load(folder, 34).train)
        if kind == "special tokens":
            assert faults.became_special(tmp_path / "cache", content.count("[MASK]")) == ""
    except UserError as error:
        assert not trained and str(error)


def test_forging_and_damaging_change_something():
    whole = {"a": [1, {"b": 2.5}], "c": "text"}
    for seed in range(50):
        assert repr(faults.forge(whole, random.Random(seed))) != repr(whole)
        data = b'{"a": 12, "b": "text"}\n' * 40
        assert faults.damage(data, random.Random(seed)) != data
    assert whole == {"a": [1, {"b": 2.5}], "c": "text"}


def test_an_error_is_a_line_of_its_own_below_the_bar(capsys):
    def main():
        bar = tqdm(total=3)
        bar.update()
        raise UserError("no room")

    with pytest.raises(SystemExit):
        run_script(main)
    assert "error: no room" in capsys.readouterr().err.split("\n")
