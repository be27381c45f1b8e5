"""Text -> documents -> tokens on disk, and files.   python -m pytest tests/test_data.py -q"""

import bz2
import gzip
import hashlib
import json
import lzma
import random

import numpy as np
import pytest
import torch

from data import corpus as corpora
from data import files
from data.files import UserError
from data.tokenizer import CLS, MASK, N_SPECIAL, SEP, UNK, Tokenizer

WORDS = ("the a model reads every token of text and learns to guess what is hidden from it by all "
         "the words around while masks move with each step so that nothing is seen twice").split()


def write_corpus(path, documents=120, seed=0, words=40):
    """Documents of two paragraphs of random words, each document with a number of its own."""
    rng = random.Random(seed)
    text = "\n\n".join(
        f"Document {i}: " + " ".join(rng.choices(WORDS, k=words))
        + ".\n" + " ".join(rng.choices(WORDS, k=words)).capitalize() + "."
        for i in range(documents))
    path.write_text(text + "\n")
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    source = write_corpus(folder / "text.txt")
    return source, corpora.prepare(str(source), 600, folder / "cache")


# ---- reading text


def test_every_packing_reads_the_same(tmp_path):
    text = "One paragraph.\r\nAnother — with ünïcode 🙂.\r\n\r\nSecond document.\n"
    for name, pack in (("a.txt", bytes), ("a.gz", gzip.compress), ("a.xz", lzma.compress),
                       ("a.bz2", bz2.compress)):
        (tmp_path / name).write_bytes(pack(b"\xef\xbb\xbf" + text.encode()))  # a byte-order mark
        assert list(corpora.read_documents([tmp_path / name])) == [
            ("", ["One paragraph.", "Another — with ünïcode 🙂."]), ("", ["Second document."])]


def test_a_path_is_not_a_name(tmp_path):
    (tmp_path / "wikitext.txt").write_text("= Title =\n\nA paragraph.\n")
    documents = list(corpora.read_documents([tmp_path / "wikitext.txt"], "wikitext.txt"))
    assert documents == [("", ["= Title ="]), ("", ["A paragraph."])]


def test_text_without_blank_lines_and_endless_lines_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "MAX_DOCUMENT", 100)
    monkeypatch.setattr(corpora, "MAX_LINE", 50)
    (tmp_path / "a.txt").write_text("word " * 1000)
    documents = [document for _, document in corpora.read_documents([tmp_path / "a.txt"])]
    assert len(documents) > 30 and "".join(sum(documents, [])).count("word") == 1000


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"", "0 documents"),
    ("a.txt", b"One document only.\n", "1 documents"),
    ("a.txt", b"zero \0 bytes\n\nhere\n", "zero bytes"),
    ("a.txt", "caf\u00e9\n\nhere\n".encode("latin-1"), "not UTF-8"),
    ("a.xz", lzma.compress(b"text " * 1000)[:-20], "damaged"),
    ("a.gz", gzip.compress(b"text " * 1000)[:-20], "damaged"),
    ("a.gz", b"not packed at all", "cannot read"),
    ("a.bz2", b"not packed at all", "cannot read"),
    ("a.txt", b"too few\n\nwords here\n", "at most"),
])
def test_bad_text_is_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        corpora.prepare(str(tmp_path / name), 600, tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".building")]


