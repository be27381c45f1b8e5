"""The nine GLUE tasks: where their files are, what is in a row, what a label means.

The official files are tab-separated without any quoting: a quote mark is a character like others.
Each task has a training file and a development file (MNLI two: matched and mismatched genres); the
labels of the test files are not public. Files come from --glue-dir DIR in the official layout
(DIR/CoLA/train.tsv), or from the official archives, which are downloaded once, checked, and read in
place: nothing is ever unpacked under a name that an archive chose.

A file that is not what it should be is refused, with its line: what a spreadsheet or pandas has
put into quote marks, a header where none belongs, more rows than GLUE has, development rows among
the training rows. Fewer rows are allowed, and every table names them.

Wang et al. 2018, "GLUE", arXiv 1804.07461.
"""

import contextlib
import hashlib
import sys
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.download import download
from data.files import UserError
from data.tokenizer import CLS, SEP

BINARY = {"0": 0, "1": 1}
ENTAILMENT = {"entailment": 0, "not_entailment": 1}


@dataclass(frozen=True)
class Task:
    """columns: of the sentences, then of the label; names in the header, numbers if it has none.

    labels: text -> class, or None: the label is a number from 0 to 5.
    rows: the official row counts of the training file and of each development file.
    metrics: names in data/metrics.py; the task's score is the mean of their values.
    """

    columns: tuple
    labels: dict | None
    rows: tuple
    metrics: tuple = ("accuracy",)
    dev: tuple = ("dev",)
    primary: bool = False  # is its accuracy part of the primary endpoint (MNLI: the matched one)?
    averaged: bool = True  # is it part of the GLUE average?

    @property
    def outputs(self):
        """Classes, or 1 for a number."""
        return len(set(self.labels.values())) if self.labels else 1

    @property
    def parts(self):
        """Names of the values that its score is the mean of: its metrics, or its development sets
        where there are two (MNLI, which has one metric)."""
        return self.metrics if len(self.dev) == 1 else [d.removeprefix("dev_") for d in self.dev]


TASKS = {  # in the order of GLUE's own table
    "CoLA": Task((3, 1), BINARY, (8551, 1043), ("matthews",)),
    "SST-2": Task(("sentence", "label"), BINARY, (67349, 872), primary=True),
    "MRPC": Task(("#1 String", "#2 String", "Quality"), BINARY, (3668, 408), ("accuracy", "f1")),
    "STS-B": Task(("sentence1", "sentence2", "score"), None, (5749, 1500),
                  ("pearson", "spearman")),
    "QQP": Task(("question1", "question2", "is_duplicate"), BINARY, (363846, 40430),
                ("accuracy", "f1"), primary=True),
    "MNLI": Task(("sentence1", "sentence2", "gold_label"),
                 {"entailment": 0, "neutral": 1, "contradiction": 2}, (392702, 9815, 9832),
                 dev=("dev_matched", "dev_mismatched"), primary=True),
    "QNLI": Task(("question", "sentence", "label"), ENTAILMENT, (104743, 5463), primary=True),
    "RTE": Task(("sentence1", "sentence2", "label"), ENTAILMENT, (2490, 277)),
    # Its development set contradicts its training set on purpose: reported, never averaged.
    "WNLI": Task(("sentence1", "sentence2", "label"), BINARY, (635, 71), averaged=False),
}

PRIMARY = [name for name, task in TASKS.items() if task.primary]
AVERAGED = [name for name, task in TASKS.items() if task.averaged]

