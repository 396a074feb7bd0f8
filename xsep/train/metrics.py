"""Accuracy, and the mean average precision of the paper's FastEval14k."""

from __future__ import annotations

import torch
from torch import Tensor


def correct_in_top(logits: Tensor, classes: Tensor, k: int) -> int:
    """How many of (N, C) logits have the class (N,) among their ``k`` highest."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return int((best == classes[:, None]).sum())


def average_precision(scores: Tensor, labels: Tensor, k: int = 100, weights: Tensor | None = None) -> Tensor:
    """Of each image, weighted by class: (N, C) scores, (N, C) labels of 0 and 1, (C,) weights or None → (N,) float64.

    A label of class c at rank r among the ``k`` highest scores contributes ``w_c`` times the precision of the first r.
    The sum is divided by what it would be if the labels came first, the heaviest of them where there are more than
    ``k``.  NaN where no label has any weight.  The paper says no more than "we weight the contribution of each class".
    """
    k = min(k, scores.shape[1])
    labels = labels.double()
    weighted = labels if weights is None else labels * weights.to(labels)
    best = scores.topk(k, dim=1).indices
    hits = labels.gather(1, best)
    precision = hits.cumsum(1) / torch.arange(1, k + 1, device=hits.device)
    return (precision * weighted.gather(1, best)).sum(1) / weighted.topk(k, dim=1).values.sum(1)


def mean_average_precision(scores: Tensor, labels: Tensor, k: int = 100, weights: Tensor | None = None) -> float:
    """The mean of ``average_precision`` over the images that have a label with a weight; NaN if none has."""
    return average_precision(scores, labels, k, weights).nanmean().item()
