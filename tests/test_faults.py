"""The quick part of the fault campaign: python -m tests.faults has the long one.

    python -m pytest tests/test_faults.py -q
"""

import itertools
import random
import shutil

import pytest
from tqdm import tqdm

from data import corpus as corpora
from data.files import UserError, load_tensors, run_script
from data.runs import open_log, read_log
from tests import faults, fuzz, hostile
from tests.box import differs, fill_box, finish

RNG = random.Random(0)


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    box = tmp_path_factory.mktemp("faults") / "box"
    box.mkdir()
    fill_box(box, ["random"])
    return box


def survives(part, count=None):
    """Go through the first `count` tries of a part of the campaign."""
    tried = list(itertools.islice(part, count))
    assert tried and [(fault, lost) for fault, lost, _ in tried if lost] == []
    return [status for _, _, status in tried]


@pytest.mark.parametrize("name, count, statuses", [
    ("kill", None, {-9}), ("disk", 1, {2}), ("checkpoints", 1, {2}), ("loss", 1, {1}),
    ("downloads", 4, {2}), ("flags", 4, {2}), ("payload", 1, {2})])
def test_a_few_tries_of(name, count, statuses, box):
    assert set(survives(faults.PARTS[name](box, 2, RNG), count)) == statuses


@pytest.mark.parametrize("name", fuzz.READERS)
def test_damaged(name):
    result = fuzz.fuzz(name, 24, 0)
    assert result["lost"] == [] and result["refused"] > 0


@pytest.mark.parametrize("kind", hostile.kinds_of_text("", large=False))
def test_text_with(kind, box, tmp_path):
    content, trained = hostile.kinds_of_text((box / "text.txt").read_text(), large=False)[kind]
    path = tmp_path / "text.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        folder = corpora.prepare(str(path), 900, tmp_path / "cache")
        assert trained is not False and len(corpora.load(folder, 34).train)
        if kind == "special tokens":
            assert hostile.became_special(folder, content.count("[MASK]")) == ""
    except UserError as error:
        assert not trained and str(error)


def test_a_log_that_lost_lines_is_refused_but_a_damaged_end_is_cut(box):
    """The checkpoint of step 58 knows of a line at step 56; what comes later is written anew."""
    run = box / "log"
    shutil.copytree(box / "random", run)
    (run / "model.pt").unlink()
    (run / "checkpoint.pt").unlink()  # that of step 60
    log = run / "log.jsonl"
    assert load_tensors(run / "checkpoint.prev.pt")["logged"] == 56
    whole = log.read_bytes().splitlines(keepends=True)
    assert len(whole) == 16
    for lines in (whole[:9], whole[:9] + [b"{}\n"] + whole[10:], []):
        log.write_bytes(b"".join(lines))
        with pytest.raises(UserError, match="lines up to step 56 were there"):
            open_log(run, 58, 56)
        assert log.read_bytes() == b"".join(lines)
    log.write_bytes(b"".join(whole[:15]) + b"\0" * 99 + b"\n" + whole[15])
    with pytest.raises(UserError, match="damaged in line 16"):
        read_log(run)
    assert finish(["train.py", "--resume", run])[0] == 0 and differs(run, box / "random") == ""


def test_an_error_is_a_line_of_its_own_below_the_bar(capsys):
    def main():
        bar = tqdm(total=3)
        bar.update()
        raise UserError("no room")

    with pytest.raises(SystemExit):
        run_script(main)
    assert "error: no room" in capsys.readouterr().err.split("\n")
