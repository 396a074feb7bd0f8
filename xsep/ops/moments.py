"""Mean and m2, the sum of the squared deviations from it, of a tensor's channels as a torch operator.

``xsep::moments(y) -> (mean, m2)``: (C,) each of y (N, C, H, W), in float32, or float64 with y; zeros of an empty batch.
A backend may have a kernel, a method ``moments(p, y)``; torch's operators make them otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._compat import is_compiling, register_autograd, register_fake
from . import backends
from .block import compose_statistics, statistics_of
from .library import implement, lib, ops, problem_of, under_transform, unwatched
from .problem import is_nhwc, vector_dtype
from .residual import Branch, residual_sum

lib.define("moments(Tensor y) -> (Tensor mean, Tensor m2)")


def with_moments(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, its mean and its m2.  Who uses this y in place of the argument gets all of its gradient in one pass."""
    if is_compiling() or under_transform():
        return (y, *compose_statistics(y))
    return _WithMoments.apply(y)


def _moments(y):
    if y.dim() != 4 or y.shape[1] < 1 or not y.is_floating_point():
        raise ValueError(f"y must be (N, C, H, W), of a floating-point dtype; got {y.dtype}, shape {tuple(y.shape)}")
    p = problem_of(y, is_nhwc(y), y.shape, (y.shape[1], 1, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1))
    kernel: Any = getattr(backends.choose(p), "moments", None) if y.numel() else None
    return statistics_of(y) if kernel is None else kernel(p, y)


implement("moments", _moments)
_run = unwatched(ops.moments, _moments, 1)


@register_fake("xsep::moments", lib=lib)
def _(y):
    return tuple(y.new_empty(y.shape[1], dtype=vector_dtype(y)) for _ in range(2))


def _gradient(dy: Tensor | None, dmean: Tensor | None, dm2: Tensor | None, y: Tensor, mean: Tensor) -> Tensor | None:
    """dy + dmean / count + 2 (y - mean) dm2, where what is None is zero."""
    if dmean is None and dm2 is None:
        return dy
    zeros = torch.zeros_like(mean)
    slope = zeros if dm2 is None else 2 * dm2
    offset = zeros if dmean is None else dmean / max(1, y.numel() // y.shape[1])
    return residual_sum(Branch(y, mean, slope, offset), None if dy is None else Branch(dy))


class _WithMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        mean, m2 = _run(y)
        ctx.save_for_backward(y, mean)
        ctx.set_materialize_grads(False)
        return y.view_as(y), mean, m2

    @staticmethod
    def backward(ctx, dy, dmean, dm2):
        return _gradient(dy, dmean, dm2, *ctx.saved_tensors)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[0])
    ctx.set_materialize_grads(False)


register_autograd(
    "xsep::moments",
    lambda ctx, dmean, dm2: _gradient(None, dmean, dm2, *ctx.saved_tensors),
    setup_context=_setup_context,
    lib=lib,
)
