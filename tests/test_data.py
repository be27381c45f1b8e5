"""Text -> documents -> tokens on disk, and files.   python -m pytest tests/test_data.py -q"""

import bz2
import gzip
import io
import json
import lzma
import multiprocessing.synchronize
import os
import random
import runpy
import signal
import sys
import threading
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tqdm import tqdm

from data import corpus as corpora
from data import docs, files
from data import text as texts
from data.files import UserError
from data.text import read_documents
from data.tokenizer import (
    CLS, INVISIBLE_RE, MASK, N_SPECIAL, SEP, UNK, Tokenizer, normalize, train_tokenizer,
)
from tests.helpers import WORDS, packed_tar, packed_zip, write_corpus


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    source = write_corpus(folder / "text.txt")
    return source, corpora.prepare(str(source), 600, folder / "cache", threads=1)


@pytest.fixture(scope="module")
def tokenizer(prepared):
    return Tokenizer(prepared[1] / "tokenizer.model")


# ---- reading text


def test_every_packing_reads_the_same(tmp_path):
    text = "One paragraph.\r\nAnother — with ünïcode 🙂.\r\n\r\nSecond document.\n"
    data = b"\xef\xbb\xbf" + text.encode()  # a byte-order mark
    members = {"a/b.txt": data, "__MACOSX/a/._b.txt": b"\0", "a/.DS_Store": b"\0"}
    for name, packed in {
            "a.txt": data, "a.gz": gzip.compress(data), "A.GZ": gzip.compress(data),
            "a.xz": lzma.compress(data), "a.bz2": bz2.compress(data), "b": bz2.compress(data),
            "a.zip": packed_zip(members), "a.tgz": packed_tar(members, "w:gz"),
            "a.tar": packed_tar(members, "w"), "a.tar.bz2": packed_tar(members, "w:bz2")}.items():
        (tmp_path / name).write_bytes(packed)
        assert list(read_documents([tmp_path / name])) == [
            ("", ["One paragraph.", "Another — with ünïcode 🙂."]), ("", ["Second document."])], name


def test_a_folder_is_read_with_its_folders_without_what_is_hidden_or_ours(tmp_path):
    top, elsewhere = tmp_path / "top", tmp_path / "elsewhere"
    for path in (top / "b.txt", top / "AA" / "wiki_00", top / "AA" / "c" / "d.txt",
                 elsewhere / "e.txt", top / ".git" / "x", top / ".hidden", top / "AA" / ".DS_Store",
                 top / "run-0" / ".lock", top / "run-0" / "config.json",
                 top / "cache" / ".lock", top / "cache" / "0123" / "meta.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{path.name}\n")
    (top / "linked").symlink_to(elsewhere)
    found = texts.find_files(str(top), tmp_path, 1)
    assert [str(p.relative_to(top)) for p in found] == [
        "AA/c/d.txt", "AA/wiki_00", "b.txt", "linked/e.txt"]
    (top / "AA" / "again").symlink_to(top)
    with pytest.raises(UserError, match="top/AA/again and .*top are one folder, by a link"):
        corpora.prepare(str(top), 600, tmp_path / "cache")
    (top / "AA" / "again").unlink()
    os.mkfifo(top / "pipe")
    for corpus in (top, top / "pipe", "/dev/null"):
        with pytest.raises(UserError, match="is a pipe or a device, .* write it to a file first"):
            corpora.prepare(str(corpus), 600, tmp_path / "cache")
    (top / "pipe").unlink()
    (top / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="gone"):
        corpora.prepare(str(top), 600, tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    for corpus, message in ((tmp_path / "empty", "the folder holds no files"),
                            (tmp_path / "no.txt", "no such file or folder; the names are docs, ")):
        with pytest.raises(UserError, match=message):
            corpora.prepare(str(corpus), 600, tmp_path / "cache")


def test_text_without_blank_lines_and_endless_lines_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "MAX_DOCUMENT", 100)
    monkeypatch.setattr(texts, "MAX_LINE", 50)
    (tmp_path / "a.txt").write_text("wörd " * 1000)
    documents = [document for _, document in read_documents([tmp_path / "a.txt"])]
    assert len(documents) > 30 and "".join(sum(documents, [])).count("wörd") == 1000
    (tmp_path / "a.txt").write_bytes(b"word " * 1000 + b"\n\nb\xff")
    with pytest.raises(UserError, match="a.txt line 3 is not UTF-8"):
        list(read_documents([tmp_path / "a.txt"]))


