"""From text to token ids on disk, once, in constant memory:

    files -> paragraphs -> documents -> train / valid split by document -> uint16 tokens

A corpus is UTF-8 text with one paragraph a line and a blank line between documents: one file
(plain, .gz, .xz, .bz2), a folder of them, or a name. `docs` is the English prose in the sources of
the Python, torch and numpy that are installed anyway, so that a first run needs no network; the
others, in NAMED, are downloaded once.

The result is a folder in the cache, named after a hash of the files and settings that made it:
    train.bin, valid.bin   token ids, uint16, documents joined by [SEP]
    tokenizer.model        the vocabulary, learned from this corpus
    meta.json              counts and hashes
"""

import ast
import bz2
import contextlib
import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import lzma
import os
import platform
import re
import shutil
import sysconfig
import tarfile
import warnings
import zipfile
import zlib
from array import array
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from data.download import NAMED, download
from data.files import (
    UserError, lock_folder, progress, read_json, sha256_file, write_atomic, write_json,
)
from data.tokenizer import (
    CLS, MASK, MAX_VOCAB, MIN_VOCAB, N_SPECIAL, PAD, SEP, UNK, Tokenizer, train_tokenizer,
)

FORMAT = 1  # raise it when the same text would give other tokens: old caches are then rebuilt
MAX_DOCUMENT = 100_000  # characters; text without blank lines is cut into documents of this size
MAX_LINE = 1 << 20  # characters; a longer line is read in pieces, or it would fill the memory
MIN_DOCUMENT = 16  # tokens; shorter ones share a [SEP], so that >= 16/17 of a block is maskable
VALID_EVERY = 50  # one document in 50 is held out: 2 %
TOKENIZER_SAMPLE = 16_000_000  # characters; beyond this a BPE vocabulary hardly changes
ENCODE_BATCH = 2_000_000  # characters handed to sentencepiece's threads at once
PARTS = ("train.bin", "valid.bin", "tokenizer.model")


# --------------------------------------------------------------------------------------------------
# text


def open_texts(path):
    """Yield (name, open text file) for a text file, plain or packed, or for each one in an archive.

    An archive is read in place: nothing of it is ever written under a name that it chose.
    """
    opener = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(path.suffix, open)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if not name.endswith("/"):
                    with archive.open(name) as f:
                        yield name, io.TextIOWrapper(f, "utf-8-sig")
    elif path.name.endswith(".tar.bz2"):
        with tarfile.open(path, "r:bz2") as archive:
            for member in archive:
                if member.isfile():
                    with archive.extractfile(member) as f:
                        yield member.name, io.TextIOWrapper(f, "utf-8-sig")
    else:
        with opener(path, "rt", encoding="utf-8-sig") as f:
            yield path.name, f


