"""From text to token ids on disk, once, in little memory (8 bytes a paragraph):

    documents (data/text.py) -> train / valid split by document -> tokens (data/tokenizer.py)

The result is a folder in the cache, named after a hash of the files and settings that made it:
    train.bin, valid.bin   token ids, uint16, documents joined by [SEP]
    tokenizer.model        the vocabulary, learned from this corpus or given
    meta.json              hashes, and what was read, in words
"""

import functools
import importlib.metadata
import shutil
from array import array
from collections import Counter
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch

from data.download import NAMED
from data.files import (
    UserError, lock_folder, progress, read_json, sha256_file, sha256_json, write_json,
)
from data.text import find_files, parts_of, read_documents
from data.tokenizer import CLS, MASK, N_SPECIAL, PAD, SEP, UNK, Tokenizer, train_tokenizer

FORMAT = 3  # raise it when the same text would give other tokens: caches are then built anew
MIN_DOCUMENT = 16  # tokens; shorter ones share a [SEP], so that some 16/17 of a block are maskable
VALID_EVERY = 50  # one document in 50 is held out: 2 %
TOKENIZER_SAMPLE = 16_000_000  # characters; beyond this a BPE vocabulary hardly changes
ENCODE_BATCH = 2_000_000  # characters that are encoded at once
PARTS = ("train.bin", "valid.bin", "tokenizer.model")


def sample_paragraphs(paths, corpus):
    """Pass 1 -> (number of documents of each part, number of characters, paragraphs for the
    tokenizer, was a test file left out?).

    Keeps every m-th document; when the sample outgrows its size, every second one is dropped and
    m doubles. So it is spread evenly over a corpus whose size is not known beforehand.
    """
    characters = kept_characters = 0
    stride, kept, parts, left_out = 1, [], Counter(), []
    with progress(desc="reading", unit=" characters") as bar:
        for part, document in read_documents(paths, corpus, left_out):
            size = sum(map(len, document))
            if parts.total() % stride == 0 and part != "valid":
                kept.append(document)
                kept_characters += size
                if kept_characters > TOKENIZER_SAMPLE and len(kept) > 1:
                    kept, stride = kept[::2], stride * 2
                    kept_characters = sum(len(p) for d in kept for p in d)
            parts[part] += 1
            characters += size
            bar.update(size)
    return parts, characters, list(chain.from_iterable(kept)), bool(left_out)