PACKED = gzip.compress(b"text " * 1000)
ZIP = packed_zip({"a.txt": b"text\n" * 9, "b.txt": os.urandom(999)})
WITH_PASSWORD = packed_zip({"s.txt": b"text"}).replace(  # the flag, in both headers of its member
    b"PK\3\4\x14\0\0", b"PK\3\4\x14\0\1").replace(
    b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1")


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"One document only.\n", "documents: 1"),
    ("a.txt", b"a\n\nzero \0 bytes\n", r"a\.txt line 3 is not UTF-8 text; .*begins with b'a.n'"),
    ("a.txt", "a\r\nb\n\nca\u00e9\n".encode("cp1252"), "line 4 is not UTF-8.* -f cp1252"),
    ("a.parquet", b"PAR1\x15\x04\0", "line 1 is not UTF-8 text; .*with b'PAR1.*unpack"),
    ("a.gz", gzip.compress(b"a\nb \xff c\n"), r"a\.gz line 2 is not UTF-8"),
    ("a.gz", PACKED[:-20], "a.gz cannot be read: Compressed file ended.*; if it is damaged"),
    ("a.gz", PACKED[:30] + b"\xff\xff" + PACKED[32:], "a.gz cannot be read"),
    ("a.bz2", bz2.compress(b"text " * 1000)[:30] + b"rubbish", "a.bz2 cannot be read"),
    ("a.zip", ZIP[:-40], "a.zip cannot be read.*File is not a zip file"),
    ("a.zip", ZIP.replace(ZIP[150:250], bytes(100)), "a.zip, b.txt, .*CRC"),
    ("a.zip", WITH_PASSWORD, "a.zip cannot be read.*password required"),
    ("a.zip", packed_zip({"b.txt": b"\xff"}), "a.zip, b.txt, line 1 is not UTF-8"),
    ("a.tar", packed_tar({"b.txt": b"\0"}, "w"), "a.tar, b.txt, line 1 is not UTF-8 text"),
    ("a.jsonl", b'\n{"id": 1, "text": "Words."}\n' * 9, "line 2 begins with .*JSON.*jq -r"),
    ("a.json", b'[\n {"text": "Some words."}\n]', "line 1 begins with .*JSON or markup"),
    ("a.json", b'["Some words.", "More words."]', "line 1 begins with .*JSON or markup"),
    ("a.html", b"<!DOCTYPE html>\n<html>", "line 1 begins with <!DOCTYPE html>: JSON or markup"),
])
def test_bad_text_is_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        corpora.prepare(str(tmp_path / name), 600, tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [".lock"]  # nothing is left behind


def test_text_about_json_is_text(tmp_path):
    (tmp_path / "a.txt").write_text('[Applause] "Yes" is\n\n{"json": 1}\n\n<b>\n')
    assert len(list(read_documents([tmp_path / "a.txt"]))) == 3


def test_an_impossible_vocabulary_is_told_what_is_possible(tmp_path):
    source = write_corpus(tmp_path / "text.txt")
    letters = ["".join(map(chr, range(0x400 + i, 0x4ff))) for i in range(9)]
    for text, size, message in ((letters, 300, "does not hold the letters .* give at least "),
                                (source.read_text().splitlines(), 30000, "or at most ")):
        with pytest.raises(UserError, match=message) as error:
            train_tokenizer(text, size, tmp_path / "t.model")
        train_tokenizer(text, int(str(error.value).split()[-1]), tmp_path / "t.model")  # it is so
    with pytest.raises(UserError, match="the text cannot train a tokenizer"):
        train_tokenizer(["\u200b"], 300, tmp_path / "t.model")


def test_an_interrupt_within_the_trainer_stays_one(tmp_path):
    def paragraphs():
        yield "Some words."
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(paragraphs(), 300, tmp_path / "t.model")
    assert not (tmp_path / "t.model").exists()


def test_what_looks_blank_is_blank(tmp_path):
    blanks = "\u200b", " \u00ad \ufeff", "\u3164\t", "▁", "\x01"
    text = "".join(f"Text {i}.\n{blank}\n" for i, blank in enumerate(blanks))
    (tmp_path / "a.txt").write_text(text + "\u200bthe last\n")
    assert [len(d) for _, d in read_documents([tmp_path / "a.txt"])] == [1] * (len(blanks) + 1)


# ---- the parts of a data set, and what the start says of them


@pytest.mark.parametrize("name, part", [
    *((name, "train") for name in ("train.txt", "wiki.train.raw", "train/a.txt")),
    *((name, "valid") for name in ("valid.txt", "Validation-00000-of-00002.gz", "x/dev/1.txt",
                                   "c4-validation.00001.txt", "ptb.val.txt", "en-dev.txt")),
    *((name, "test") for name in ("test.txt", "a_test", "test2.txt", "test_01.txt")),
    *((name, "") for name in ("a.txt", "latest.txt", "device.txt", "test-driven.txt", "trains")),
])
def test_a_name_says_which_part_it_is(name, part):
    assert texts.part_of(name) == part


def test_files_to_validate_are_held_out_and_those_to_test_left_out(tmp_path):
    """In a folder and in an archive; not where one file is all there is, or all are alike."""
    written = {"train.txt": write_corpus(tmp_path / "a", 60).read_bytes(),
               "more.txt": b"More words.\n\nMany more words.\n",
               "valid.txt": write_corpus(tmp_path / "b", 9, seed=1).read_bytes(),
               "test.txt": b"the zyxomma\n\n" * 99}
    (tmp_path / "parts").mkdir()
    for name, data in written.items():
        (tmp_path / "parts" / name).write_bytes(data)
    (tmp_path / "parts.zip").write_bytes(packed_zip(written))
    folders = [corpora.prepare(str(tmp_path / name), 600, tmp_path / "cache")
               for name in ("parts", "parts.zip")]
    for folder in folders:
        text = corpora.load(folder, 34)
        assert "documents: 71 (by their files' names 9 held out" in text.about
        assert " and test files left out)" in text.about
        held = "".join(text.tokenizer.decode(np.fromfile(folder / "valid.bin", np.uint16)))
        assert held.count("document") == 9 and "more words" not in held
        assert not any("zyxo" in piece for piece in text.tokenizer.pieces)
    one = write_corpus(tmp_path / "test.txt", 60)
    assert "documents: 60; " in corpora.load(corpora.prepare(
        str(one), 600, tmp_path / "cache"), 34).about
    for name in ("train.txt", "more.txt"):
        (tmp_path / "parts" / name).unlink()
    with pytest.raises(UserError, match="documents: 9 .*files named test are left out"):
        corpora.prepare(str(tmp_path / "parts"), 600, tmp_path / "cache")


def test_the_start_says_how_much_of_the_held_out_text_is_trained_on(tmp_path):
    documents = write_corpus(tmp_path / "half.txt", 60).read_text().split("\n\n")
    documents[3] += "\nThe model reads a text while the masks move."
    documents[25] = ("the  model reads a text while the masks move.\n"  # what is held out
                     "\u200bThe masks move while a text reads the model.")
    (tmp_path / "half.txt").write_text("\n\n".join(documents))
    folder = corpora.prepare(str(tmp_path / "half.txt"), 600, tmp_path / "cache")
    assert "of the held-out text 50.0% is in the training text" in corpora.load(folder, 16).about


# ---- the text of the first run


def no_shared_memory(*_):
    raise FileNotFoundError(2, "No such file or directory")  # as where there is no /dev/shm


def test_docs_are_the_same_from_any_number_of_processes(tmp_path, monkeypatch):
    prose = "This {} sentence is long enough to be taken for prose by all who read it here, I hope."
    for name in ("stdlib", "torch", "numpy"):
        (root := tmp_path / name / "site-packages").mkdir(parents=True)
        for i in range(60):  # the same in all three roots: only the first counts
            (root.parent / f"m{i:02}.py").write_text(f'"""{prose.format("x" * i)}\n\nfew\n"""\n')
        (root / "other.py").write_text(f'"""{prose.format(name)}"""')
        (root.parent / "wrong.py").write_text(f'def: """{prose.format("wrong")}"""')
    monkeypatch.setattr(docs.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "stdlib")})
    monkeypatch.setattr(docs.importlib.util, "find_spec", lambda name: SimpleNamespace(
        origin=str(tmp_path / name / "__init__.py")))
    words = ["x" * i for i in range(60)] + ["torch", "numpy"]  # no site-packages of the stdlib
    monkeypatch.setattr(multiprocessing.synchronize._multiprocessing, "SemLock", no_shared_memory)
    for processes in (1, 3):
        (cache := tmp_path / f"cache{processes}").mkdir()
        path, = texts.find_files("docs", cache, processes)
        assert path.read_text().strip().split("\n\n") == [
            " ".join(prose.format(word).split()) for word in words]
        path.write_text("kept")
        assert docs.extract_docs(cache, processes).read_text() == "kept"