@contextlib.contextmanager
def readable(path):
    """Turn what can be wrong with a text file or an archive into one line."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason}): convert it, for example with iconv")
    except (EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, tarfile.TarError) as error:
        raise UserError(f"{path} is damaged: {error}")
    except RuntimeError as error:  # a .zip with a password, or packed in a way Python cannot read
        raise UserError(f"cannot read {path}: {error}")
    except OSError as error:  # bz2 and gzip also report a damaged archive this way
        raise UserError(f"cannot read {path}: {error.strerror or error}")


def read_documents(paths, corpus=""):
    """Yield (split, document): a list of paragraphs, and train or valid, or "" where we choose.

    In WikiText a blank line separates paragraphs, ` = Title = ` begins an article, and there is a
    file to validate on; BookCorpus is sentences without any boundary, so it is cut by size.
    """
    wikitext = corpus in ("wikitext2", "wikitext103")
    for path in paths:
        with readable(path):
            for name, f in open_texts(path):
                split = re.search(r"\.(train|valid)\.raw$|$", name)[1] if wikitext else ""
                document, size, line = [], 0, "\n"
                while line and split is not None:  # what is neither is the test set
                    line = f.readline(MAX_LINE)
                    text = line.strip()
                    if "\0" in text:
                        raise UserError(f"{path} is not text: it has zero bytes")
                    heading = wikitext and text.startswith("= ") and text.endswith(" =")
                    if text and not heading:
                        document.append(undo_tokens(text) if corpus in NAMED else text)
                        size += len(text)
                    ends = re.fullmatch("= [^=]+ =", text) if wikitext else not text
                    if document and (ends or not line or size > MAX_DOCUMENT):
                        yield split, document
                        document, size = [], 0


def undo_tokens(line):
    """Put a line that was cut into tokens together again: `1 @,@ 000 people , he said`."""
    line = re.sub(r" @([-,.])@ ", r"\1", line)
    line = re.sub(r'" ([^"]*?) "', r'"\1"', line)
    line = re.sub(r"([(\[]) ", r"\1", line)
    return re.sub(r" ([,.;:!?)\]%]|'s\b|n't\b|'(?:re|ve|ll|d|m)\b)", r"\1", line)


def find_files(corpus, cache):
    """--corpus -> the list of its text files. Extracts `docs` where that has not been done yet."""
    if corpus == "docs":
        return [extract_docs(cache)]
    if corpus in NAMED:
        name = NAMED[corpus]["urls"][0].rpartition("/")[2]
        return [download(**NAMED[corpus], target=cache / "downloads" / name)]
    path = Path(corpus)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
        if not files:
            raise UserError(f"--corpus {corpus}: the folder holds no files")
        return files
    if not path.is_file():
        raise UserError(f"--corpus {corpus}: no such file or folder; the names are docs, "
                        + ", ".join(NAMED))
    return [path]


# --------------------------------------------------------------------------------------------------
# the offline corpus

PROSE_WORD = re.compile(r"[A-Za-z]+(['-][A-Za-z]+)*[.,;:!?)]*")


def prose_paragraphs(source):
    """The English paragraphs in the string constants of one Python source file (bytes)."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):  # test data that is wrong on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 80:
            for paragraph in re.split(r"\n\s*\n", node.value):
                words = paragraph.split()
                prose = sum(bool(PROSE_WORD.fullmatch(word)) for word in words)
                # Code, tables and doctests have few plain words; 3/4 keeps prose with some markup.
                if len(words) >= 8 and prose >= 0.75 * len(words):
                    yield " ".join(words).encode("utf-8", "replace").decode()


