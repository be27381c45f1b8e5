"""The metrics of GLUE, by hand: defined for every input, 0 where a prediction is degenerate.

The first five take two tensors of N values, predictions first, compute in float64 and return a
float. A class is an integer label. Checked against hand-worked values in tests/test_glue_data.py.
"""

import torch


def accuracy(guess, truth):
    """Share of equal classes, 0 to 1."""
    return (guess == truth).double().mean().item()


def f1(guess, truth):
    """F1 of class 1: 2 TP / (2 TP + FP + FN); 0 where no label and no prediction is 1."""
    true_positives = ((guess == 1) & (truth == 1)).sum().item()
    both = (guess == 1).sum().item() + (truth == 1).sum().item()  # 2 TP + FP + FN
    return 2 * true_positives / both if both else 0.0


def matthews(guess, truth):
    """Matthews correlation of two-class labels (0, 1), -1 to 1: Pearson's of the indicators."""
    return pearson(guess == 1, truth == 1)


def pearson(a, b):
    """Pearson's correlation; 0 where one side is constant, or is not finite everywhere."""
    a, b = a.flatten().double(), b.flatten().double()
    # A mean is rounded, so a constant minus its mean may be dust instead of 0: look before.
    if not (a.isfinite().all() and b.isfinite().all()) or any(x.min() == x.max() for x in (a, b)):
        return 0.0
    a, b = ((x - x.mean()) / (x - x.mean()).abs().max() for x in (a, b))  # squares stay in range
    return (a @ b / torch.linalg.vector_norm(a) / torch.linalg.vector_norm(b)).item()


def spearman(a, b):
    """Spearman's rank correlation; ties share their mean rank; degenerate input as for Pearson."""
    if not (a.isfinite().all() and b.isfinite().all()):
        return 0.0
    return pearson(mean_ranks(a), mean_ranks(b))


def mean_ranks(x):
    """Ranks 1 to N, equal values sharing the mean of theirs."""
    _, group, size = x.flatten().unique(return_inverse=True, return_counts=True)
    return (size.cumsum(0) - (size - 1) / 2)[group]


METRICS = {metric.__name__: metric for metric in (accuracy, f1, matthews, pearson, spearman)}


def measure(task, outputs, devs):
    """Outputs (N, classes or 1) for each development set -> the metrics by name, times 100; where
    there are two sets (MNLI, with one metric) by their names, matched and mismatched."""
    values = []
    for output, dev in zip(outputs, devs):
        guess = output.squeeze(1) if task.labels is None else output.argmax(1)
        values += [100 * METRICS[name](guess, torch.tensor(dev.labels))
                   for name in task.metrics]
    return dict(zip(task.parts, values, strict=True))


def majority_class(task, labels, devs):
    """The metrics of always predicting the commonest label of the training rows."""
    constant = torch.zeros(task.outputs)
    if task.labels:
        constant[max(sorted(set(labels)), key=labels.count)] = 1
    return measure(task, [constant.expand(len(dev), -1) for dev in devs], devs)


def measured(task, outputs, data):
    """What an entry of glue.json says of the outputs for each development set, and of the rows.
    data: (training Rows, [development Rows], sha256 of the files)."""
    train, devs, sha256 = data
    parts = measure(task, outputs, devs)
    # Which rows of the first set are right; of the primary endpoint alone, nobody asks for others.
    right = (outputs[0].argmax(1) == torch.tensor(devs[0].labels)).tolist() if task.primary else ()
    return {
        "score": sum(parts.values()) / len(parts), "parts": parts,
        "majority": majority_class(task, train.labels, devs),
        "correct": "".join("01"[x] for x in right), "data": sha256, "trained_on": len(train),
        "rows": [part.in_file for part in (train, *devs)],
        "official": [part.official for part in (train, *devs)],
        "shared": [dev.shared for dev in devs]}