def batches(documents):
    """Yield lists of (split, document) of some ENCODE_BATCH characters."""
    batch, size = [], 0
    for split, document in documents:
        batch.append((split, document))
        size += sum(map(len, document))
        if size > ENCODE_BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def encode_documents(paths, corpus, tokenizer, parts, characters, folder, threads):
    """Pass 2: encode everything into train.bin and valid.bin -> the share of the held-out text
    that is in the training text, too, paragraph by paragraph."""
    valid_every = min(VALID_EVERY, parts.total())
    splits = ["train"] * valid_every
    if not parts["valid"]:  # else those are held out, and all others are to train on
        splits[valid_every // 2] = "valid"
    held_out, trained = Counter(), array("q")  # tokens of each paragraph, by its hash; hashes
    files = {split: open(folder / f"{split}.bin", "wb") for split in ("train", "valid")}
    unfinished = dict.fromkeys(files, 0)  # tokens since the last [SEP]
    numbered = enumerate(read_documents(paths, corpus))
    chosen = (("valid" if part == "valid" else splits[i % valid_every], document)
              for i, (part, document) in numbered)
    with (files["train"], files["valid"],
          progress(desc="encoding", total=characters, unit=" characters") as bar):
        for batch in batches(chosen):
            paragraphs = list(chain.from_iterable(document for _, document in batch))
            encoded = iter(tokenizer.encode(paragraphs, threads))
            for split, document in batch:
                ids = array("H")
                for paragraph in islice(encoded, len(document)):
                    ids.extend(paragraph)
                    if split == "valid":
                        held_out[hash(tuple(paragraph))] += len(paragraph)
                    else:
                        trained.append(hash(tuple(paragraph)))
                unfinished[split] += len(ids)
                if unfinished[split] >= MIN_DOCUMENT:
                    ids.append(SEP)
                    unfinished[split] = 0
                ids.tofile(files[split])
            bar.update(sum(map(len, paragraphs)))
    return sum(held_out[p] for p in held_out.keys() & trained) / max(1, held_out.total())


def build(corpus, paths, vocab_size, key, folder, threads, tokenizer):
    """Learn the vocabulary, or take that of `tokenizer`, encode the text, and write all of a cache
    folder but its name."""
    parts, characters, sample, tests = sample_paragraphs(paths, corpus)
    by_name = [f"{parts['valid']:,} held out"] * bool(parts["valid"])
    by_name += ["test files left out"] * tests
    documents = f"documents: {parts.total():,}"
    documents += f" (by their files' names {' and '.join(by_name)})" * bool(by_name)
    if parts.total() < 2 or not sample:
        raise UserError(f"--corpus {corpus}: {documents}: too few to train on one and hold out "
                        "another (one paragraph a line, a blank line between documents; files "
                        "named test are left out)")
    if tokenizer:
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
    else:
        print(f"corpus: learning a vocabulary of {vocab_size} pieces (some seconds)", flush=True)
        train_tokenizer(sample, vocab_size, folder / "tokenizer.model")
    tokenizer = Tokenizer(folder / "tokenizer.model")
    seen = encode_documents(paths, corpus, tokenizer, parts, characters, folder, threads)
    write_json(folder / "meta.json", {
        "key": key, "sha256": {name: sha256_file(folder / name) for name in PARTS},
        "about": f"files: {len(paths):,}, characters: {characters:,}, {documents}; of the held-out "
                 f"text {seen:.1%} is in the training text, too"})


def prepare(corpus, vocab_size, cache, threads=1, tokenizer=None):
    """Return the cache folder of `corpus` (a path or a name), building it if it is not there.

    threads: of sentencepiece, and processes for `docs`. The result is the same.
    tokenizer: a tokenizer.model to encode it with; else one of vocab_size pieces is learned.
    """
    cache = Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    paths = find_files(corpus, cache, threads)
    # The key holds all that decides the tokens; sentencepiece's version does too.
    key = {"files": [sha256_file(path) for path in paths],
           "format": FORMAT, "sentencepiece": importlib.metadata.version("sentencepiece"),
           **({"tokenizer": sha256_file(tokenizer)} if tokenizer else {"vocab_size": vocab_size})}
    if any(parts := parts_of(paths)):
        key["parts"] = parts
    if corpus in NAMED:  # its archive, given as a path, would be read in another way
        key["name"] = corpus
    folder = cache / sha256_json(key)[:16]
    if folder.is_dir():
        return folder
    with lock_folder(cache, wait="it prepares a corpus"):
        if folder.is_dir():  # it was made while we waited
            return folder
        for old in cache.glob("*.building"):  # of a process that was killed
            shutil.rmtree(old)
        building = cache / f"{folder.name}.building"
        building.mkdir()
        try:
            build(corpus, paths, vocab_size, key, building, threads, tokenizer)
            building.rename(folder)  # the whole folder appears at once, or not at all
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return folder


def find_prepared(cache, sha256):
    """The cache folder of the Text with this hash, or None: so a run finds its text also where the
    files it came from have moved, changed or gone."""
    for meta in sorted(Path(cache).glob("*/meta.json")):
        try:
            whole = ".building" not in meta.parent.name
            if whole and sha256_json(read_json(meta)["sha256"]) == sha256:
                return meta.parent
        except (UserError, LookupError, TypeError):  # a damaged one is not it
            continue
    return None


@dataclass
class Text:
    """What a run reads: see load()."""
    train: np.ndarray  # (N, seq_len - 2) uint16, blocks of consecutive tokens, memory-mapped
    valid: np.ndarray  # the same of the documents that are held out
    counts: np.ndarray  # (V,) how often each token occurs in `train`
    tokenizer: Tokenizer
    tokenizer_path: Path
    sha256: str  # of the hashes of its three files
    unigram_entropy: float  # nats, of the held-out text
    about: str  # what was read, in words


def load(folder, seq_len, max_tokens=0, whole=False):
    """Open a cache folder -> Text. `max_tokens` > 0 uses only the first so many training tokens;
    with `whole` all of the text is held out, for a run that has read nothing of it. UserError on
    damage."""
    try:
        meta = read_json(folder / "meta.json")
        about = meta.get("about", "an older cache")
        intact = all(sha256_file(folder / name) == meta["sha256"][name] for name in PARTS)
    except (UserError, FileNotFoundError, LookupError, TypeError, ValueError):
        intact = False
    if not intact:
        raise UserError(f"{folder} is damaged: delete it and start again, it is then built anew")
    n = seq_len - 2  # [CLS] and [SEP] take two places
    parts = {name: np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="r")
             for name in ("train", "valid")}
    if whole:
        parts = dict.fromkeys(parts, np.concatenate(list(parts.values())))
    elif max_tokens:
        parts["train"] = parts["train"][:max_tokens]
    blocks = {}
    for name, tokens in parts.items():
        if len(tokens) < n:
            raise UserError(f"the corpus is too small: its {name} part has {len(tokens)} tokens, "
                            f"less than one block of {n}: give more text")
        blocks[name] = tokens[:len(tokens) // n * n].reshape(-1, n)
    tokenizer = Tokenizer(folder / "tokenizer.model")
    about += f'; the text begins "{tokenizer.decode(blocks["train"][0])[:60]}"'
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for i in range(0, len(blocks["train"]), 1 << 16):  # in pieces: bincount makes int64 copies
        counts += np.bincount(blocks["train"][i:i + (1 << 16)].ravel(), minlength=len(counts))
    assert counts[[PAD, UNK, CLS, MASK]].sum() == 0, "no special token but [SEP] is in a text"
    valid_counts = np.bincount(parts["valid"], minlength=len(counts))
    return Text(
        **blocks, counts=counts, tokenizer=tokenizer, tokenizer_path=folder / "tokenizer.model",
        sha256=sha256_json(meta["sha256"]), about=about,
        unigram_entropy=unigram_entropy(valid_counts))


def load_text(args, earlier, machine, other=False):
    """Load the tokens: of an `earlier` run (its config) those that it began with, found in the
    cache by their hash, whatever was upgraded, moved or deleted since; else, or if it is to read an
    `other` text, those of --corpus.
    """
    origin = args.out if earlier else args.init_from  # the run whose tokenizer encodes the text

    def find():
        tokenizer = origin and Path(origin) / "tokenizer.model"
        return prepare(args.corpus, args.vocab_size, args.cache, machine.threads, tokenizer)

    if not earlier or other:
        folder = machine.in_turn(find)
        found = sha256_json(read_json(folder / "meta.json")["sha256"])
        unread = earlier and found != earlier["corpus_sha256"]
        return load(folder, args.seq_len, args.corpus_tokens, whole=unread)
    moved = (f"the text that {args.out} began with is not in {args.cache}: if it has moved, say "
             "where with --corpus")
    found = find_prepared(args.cache, earlier["corpus_sha256"])
    try:
        text = load(found or machine.in_turn(find), args.seq_len, args.corpus_tokens)
    except UserError as error:
        raise error if found else UserError(f"{error} ({moved})")
    if earlier["corpus_sha256"] != text.sha256:
        raise UserError(f"--corpus {args.corpus} is another text, and {moved}")
    if found and args.corpus != earlier["flags"]["corpus"]:
        print(f"note: --corpus {args.corpus} was not read: the text that {args.out} began with is "
              f"in {args.cache}")
    return text


def unigram_entropy(counts):
    """Entropy in nats of the distribution with these counts, special tokens left out: the loss of a
    model that knows how frequent every token is and nothing else."""
    p = counts[N_SPECIAL:] / counts[N_SPECIAL:].sum()
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


# --------------------------------------------------------------------------------------------------
# batches


def with_ends(blocks):
    """uint16 blocks (B, T - 2) -> tokens (B, T), int64, between [CLS] and [SEP]."""
    tokens = np.pad(blocks.astype(np.int64), ((0, 0), (1, 1)), constant_values=((0, 0), (CLS, SEP)))
    return torch.from_numpy(tokens)


def maskable(seq_len):
    """How many tokens of a block are no [SEP], at the least: see MIN_DOCUMENT."""
    n = seq_len - 2
    return n - -(-n // (MIN_DOCUMENT + 1))


def block_order(n_blocks, seed, step, batch_size):
    """The numbers of the blocks (batch_size,) of a step: epoch after epoch, each in an order of its
    own.

    A function of (seed, step) alone: resuming seeks nowhere, and arms with one seed share it.
    """
    first, last = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(first // n_blocks, (last - 1) // n_blocks + 1):
        begin = epoch * n_blocks
        parts.append(epoch_order(seed, epoch, n_blocks)[max(0, first - begin):last - begin])
    return np.concatenate(parts)


@functools.lru_cache(maxsize=2)  # the epoch that ends and the one that begins
def epoch_order(seed, epoch, n_blocks):
    # numpy pads seeds with zeros: this is the stream (seed, epoch, 0); masking.py has the others.
    return np.random.default_rng((seed, epoch)).permutation(n_blocks)
