"""Nearly all tests compare bit for bit, or with a CPU's numbers, so they run on the CPU also where
there is a GPU; tests/test_cuda.py alone gives it to the processes that it starts."""

import os

GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")  # as the user has it; None: all of them
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when torch first looks for a GPU
