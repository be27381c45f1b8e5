"""What tests/bench.py measures: every function here runs in a process of its own."""

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

BATCH, SEQ_LEN = 16, 128
# Tokens in a row, mean and deviation: those of GLUE's training rows with a vocabulary of 8192.
LENGTHS = {"CoLA": (12.9, 4.7), "MNLI": (45.4, 21.2)}


def reply(result):
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result["memory_mb"] = round(memory / (2**20 if sys.platform == "darwin" else 2**10))
    print(json.dumps(result))


def timed(step, warm, count):
    """Seconds of a call of step(), the median of `count` after `warm` that are not counted."""
    seconds = []
    for i in range(warm + count):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[warm:])


def amp(dtype):
    """-> a context in which matrix products are made in `dtype`, as train.py makes them."""
    import torch

    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")


def matrix_peak(n=1024, dtype="float32"):
    """FLOP/s of a product of two n x n matrices: the floor of everything else."""
    import torch

    a, b, out = torch.randn(3, n, n).to(getattr(torch, dtype))
    # The fastest of some: what the machine can do, not what it did while others used it.
    seconds = min(timed(lambda: torch.mm(a, b, out=out), 1, 3) for _ in range(8))
    return {"flops_per_s": 2 * n**3 / seconds}


def peer_step(layers, width, vocab_size, gathered, steps, dtype="float32"):
    """One pretraining step with transformers' BertForMaskedLM on random ids."""
    import torch
    import torch.nn.functional as F
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(
        vocab_size=vocab_size, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=width // 64, intermediate_size=4 * width,
        max_position_embeddings=SEQ_LEN, attn_implementation="sdpa")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, eps=1e-6, fused=True)
    tokens = torch.randint(5, vocab_size, (BATCH, SEQ_LEN))
    tokens[:, 0], tokens[:, -1] = 2, 3

    def step():
        # What DataCollatorForLanguageModeling does: each token by a coin of its own, 80/10/10.
        probability = torch.full(tokens.shape, 0.15)
        probability.masked_fill_(tokens < 5, 0.0)
        masked = torch.bernoulli(probability).bool()
        labels = tokens.masked_fill(~masked, -100)
        show = torch.bernoulli(torch.full(tokens.shape, 0.8)).bool() & masked
        other = torch.bernoulli(torch.full(tokens.shape, 0.5)).bool() & masked & ~show
        inputs = tokens.masked_fill(show, 4)
        inputs = torch.where(other, torch.randint(vocab_size, tokens.shape), inputs)
        with amp(dtype):
            if gathered:
                hidden = model.bert(inputs).last_hidden_state[masked]
                loss = F.cross_entropy(model.cls(hidden), labels[masked])
            else:
                loss = model(inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = timed(step, 5, steps)
    predicted = 0.15 * (SEQ_LEN - 2) if gathered else SEQ_LEN
    return {"tokens_per_s": BATCH * SEQ_LEN / seconds,
            "flops_per_step": 3 * BATCH * peer_flops(layers, width, vocab_size, predicted)}


def peer_flops(layers, width, vocab_size, predicted):
    """As model.forward_flops, for a last block that computes every token."""
    d = width
    blocks = layers * SEQ_LEN * (24 * d**2 + 4 * SEQ_LEN * d)
    return blocks + predicted * (2 * d**2 + 2 * d * vocab_size)


def rows_like(task, count):
    """-> [(ids, length of the first sentence)] with sentence lengths like the task's."""
    import numpy as np

    rng, (mean, deviation) = np.random.default_rng(0), LENGTHS[task]
    # Lengths are skewed: a lognormal with this mean and deviation.
    sigma = np.log(1 + (deviation / mean) ** 2) ** 0.5
    lengths = np.exp(rng.normal(np.log(mean) - sigma**2 / 2, sigma, count))
    lengths = lengths.round().clip(5, SEQ_LEN).astype(int)
    return [(rng.integers(5, 8192, n).astype(np.uint16), n) for n in lengths]


def tune(task, layers, width, count, dtype="float32"):
    """Fine-tuning with glue.py's own loop and recipe: examples/s over one epoch."""
    import torch

    import glue
    from model import Bert, Shape, keep_memory

    keep_memory()  # as glue.py does
    a = SimpleNamespace(**{**glue.DEFAULTS, "epochs": 1, "lr": 1e-3, "embedding_lr": 1e-3})
    rows = rows_like(task, count)
    labels = [i % 2 for i in range(count)]

    def epoch(n):
        torch.manual_seed(0)
        bert = Bert(Shape(8192, layers, width, SEQ_LEN, dropout=a.dropout))
        began = time.perf_counter()
        glue.fine_tune(bert, 2, rows[:n], labels[:n], [], a, 0, torch.device("cpu"),
                       lambda: amp(dtype), lambda *_: None)
        return time.perf_counter() - began

    epoch(4 * a.batch_size)
    return {"examples_per_s": count / epoch(count)}


def tune_peer(task, layers, width, count, padded, dtype="float32"):
    """The same with transformers' BertForSequenceClassification, padded to 128 tokens, the default
    of its run_glue.py, or to the longest row of the batch. Data are tensors before the clock runs.
    """
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    import glue

    a = SimpleNamespace(**glue.DEFAULTS)
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=8192, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=width // 64, intermediate_size=4 * width,
        max_position_embeddings=SEQ_LEN, hidden_dropout_prob=a.dropout,
        attention_probs_dropout_prob=a.dropout, attn_implementation="sdpa")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6, fused=True)
    rows, batches = rows_like(task, count), []
    for first in range(0, count, a.batch_size):
        part = rows[first:first + a.batch_size]
        ids = torch.zeros(len(part), SEQ_LEN if padded else max(n for _, n in part)).long()
        attend = torch.zeros_like(ids)
        for i, (row, n) in enumerate(part):
            ids[i, :n] = torch.from_numpy(row.astype("int64"))
            attend[i, :n] = 1
        batches.append((ids, attend, torch.arange(len(part)) % 2))

    def update(ids, attend, labels):
        with amp(dtype):
            loss = model(ids, attention_mask=attend, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), a.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for batch in batches[:4]:
        update(*batch)
    began = time.perf_counter()
    for batch in batches:
        update(*batch)
    return {"examples_per_s": count / (time.perf_counter() - began)}


def make_tokenizer(text, path):
    from data.tokenizer import train_tokenizer

    train_tokenizer(Path(text).read_text().split("\n"), 8192, path)
    return {}


def prepare_text(text, tokenizer):
    """Pass 2 of data/corpus.py, from a text file to token ids on disk: MB/s."""
    from data import corpus
    from data.tokenizer import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        corpus.encode_documents([Path(text)], "", Tokenizer(tokenizer), 10**9, None, Path(folder))
        return {"mb_per_s": os.path.getsize(text) / 1e6 / (time.perf_counter() - began)}


def prepare_peer(text, tokenizer):
    """sentencepiece's own parallel encoder on the same paragraphs, which it holds in memory."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    paragraphs = [line for line in Path(text).read_text().split("\n") if line]
    began = time.perf_counter()
    processor.encode(paragraphs, num_threads=os.cpu_count())
    return {"mb_per_s": os.path.getsize(text) / 1e6 / (time.perf_counter() - began)}
