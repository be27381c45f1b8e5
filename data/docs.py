"""The corpus `docs`: English prose in the sources of the installed Python, torch and numpy, so that
a first run needs no network. Nothing is imported or run: sources are only parsed.
"""

import ast
import gc
import importlib.metadata
import importlib.util
import platform
import re
import sys
import sysconfig
import warnings
from pathlib import Path

from data.files import lock_folder, progress, write_atomic
from data.jobs import run_jobs

PROSE_WORD = re.compile(r"[A-Za-z]+(['-][A-Za-z]+)*[.,;:!?)]*")


def extract_docs(cache, threads):
    """Write the prose as one text file in the folder `cache`; return its path.

    A source file is a document, and a paragraph that came before (compared by its letters alone) is
    left out, so that nothing in the held-out documents has been trained on.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    roots, versions = [stdlib], [f"python{platform.python_version()}"]
    for package in ("torch", "numpy"):
        roots.append(Path(importlib.util.find_spec(package).origin).parent)
        versions.append(package + importlib.metadata.version(package))
    target = cache / f"docs-{'-'.join(versions)}.txt"
    if target.exists():
        return target
    with lock_folder(cache, wait="it reads the documentation strings"):
        if target.exists():  # it was made while we waited
            return target
        files = [p for root in roots for p in sorted(root.rglob("*.py"))
                 if p.is_file()  # and not a link to nothing, such as an editor's lock
                 and (root != stdlib or not {"site-packages", "dist-packages"} & set(p.parts))]
        parts = [files[i:i + 100] for i in range(0, len(files), 100)]
        processes = threads if sys.platform == "linux" else 1  # else no fork is safe
        found, seen, documents = {}, set(), []
        gc.disable()  # a syntax tree is many objects and no cycles: 33 s of work instead of 46
        with progress(total=len(files), unit=" files", desc="reading documentation strings") as bar:
            for part, values in run_jobs(lambda paths: [*map(read_prose, paths)], parts, processes):
                found |= zip(part, values)
                bar.update(len(part))
        gc.enable()
        for path in files:
            new = [p for letters, p in found[path] if not (letters in seen or seen.add(letters))]
            if new:
                documents.append("\n".join(new))
        write_atomic(target, "\n\n".join(documents).encode() + b"\n")
    return target


def read_prose(path):
    """A Python source file -> [(hash of its letters, paragraph)] for the English paragraphs in its
    string constants."""
    source, found = path.read_bytes(), []
    if b'"""' not in source and b"'''" not in source:
        return found  # no documentation string: not worth the parsing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):  # test data that is wrong on purpose
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 80:
            for paragraph in re.split(r"\n\s*\n", node.value):
                words = paragraph.split()
                prose = sum(bool(PROSE_WORD.fullmatch(word)) for word in words)
                # Code, tables and doctests have few plain words; 3/4 keeps prose with some markup.
                if len(words) >= 8 and prose >= 0.75 * len(words):
                    paragraph = " ".join(words).encode("utf-8", "replace").decode()
                    letters = re.sub(r"[\W\d_]+", "", paragraph.lower())
                    found.append((hash(letters), paragraph))  # forks hash alike
    return found
