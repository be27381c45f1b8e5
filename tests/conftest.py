"""Nearly all tests compare bit for bit, or with a CPU's numbers, so they run on the CPU also where
there is a GPU; tests/test_cuda.py alone gives it to the processes that it starts."""

import os
import signal

import pytest

GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")  # as the user has it; None: all of them
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when torch first looks for a GPU

from tests.helpers import call, command, write_corpus  # noqa: E402


@pytest.fixture(autouse=True)
def restore_signals():
    """A training run in this process takes over the signals. What a shell runs in the background
    ignores Ctrl-C: the tests do not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a toy corpus, for the runs of a test file."""
    folder = tmp_path_factory.mktemp("toy")
    write_corpus(folder / "text.txt", documents=300)
    return folder


@pytest.fixture(scope="module")
def teacher(folder):
    """A finished run on it."""
    with pytest.MonkeyPatch.context() as patch:
        call(command(folder, "teacher", "--masking", "random", "--seed", "1"), patch)
    return folder / "teacher"