# ---- tokens


def test_every_paragraph_is_encoded_once_and_documents_are_split_whole(prepared, tokenizer):
    source, folder = prepared
    documents = [document for _, document in read_documents([source])]
    expected = {"train": [], "valid": []}
    for i, document in enumerate(documents):
        ids = sum((tokenizer.sp.encode(normalize(f" {p}")) for p in document), [])  # not by words
        expected["valid" if i % 50 == 25 else "train"] += [*ids, SEP]
    for name, ids in expected.items():
        assert np.fromfile(folder / f"{name}.bin", np.uint16).tolist() == ids
    text = corpora.load(folder, 34)
    counts = np.bincount(expected["valid"], minlength=600)[N_SPECIAL:]
    p = counts[counts > 0] / counts.sum()
    assert text.unigram_entropy == pytest.approx(-(p * np.log(p)).sum())
    assert text.counts[N_SPECIAL:].sum() == (text.train >= N_SPECIAL).sum()
    characters = sum(len(p) for d in documents for p in d)
    assert text.about == (
        f"files: 1, characters: {characters:,}, documents: 120; of the held-out text 0.0% is in "
        f'the training text, too; the text begins "{normalize(documents[0][0])[:60]}"')


def test_batches_threads_and_memory_do_not_change_the_tokens(prepared, tmp_path, monkeypatch):
    source, folder = prepared
    monkeypatch.setattr(corpora, "ENCODE_BATCH", 500)  # a few documents at a time
    used = []
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, threads: (
        used.append(threads), encode(self, text, threads))[1])
    other = corpora.prepare(str(source), 600, tmp_path / "cache", threads=3)
    for name in ("train.bin", "valid.bin", "tokenizer.model"):  # the tokenizer is deterministic too
        assert (folder / name).read_bytes() == (other / name).read_bytes()
    assert set(used) == {3} and len(used) > 20


