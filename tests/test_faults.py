"""The quick part of the fault campaign, which python -m tests.faults has in full; and text of
strangers that does harm, or only looks odd.

    python -m pytest tests/test_faults.py -q
"""

import itertools
import random
import tarfile
import zipfile

import pytest
from tqdm import tqdm

from data import corpus, runs
from data.files import UserError, run_script
from tests import faults
from tests.helpers import packed_tar, packed_zip, write_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    faults.write_inputs(folder)
    return folder


@pytest.mark.parametrize("name, count, statuses", [
    ("checkpoint", 1, {-9}), ("signal", 1, {129, 130, 143}), ("disk", 1, {2}), ("two", 1, {2}),
    ("damaged", 90, {"read", 2})])
def test_a_few_tries_of(name, count, statuses, folder):
    tried = list(itertools.islice(faults.CASES[name](folder, 1, random.Random(0)), count))
    assert len(tried) == count and [row for row in tried if row[1]] == []
    assert {status for *_, status in tried} <= statuses


def test_a_loss_is_seen(folder, monkeypatch):
    """A run that goes on with weights that are a little off is lost, and is said to be."""
    restore = runs.Run.restore

    def bad_restore(self, job, state):
        state = restore(self, job, state)
        job.model.head_bias.data += 1e-6 * (state.step > 0)
        return state

    monkeypatch.setattr(runs.Run, "restore", bad_restore)
    [(fault, lost, status)] = faults.CASES["checkpoint"](folder, 1, random.Random(0))
    assert "other: [" in lost and "model.pt" in lost and status == -9


@pytest.mark.parametrize("old, new", [
    ("\n", "\r"), ("the", "😀👩‍👩‍👧‍👦🇩🇪"), ("a", "שלום "), ("o", "o\u0301\u0323\u0300" * 5),
    ("e", "\u00ade\u200b")],
    ids=["CR", "emoji", "right to left", "combining marks", "soft hyphens"])
def test_odd_text_is_text(old, new, tmp_path):
    path = write_corpus(tmp_path / "text.txt", documents=300)
    path.write_text(path.read_text().replace(old, new), newline="")
    prepared = corpus.load(corpus.prepare(str(path), 900, tmp_path / "cache", 1), 34)
    assert len(prepared.train) > 100


def link_to(target):
    link = zipfile.ZipInfo("link.txt")
    link.external_attr = 0o120777 << 16
    return {link: target, "link.txt/x": b"text"}


EVIL = "../../evil.txt"
TYPES = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE


@pytest.mark.parametrize("pack", [
    *(lambda text, name=name: packed_zip({"text.txt": text, name: text})
      for name in (EVIL, "/tmp/evil.txt", "a/" + EVIL, "..\\evil")),
    lambda text: packed_zip({"text.txt": text, **link_to(EVIL)}),
    *(lambda text, kind=kind: packed_tar({"text.txt": text, EVIL: text}, "w", kind)
      for kind in TYPES)])
def test_an_archive_writes_nowhere_else(pack, tmp_path):
    text = write_corpus(tmp_path / "text.txt", documents=300).read_bytes()
    (inner := tmp_path / "a" / "b").mkdir(parents=True)
    (inner / "archive").write_bytes(pack(text))
    try:
        corpus.prepare(str(inner / "archive"), 600, inner / "cache", 1)
    except UserError as error:
        assert str(error)
    assert {p.name for p in tmp_path.iterdir()} == {"text.txt", "a"}
    assert {p.name for p in inner.iterdir()} == {"archive", "cache"}
    assert not [p for p in inner.rglob("*") if "evil" in p.name or p.is_symlink()]


def test_an_error_is_a_line_of_its_own_below_the_bar(capsys):
    def main():
        bar = tqdm(total=3)
        bar.update()
        raise UserError("no room")

    with pytest.raises(SystemExit):
        run_script(main)
    assert "error: no room" in capsys.readouterr().err.split("\n")
