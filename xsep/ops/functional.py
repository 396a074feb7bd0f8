"""``depthwise_conv2d`` and ``separable_conv2d`` in ``F.conv2d``'s argument order, and ``explain``."""

from __future__ import annotations

from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .._compat import is_compiling
from . import aten, backends, library
from .geometry import Padding, Size2, pair, resolve_padding
from .problem import Problem, is_nhwc


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Padding = 0,
    dilation: Size2 = 1,
) -> Tensor:
    """Depthwise 2-D convolution: ``F.conv2d(..., groups=C)``, in the memory format of ``input``.

    Args:
        input: (N, C, H, W) or (C, H, W), float64, float32, float16 or bfloat16; contiguous or channels_last, and
            slices of either, are read in place.
        weight: (C*M, 1, R, S), dtype and device of ``input``; filters ``c*M .. c*M+M-1`` belong to channel ``c``.
        bias: (C*M,) or None.
        stride, dilation: an int or a pair (vertical, horizontal), at least 1.
        padding: an int, a pair, four ints (top, bottom, left, right), ``'valid'``, ``'same'`` (torch's) or
            ``'tf_same'`` (TensorFlow's SAME for any stride).

    Returns:
        (N, C*M, P, Q) or (C*M, P, Q), where P = (H + top + bottom - dilation*(R-1) - 1) // stride + 1.

    Raises:
        ValueError: a shape, stride, padding or dilation that does not fit; the message names it.
        TypeError: dtypes that differ.
        RuntimeError: a forced backend that cannot take the input.

    Under a ``torch.func`` transform or forward-mode AD the same result is composed of torch's operators, whatever
    backend is chosen, since an operator with a registered backward would answer them wrongly.
    """
    batched = _batched(input, "input")
    stride, pad, dilation = _geometry(batched, weight, stride, padding, dilation)
    fprop = aten.compose if not is_compiling() and _under_transform() else library.fprop
    y = fprop(batched, weight, bias, stride, pad, dilation)
    return y if batched is input else y.squeeze(0)


def separable_conv2d(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Padding = 0,
    dilation: Size2 = 1,
    activation: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Depthwise convolution, optional ``activation``, then a pointwise (1x1) convolution.

    ``depthwise_weight`` is (C*M, 1, R, S), ``pointwise_weight`` (O, C*M, 1, 1); the other arguments, and what is
    raised, are ``depthwise_conv2d``'s.  Returns (N, O, P, Q) or (O, P, Q).  The paper's separable convolution
    (section 4.7) has no activation in between.
    """
    z = depthwise_conv2d(input, depthwise_weight, depthwise_bias, stride, padding, dilation)
    if activation is not None:
        z = activation(z)
    return F.conv2d(z, pointwise_weight, pointwise_bias)


def explain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Padding = 0,
    dilation: Size2 = 1,
) -> str:
    """Which backend ``depthwise_conv2d`` would run for these arguments, and why the others do not."""
    x = _batched(input, "input")
    geometry = _geometry(x, weight, stride, padding, dilation)
    return backends.explain_problem(
        Problem(x.device.type, x.dtype, is_nhwc(x), tuple(x.shape), tuple(weight.shape), *geometry, x.get_device())
    )


def _batched(t: Tensor, name: str) -> Tensor:
    if t.dim() == 4:
        return t
    if t.dim() == 3:
        return t.unsqueeze(0)
    raise ValueError(f"{name} must be (N, C, H, W) or (C, H, W); got shape {tuple(t.shape)}")


def _geometry(
    x: Tensor, weight: Tensor, stride: Size2, padding: Padding, dilation: Size2
) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int]]:
    if weight.dim() != 4:
        raise ValueError(f"weight must be (C*M, 1, R, S); got shape {tuple(weight.shape)}")
    strides, dilations = pair(stride, "stride", 1), pair(dilation, "dilation", 1)
    return strides, resolve_padding(padding, x.shape[2:], weight.shape[2:], strides, dilations), dilations


def _under_transform() -> bool:
    # register_autograd operators fail under torch.func.grad and answer jvp with a silent zero.
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