def extract_docs(cache):
    """Write the prose of the installed Python, torch and numpy as one text file; return its path.

    Nothing is imported or run: the sources are only parsed. A source file is a document, and a
    paragraph that came before (compared by its letters alone) is left out, so that nothing in the
    held-out documents has been trained on.
    """
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    versions = [f"python{platform.python_version()}"]
    for package in ("torch", "numpy"):
        roots.append(Path(importlib.util.find_spec(package).origin).parent)
        versions.append(package + importlib.metadata.version(package))
    target = cache / f"docs-{'-'.join(versions)}.txt"
    if target.exists():
        return target
    lock = lock_folder(cache)
    stdlib = roots[0]
    files = [p for root in roots for p in sorted(root.rglob("*.py"))
             if p.is_file()  # and not a link to nothing, such as an editor's lock
             and (root != stdlib or not {"site-packages", "dist-packages"} & set(p.parts))]
    seen, documents = set(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes and the like in other people's sources
        for path in progress(files, desc="reading documentation strings", unit=" files"):
            source = path.read_bytes()
            if b'"""' not in source and b"'''" not in source:
                continue  # no documentation string: not worth the parsing
            document = []
            for paragraph in prose_paragraphs(source):
                letters = hashlib.md5(re.sub(r"[\W\d_]+", "", paragraph.lower()).encode()).digest()
                if letters not in seen:
                    seen.add(letters)
                    document.append(paragraph)
            if document:
                documents.append("\n".join(document))
    write_atomic(target, "\n\n".join(documents).encode() + b"\n")
    lock.close()
    return target


# --------------------------------------------------------------------------------------------------
# preparation


def sample_paragraphs(paths, corpus):
    """Pass 1 -> (number of documents, number of characters, paragraphs for the tokenizer).

    Keeps every m-th document; when the sample outgrows its size, every second one is dropped and
    m doubles. So it is spread evenly over a corpus whose size is not known beforehand.
    """
    documents = characters = kept_characters = 0
    stride, kept = 1, []
    with progress(desc="reading", unit=" characters") as bar:
        for split, document in read_documents(paths, corpus):
            size = sum(map(len, document))
            if documents % stride == 0 and split != "valid":
                kept.append(document)
                kept_characters += size
                if kept_characters > TOKENIZER_SAMPLE and len(kept) > 1:
                    kept, stride = kept[::2], stride * 2
                    kept_characters = sum(len(p) for d in kept for p in d)
            documents += 1
            characters += size
            bar.update(size)
    return documents, characters, [paragraph for document in kept for paragraph in document]


def encode_documents(paths, corpus, tokenizer, documents, characters, folder):
    """Pass 2: encode everything into train.bin and valid.bin; return their token counts by id."""
    names = ("train", "valid")
    counts = {name: np.zeros(tokenizer.vocab_size, dtype=np.int64) for name in names}
    unfinished = dict.fromkeys(names, 0)  # tokens since the last [SEP]
    valid_every = min(VALID_EVERY, documents)
    bar = progress(desc="encoding", total=characters, unit=" characters")
    with (bar, open(folder / "train.bin", "wb") as train,
          open(folder / "valid.bin", "wb") as valid):
        files = {"train": train, "valid": valid}

        def flush(batch):
            """Encode (split, document) pairs in parallel and append them to their files."""
            paragraphs = [p for _, document in batch for p in document]
            encoded = iter(tokenizer.encode(paragraphs, threads=os.cpu_count()))
            out = {name: array("H") for name in names}
            for name, document in batch:
                ids = out[name]
                before = len(ids)
                for tokens in itertools.islice(encoded, len(document)):
                    ids.extend(tokens)
                unfinished[name] += len(ids) - before
                if unfinished[name] >= MIN_DOCUMENT:
                    ids.append(SEP)
                    unfinished[name] = 0
            for name in names:
                counts[name] += np.bincount(np.array(out[name], dtype=np.int64),
                                            minlength=tokenizer.vocab_size)
                out[name].tofile(files[name])
            bar.update(sum(map(len, paragraphs)))

        batch, size = [], 0
        for i, (split, document) in enumerate(read_documents(paths, corpus)):
            ours = "valid" if i % valid_every == valid_every // 2 else "train"
            batch.append((split or ours, document))
            size += sum(map(len, document))
            if size > ENCODE_BATCH:
                flush(batch)
                batch, size = [], 0
        flush(batch)
        for f in files.values():
            f.flush()
            os.fsync(f.fileno())
    return counts


def unigram_entropy(counts):
    """Entropy in nats of the distribution with these counts, special tokens left out: the loss of a
    model that knows how frequent every token is and nothing else."""
    p = counts[N_SPECIAL:] / counts[N_SPECIAL:].sum()
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def find_prepared(cache, train_sha256, tokenizer_sha256):
    return None


def prepare(corpus, vocab_size, cache="data/cache", threads=1):
    """Return the cache folder of `corpus` (a path or a name), building it if it is not there."""
    if not MIN_VOCAB <= vocab_size <= MAX_VOCAB:
        raise UserError(f"--vocab-size {vocab_size}: it must lie between {MIN_VOCAB} and "
                        f"{MAX_VOCAB}, what uint16 holds")
    cache = Path(cache)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the cache {cache}: {error.strerror}")
    paths = find_files(corpus, cache)
    try:
        hashes = [sha256_file(path) for path in paths]
    except OSError as error:
        raise UserError(f"--corpus {corpus}: cannot read {error.filename}: {error.strerror}")
    # The key holds all that decides the tokens; sentencepiece's version does too.
    key = {"files": hashes, "vocab_size": vocab_size, "format": FORMAT,
           "sentencepiece": importlib.metadata.version("sentencepiece")}
    if corpus in NAMED:  # its archive, given as a path, would be read in another way
        key["name"] = corpus
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    if (cache / name).is_dir():
        return cache / name
    building = cache / f"{name}.building"
    try:
        building.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {building}: {error.strerror}")
    lock = lock_folder(building)  # two runs that start together: the second is told to wait
    try:
        if not (cache / name).is_dir():  # it was not finished just before we held the lock
            build(corpus, paths, vocab_size, key, building)
            building.rename(cache / name)  # the whole folder appears at once, or not at all
    except OSError as error:
        raise UserError(f"cannot write the token cache in {cache}: {error.strerror}")
    finally:
        shutil.rmtree(building, ignore_errors=True)
        lock.close()
    return cache / name


def build(corpus, paths, vocab_size, key, folder):
    """Learn the vocabulary, encode the text, and write all of a cache folder but its name."""
    documents, characters, sample = sample_paragraphs(paths, corpus)
    if documents < 2:
        raise UserError(f"--corpus {corpus}: {documents} documents, too few to hold one out "
                        "(one paragraph a line, a blank line between documents)")
    print(f"corpus: {documents} documents, {characters / 1e6:.1f} million characters; "
          f"learning a vocabulary of {vocab_size} (some seconds)", flush=True)
    train_tokenizer(sample, vocab_size, folder / "tokenizer.model")
    tokenizer = Tokenizer(folder / "tokenizer.model")
    counts = encode_documents(paths, corpus, tokenizer, documents, characters, folder)
    if not counts["valid"][N_SPECIAL:].any() or not counts["train"][N_SPECIAL:].any():
        raise UserError(f"--corpus {corpus}: too small: nothing is left to train on or hold out")
    write_json(folder / "meta.json", {
        "key": key,
        "documents": documents,
        "characters": characters,
        "train_tokens": int(counts["train"].sum()),
        "valid_tokens": int(counts["valid"].sum()),
        "sha256": {name: sha256_file(folder / name) for name in PARTS},
    })


def load(folder, seq_len, max_tokens=0):
    """Open a cache folder -> a namespace with

    train, valid   (N, seq_len - 2) uint16 blocks of consecutive tokens, memory-mapped
    tokenizer, tokenizer_path, sha256 (of train.bin), unigram_entropy (nats, of the held-out text)
    counts         (V,) how often each token occurs in `train`

    `max_tokens` > 0 uses only the first so many training tokens. UserError on damage.
    """
    folder = Path(folder)
    sha256 = read_json(folder / "meta.json").get("sha256")
    for name in PARTS:
        if not isinstance(sha256, dict) or not (folder / name).is_file() or (
                sha256_file(folder / name) != sha256.get(name)):
            raise UserError(f"{folder / name} is damaged: delete {folder} and start again, "
                            "it is then built anew")
    n = seq_len - 2  # [CLS] and [SEP] take two places
    blocks = {}
    for name in ("train", "valid"):
        tokens = np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="r")
        if name == "train" and max_tokens:
            tokens = tokens[:max_tokens]
        if len(tokens) < n:
            raise UserError(f"the corpus is too small: its {name} part has {len(tokens)} tokens, "
                            f"less than one block of {n}: give more text")
        blocks[name] = tokens[:len(tokens) // n * n].reshape(-1, n)
    tokenizer = Tokenizer(folder / "tokenizer.model")
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for i in range(0, len(blocks["train"]), 1 << 16):  # in pieces: bincount makes int64 copies
        counts += np.bincount(blocks["train"][i:i + (1 << 16)].ravel(), minlength=len(counts))
    assert counts[[PAD, UNK, CLS, MASK]].sum() == 0, "no special token but [SEP] is in a text"
    valid_counts = np.bincount(np.fromfile(folder / "valid.bin", np.uint16), minlength=len(counts))
    return SimpleNamespace(
        **blocks, tokenizer=tokenizer, tokenizer_path=folder / "tokenizer.model", counts=counts,
        sha256=sha256["train.bin"], about="?", unigram_entropy=unigram_entropy(valid_counts),
    )


# --------------------------------------------------------------------------------------------------
# batches


def with_ends(blocks):
    """uint16 blocks (B, T - 2) -> tokens (B, T), int64, between [CLS] and [SEP]."""
    tokens = np.pad(blocks.astype(np.int64), ((0, 0), (1, 1)), constant_values=((0, 0), (CLS, SEP)))
    return torch.from_numpy(tokens)


def batch_at(blocks, seed, step, batch_size):
    return with_ends(blocks[block_order(len(blocks), seed, step, batch_size)])


def block_order(n, seed, step, batch_size):
    first = step * batch_size
    rows = []
    for epoch in range(first // n, (first + batch_size - 1) // n + 1):
        order = epoch_order(seed, epoch, n)
        begin = epoch * n
        rows.append(order[max(0, first - begin):first + batch_size - begin])
    return np.concatenate(rows)


@functools.lru_cache(maxsize=2)  # the epoch that ends and the one that begins
def epoch_order(seed, epoch, n):
    return np.random.default_rng((seed, epoch)).permutation(n)
