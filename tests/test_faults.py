"""The quick part of the fault campaign: python -m tests.faults has the long one.

    python -m pytest tests/test_faults.py -q
"""

import itertools
import random

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


@pytest.mark.parametrize("name, tries, count, statuses", [
    ("checkpoint", 1, 1, {-9}), ("signal", 1, 1, {129, 130, 143}), ("disk", 1, 1, {2}),
    ("hostile", 1, 2, {0}), ("damaged", 1, 135, {"read", 2})])
def test_a_few_tries_of(name, tries, count, statuses, toy):
    tried = list(itertools.islice(faults.CASES[name](*toy, tries, random.Random(0)), count))
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


@pytest.mark.parametrize("kind", faults.kinds_of_text("", large=False))
def test_text_with(kind, toy, tmp_path):
    content, trained = faults.kinds_of_text((toy[0] / "text.txt").read_text(), large=False)[kind]
    path = tmp_path / "text.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        folder = corpus.prepare(str(path), 900, tmp_path / "cache", 1)
        assert trained is not False and len(corpus.load(folder, 34).train)
    except UserError as error:
        assert not trained and str(error)


def test_an_error_is_a_line_of_its_own_below_the_bar(capsys):
    def main():
        bar = tqdm(total=3)
        bar.update()
        raise UserError("no room")

    with pytest.raises(SystemExit):
        run_script(main)
    assert "error: no room" in capsys.readouterr().err.split("\n")
