"""The part of tests/faults.py about what people type and what files from strangers hold.

Every part is a generator of (what was tried, what went wrong or "", exit status).
"""

import io
import os
import shutil
import tarfile
import zipfile

import numpy as np
import torch

from data.files import load_tensors, save_tensors
from data.tokenizer import CLS, MASK, PAD, SEP, UNK, Tokenizer
from tests.box import (
    ARMS, differs, finish, glue, limit_memory, not_fine, not_refused, toy,
)

MEMORY = 6 << 30  # bytes of addresses for those who may be fed a bomb

# --------------------------------------------------------------------------------------------------
# flags: wrong lines, each with the word that the answer must have; it is the last flag but for "->"

TRAIN = """
--batch-size 0; --batch-size -3; --batch-size x; --batch-size 2.5; --mask-rate 1.5; --mask-rate 0
--mask-rate nan; --mask-rate-end 2; --pool 9; --pool 1; --pool -1; --seq-len 4; --seq-len -1
--steps -1; --steps 0; --steps 1e3; --seed x; --seed -1; --seed 99999999999999999999; --lr 0
--lr inf; --lr nan; --dropout 1; --dropout -0.1; --clip 0; --distill complete --tau 0
--distill complete --alpha 2; --distill complete -> --teacher; --vocab-size 10; --vocab-size 70000
--width 100; --layers -1; --size huge; --micro-batch 3; --preset lap; --stray
--score-input masked --pool 0; --masking random --select high; --masking entropy -> --teacher
--masking random --init-frac 0.1; --alpha 0.5; --teacher nowhere; --flops-of nowhere
--steps 5 --flops-of nowhere; --corpus nowhere; --corpus; --maskin self; --mask self
--resume nowhere -> nowhere; --eval nowhere -> nowhere; --resume nowhere --eval nowhere
--device tpu; --dtype float16; --positions learned --rotary-base 10; --positions absolute
--threads -1; --log-every 0; --checkpoint-every 0; --eval-blocks 0; --eval-every -1
--corpus-tokens -1; --init-frac 1; --warmup-frac 1; --weight-decay -1; --init-std 0
--rotary-base -5; --local-start -1; --resume nowhere --steps 9 -> nowhere; stray -> stray
--compile maybe -> maybe; --batch-size 999999999 -> less than a batch
"""
OTHERS = """
glue.py RUN --tasks X; glue.py RUN --lr 0; glue.py RUN --tabel; glue.py RUN --epochs x
glue.py RUN --seeds 0; glue.py RUN --max-len 2; glue.py RUN --dropout 1; glue.py RUN --batch-size 0
glue.py RUN --pool-output max; glue.py RUN --json --markdown -> not both; glue.py -> run folders
glue.py nowhere -> nowhere; glue.py RUN --glue-dir nowhere -> nowhere
masking.py RUN -> give a sentence; masking.py nowhere a -> give a run folder
masking.py RUN a b -> unrecognized; masking.py RUN abc --mask-rate 2; masking.py RUN abc --seed -1
masking.py RUN abc --seed x; model.py RUN -> what to do; model.py --fill x -> give a run folder
model.py RUN --fill x -> no [MASK]; model.py nowhere --fill [MASK] -> nowhere
"""


def read_cases(text):
    """-> [(words of the command line, what the answer must have in it)]"""
    cases = []
    for case in text.strip().replace("\n", ";").split(";"):
        line, _, word = case.partition("->")
        words = line.split()
        cases.append((words, word.strip() or [w for w in words if w.startswith("--")][-1]))
    return cases


def flags(box, tries, rng):
    """Wrong, contradicting and misspelt flags: refused before any work begins."""
    cases = read_cases(TRAIN)
    for words, answer in rng.sample(cases, min(len(cases), 2 * tries)):
        out, cache = box / "refused", box / "refused-cache"
        result = finish(["train.py", "--corpus", box / "text.txt", "--cache", cache,
                         "--vocab-size", "600", "--out", out, *words])
        lost = not_refused(result, answer) or ("it made a folder" if out.exists() else "")
        if cache.exists() and "batch" not in answer:  # how large a corpus is, it must first see
            lost = lost or "it began to work"
        shutil.rmtree(cache, ignore_errors=True)
        yield "wrong flags of train.py", lost and f"{words}: {lost}", result[0]
    for words, answer in read_cases(OTHERS):
        result = finish([box / "random" if word == "RUN" else word for word in words])
        lost = not_refused(result, answer)
        yield "wrong flags of the others", lost and f"{words}: {lost}", result[0]


# --------------------------------------------------------------------------------------------------
# files from strangers