def test_the_tokenizer_sample_is_spread_over_the_corpus(tmp_path, monkeypatch):
    source = write_corpus(tmp_path / "text.txt", documents=400)
    monkeypatch.setattr(corpora, "TOKENIZER_SAMPLE", 20_000)
    parts, characters, sample, tests = corpora.sample_paragraphs([source], "")
    numbers = [int(p.split()[1][:-1]) for p in sample if p.startswith("Document")]
    assert parts == {"": 400} and not tests and sum(map(len, sample)) <= 20_000 < characters
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


@pytest.mark.parametrize("text, alike", [
    ("e\u200b\u0301t", "ét"),
    ("👩\u200d👧", "👩👧"), ("❤\ufe0f", "❤"),
    *((f"the{blank}quiet", "the quiet") for blank in ("▁", "▅", "\r\n", "\u00a0 \u200b\t")),
    ("  The Quiet\n", "the quiet"), ("ﬁÅK", "fiåk"), ("か\u3099\uff76\uff9e", "がガ"),
    ("\u1112\u1161\u11ab", "한"), ("ΟΔΟΣ", "οδοσ"), ("bad \udc80 byte", "bad ? byte"),
    ("\u200b \t", ""),
])
def test_what_looks_alike_has_the_same_ids(text, alike, tokenizer):
    assert tokenizer.encode(text) == tokenizer.encode(alike)
    assert tokenizer.decode(tokenizer.encode(text)) == alike


def test_no_invisible_character_and_no_blank_is_a_letter():
    visible = set("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2"
                  "\U000110bd\U000110cd")  # Arabic, Syriac and Kaithi signs of category Cf
    for c in map(chr, range(sys.maxunicode + 1)):
        if c.isspace():
            assert normalize(f"a{c}b") in ("a b", "ab"), hex(ord(c))
        elif unicodedata.category(c) in ("Cc", "Cf") and c not in visible | set(map(
                chr, range(0x13430, 0x13440))):  # hieroglyphs that join
            assert INVISIBLE_RE.fullmatch(c) and normalize(f"a{c}b") == "ab", hex(ord(c))
        elif INVISIBLE_RE.match(c):
            assert unicodedata.category(c) in ("Cc", "Cf", "Mn", "Lo", "Cn", "So"), hex(ord(c))