# Sizes and checksums as recorded by the Hugging Face and TensorFlow dataset libraries.
GLUE = "https://dl.fbaipublicfiles.com/glue/data/"
MSR = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"
FILES = {  # task -> (address, bytes, sha256) of the files that hold it
    "CoLA": [(GLUE + "CoLA.zip", 376971,
              "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff")],
    "SST-2": [(GLUE + "SST-2.zip", 7439277,
               "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa")],
    "MRPC": [(MSR + "msr_paraphrase_train.txt", 1047044,
              "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
             (GLUE + "mrpc_dev_ids.tsv", 6222,
              "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7")],
    "STS-B": [(GLUE + "STS-B.zip", 802872,
               "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85")],
    "QQP": [(GLUE + "QQP-clean.zip", 41696084,
             "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0")],
    "MNLI": [(GLUE + "MNLI.zip", 312783507,
              "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633")],
    "QNLI": [(GLUE + "QNLIv2.zip", 10627589,
              "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5")],
    "RTE": [(GLUE + "RTE.zip", 697150,
             "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee")],
    "WNLI": [(GLUE + "WNLI.zip", 28999,
              "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46")],
}
# QQP alone: its share of rows without all their columns, and of the rows by which two official
# releases differ, is far below this.
MALFORMED = 1e-3
# Of the official development rows 1.5 % (CoLA), 0.4 % (STS-B) or none are training rows, too.
SHARED = 0.05
SUBSET_SEED = 2605  # of max_train: one subset for every run, arm and seed
QUOTED = ("its fields are in quote marks, as a spreadsheet or pandas writes them, which would be "
          "learned: write the file without (csv.QUOTE_NONE)")


@dataclass
class Rows:
    """One file: the sentences of each row (one or two), and its labels."""

    sentences: list  # of N-lists: one, or two for pairs
    labels: list  # N classes, or floats
    official: int  # how many rows the official file has
    in_file: int = 0  # how many rows this file has, of which these are all, or a subset
    shared: int = 0  # of a development file: rows that are in the training file, too

    def __len__(self):
        return len(self.labels)

    def subset(self, keep):
        """The rows with these numbers."""
        return replace(self, sentences=[[column[i] for i in keep] for column in self.sentences],
                       labels=[self.labels[i] for i in keep])


def read_task(name, glue_dir, cache, max_train=0):
    """-> (training Rows, [development Rows], sha256 of the files). UserError says what is wrong.

    glue_dir: a folder in the official layout; "" downloads into `cache` what is not there yet.
    max_train: at most so many training rows, always the same ones; 0: all.
    """
    task = TASKS[name]
    digest = hashlib.sha256()

    def get(file):
        label, data = fetch(name, file, glue_dir, cache)
        digest.update(data)
        try:  # MRPC's files begin with a byte-order mark
            return label, data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data[:error.start].count(b"\n") + 1
            raise UserError(f"{label}, line {line}: not UTF-8 ({error.reason})")

    if name == "MRPC" and not (glue_dir and (Path(glue_dir) / "MRPC" / "train.tsv").exists()):
        train, *devs = split_mrpc(*get("msr_paraphrase_train.txt"), *get("mrpc_dev_ids.tsv"))
    else:
        train, *devs = [parse(name, *get(f"{file}.tsv"), official)
                        for file, official in zip(("train", *task.dev), task.rows)]
    known = set(zip(*train.sentences))
    for file, dev in zip(task.dev, devs):
        shared = [row for row in zip(*dev.sentences) if row in known]
        dev.shared = len(shared)
        if dev.shared > SHARED * len(dev):
            raise UserError(f"{name}/{file}.tsv: {dev.shared} of its {len(dev)} rows are in the "
                            f"training file, too, for example {shared[0][0][:60]!r}: a model would "
                            "be scored on what it has learned; give GLUE's own files")
    if max_train:
        rng = np.random.default_rng(SUBSET_SEED)
        train = train.subset(rng.permutation(len(train))[:max_train])
    return train, devs, digest.hexdigest()


def fetch(task, file, glue_dir, cache):
    """-> (what to call it in a message, its bytes), from the folder or from the archive."""
    if glue_dir:
        path = Path(glue_dir) / task / file
        try:
            return path, path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror} (--glue-dir holds a folder per "
                            f"task in the official layout, here {task}/{file})")
    # One archive a task; the original release of MRPC is one address a file.
    url, size, sha256 = next(entry for entry in FILES[task]
                             if entry[0].endswith((".zip", file)))
    try:
        path = download([url], size, sha256, Path(cache) / "downloads" / url.rpartition("/")[2])
    except UserError as error:
        raise UserError(f"{error}; or give a folder that has {task}/{file} with --glue-dir")
    if path.suffix != ".zip":
        return path, path.read_bytes()
    member = f"{task}/{file}"  # it is there: the archive has the checksum of the official one
    with zipfile.ZipFile(path) as archive:
        return f"{path}:{member}", archive.read(member)


