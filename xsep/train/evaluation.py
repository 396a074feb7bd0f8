"""Scores of a model: accuracy, or MAP@100, of the crop in the middle."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Callable

import torch
from torch import Tensor, nn

from .data import DataError, Plan, batches
from .metrics import average_precision, correct_in_top
from .processes import Processes
from .splits import Split


def prepare(images: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """uint8 (N, 3, H, W) → float32 in [-1, 1] on the device."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = images.to(device, non_blocking=True, memory_format=layout)
    return images.float().div_(127.5).sub_(1)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    plan: Plan,
    joined: Processes,
    class_weights: Tensor | None = None,
    channels_last: bool = True,
    amp: torch.dtype | None = None,
    stopped: Callable[[], int] = lambda: 0,
) -> dict[str, float]:
    """``images`` and ``top1``, ``top5``, or ``map100`` if they have several labels, over all processes.

    When ``stopped`` is not 0 on one of them the result is not complete, and empty.
    """
    training = model.training
    model.eval()
    images = first = second = 0.0
    try:
        for pixels, targets in batches(split.once(plan)):
            if stopped():
                break
            if not len(pixels):
                continue
            with torch.autocast(joined.device.type, amp) if amp else nullcontext():
                logits = model(prepare(pixels, joined.device, channels_last))
            logits = logits.float()
            targets = targets.to(joined.device)
            if split.multi_label:
                precisions = average_precision(logits, targets, 100, class_weights)
                images += int(precisions.isfinite().sum())
                first += precisions.nansum().item()
            else:
                images += len(pixels)
                first += correct_in_top(logits, targets, 1)
                second += correct_in_top(logits, targets, 5)
    finally:
        model.train(training)
    images, first, second, signals = joined.sum(images, first, second, stopped())
    if signals:
        return {}
    if not images:
        raise DataError("no image to evaluate on could be read")
    scores = {"map100": first / images} if split.multi_label else {"top1": first / images, "top5": second / images}
    return {"images": images, **scores}