def payloads(box, tries, rng):
    """A pickle that would run a command, with and without our checksum."""
    class Payload:
        def __reduce__(self):
            return (os.system, (f"touch '{box}/executed'",))

    run = box / "payload"
    shutil.copytree(box / "random", run)
    readers = {
        "model.pt": [["train.py", "--eval", run], ["masking.py", run, "a b c"], glue(box, run),
                     ["model.py", run, "--fill", "a [MASK]"],
                     [*toy(box, box / "student", "--masking", "entropy"), "--teacher", run]],
        "checkpoint.pt": [["train.py", "--resume", run]]}
    for name, commands in readers.items():
        for save in (lambda value, path: save_tensors(path, value), torch.save):
            for key in ("model", "step"):
                whole = load_tensors(box / "random" / name)
                save({**whole, key: Payload()}, run / name)
                for argv in commands[:tries]:
                    result = finish(argv)
                    lost = "its code ran" if (box / "executed").exists() else not_refused(result)
                    yield "a pickle with code in it", lost, result[0]
        (run / name).unlink()
    shutil.rmtree(run)


def archives(box, tries, rng):
    """Archives that would write elsewhere, through names or links; and bombs."""
    text = (box / "text.txt").read_bytes()
    outside = box / "outside.txt"
    outside.write_bytes(b"a secret\n")
    names = ["../evil.txt", "../../evil.txt", f"{box}/evil.txt", "a/../../evil.txt", "..\\evil.txt"]

    def make_zip(path, members):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            for name, data in members:
                z.writestr(name, data)

    def make_tar(path, kind, name, target):
        with tarfile.open(path, "w:bz2") as tar:
            for member in (tarfile.TarInfo("text.txt"), tarfile.TarInfo(name)):
                if member.name == name:
                    member.type, member.linkname = kind, target
                member.size = len(text) if member.isfile() else 0
                tar.addfile(member, io.BytesIO(text) if member.isfile() else None)

    cases = []
    for name in names:
        make_zip(box / "evil.zip", [("text.txt", text), (name, text)])
        cases.append((box / "evil.zip", None))
        link = zipfile.ZipInfo("link.txt")
        link.external_attr = 0o120777 << 16
        make_zip(box / "link.zip", [("text.txt", text), (link, name), ("link.txt/x.txt", text)])
        cases.append((box / "link.zip", None))
        for kind in (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE,
                     tarfile.CHRTYPE) if name in names[1:3] else ():
            cases.append((box / "evil.tar.bz2", (kind, name, str(outside))))
    for path, tar in cases:
        if tar:
            make_tar(path, *tar)
        before = {p for p in box.parent.rglob("*")}
        cache, out = box / "evil-cache", box / "evil-run"
        result = finish([*toy(box, out, *ARMS["random"], steps=1), "--corpus", path, "--cache",
                         cache])
        written = {p for p in box.parent.rglob("*")} - before
        written = {p for p in written if cache not in (p, *p.parents) and out not in (
            p, *p.parents)}
        lost = not_fine(result) or (f"it wrote {written}" if written else "")
        yield "an archive that would write elsewhere", lost, result[0]
        shutil.rmtree(cache, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
    code = ("import sys; from pathlib import Path; from data import tasks; from data.files import "
            "run_script; tasks.download = lambda *a: Path(sys.argv[1]); run_script(lambda: "
            "tasks.fetch('CoLA', 'train.tsv', '', '.'))")
    make_zip(box / "evil.zip", [("../evil.txt", text), ("CoLA/train.tsv", text)])
    result = finish(["-c", code, box / "evil.zip"])
    lost = not_fine(result) or ("it wrote" if list(box.parent.rglob("evil.txt")) else "")
    yield "an archive that would write elsewhere", lost, result[0]
    for fill, member, size in ((b"a", "CoLA/train.tsv", 700), (b"\0", "text.txt", 1000),
                               (b"a", "text.txt", 30), (b"a b\n\n", "text.txt", 10)):
        bomb = box / "bomb.zip"
        with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as z, z.open(
                member, "w", force_zip64=True) as f:
            for _ in range(size):
                f.write(fill * ((1 << 20) // len(fill)))
        argv = [*toy(box, box / "bombed", *ARMS["random"], steps=1), "--corpus", bomb]
        result = finish(["-c", code, bomb] if "CoLA" in member else argv,
                        preexec_fn=limit_memory(MEMORY))
        yield "an archive bomb", not_refused(result), result[0]
        bomb.unlink()


def names(box, tries, rng):
    """A corpus, a run and a page with odd names: the same weights, and glue.py reads them."""
    for name in ("with space", "quo'te\"s", "new\nline", "naïve-日本語", "[x]*?", "%s{0}", "~", "\\n",
                 "-dash", os.fsdecode(b"latin-\xe4"), "a" * 200)[:2 * tries]:
        folder = box / name
        folder.mkdir()
        text, run = folder / f"{name}.txt", folder / name
        shutil.copy(box / "text.txt", text)
        results = [finish([*toy(box, run, *ARMS["random"]), "--corpus", text]),
                   finish(["train.py", "--eval", run]),
                   finish(glue(box, run, "--tasks", "CoLA")),
                   finish(["masking.py", run, "the model reads", "--html", folder / "a.html"])]
        lost = differs(run, box / "random") or next(filter(None, map(not_fine, results)), "")
        if any(status for status, *_ in results):
            lost = lost or "refused"
        yield "odd file names", lost and f"{name!r}: {lost} {results[0][2][-200:]}", results[0][0]


# --------------------------------------------------------------------------------------------------
# text

SPECIAL = "[MASK] [SEP] [CLS] [PAD] [UNK] <s> </s> <unk> <pad> <0x41> ▁ \u2581[MASK]\u2581"


def kinds_of_text(plain, large):
    """name -> (content, is it trained on? None: either)"""
    kinds = {
        "CRLF": (plain.replace("\n", "\r\n"), True),
        "CR": (plain.replace("\n", "\r"), True),
        "BOM": ("\ufeff" + plain, True),
        "emoji": (plain.replace("the", "😀👩‍👩‍👧‍👦🇩🇪"), True),
        "right to left": (plain.replace("a", "שלום ").replace("e", "مرحبا "), True),
        "special tokens": (plain.replace("mask", SPECIAL), True),
        "no blank line": (plain.replace("\n\n", "\n"), True),
        "combining marks": (plain.replace("o", "o\u0301\u0323\u0300" * 5), True),
        "control characters": (plain.replace(" ", " \x0b\x1c\x85\u2028"), None),
        "one word repeated": ("word " * 50_000, None),
        "zero bytes": (plain[:500] + "\0" + plain[500:], False),
        "UTF-16": (plain.encode("utf-16"), False),
        "latin-1": (plain.replace("a", "\xe4").encode("latin-1"), False),
        "surrogates": (plain.encode().replace(b"the", b"\xed\xa0\x80"), False),
        "empty": ("", False), "one letter": ("a", False), "only blank lines": ("\n" * 1000, False),
        "binary": (bytes(range(1, 256)) * 2000, False),
    }
    if large:
        kinds |= {"one line of 100 MB": (("word and another " * 6_000_000)[:100_000_000], None),
                  "one word of 100 MB": ("abc" * 33_000_000, None),
                  "10 million empty lines": (plain + "\n" * 10_000_000 + plain, True)}
    return kinds


def text(box, tries, rng):
    """Text of every kind is trained on or refused in one line, in bounded memory."""
    kinds = kinds_of_text((box / "text.txt").read_text(), large=tries > 4)
    for name, (content, trained) in kinds.items():
        path, out, cache = box / "kind.txt", box / "kind", box / "kind-cache"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        result = finish([*toy(box, out, *ARMS["random"], steps=2), "--corpus", path,
                         "--vocab-size", "900", "--cache", cache], preexec_fn=limit_memory(MEMORY))
        lost = not_fine(result)
        if trained is not None and not lost and (result[0] == 0) != trained:
            lost = "trained on" if result[0] == 0 else f"refused: {result[2][-300:]}"
        for folder in cache.glob("*/train.bin") if name == "special tokens" and not lost else ():
            lost = became_special(folder.parent, content.count("[MASK]"))
        what = "trained on" if result[0] == 0 else "refused"
        yield f"text of every kind, {what}", lost and f"{name}: {lost}", result[0]
        for folder in (out, cache):
            shutil.rmtree(folder, ignore_errors=True)


def became_special(cache, occurrences):
    """"" where the text "[MASK]" and its like are ordinary tokens in the prepared corpus."""
    tokenizer = Tokenizer(cache / "tokenizer.model")
    tokens = np.concatenate([np.fromfile(cache / f"{name}.bin", np.uint16)
                             for name in ("train", "valid")])
    if found := set(tokens.tolist()) & {PAD, UNK, CLS, MASK}:
        return f"special ids {found} in the corpus"
    if (seen := tokenizer.decode(tokens).count("[mask]")) != occurrences:
        return f"{occurrences} times [MASK] in the text, {seen} times in the tokens"
    if set(tokenizer.encode(SPECIAL)) & {PAD, UNK, CLS, SEP, MASK}:
        return "special ids from text"
    return ""


PARTS = {"flags": flags, "payload": payloads, "archives": archives, "names": names, "text": text}