def split_lines(text):
    """Lines, by \\n alone: splitlines would also cut at the control characters of some rows."""
    return [line.removesuffix("\r") for line in text.rstrip("\r\n").split("\n")]


def split_mrpc(label, text, ids_label, ids_text):
    """The original training file, and the pair ids of GLUE's development set -> [train, dev] Rows.

    This is how GLUE made its MRPC: the original release has no development set.
    """
    rows = parse("MRPC", label, text, 0)
    pairs = [tuple(line.split("\t")[1:3]) for line in split_lines(text)[1:]]  # a row's two ids
    wanted = {tuple(line.split("\t")) for line in split_lines(ids_text)}
    if len(wanted) != sum(pair in wanted for pair in pairs) or not 0 < len(wanted) < len(rows):
        raise UserError(f"{ids_label} names {len(wanted)} pairs for the development set, of which "
                        f"{label} has {sum(pair in wanted for pair in pairs)}")
    parts = [[i for i, pair in enumerate(pairs) if (pair in wanted) == is_dev]
             for is_dev in (False, True)]
    return [replace(rows.subset(keep), official=official, in_file=len(keep))
            for keep, official in zip(parts, TASKS["MRPC"].rows)]


def parse(name, label, text, official):
    """A .tsv file -> Rows. `label` names it in messages: file, line, what was expected."""
    task, lines = TASKS[name], split_lines(text)
    columns, width, first = task.columns, 4, 0  # CoLA has no header
    if isinstance(columns[0], str):
        header = lines[0].split("\t")
        if missing := [column for column in columns if column not in header]:
            hint = f": {QUOTED}" if any(map(is_quoted, header)) else ""
            raise UserError(f"{label}, line 1: a header with {', '.join(columns)} was expected, "
                            f"and {', '.join(missing)} is not in "
                            f"{', '.join(header)[:200]!r}{hint}")
        columns, width, first = [header.index(column) for column in columns], len(header), 1
    rows, malformed = [], 0
    for number, line in enumerate(lines[first:], first + 1):
        fields = line.split("\t")
        if len(fields) != width:
            malformed += 1  # a known fault of QQP's file, and of no other
            if name == "QQP" and malformed <= max(1, MALFORMED * len(lines)):
                continue
            raise UserError(f"{label}, line {number}: {width} tab-separated columns were "
                            f"expected, not {len(fields)}")
        if not first and fields == ["0", "1", "2", "3"]:  # pandas numbers columns without names
            raise UserError(f"{label}, line {number} is a header, where none belongs: remove it")
        *sentences, value = (fields[c] for c in columns)
        rows.append((number, *sentences, read_label(task, value, f"{label}, line {number}")))
    if malformed:
        print(f"{label}: {malformed} malformed rows left out", file=sys.stderr)
    if not rows:
        raise UserError(f"{label} has no rows")
    refuse_quoted(name, label, rows)
    if official and len(rows) > official * (1 + MALFORMED * (name == "QQP")):
        raise UserError(f"{label} has {len(rows)} rows, and GLUE's own file {official}: give the "
                        "official file, or fewer of its rows")
    _, *sentences, labels = map(list, zip(*rows))
    return Rows(sentences, labels, official, in_file=len(labels))


def is_quoted(field):
    """Is it as a spreadsheet or pandas writes a field: in quote marks, those inside doubled?"""
    return len(field) > 1 and field[0] == field[-1] == '"' and (
        '"' not in field[1:-1].replace('""', ""))