def test_missing_corpus_and_impossible_vocabulary(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        corpora.prepare(str(tmp_path / "none.txt"), 600, tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no files"):
        corpora.prepare(str(tmp_path / "empty"), 600, tmp_path / "cache")
    source = write_corpus(tmp_path / "text.txt")
    for size in (100, 70000):
        with pytest.raises(UserError, match="uint16"):
            corpora.prepare(str(source), size, tmp_path / "cache")
    source.write_text("\n\n".join("".join(map(chr, range(0x400 + i, 0x4ff))) for i in range(9)))
    with pytest.raises(UserError, match="does not hold the letters"):
        corpora.prepare(str(source), 300, tmp_path / "cache")
    write_corpus(source)
    with pytest.raises(UserError, match="more than this corpus supports.*at most [0-9]+"):
        corpora.prepare(str(source), 30000, tmp_path / "cache")


# ---- tokens


def test_every_paragraph_is_encoded_once_and_documents_are_split_whole(prepared):
    source, folder = prepared
    tokenizer = Tokenizer(folder / "tokenizer.model")
    documents = [document for _, document in corpora.read_documents([source])]
    expected = {"train": [], "valid": []}
    for i, document in enumerate(documents):
        ids = sum((tokenizer.encode(paragraph) for paragraph in document), [])
        expected["valid" if i % 50 == 25 else "train"] += [*ids, SEP]
    for name, ids in expected.items():
        assert np.fromfile(folder / f"{name}.bin", np.uint16).tolist() == ids
    meta, text = files.read_json(folder / "meta.json"), corpora.load(folder, 34)
    counts = np.bincount(expected["valid"], minlength=600)[N_SPECIAL:]
    p = counts[counts > 0] / counts.sum()
    assert text.unigram_entropy == pytest.approx(-(p * np.log(p)).sum())
    assert meta["documents"] == 120 and meta["train_tokens"] == len(expected["train"])


def test_batches_and_memory_do_not_change_the_tokens(prepared, tmp_path, monkeypatch):
    source, folder = prepared
    monkeypatch.setattr(corpora, "ENCODE_BATCH", 500)  # a few documents at a time
    other = corpora.prepare(str(source), 600, tmp_path / "cache")
    for name in ("train.bin", "valid.bin", "tokenizer.model"):  # the tokenizer is deterministic too
        assert (folder / name).read_bytes() == (other / name).read_bytes()


def test_the_tokenizer_sample_is_spread_over_the_corpus(tmp_path, monkeypatch):
    source = write_corpus(tmp_path / "text.txt", documents=400)
    monkeypatch.setattr(corpora, "TOKENIZER_SAMPLE", 20_000)
    documents, characters, sample = corpora.sample_paragraphs([source], "")
    numbers = [int(p.split()[1][:-1]) for p in sample if p.startswith("Document")]
    assert documents == 400 and sum(map(len, sample)) <= 20_000 < characters
    assert len(set(np.diff(numbers))) == 1 and numbers[-1] > 300


def test_short_documents_share_a_separator(tmp_path):
    """So every block has enough tokens that can be masked."""
    path = tmp_path / "text.txt"
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklm", k=4)) for _ in range(9000)]
    path.write_text("\n\n".join(words) + "\n")
    text = corpora.load(corpora.prepare(str(path), 512, tmp_path / "cache"), 34)
    assert ((text.train == SEP).sum(1) <= 2).all() and (text.train == SEP).any()  # ceil(32 / 17)


def test_special_tokens_never_come_from_text(tmp_path):
    path = write_corpus(tmp_path / "text.txt")
    path.write_text(path.read_text() + "\n\n[MASK] [CLS] [PAD] [SEP] <s> </s> <unk> [MASK].\n" * 9)
    folder = corpora.prepare(str(path), 600, tmp_path / "cache")
    tokenizer = Tokenizer(folder / "tokenizer.model")
    assert min(tokenizer.encode("[MASK] [CLS] a [PAD][SEP] <unk> 🙂 \u4e2d")) >= N_SPECIAL
    tokens = np.fromfile(folder / "train.bin", np.uint16)
    assert set(tokens[tokens < N_SPECIAL]) == {SEP}
    assert [tokenizer.pieces[i] for i in (CLS, UNK, MASK)] == ["[CLS]", "[UNK]", "[MASK]"]


def test_prompts_with_masks(prepared):
    tokenizer = Tokenizer(prepared[1] / "tokenizer.model")
    ids = tokenizer.encode_with_masks("the [MASK] reads [MASK].")
    assert ids == [*tokenizer.encode("the"), MASK, *tokenizer.encode("reads"), MASK,
                   tokenizer.encode("it.")[-1]]
    assert tokenizer.decode(tokenizer.encode("The  Model")) == "the model"


# ---- the cache


def test_the_cache_is_used_again_and_keyed_by_content(prepared, tmp_path):
    source, folder = prepared
    stamp = (folder / "train.bin").stat().st_mtime_ns
    assert corpora.prepare(str(source), 600, folder.parent) == folder
    assert (folder / "train.bin").stat().st_mtime_ns == stamp
    other = write_corpus(tmp_path / "text.txt", seed=1)
    assert corpora.prepare(str(other), 600, folder.parent) != folder


def test_a_damaged_cache_is_refused(tmp_path):
    folder = corpora.prepare(str(write_corpus(tmp_path / "text.txt")), 600, tmp_path / "cache")
    corpora.load(folder, 32)
    for name in ("train.bin", "valid.bin", "tokenizer.model"):
        good = (folder / name).read_bytes()
        for bad in (good[:-1], bytes([good[0] ^ 1]) + good[1:]):
            (folder / name).write_bytes(bad)
            with pytest.raises(UserError, match=f"{name} is damaged: delete"):
                corpora.load(folder, 32)
        (folder / name).write_bytes(good)
    for content in ({}, {"sha256": {}}):
        files.write_json(folder / "meta.json", content)
        with pytest.raises(UserError, match="is damaged"):
            corpora.load(folder, 32)


# ---- batches


def test_batches_are_a_permutation_of_every_epoch():
    blocks = np.arange(11 * 3, dtype=np.uint16).reshape(11, 3) + N_SPECIAL
    rows = torch.cat([corpora.batch_at(blocks, 0, step, 4) for step in range(11)])  # four epochs
    assert rows.shape == (44, 5) and (rows[:, 0] == CLS).all() and (rows[:, -1] == SEP).all()
    for epoch in range(4):
        part = rows[epoch * 11:(epoch + 1) * 11, 1:-1]
        assert sorted(part[:, 0].tolist()) == blocks[:, 0].tolist()
    assert rows[:11].tolist() != rows[11:22].tolist()
    assert torch.equal(corpora.batch_at(blocks, 0, 7, 4), rows[28:32])  # no history needed
    assert not torch.equal(corpora.batch_at(blocks, 1, 7, 4), rows[28:32])


# ---- files


def test_tensors_carry_their_checksum(tmp_path):
    path = tmp_path / "x.pt"
    files.save_tensors(path, {"a": torch.arange(1000.0), "step": 3})
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.arange(1000.0))
    good = path.read_bytes()
    assert files.load_tensors(path)["step"] == 3
    for i in range(0, len(good), 97):
        path.write_bytes(good[:i] + bytes([good[i] ^ 4]) + good[i + 1:])
        with pytest.raises(UserError, match="damaged"):
            files.load_tensors(path)
    for cut in (0, 10, 64, len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(UserError, match="damaged"):
            files.load_tensors(path)


def test_a_pickle_payload_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "x.pt"
    files.save_tensors(path, {"a": Payload()})
    with pytest.raises(UserError, match="not one of our files"):
        files.load_tensors(path)
    path.write_bytes(b"junk" + hashlib.sha256(b"junk").hexdigest().encode())
    with pytest.raises(UserError, match="not one of our files"):
        files.load_tensors(path)
    assert not (tmp_path / "ran").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 1} and len(list(tmp_path.iterdir())) == 1


def test_json_files_carry_a_checksum(tmp_path):
    """A flipped bit that leaves JSON whole is seen; other spaces and key orders are no damage."""
    path = tmp_path / "x.json"
    files.write_json(path, {"b": [1.5, float("inf"), "é"], "a": {"steps": 100}})
    whole = path.read_text()
    assert files.read_json(path) == {"a": {"steps": 100}, "b": [1.5, float("inf"), "é"]}
    path.write_text(json.dumps(json.loads(whole), sort_keys=True))
    assert files.read_json(path)["a"] == {"steps": 100}
    for bad in (whole.replace("100", "108"), whole.replace('"checksum"', '"checksun"'),
                whole.replace('"a"', '"c"'), "{", "[]", "{}", "[" * 100_000, '{"a": "\udc80'):
        path.write_bytes(bad.encode("utf-8", "surrogateescape"))
        with pytest.raises(UserError, match="is damaged"):
            files.read_json(path)


def test_a_lock_is_held_once_and_dies_with_its_owner(tmp_path):
    first = files.lock_folder(tmp_path)
    with pytest.raises(UserError, match="in use"):
        files.lock_folder(tmp_path)
    first.close()
    files.lock_folder(tmp_path)
