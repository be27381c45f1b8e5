"""The corpus `docs`: English prose in the sources of the installed Python, torch and numpy, so that
a first run needs no network. Nothing is imported or run: sources are only parsed.
"""

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import multiprocessing
import platform
import re
import signal
import sys
import sysconfig
import warnings
from pathlib import Path

from data.files import lock_folder, progress, write_atomic
from data.machine import cores

PROSE_WORD = re.compile(r"[A-Za-z]+(['-][A-Za-z]+)*[.,;:!?)]*")


def extract_docs(cache, threads=0):
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
        seen, documents = set(), []
        found = parallel_map(read_prose, files, threads or cores())
        for paragraphs in progress(found, total=len(files), unit=" files",
                                   desc="reading documentation strings"):
            new = [p for letters, p in paragraphs if not (letters in seen or seen.add(letters))]
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
                    found.append((hashlib.md5(letters.encode()).digest(), paragraph))
    return found


def parallel_map(function, items, processes):
    """Yield function(item) for every item, in order, from so many processes. Each has a pipe, which
    needs no shared memory, and ends when nobody reads it any more."""
    if sys.platform != "linux":  # elsewhere a fork is not safe
        yield from map(function, items)
        return
    context, pipes = multiprocessing.get_context("fork"), []

    def work(items, pipe):
        for reading in pipes:  # the parent alone reads: when it is gone, a pipe breaks
            reading.close()
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # and that ends this process
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is left to the parent
        gc.disable()  # a syntax tree is many objects and no cycles: 33 s of work instead of 46
        for item in items:
            try:
                pipe.send((function(item), None))
            except Exception as error:
                pipe.send((None, error))

    for i in range(processes):
        reading, writing = context.Pipe(duplex=False)
        pipes.append(reading)
        context.Process(target=work, args=(items[i::processes], writing), daemon=True).start()
        writing.close()
    for i in range(len(items)):
        value, error = pipes[i % processes].recv()
        if error:
            raise error
        yield value
