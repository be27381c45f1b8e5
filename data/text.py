"""From files to documents: a file, plain or packed, an archive, a folder, or a corpus by its name.

Text is UTF-8 with one paragraph a line and a blank line between documents. What is not that is
refused in one line, with its place, rather than learned. Files whose names say that they are there
to validate are held out, and those to test are left out.
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
from data.tokenizer import INVISIBLE, RESERVED

MAX_DOCUMENT = 100_000  # characters; text without blank lines is cut into documents of this size
MAX_LINE = 1 << 20  # characters; a longer line is read in pieces, or it would fill the memory
# Packed files are known by their first bytes, whatever their names.
OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
NO_PROSE = re.compile(r'[{<]|\[\s*([{"]|$)')  # how JSON and markup begin
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what errors="surrogateescape" makes of bad bytes
BLANK = re.compile(rf"{INVISIBLE[:-1]}\s{RESERVED}]*")  # what `normalize` leaves nothing of
# Data sets come in parts: train.txt, wiki.valid.raw, test-00000-of-00002.gz, dev/a.txt.
PART = re.compile(
    r"(?:^|[/._-])(?:(?P<train>train)|(?P<valid>valid(?:ation)?|val|dev)|(?P<test>test))"
    r"(?=[/.]|[-_]?\d|$)", re.I)


def find_files(corpus, cache, threads):
    """--corpus -> the list of its files. Makes or downloads them where they are known by name."""
    if corpus == "docs":
        return [extract_docs(cache, threads)]
    if corpus in NAMED:
        name = NAMED[corpus]["urls"][0].rpartition("/")[2]
        return [download(**NAMED[corpus], target=cache / "downloads" / name)]
    path = Path(corpus or "no name")  # "", of a variable that is not set, would be this folder
    if not path.exists():
        raise UserError(f"--corpus {corpus}: no such file or folder; the names are docs, "
                        + ", ".join(NAMED))
    files = walk(path) if path.is_dir() else [path]
    for file in files:
        if not file.is_file() and file.exists():
            raise UserError(f"{file} is a pipe or a device, and text is read twice: write it to a "
                            "file first")
    if not files:
        raise UserError(f"--corpus {corpus}: the folder holds no files")
    return files


def walk(top):
    """The files of a folder and its folders, but for hidden ones and what these scripts made:
    run folders and caches, which have a .lock. UserError where a link leads to the same again."""
    def fail(error):
        raise error

    files, seen = [], {}
    for folder, folders, names in os.walk(top, onerror=fail, followlinks=True):
        if (first := seen.setdefault(os.path.realpath(folder), folder)) != folder:
            raise UserError(f"{folder} and {first} are one folder, by a link: take the link out")
        if ".lock" in names and folder != str(top):
            names, folders[:] = [], []
        folders[:] = [name for name in folders if not is_hidden(name)]
        files += [Path(folder, name) for name in names if not is_hidden(name)]
    return sorted(files)


def parts_of(paths):
    """The part of a data set that each file is by its name below their common folder: train, valid,
    test, or "" where that says nothing."""
    top = os.path.commonpath(paths)
    return [part_of(os.path.relpath(path, top)) for path in paths]


def part_of(name):
    found = PART.search(name)
    return found.lastgroup if found else ""


def is_hidden(name):
    """As are most files that packers and file managers leave."""
    return any(part.startswith(".") for part in PurePath(name).parts)


def open_texts(path):
    """Yield ("", open text file) for a text file, plain or packed, or (name, open text file) for
    each one in an archive.

    An archive is read in place: nothing of it is ever written under a name that it chose.
    """
    as_text = {"encoding": "utf-8-sig", "errors": "surrogateescape"}  # check_lines finds bad bytes
    with open(path, "rb") as f:
        start = f.read(8)
    if start.startswith(b"PK\3\4"):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if not name.endswith("/") and not is_hidden(name):
                    with archive.open(name) as f:
                        yield name, io.TextIOWrapper(f, **as_text)
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and not is_hidden(member.name):
                    with archive.extractfile(member) as f:
                        yield member.name, io.TextIOWrapper(f, **as_text)
    else:
        opener = next((OPENERS[magic] for magic in OPENERS if start.startswith(magic)), open)
        with opener(path, "rt", **as_text) as f:
            yield "", f


def read_documents(paths, corpus="", left_out=None):
    """Yield (part, document): train, valid, or "" where we choose; and a list of paragraphs. Test
    files are left out; their names are added to `left_out`, a list."""
    for path, part in zip(paths, parts_of(paths)):
        where = path
        try:
            for name, file in open_texts(path):
                where, its_part = f"{path}, {name}," if name else path, part_of(name) or part
                if its_part == "test":
                    if left_out is not None:
                        left_out.append(where)
                    continue
                read = read_wikitext if corpus in NAMED else read_paragraphs
                for document in read(check_lines(where, file)):
                    yield its_part, document
        except (EOFError, OSError, RuntimeError, lzma.LZMAError, zlib.error, zipfile.BadZipFile,
                tarfile.TarError) as error:  # RuntimeError: a .zip with a password
            if getattr(error, "filename", None):  # what cannot be opened has its name
                raise
            raise UserError(f"{where} cannot be read: {str(error)[:200]}; "
                            "if it is damaged, copy it again")


def check_lines(where, file):
    """Yield the lines of an open file, stripped, "" for one that only looks blank. UserError, with
    its number, for one that is no text, and for a first one that is JSON or markup."""
    number, first, begins = 1, True, ""
    while line := file.readline(MAX_LINE):
        text, begins = line.strip(), begins or line[:8]
        if "\0" in text or (not text.isascii() and NOT_UTF8.search(text)):
            begins = begins.encode("utf-8", "surrogateescape")
            raise UserError(
                f"{where} line {number} is not UTF-8 text; the file begins with {begins}. Text of "
                "Windows: iconv -f cp1252 -t utf-8; with zero bytes: iconv -f utf-16 -t utf-8; "
                "packed, or no text at all: unpack it, or write its text to a file")
        if BLANK.fullmatch(text):
            text = ""
        if text and first and NO_PROSE.match(text):
            raise UserError(f"{where} line {number} begins with {text[:20]}: JSON or markup, where "
                            "text is expected, a paragraph a line and a blank line between "
                            "documents; of JSON lines, jq -r '.FIELD, \"\"' makes that")
        yield text
        first = first and not text
        number += line.endswith("\n")


def read_paragraphs(lines):
    """Yield documents. Text without any boundary is cut by size."""
    document, size = [], 0
    for line in chain(lines, [""]):
        if line:
            document.append(line)
            size += len(line)
        if document and (not line or size > MAX_DOCUMENT):
            yield document
            document, size = [], 0


def read_wikitext(lines):
    """Yield articles. A blank line separates paragraphs, ` = Title = ` begins an article."""
    article = []
    for line in chain(lines, ["= End ="]):
        if not re.fullmatch("= .* =", line):
            article += [undo_tokens(line)] if line else []
        elif re.fullmatch("= [^=]+ =", line) and article:
            yield article
            article = []


def undo_tokens(line):
    """Put a line that was cut into tokens together again: `1 @,@ 000 people , he said`."""
    line = re.sub(r" @([-,.])@ ", r"\1", line)
    line = re.sub(r'" ([^"]*?) "', r'"\1"', line)
    line = re.sub(r"([(\[]) ", r"\1", line)
    return re.sub(r" ([,.;:!?)\]%]|'s\b|n't\b|'(?:re|ve|ll|d|m)\b)", r"\1", line)
