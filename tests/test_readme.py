"""What the README says, against the code.   python -m pytest tests/test_readme.py -q"""

import json
import re
import shlex
from argparse import Namespace

import pytest

import glue
import masking
import train
from data import inspection
from data.files import UserError
from tests.helpers import ROOT, T, V, call, command, rows_of
from tests.test_masking import noise_of

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *(ROOT / "data" / "results").glob("*.md")]
SHELL = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S)
         for line in block.splitlines()]


def commands(script):
    """The arguments of this script's commands in the README."""
    found = [shlex.split(line.split(" # ")[0]) for line in SHELL if f" {script} " in f"{line} "]
    return [words[words.index(script) + 1:] for words in found]


def test_its_commands_are_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where none of the runs is there yet
    asked = commands("train.py")
    assert len(asked) >= 5
    for argv in asked:
        if "--resume" not in argv and "--eval" not in argv:
            train.parse_args(argv)
    for argv in commands("glue.py"):
        glue.parse_args(argv)
    for argv in commands("data.inspection"):
        monkeypatch.setattr("sys.argv", ["inspection", *argv])
        with pytest.raises(UserError, match="not a run folder"):  # and no complaint of a flag
            inspection.main()


def test_the_flags_of_the_method_have_the_values_and_defaults_that_it_names():
    rows = re.findall(r"^\| `--([a-z-]+)` \| (.*?) \|$", README, re.M)
    assert len(rows) == 5
    args = Namespace(**train.DEFAULTS)
    train.settle(args)
    for name, values in rows:
        default = getattr(args, name.replace("-", "_"))
        assert f"**{default}**" in values, name
        choices = next(row[2] for group in train.FLAGS.values() for row in group if row[0] == name)
        if isinstance(choices, tuple):
            named = re.sub(r"\(.*?\)|: .*", "", values).split(",")
            assert {word.strip("* ") for word in named} == set(choices), name


def test_its_tree_is_the_folder():
    tree = re.search(r"## Reading order\n.*?```\n(.*?)```", README, re.S)[1]
    for name in ("masking.py", "train.py", "model.py", "glue.py", "data/results/", "tests/"):
        assert f"\n{name}" in f"\n{tree}" and (ROOT / name).exists()
    nouns = set(re.findall(r"[a-z]+", tree.partition("data/ ")[2].partition("data/results/")[0]))
    modules = {path.stem for path in (ROOT / "data").glob("*.py")} - {"__init__"}
    assert modules <= nouns


def test_data_is_plumbing_that_imports_no_script_but_to_look_at_the_method():
    for path in (ROOT / "data").glob("*.py"):
        found = set(re.findall(r"^ *(?:from|import) (\w+)", path.read_text(), re.M))
        scripts = found & {"model", "masking", "train", "glue"}
        assert not scripts or path.stem == "inspection", (path.name, scripts)


def test_its_links_and_pictures_are_there():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def test_every_key_of_the_log_is_explained(folder, monkeypatch):
    call(command(folder, "run", "--score-input", "vocabulary"), monkeypatch)
    explained = (ROOT / "data" / "results" / "keys.md").read_text()
    kinds = {"word_internal", "number", "frequent", "rare"}  # "kinds of tokens"
    for line in map(json.loads, (folder / "run" / "log.jsonl").read_text().splitlines()):
        for key in {*line, *line.get("masked", {})} - kinds:
            assert f"`{key}`" in explained or f".{key}`" in explained, key


def test_pages_are_narrow_and_have_no_gaps():
    for page in PAGES:
        text = page.read_text()
        assert not re.search("{{|FORMATS|GAP|TODO", text), page.name
        assert not [line for line in text.splitlines() if len(line) > 120], page.name


def test_your_own_strategy_works_as_it_says():
    code = re.search(r"```python\n# masking.py, at its end\n(.*?)```", README, re.S)[1]
    names = dict(vars(masking))
    exec(code, names)
    pieces = ["▁a" if i % 3 == 0 else "b" for i in range(V)]
    tokens, noise, k = rows_of(200), noise_of(200), 9
    positions = masking.Strategy(None, names["word_starts"](pieces), names["whole_words"])(
        tokens, k, noise)
    assert positions.shape == (200, k)
    cut_short = 0
    for row, chosen in zip(tokens.tolist(), positions.tolist()):
        words = []  # the places of each word
        for place in range(1, T - 1):
            if row[place] % 3 == 0 or not words:
                words.append(set())
            words[-1].add(place)
        parts = [len(word & set(chosen)) / len(word) for word in words]
        cut_short += sum(0 < part < 1 for part in parts)
        assert sum(0 < part < 1 for part in parts) <= 1  # the last one, where k is reached
    assert 0 < cut_short < 200