def refuse_quoted(name, label, rows):
    """UserError where most sentences that hold a comma, or a quote mark, are quoted for it. A row
    is (its line, a sentence or two, its label).

    In official files at most one in ten is, by its author. QQP's are quoted as pandas would, for
    a quote mark and not for a comma, in all their releases: this is what everybody trains on.
    """
    for mark in ',' if name == "QQP" else ',"':
        fields = [(number, field) for number, *sentences, _ in rows
                  for field in sentences if mark in field]
        quoted = [number for number, field in fields if is_quoted(field)]
        if len(quoted) > max(2, len(fields) / 2):
            raise UserError(f"{label}, line {min(quoted)}: {QUOTED}")


def read_label(task, value, where):
    """The text of a label -> a class or a number. Unlabelled rows (-1) are refused."""
    with contextlib.suppress(LookupError, ValueError):
        if task.labels:
            return task.labels[value]
        if 0 <= float(value) <= 5:  # not so for nan
            return float(value)
    expected, hint = " or ".join(task.labels or ["a number from 0 to 5"]), ""
    if value in ("-1", "-1.0"):
        hint = ": these rows have no labels, as in a test file"
    elif is_quoted(value):
        hint = f": {QUOTED}"
    elif "label" in value.lower() or value == task.columns[-1]:
        hint = ": this line is a header, where none belongs"
    raise UserError(f"{where}: the label {expected} was expected, not {value[:40]!r}{hint}")


# --------------------------------------------------------------------------------------------------
# rows -> batches

POOL_BATCHES = 50  # batches that are sorted by length together: little padding, still random


def encode_rows(tokenizer, sentences, max_len, threads=1):
    """N rows of one or two sentences -> [(ids, length of the first part)], and the lengths (N,)
    that they would have uncut.

    [CLS] a [SEP] or [CLS] a [SEP] b [SEP], uint16. What is too long for max_len loses tokens from
    the end of the longer sentence; the [SEP]s stay.
    """
    encoded = [tokenizer.encode(column, threads=threads) for column in sentences]
    rows, uncut = [], []
    for a, *second in zip(*encoded):
        room = max_len - 2 - len(second)
        seconds = [b[:max(room // 2, room - len(a))] for b in second]  # none, or one
        first = [CLS, *a[:room - sum(map(len, seconds))], SEP]
        ids = first + [i for b in seconds for i in (*b, SEP)]
        rows.append((np.array(ids, dtype=np.uint16), len(first)))
        uncut.append(max_len - room + len(a) + sum(map(len, second)))
    return rows, np.array(uncut)


def encode_task(name, data, tokenizer, max_len, threads):
    """What read_task gives -> (training rows, rows of each development file), encoded. One row is
    shown, the cheapest way to see a wrong label or tokenizer, and what is cut is said."""
    train, devs, _ = data
    rows, uncut = zip(*(encode_rows(tokenizer, part.sentences, max_len, threads)
                        for part in (train, *devs)))
    pieces = "".join(tokenizer.pieces[i] for i in rows[0][0][0])
    print(f"{name}: {len(train)} of {train.in_file} training rows, for example {pieces[:150]} -> "
          f"{train.labels[0]}")
    lengths = np.concatenate(uncut)
    if (lengths > max_len).any():
        lost = (lengths - max_len).clip(0).sum() / lengths.sum()
        print(f"{name}: {(lengths > max_len).mean():.1%} of the rows are cut at {max_len} tokens, "
              f"which loses {lost:.1%} of all tokens")
    return rows


def batches(lengths, batch_size, seed, epoch):
    """Lists of row numbers: every row once, in batches of similar length, in random order."""
    rng = np.random.default_rng((seed, epoch))
    order, size = rng.permutation(len(lengths)), batch_size * POOL_BATCHES
    found = []
    for pool in np.split(order, range(size, len(order), size)):
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        found += np.split(pool, range(batch_size, len(pool), batch_size))
    return [found[i] for i in rng.permutation(len(found))]
