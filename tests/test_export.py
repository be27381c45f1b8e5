"""python model.py RUN --export DIR and --fill.   python -m pytest tests/test_export.py -q

What needs Hugging Face transformers is skipped where it is not installed.
"""

import json
import random
import re
import struct

import pytest
import torch

import model as model_script
from data import corpus as corpora
from data.export import interleave, safetensors
from data.tokenizer import CLS, MASK, SEP, Tokenizer
from model import Bert, Shape, load
from tests.helpers import call, save_run

ENGLISH = """It's a truth universally acknowledged, that a single man in possession of a good
fortune must be in want of a wife -- isn't it?|
In 1984 (or 1,984?) 50% of 3.5 million people paid $20.|
"Naïve" café-goers said: “Straße” and ﬁnally… ½ of the Ⅳ|   spaces   and\ttabs  |a|.|
Model outputs are read by the model; the reader learns to read every hidden token of it.|
C++ e.g. x_1 == y[0]; https://example.org/?q=a+b&c#d|日本語 and Ελλάδα, 😀 emoji\u200b|
|readers READERS Readers|'s|n't|--|(a)|İstanbul|e\u0301gal|it is 10:30 a.m.""".split("|")
ODD = [
    *"½ﬁßİς`´¨~日한Å▁▅█\u2047\u0345\u0958", "[MASK]", " [MASK] ", "the", " model", "ing", "'s", "ΑΣ",
    "か\u3099", "ｶﾞ", "ﾊﾞﾅﾅ", "\u1112\u1161\u11ab", "e\u0301", "A\u030a", "q\u0303", "x\u0323\u0301",
    "X\u0301\u0323", "\u1e9b\u0323", "ष\u093c", "שלום", "\u05d0\u05b7", "ᏣᎳ", "❤\ufe0f",
    "👩\u200d👩\u200d👧", "🏳\ufe0f\u200d🌈", *"\0\x07\x1c\x85\u00ad\u200b\u200f\u202b\ufeff", " ", "  ",
    "\r\n", *"\t\v\f\u00a0\u2003\u2028\u3000"]


@pytest.fixture(scope="module")
def runs(folder):
    text = corpora.load(corpora.prepare(str(folder / "text.txt"), 600, folder / "cache"), 64)
    found = {}
    for positions in ("rotary", "learned"):
        torch.manual_seed(0)
        model = Bert(Shape(600, 3, 128, 64, positions=positions, init_std=0.2))
        for name, p in model.named_parameters():  # biases and norms away from 0 and 1
            if p.dim() < 2:
                is_scale = "norm" in name and "weight" in name
                torch.nn.init.normal_(p, mean=1.0 if is_scale else 0.0)
        found[positions] = save_run(folder / positions, model, text.tokenizer_path)
    return found


def test_fill_prints_five_guesses_a_mask(runs, monkeypatch, capsys):
    call(["model.py", runs["rotary"], "--fill", "The [MASK] reads the [MASK]."], monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(len(re.findall(r"\S+ 0\.\d{3}", line)) == 5 for line in lines)
    model, tokenizer = load(runs["rotary"])
    ids = torch.tensor([[CLS, *tokenizer.encode_with_masks("The [MASK] reads the [MASK]."), SEP]])
    where = (ids[0] == MASK).nonzero().flatten()
    with torch.inference_mode():
        best = model(ids)[0, where].softmax(-1).topk(5)
    _, guesses = model_script.fill_mask(model, tokenizer, [  # a list of texts, as of a text
        "a [MASK]", "The [MASK] reads the [MASK]."])
    assert [[piece for piece, _ in row] for row in guesses] == [
        [tokenizer.pieces[i] for i in row] for row in best.indices.tolist()]
    assert [[p for _, p in row] for row in guesses] == [
        pytest.approx(row, abs=1e-5) for row in best.values.tolist()]


def test_an_export_is_never_overwritten(runs, tmp_path, monkeypatch, capsys):
    call(["model.py", runs["learned"], "--export", tmp_path / "out"], monkeypatch)
    assert "BertForMaskedLM" in capsys.readouterr().out
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(SystemExit):
        call(["model.py", runs["rotary"], "--export", tmp_path / "out"], monkeypatch)
    assert "exists: give another folder" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}


