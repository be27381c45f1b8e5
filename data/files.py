"""Files that survive: one-line errors, atomic writes, checksums, locks.

A user's mistake is a `UserError`: one line on stderr that says what to do, exit status 2. So is a
file that cannot be read or written, wherever that happens: where nothing more is known,
`run_script` puts an OSError into words. Anything else that goes wrong is our bug and keeps its
traceback.
"""

import errno
import hashlib
import io
import json
import os
import pickle
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

try:
    import fcntl
except ModuleNotFoundError:
    print("error: this needs Linux or macOS; on Windows it runs in WSL", file=sys.stderr)
    sys.exit(2)


class UserError(Exception):
    """Something that the user can put right. Its text is the one line that they will read."""


class Output:
    """A stdout or stderr without which work goes on: a closed pipe or terminal, a full disk."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None: closed before we began (2>&-)
        if hasattr(self.stream, "reconfigure"):  # a notebook's has no such thing, and all letters
            self.stream.reconfigure(errors="replace")

    def write(self, text):
        with suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def run_script(main):
    """Return main(); turn a UserError or an OSError into one line and status 2, Ctrl-C into 130."""
    try:
        sys.stdin = sys.stdin or open(os.devnull)  # or the next file opened would be printed into
        if not isinstance(sys.stdout, Output):
            sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
        return main()
    except UserError as error:
        message = f"error: {' '.join(str(error).split())}"
    except OSError as error:
        name = error.filename or ""
        message = f"error: {name}{': ' if name else ''}{error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message += ("; what is on disk is whole: make room, then give the command again "
                        "(train.py: with --resume)")
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        message = "error: not enough memory for this model and so many rows at once"
    except KeyboardInterrupt:
        message = "\ninterrupted: nothing that was finished is lost"
    for bar in list(getattr(tqdm, "_instances", ())):  # or the line would be glued to a bar
        bar.close()
    print(message, file=sys.stderr)
    sys.exit(130 if message[0] == "\n" else 2)


def out_of_memory(error):
    """Is this what Python or torch raises where there is no memory left?"""
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or "can't allocate memory" in str(error))


def progress(*args, **kwargs):
    """A progress bar for a person; for a log file a line now and then."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(*args, **{"unit_scale": True, "mininterval": 0.1 if terminal else 30, **kwargs})


# --------------------------------------------------------------------------------------------------
# writing and reading


def write_atomic(path, data):
    """Write bytes so that `path` holds the old content or all of the new, also after a crash.

    Temporary file, flush to the disk, rename: the order matters, a rename that reaches the disk
    before the data does would leave an empty file behind a power cut.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)  # a full disk does not say of which file
        raise


def write_json(path, value):
    """Write a JSON value, atomically."""
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path):
    """A file that holds a JSON object -> a dict. UserError if it holds anything else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        raise UserError(f"{path} is damaged: {error}")
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: a JSON object was expected")
    return value


def sha256_file(path):
    """The sha256 of a file's bytes as 64 hex digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_json(value):
    """The sha256 of a JSON value, whatever the order of its keys, as 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def save_tensors(path, value):
    """torch.save with a checksum in the file itself, written atomically.

    A .pt file is a zip archive, and a zip archive may end in a comment. Ours is the sha256 of all
    bytes before it, so plain `torch.load(path, weights_only=True)` still opens the file, and
    load_tensors can tell a flipped bit, which torch.load would pass over in silence.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    data = buffer.getvalue()
    assert data.endswith(b"\0\0"), "a zip archive without a comment ends in its length, 0"
    data = data[:-2] + (64).to_bytes(2, "little")
    write_atomic(path, data + hashlib.sha256(data).hexdigest().encode())


def load_tensors(path):
    """What save_tensors wrote. UserError if it is damaged; runs no code from the file."""
    data = Path(path).read_bytes()
    if hashlib.sha256(data[:-64]).hexdigest().encode() != data[-64:]:
        raise UserError(f"{path} is damaged: its bytes do not have the checksum they carry")
    try:  # what a stranger made may have a right checksum; torch then fails in many ways
        if not data.startswith(b"PK"):
            raise ValueError("not a zip archive")
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, ValueError, LookupError, TypeError, EOFError,
            AttributeError, OSError) as error:
        raise UserError(f"{path} is not one of our files: {str(error)[:120]}")


def lock_folder(folder, wait=""):
    """Hold `folder` for this process until it ends, however it ends. Where another process holds
    it: UserError, or, with `wait` (what for: it is printed), wait for it.

    The kernel drops a flock when its process dies, so a lock never outlives its owner. Keep the
    returned file object alive: closing it gives the folder back. Some network file systems have no
    locks: then there is a warning, once, and no lock.
    """
    handle = open(Path(folder) / ".lock", "w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise UserError(f"{folder} is in use by another process: wait for it, or stop it")
        print(f"waiting for another process: {wait}", file=sys.stderr)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        if not hasattr(lock_folder, "warned"):
            print(f"warning: no locks on the file system of {folder} ({error.strerror}): do not "
                  "give two processes the same run or a cold cache", file=sys.stderr)
        lock_folder.warned = True
    return handle


def on_signals(handler):
    """Call handler(number, frame) at a signal -> {number: what was called before}. Only the main
    thread may do that: in another, signals stay as they are."""
    main = threading.current_thread() is threading.main_thread()
    return {number: signal.signal(number, handler)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if main and signal.getsignal(number) != signal.SIG_IGN}  # as nohup makes SIGHUP


def catch_signals():
    """-> a list into which the number of a signal is put; a second signal is not waited for."""
    caught = []
    on_signals(lambda number, frame: (caught.append(number), signal.signal(number, signal.SIG_DFL)))
    return caught