@pytest.mark.parametrize("character", "▅\t\u00ad")
def test_no_paragraph_is_left_out_of_the_vocabulary(character, tmp_path):
    paragraphs = [f"the {word} zebrafish {character} and more" for word in WORDS * 2]
    train_tokenizer(paragraphs, 330, tmp_path / "t.model")
    tokenizer = Tokenizer(tmp_path / "t.model")
    assert [tokenizer.pieces[i] for i in tokenizer.encode("zebrafish")] == ["▁zebrafish"]
    assert not {"▅", "\t", "\u00ad"} & set(tokenizer.pieces)


def test_prompts_with_masks(tokenizer):
    ids = tokenizer.encode_with_masks("the [MASK] reads [MASK].")
    assert ids == [*tokenizer.encode("the"), MASK, *tokenizer.encode("reads"), MASK,
                   tokenizer.encode("it.")[-1]]
    assert tokenizer.encode_with_masks("[MASK]the[MASK] the [MASK]\u200bthe") == [
        MASK, *tokenizer.sp.encode("the"), *2 * [MASK, *tokenizer.encode("the")]]


def test_a_tokenizer_that_is_not_the_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        Tokenizer(tmp_path / "none.model")
    (tmp_path / "t.model").write_bytes(b"rubbish")
    for sha256, message in ((None, "not a sentencepiece model"), ("0" * 64, "is damaged")):
        with pytest.raises(UserError, match=message):
            Tokenizer(tmp_path / "t.model", sha256)


# ---- the cache


def test_the_cache_is_used_again_and_found_by_its_hashes(prepared, tmp_path):
    source, folder = prepared
    stamp = (folder / "train.bin").stat().st_mtime_ns
    assert corpora.prepare(str(source), 600, folder.parent) == folder
    assert (folder / "train.bin").stat().st_mtime_ns == stamp
    other = write_corpus(tmp_path / "text.txt", seed=1)
    own = corpora.prepare(str(other), 600, folder.parent)
    given = corpora.prepare(str(other), 600, folder.parent, 1, folder / "tokenizer.model")
    assert len({folder, own, given}) == 3
    (folder.parent / "0").mkdir()
    (folder.parent / "0" / "meta.json").write_text("{")
    text = corpora.load(folder, 34)
    assert corpora.find_prepared(folder.parent, text.sha256) == folder
    assert corpora.find_prepared(folder.parent, "0" * 64) is None
    assert corpora.find_prepared(tmp_path / "no cache", text.sha256) is None


def test_a_damaged_cache_is_refused(tmp_path):
    folder = corpora.prepare(str(write_corpus(tmp_path / "text.txt")), 600, tmp_path / "cache")
    corpora.load(folder, 32)
    meta = (folder / "meta.json").read_bytes()
    for name, damaged in (
            *((name, bad) for name in corpora.PARTS for good in [(folder / name).read_bytes()]
              for bad in (good[:-1], bytes([good[0] ^ 1]) + good[1:], None)),
            *(("meta.json", bad) for bad in (b"{}", b'{"sha256": {}}', meta[:-9], None))):
        good = (folder / name).read_bytes()
        (folder / name).unlink() if damaged is None else (folder / name).write_bytes(damaged)
        with pytest.raises(UserError, match="cache/[0-9a-f]{16} is damaged: delete it and start"):
            corpora.load(folder, 32)
        (folder / name).write_bytes(good)
    for seq_len, max_tokens in ((10**6, 0), (34, 20)):
        with pytest.raises(UserError, match="the corpus is too small: .* give more text"):
            corpora.load(folder, seq_len, max_tokens)
    assert len(corpora.load(folder, 34, max_tokens=100).train) == 3


