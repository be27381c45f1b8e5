"""Variants of the training step that might be faster: tests/profiling.py times and compares them.

Each is a function (args, job, stack) -> step(number) -> (2,): loss and norm, as train.update has
them; what it enters in `stack` ends with it. All must learn the same. One that pays would become a
few lines of data/machine.py.
"""

import itertools
import queue
import threading
from unittest import mock

import torch
import torch.nn.functional as F

import masking
import train
from data import corpus
from data.files import UserError


def pieces(args, job):
    """train.update once more, for one micro-batch without a teacher, in pieces that can be put into
    graphs -> read(number), prepare(tokens, noise), loss_of(inputs, positions, labels), learn(loss)
    """
    def read(number):
        job.model.train()
        blocks = corpus.block_order(len(job.text.train), args.seed, number, args.batch_size)
        tokens = corpus.with_ends(job.text.train[blocks])
        noise = masking.draw(args.seed, number, *tokens.shape)
        rate = train.learning_rate(number, args.steps, args.lr, args.warmup_frac, args.decay_frac)
        for group in job.optimizer.param_groups:
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        masking.seed_dropout(args.seed, number, 0)
        return tokens.to(job.machine.device), noise.to(job.machine.device)

    def prepare(tokens, noise):
        positions = train.where_to_mask(args, job, args.steps - 1, tokens, noise)
        inputs = masking.corrupt(tokens, positions, noise, job.model.shape.vocab_size)
        return inputs, positions, tokens.gather(1, positions).flatten()

    def loss_of(inputs, positions, labels):
        with job.machine.autocast():
            logits = job.model(inputs, positions).flatten(0, 1)
        return F.cross_entropy(logits.float(), labels)

    def learn(loss):
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(job.model.parameters(), args.clip)
        job.optimizer.step()
        job.optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss.detach(), norm])

    return read, prepare, loss_of, learn


def read_as(stack, take):
    """Let train.update, and read() below, get tokens and noise from take()."""
    made = []  # the noise of the tokens that were taken last

    def tokens_of(blocks):
        tokens, noise = take()
        made[:] = [noise]
        return tokens

    for owner, name, function in ((corpus, "block_order", lambda *_: []),
                                  (corpus, "with_ends", tokens_of),
                                  (masking, "draw", lambda *_: made[0])):
        stack.enter_context(mock.patch.object(owner, name, function))


def read_ahead(args, job, stack):
    """A thread makes the next two batches and copies them from pinned memory, on its own stream."""
    order, with_ends, draw = corpus.block_order, corpus.with_ends, masking.draw
    ready, done = queue.Queue(2), threading.Event()
    device, on_gpu = job.machine.device, job.machine.device.type == "cuda"
    stream = torch.cuda.Stream() if on_gpu else None

    def make(number):
        tokens = with_ends(job.text.train[order(
            len(job.text.train), args.seed, number, args.batch_size)])
        made = tokens, draw(args.seed, number, *tokens.shape)
        if not on_gpu:
            return *made, None
        with torch.cuda.stream(stream):
            made = [x.pin_memory().to(device, non_blocking=True) for x in made]
            return *made, stream.record_event()

    def work():
        for number in itertools.count():
            try:
                item = make(number)
            except Exception as error:  # the step that waits for it must not wait for ever
                item = error
            while not done.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    pass
            if done.is_set() or isinstance(item, Exception):
                return

    def take():
        item = ready.get()
        if isinstance(item, Exception):
            raise item
        *made, copied = item
        if on_gpu:
            torch.cuda.current_stream().wait_event(copied)
            for x in made:  # its memory was handed out on the other stream
                x.record_stream(torch.cuda.current_stream())
        return made

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    stack.callback(thread.join)
    stack.callback(done.set)  # callbacks run last to first
    read_as(stack, take)


# --------------------------------------------------------------------------------------------------


def eager(args, job, stack):
    job.forward = job.model
    return lambda number: train.update(args, job, number)


def compiled(args, job, stack):
    job.forward = job.machine.compile(job.model)
    return lambda number: train.update(args, job, number)


def reduce_overhead(args, job, stack):
    """torch.compile puts forward and backward into CUDA graphs of their own."""
    job.forward = torch.compile(job.model, mode="reduce-overhead")

    def step(number):
        torch.compiler.cudagraph_mark_step_begin()
        return train.update(args, job, number)

    return step


def on_device(args, job, stack):
    """What could be won by preparing batches better: the same batch again, on the device already.
    Its first loss alone is comparable."""
    step, (tokens, noise) = compiled(args, job, stack), pieces(args, job)[0](0)
    read_as(stack, lambda: (tokens, noise))
    return step


def ahead(args, job, stack):
    step = compiled(args, job, stack)
    read_ahead(args, job, stack)
    return step


def loss(args, job, stack):
    """The loss is compiled with the forward."""
    read, prepare, loss_of, learn = pieces(args, job)
    loss_of = job.machine.compile(loss_of)
    return lambda number: learn(loss_of(*prepare(*read(number))))


def choose(args, job, stack):
    """The choice of the tokens, too."""
    read, prepare, loss_of, learn = pieces(args, job)
    whole = job.machine.compile(lambda tokens, noise: loss_of(*prepare(tokens, noise)))
    return lambda number: learn(whole(*read(number)))


def graph(args, job, stack, compiled=False):
    """The whole update is one CUDA graph: k is constant, and so are all shapes."""
    if job.machine.device.type != "cuda":
        raise UserError("needs a GPU")
    read, prepare, loss_of, learn = pieces(args, job)
    if compiled:
        loss_of = job.machine.compile(loss_of)
    for group in job.optimizer.param_groups:  # the graph reads the rate where it lies
        group.update(capturable=True, lr=torch.zeros((), device=job.machine.device))
    tokens, noise = (x.clone() for x in read(0))

    def update():
        return learn(loss_of(*prepare(tokens, noise)))

    # Nothing is captured that has not run before, on a stream of its own; at a rate of 0, ...
    for group in job.optimizer.param_groups:
        group["lr"].zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            update()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = update()
    for state in job.optimizer.state.values():  # ... and AdamW forgets it
        for value in state.values():
            value.zero_()

    def step(number):
        for there, new in zip((tokens, noise), read(number)):
            there.copy_(new)
        captured.replay()
        return out.clone()

    return step


def graph_compiled(args, job, stack):
    return graph(args, job, stack, compiled=True)


def everything(args, job, stack):
    """One graph, compiled, and batches read ahead."""
    step = graph(args, job, stack, compiled=True)
    read_ahead(args, job, stack)
    return step


# The most telling ones first, since time may not be enough for all.
VARIANTS = {function.__name__.replace("_", "-"): function for function in (
    eager, compiled, everything, graph, on_device, ahead, graph_compiled, loss, choose,
    reduce_overhead)}
