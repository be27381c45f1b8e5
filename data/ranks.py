"""Several processes on one run, as torchrun starts them: the little that train.py needs of it.

    torchrun --nproc-per-node=2 train.py --masking self

Each process holds the whole model and takes an equal share of the rows of every batch; gradients
are averaged (torch's DistributedDataParallel). All draws are functions of the row's number in the
whole batch, so N processes do what one does with --micro-batch (batch size / N), but for the order
in which gradients are summed. Process 0 alone writes; several machines need a shared folder.
Where there is one process, nothing here does anything.
"""

import os
import sys
from datetime import timedelta

RANK, WORLD = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
# For one process to prepare a large corpus while the others wait. A process that dies is noticed
# at once, since its connections close.
PATIENCE = timedelta(hours=2)


def join(device):
    """Meet the other processes -> this one's device."""
    if WORLD == 1:
        return device
    import torch
    import torch.distributed as dist

    if RANK:
        sys.stdout = open(os.devnull, "w")  # process 0 speaks for all
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
                            timeout=PATIENCE)
    return device


def leave():
    if WORLD > 1:
        import torch.distributed as dist
        dist.barrier()
        dist.destroy_process_group()


def in_turn(function):
    """function() in process 0, then, when that is through, in the others -> its value."""
    if WORLD == 1:
        return function()
    import torch.distributed as dist

    value = None if RANK else function()
    dist.barrier()
    return function() if RANK else value


def wrap(model):
    """A model whose backward averages the gradients over the processes."""
    if WORLD == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel
    return DistributedDataParallel(model, forward_sync_buffers=False)


def any_of(flag):
    """Is it true in any process? All stop after the same step, or they would wait for ever."""
    if WORLD == 1:
        return flag
    import torch
    import torch.distributed as dist

    flag = torch.tensor(int(flag))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def mean(x):
    """The mean of a tensor over the processes."""
    if WORLD > 1:
        import torch.distributed as dist
        dist.all_reduce(x)
        x /= WORLD
    return x


def gather(x):
    """The tensors x of all processes in their order, each of the same shape."""
    if WORLD == 1:
        return [x]
    import torch
    import torch.distributed as dist

    out = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(out, x)
    return out


def guard(main):
    """main(), but one line and status 1 where another process has died: it is waited for by all."""
    try:
        return main()
    except RuntimeError as error:
        words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
        if WORLD == 1 or not any(word in str(error) for word in words):
            raise
    print(f"error: process {RANK} of {WORLD} ends, because another one has died; the last "
          "checkpoint is intact: go on with --resume", file=sys.stderr, flush=True)
    os._exit(1)  # an orderly exit would wait for the dead one