def test_processes_that_start_together_wait_for_the_one_that_builds(tmp_path, monkeypatch, capsys):
    source, built, folders = write_corpus(tmp_path / "text.txt"), [], []
    build = corpora.build
    monkeypatch.setattr(corpora, "build", lambda *args: (built.append(args), build(*args)))
    threads = [threading.Thread(target=lambda: folders.append(
        corpora.prepare(str(source), 600, tmp_path / "cache"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and len(folders) == 3 and len(set(folders)) == 1
    assert "waiting for another process: it prepares a corpus" in capsys.readouterr().err


def test_what_a_killed_builder_left_goes_with_the_next(tmp_path):
    (left := tmp_path / "cache" / "ab.building").mkdir(parents=True)
    (left / "train.bin").write_bytes(b"x")
    corpora.prepare(str(write_corpus(tmp_path / "text.txt")), 600, tmp_path / "cache")
    assert not left.exists()


# ---- batches


def test_batches_are_a_permutation_of_every_epoch():
    steps = np.stack([corpora.block_order(11, 0, step, 4) for step in range(11)])  # four epochs
    order = steps.flatten()
    for epoch in range(4):
        assert sorted(order[epoch * 11:(epoch + 1) * 11]) == list(range(11))
    assert order[:11].tolist() != order[11:22].tolist()
    assert np.array_equal(corpora.block_order(11, 0, 7, 4), steps[7])  # no history needed
    assert not np.array_equal(corpora.block_order(11, 1, 7, 4), steps[7])
    assert np.array_equal(corpora.block_order(11, 0, 1, 22), order[22:])  # several epochs at once


# ---- files


def test_tensors_carry_their_checksum(tmp_path):
    path = tmp_path / "x.pt"
    files.save_tensors(path, {"a": torch.arange(1000.0), "step": 3})
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.arange(1000.0))
    good = path.read_bytes()
    assert files.load_tensors(path)["step"] == 3
    for bad in (*(good[:i] + bytes([good[i] ^ 4]) + good[i + 1:] for i in range(0, len(good), 97)),
                *(good[:cut] for cut in (0, 10, 64, len(good) - 1))):
        path.write_bytes(bad)
        with pytest.raises(UserError, match="damaged"):
            files.load_tensors(path)


def test_a_pickle_payload_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    files.save_tensors(tmp_path / "x.pt", {"a": Payload()})
    with pytest.raises(UserError, match="not one of our files"):
        files.load_tensors(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


def test_a_failed_write_leaves_the_old_file_and_says_which(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*x\.json"):
        files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 1} and len(list(tmp_path.iterdir())) == 1


def test_json_is_an_object_or_damaged(tmp_path):
    path, value = tmp_path / "x.json", {"b": [1.5, float("inf"), "é"], "a": {"steps": 100}}
    files.write_json(path, value)
    assert files.read_json(path) == value == json.loads(path.read_text())
    assert files.sha256_json(value) == files.sha256_json(dict(reversed(value.items())))
    for bad in ("{", "[]", "", "[" * 100_000, '{"a": "\udc80"}'):
        path.write_bytes(bad.encode("utf-8", "surrogateescape"))
        with pytest.raises(UserError, match=r"x\.json is damaged"):
            files.read_json(path)


def test_a_lock_is_held_once_and_dies_with_its_owner(tmp_path):
    first = files.lock_folder(tmp_path)
    with pytest.raises(UserError, match="in use"):
        files.lock_folder(tmp_path)
    first.close()
    files.lock_folder(tmp_path)


def test_without_locks_there_is_one_warning(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    monkeypatch.delattr(files.lock_folder, "warned", raising=False)
    for _ in range(2):
        files.lock_folder(tmp_path, wait="it prepares a corpus")
    assert capsys.readouterr().err.count("warning: no locks on the file system") == 1
    monkeypatch.delattr(files.lock_folder, "warned")


def test_a_system_without_locks_is_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(files.__file__)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Linux or macOS" in error and error.count("\n") == 1


def test_signals_are_left_alone_in_a_thread():
    found, before = [], signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: found.append(files.catch_signals()))
    thread.start()
    thread.join()
    assert found == [[]] and signal.getsignal(signal.SIGINT) is before


def test_work_goes_on_where_nobody_reads(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writing, "w"))
    assert files.run_script(lambda: (print("a" * 10**6, flush=True), print("works"))[1:]) == (None,)
    with pytest.raises(BrokenPipeError):
        sys.stdout.stream.close()


def test_a_notebook_has_its_own_streams(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys, "stdout", stream := io.StringIO())
    files.run_script(lambda: print("works ▁"))
    assert stream.getvalue() == "works ▁\n"


@pytest.mark.parametrize("error, line, status", [
    (UserError("two\nlines"), "error: two lines", 2),
    (FileNotFoundError(2, "No such file", "x.txt"), "error: x.txt: No such file", 2),
    (OSError(28, "No space left", "y"), "error: y: No space left; what is on disk is whole", 2),
    (KeyboardInterrupt(), "interrupted: nothing that was finished is lost", 130),
])
def test_what_a_user_can_put_right_is_a_line_of_its_own_below_the_bar(
        error, line, status, monkeypatch, capsys):
    def main():
        bar = tqdm(total=3)
        bar.update()
        raise error

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # run_script wraps them
    with pytest.raises(SystemExit) as stop:
        files.run_script(main)
    bar, *lines = filter(None, capsys.readouterr().err.split("\n"))
    assert stop.value.code == status and "/3" in bar
    assert len(lines) == 1 and lines[0].startswith(line)
