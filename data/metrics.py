"""Metrics, by hand: defined for every input, 0 where a prediction is degenerate."""

import torch


def spearman(a, b):
    """Spearman's rank correlation of two tensors; ties share their mean rank; 0 for a constant."""
    ranks = []
    for x in (a, b):
        _, group, size = x.flatten().unique(return_inverse=True, return_counts=True)
        mean_rank = size.cumsum(0) - (size - 1) / 2
        ranks.append(mean_rank[group].double() - (x.numel() + 1) / 2)
    scale = torch.linalg.vector_norm(ranks[0]) * torch.linalg.vector_norm(ranks[1])
    return (ranks[0] @ ranks[1] / scale).item() if scale > 0 else 0.0