def test_safetensors_bytes_by_hand():
    data = safetensors({"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3.0])})
    size, = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + size])
    assert size % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    assert header == {"a": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
                      "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}
    assert struct.unpack("<3f", data[8 + size:]) == (1.0, 2.0, 3.0)


def test_rotary_planes_change_their_order():
    x = torch.arange(2 * 6)  # two heads of width 6: the planes are (0, 3), (1, 4), (2, 5)
    assert interleave(x, 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


# ---- against transformers


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        for name, run in runs.items():
            call(["model.py", run, "--export", folder / name], patch)
    return folder


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_transformers_has_the_same_logits(positions, runs, exported):
    import transformers
    name = {"rotary": "RoFormerForMaskedLM", "learned": "BertForMaskedLM"}[positions]
    theirs, info = getattr(transformers, name).from_pretrained(
        exported / positions, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    auto = transformers.AutoModelForMaskedLM.from_pretrained(exported / positions)
    assert type(auto) is type(theirs)
    ours, _ = load(runs[positions])
    torch.manual_seed(1)
    tokens = torch.randint(5, 600, (4, 40))
    types = torch.randint(0, 2, (4, 40))
    attend = torch.arange(40) < torch.tensor([[40], [33], [7], [1]])
    tokens[~attend] = 0
    with torch.inference_mode():
        a = ours(tokens, None, types, attend)[attend]
        for other in (theirs.eval(), auto.eval()):
            b = other(input_ids=tokens, token_type_ids=types, attention_mask=attend.long()).logits
            assert a.std() > 1 and (a - b[attend]).abs().max() < 1e-4


def test_auto_tokenizer_gives_the_same_ids(runs, exported):
    """For text of every kind, and with [MASK] in it."""
    from transformers import AutoTokenizer
    ours = Tokenizer(runs["rotary"] / "tokenizer.model")
    theirs = AutoTokenizer.from_pretrained(exported / "rotary")
    rng = random.Random(0)
    words = (runs["rotary"].parent / "text.txt").read_text().split()
    texts = [*ENGLISH, *(" ".join(rng.choices(words, k=12)) for _ in range(200))]
    odd = ["".join(rng.choices(ODD, k=rng.randint(1, 9))) for _ in range(1000)]
    for text in (*texts, *odd, "read[MASK]s [MASK] [MASK]", "the reader, [MASK], reads ([MASK])"):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == ours.encode_with_masks(text), repr(text)
    pair = theirs("one word", "and another")
    a, b = ours.encode("one word"), ours.encode("and another")
    assert pair["input_ids"] == [2, *a, 3, *b, 3]
    assert pair["token_type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    assert theirs.model_max_length == 64
    assert [theirs.pad_token_id, theirs.unk_token_id, theirs.cls_token_id, theirs.sep_token_id,
            theirs.mask_token_id] == [0, 1, 2, 3, 4]
    for text in texts:
        assert theirs.decode(ours.encode(text)).strip() == ours.decode(ours.encode(text)).strip()


def words_of(spans):
    """Spans of tokens -> those of words: a word ends where the next token does not follow on."""
    words = []
    for first, last in spans:
        if words and words[-1][1] == first:
            words[-1] = words[-1][0], last
        else:
            words.append((first, last))
    return words


def test_a_span_is_a_word_without_the_blank_before_it(exported):
    from transformers import AutoTokenizer
    theirs = AutoTokenizer.from_pretrained(exported / "rotary")
    for text in (ENGLISH[0], "the  model\r\n \u00a0reads\u2003it", "A [MASK] reads: x_1, a."):
        spans = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        assert words_of(spans["offset_mapping"]) == [
            found.span() for found in re.finditer(r"\S+", text)], repr(text)
