"""From files to documents: a file, plain or packed, an archive, a folder, or a corpus by its name.

Text is UTF-8 with one paragraph a line and a blank line between documents. What is not that is
refused in one line, with its place, rather than learned.
"""

import bz2
import gzip
import io
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from itertools import chain
from pathlib import Path, PurePath

from data.docs import extract_docs
from data.download import NAMED, download
from data.files import UserError

MAX_DOCUMENT = 100_000  # characters; text without blank lines is cut into documents of this size
MAX_LINE = 1 << 20  # characters; a longer line is read in pieces, or it would fill the memory
# Packed files are known by their first bytes, whatever their names.
OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
UNREADABLE = {b"\x28\xb5\x2f\xfd": "zstd", b"\x50\x2a\x4d\x18": "zstd", b"\x04\x22\x4d\x18": "lz4",
              b"7z\xbc\xaf": "7z", b"Rar!": "rar"}
NO_PROSE = re.compile(
    r'\{\s*(["\']|$)|\[\s*([{"]|$)|<(\?xml|!doctype|html|mediawiki|doc[ >])', re.I)
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what errors="surrogateescape" makes of bad bytes


def find_files(corpus, cache, threads):
    """--corpus -> the list of its files. Makes or downloads them where they are known by name."""
    if corpus == "docs":
        return [extract_docs(cache, threads)]
    if corpus in NAMED:
        name = NAMED[corpus]["urls"][0].rpartition("/")[2]
        return [download(**NAMED[corpus], target=cache / "downloads" / name)]
    path = Path(corpus or "no name")  # "", of a variable that is not set, would be this folder
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"--corpus {corpus}: no such file or folder; the names are docs, "
                        + ", ".join(NAMED))

    def fail(error):
        raise error

    walk = os.walk(path, onerror=fail, followlinks=True)
    files = sorted(Path(folder, name) for folder, _, names in walk for name in names)
    files = [file for file in files if not is_leftover(file.relative_to(path))]
    if not files:
        raise UserError(f"--corpus {corpus}: the folder holds no files")
    return files


def is_leftover(name):
    """Is it a hidden file, or one that a packer or a file manager leaves?"""
    return any(part.startswith(".") or part in ("__MACOSX", "Thumbs.db", "desktop.ini")
               for part in PurePath(name).parts)


def open_texts(path):
    """Yield (name, open text file) for a text file, plain or packed, or for each one in an archive.

    An archive is read in place: nothing of it is ever written under a name that it chose.
    """
    as_text = {"encoding": "utf-8-sig", "errors": "surrogateescape"}  # check_lines finds bad bytes
    with open(path, "rb") as f:
        start = f.read(8)
    for magic, kind in UNREADABLE.items():
        if start.startswith(magic):
            raise UserError(f"{path} is compressed with {kind}: unpack it first")
    if start.startswith(b"PK\3\4"):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if not name.endswith("/") and not is_leftover(name):
                    with archive.open(name) as f:
                        yield f"{path}, {name},", io.TextIOWrapper(f, **as_text)
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and not is_leftover(member.name):
                    with archive.extractfile(member) as f:
                        yield f"{path}, {member.name},", io.TextIOWrapper(f, **as_text)
    else:
        opener = next((OPENERS[magic] for magic in OPENERS if start.startswith(magic)), open)
        with opener(path, "rt", **as_text) as f:
            yield str(path), f


def read_documents(paths, corpus=""):
    """Yield (split, document): a list of paragraphs, and train or valid, or "" where we choose."""
    for path in paths:
        where = path
        try:
            for where, file in open_texts(path):
                lines = check_lines(where, file)
                if corpus in ("wikitext2", "wikitext103"):
                    yield from read_wikitext(where, lines)
                else:
                    yield from read_paragraphs(lines, tokenized=corpus == "bookcorpus")
        except (EOFError, OSError, RuntimeError, lzma.LZMAError, zlib.error, zipfile.BadZipFile,
                tarfile.TarError) as error:  # RuntimeError: a .zip with a password
            if getattr(error, "filename", None):  # what cannot be opened has its name
                raise
            raise UserError(f"{where} cannot be read: {str(error)[:200]}; "
                            "if it is damaged, copy it again")


def check_lines(where, file):
    """Yield the lines of an open file, stripped. UserError, with its number, for one that is no
    text, and for a first one that is JSON or markup."""
    number, first = 1, True
    while line := file.readline(MAX_LINE):
        text = line.strip()
        if "\0" in text:
            raise UserError(f"{where} line {number} is not text: it has a zero byte "
                            "(if it is UTF-16: iconv -f utf-16 -t utf-8)")
        if not text.isascii() and NOT_UTF8.search(text):
            raise UserError(f"{where} line {number} is not UTF-8: convert it, for example with "
                            "iconv -f latin1 -t utf-8")
        if text and first and NO_PROSE.match(text):
            raise UserError(f"{where} line {number} begins with {text[:20]}: JSON or markup, where "
                            "text is expected, a paragraph a line and a blank line between "
                            "documents; of JSON lines, jq -r '.FIELD, \"\"' makes that")
        yield text
        first = first and not text
        number += line.endswith("\n")


def read_paragraphs(lines, tokenized=False):
    """Yield ("", document). BookCorpus is sentences without any boundary, so it is cut by size."""
    document, size = [], 0
    for line in chain(lines, [""]):
        if line:
            document.append(undo_tokens(line) if tokenized else line)
            size += len(line)
        if document and (not line or size > MAX_DOCUMENT):
            yield "", document
            document, size = [], 0


def read_wikitext(name, lines):
    """Yield (split, article). A blank line separates paragraphs, ` = Title = ` begins an article,
    and there is a file to validate on."""
    split = re.search(r"\.(train|valid)\.raw\b|$", name)[1]
    article = []
    for line in chain(lines if split else (), ["= End ="]):  # not the test set
        if not re.fullmatch("= .* =", line):
            article += [undo_tokens(line)] if line else []
        elif re.fullmatch("= [^=]+ =", line) and article:
            yield split, article
            article = []


def undo_tokens(line):
    """Put a line that was cut into tokens together again: `1 @,@ 000 people , he said`."""
    line = re.sub(r" @([-,.])@ ", r"\1", line)
    line = re.sub(r'" ([^"]*?) "', r'"\1"', line)
    line = re.sub(r"([(\[]) ", r"\1", line)
    return re.sub(r" ([,.;:!?)\]%]|'s\b|n't\b|'(?:re|ve|ll|d|m)\b)", r"\1", line)
