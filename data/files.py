"""The few things that every script needs once: one-line errors, atomic writes, checksums, locks.

A user's mistake is a `UserError`: one line on stderr that says what to do, exit status 2. Anything
else that goes wrong is our bug and keeps its traceback.
"""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import pickle
import resource
import signal
import sys
from pathlib import Path

from tqdm import tqdm


class UserError(Exception):
    """Something that the user can put right. Its text is the one line that they will read."""


def refuse_command(message):
    """For argparse's parser.error: one line where it would print the whole usage."""
    raise UserError(f"{message}; --help lists what can be given")


def add_flags(parser, flags):
    """Add {group: [(name, default, help, choices where there are any)]} to an argparse parser."""
    for title, group in flags.items():
        arguments = parser.add_argument_group(title)
        for name, default, text, *choices in group:
            if default not in ("", -1):
                text += f" (default {default})"
            how = {"choices": choices[0]} if choices else {"type": type(default), "metavar": "X"}
            if isinstance(default, bool):
                how = {"action": argparse.BooleanOptionalAction}
            arguments.add_argument(f"--{name}", help=text, **how)


def check_range(flags, names, allowed, rule):
    """UserError for the first of the flags in `names` whose value is not allowed(value)."""
    for name in names.split():
        if not allowed(flags[name]):
            raise UserError(f"--{name.replace('_', '-')} {flags[name]}: must be {rule}")


def say(line):
    """A line on stderr, below the progress bars of what it ends; else it would be glued to one."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    print(line, file=sys.stderr)


def run_script(main):
    """Return main(); turn a UserError into one line and status 2, Ctrl-C into status 130."""
    try:
        return main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")  # torchrun's number of this process
        who = "error" if rank == "0" else f"error in process {rank}"
        say(f"{who}: {' '.join(str(error).split())}")
        sys.exit(2)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            say(f"error: this name is too long for a file: {error.filename}")
            sys.exit(2)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        say(f"error: cannot write: {error.strerror}; what is on disk is whole: make room, then "
            "give the command again (train.py: with --resume)")
        sys.exit(2)
    except KeyboardInterrupt:
        say("\ninterrupted: nothing that was finished is lost")
        sys.exit(130)


def catch_signals():
    """-> a list into which the number of a signal is put; a second signal is not waited for."""
    caught = []

    def on_signal(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP: leave it so
            signal.signal(number, on_signal)
    return caught


def sha256_file(path):
    """The sha256 of a file's bytes as 64 hex digits, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def make_folder(path):
    """Create a folder and those above it, where they are not there. UserError if that fails."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {path}: {error.strerror}")


def write_atomic(path, data):
    """Write bytes so that `path` holds the old content or all of the new, also after a crash.

    Temporary file, flush to the disk, rename: the order matters, a rename that reaches the disk
    before the data does would leave an empty file behind a power cut.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # there may be nothing that can be removed
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}; what was there is unchanged")


def checksum(value):
    """The sha256 of a JSON value, whatever the order of its keys, as 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path, value):
    """Write a dict whose keys are strings, with a checksum of its own beside them, atomically."""
    value = {**value, "checksum": checksum(value)}
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path):
    """What write_json wrote, without the checksum. UserError if it is missing or damaged."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        recorded = value.pop("checksum", None) if isinstance(value, dict) else None
        actual = checksum(value)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}")
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        raise UserError(f"{path} is damaged: {error}")
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: a JSON object was expected")
    if recorded != actual:
        raise UserError(f"{path} is damaged, was changed by hand, or is of another version: "
                        "its checksum is not that of its content")
    return value


def save_tensors(path, value):
    """torch.save with a checksum in the file itself, written atomically.

    A .pt file is a zip archive, and a zip archive may end in a comment. Ours is the sha256 of all
    bytes before it, so plain `torch.load(path, weights_only=True)` still opens the file, and
    load_tensors can tell a flipped bit, which torch.load would pass over in silence.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    end = buffer.seek(-2, io.SEEK_END)
    assert buffer.read() == b"\0\0", "a zip archive without a comment ends in its length, 0"
    buffer.seek(end)
    buffer.write((64).to_bytes(2, "little"))
    buffer.write(hashlib.sha256(buffer.getbuffer()).hexdigest().encode())
    write_atomic(path, buffer.getbuffer())


def load_tensors(path):
    """What save_tensors wrote. UserError if missing or damaged; runs no code from the file."""
    import torch

    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}")
    if hashlib.sha256(data[:-64]).hexdigest().encode() != data[-64:]:
        raise UserError(f"{path} is damaged: its bytes do not have the checksum they carry")
    try:  # what a stranger made may have a right checksum; torch then fails in many ways
        if not data.startswith(b"PK"):
            raise ValueError("not a zip archive")
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, ValueError, LookupError, TypeError, EOFError,
            AttributeError, OSError) as error:
        raise UserError(f"{path} is not one of our files: {str(error)[:120]}")


def lock_folder(folder, wait=False):
    """Hold `folder` for this process until it ends, however it ends. Where another process holds
    it: UserError, or, with `wait`, wait for it.

    The kernel drops a flock when its process dies, so a lock never outlives its owner. Keep the
    returned file object alive: closing it gives the folder back.
    """
    try:
        handle = open(Path(folder) / ".lock", "w")
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror}")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise UserError(f"{folder} is in use by another process: wait for it, or stop it")
    except OSError as error:
        raise UserError(f"cannot lock {folder}: {error.strerror}")
    return handle


def progress(*args, **kwargs):
    """A bar for a person; for a log file a line now and then."""
    return tqdm(*args, **kwargs, unit_scale=True, mininterval=0.1 if sys.stderr.isatty() else 30)


def peak_memory(device):
    """Bytes: on a GPU what torch allocated there, else the largest resident size of the process."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
