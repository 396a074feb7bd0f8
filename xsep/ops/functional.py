"""``depthwise_conv2d`` and ``separable_conv2d`` in ``F.conv2d``'s argument order, the blocks, ``explain``."""

from __future__ import annotations

from typing import Callable, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .._compat import autocast_dtype, is_autocast_enabled
from . import backends, block, inference, library
from .geometry import Padding, Size2, pair, resolve_padding
from .problem import BlockProblem, Problem, is_nhwc, vector_dtype


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
    y = library.fprop(batched, weight, bias, stride, pad, dilation)
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


def separable_block(
    input: Tensor,
    center: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    stride: Size2 = 1,
    padding: Padding = 0,
    dilation: Size2 = 1,
    activation: Literal["relu", "elu"] | None = None,
    statistics: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The unit that separable networks are made of: BatchNorm, ReLU, depthwise and pointwise convolution, statistics.

    BatchNorm and ReLU are those before the convolutions: u = relu(scale * (input - center) + shift), per channel, takes
    the place of ``input``; padding is zeros of u.  The statistics are those that the BatchNorm after them needs.
    Backward keeps ``input`` and the result, and nothing between them.

    Args:
        input: (N, C, H, W), float64, float32, float16 or bfloat16, in either memory format.
        center, scale, shift: (C,), of any floating-point dtype, or None for 0, 1 and 0.
        relu: whether there is the ReLU.
        depthwise_weight: (C*M, 1, R, S), device of ``input``, and its dtype or, with halves, float32, which is rounded.
        pointwise_weight: (K, C*M, 1, 1), likewise.
        stride, padding, dilation: of the depthwise convolution, as in ``depthwise_conv2d``.
        activation: between the convolutions: None, ``'relu'`` or ``'elu'``.
        statistics: whether to return them.

    Returns:
        (y, mean, m2): y is (N, K, P, Q) in the memory format of ``input``; mean and m2 are (K,), of float32, or of
        float64 with ``input``: the mean over N, P and Q, and the sum of the squared deviations from it (both zeros
        for an empty batch).  All three have gradients.  Without ``statistics`` mean and m2 are None.

    Raises:
        ValueError: a shape, stride, padding, dilation, activation or device that does not fit; the message names it.
        TypeError: dtypes that differ or are not floating-point, or ``relu`` that is no bool.
        RuntimeError: a forced backend that cannot take the input.

    The first derivatives come from the backend; derivatives of theirs are those of a composition of torch's operators,
    and so is everything under a ``torch.func`` transform or forward-mode AD.
    """
    if not isinstance(relu, bool):
        raise TypeError(f"relu must be a bool; got {relu!r}")
    if activation not in (None, "relu", "elu"):
        raise ValueError(f"activation must be None, 'relu' or 'elu'; got {activation!r}")
    if input.dim() != 4:
        raise ValueError(f"input must be (N, C, H, W); got shape {tuple(input.shape)}")
    geometry = _geometry(input, depthwise_weight, stride, padding, dilation, "depthwise_weight")
    center, scale, shift = (v if v is None else v.to(vector_dtype(input)) for v in (center, scale, shift))
    tensors = input, depthwise_weight, pointwise_weight, center, scale, shift
    y, mean, m2 = block.run(*tensors, relu, activation, *geometry, statistics)
    return (y, mean, m2) if statistics else (y, None, None)


def separable_block_inference(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: Size2 = 1,
    padding: Padding = 0,
    dilation: Size2 = 1,
    relu: bool = False,
    activation: Literal["relu", "relu6"] | None = None,
    out_activation: Literal["relu", "relu6"] | None = None,
) -> Tensor:
    """A separable convolution of a trained network and what goes round it, BatchNorm folded into weights and biases.

    y = out_activation(pointwise(activation(depthwise(u) + depthwise_bias)) + bias + residual), where u is ``input`` or,
    with ``relu``, relu(input).  ``xsep.fuse`` makes a model of such blocks.

    Args:
        input: (N, C, H, W), float64, float32, float16 or bfloat16, in either memory format.
        depthwise_weight: (C*M, 1, R, S), dtype and device of ``input``, as all tensors here.
        pointwise_weight: (K, C*M, 1, 1).
        depthwise_bias, bias: (C*M,) and (K,), or None.
        residual: (N, K, P, Q) in either memory format, or None.
        stride, padding, dilation: of the depthwise convolution, as in ``depthwise_conv2d``.
        relu: whether there is a ReLU before the convolutions.
        activation, out_activation: between the convolutions and at the end: None, ``'relu'`` or ``'relu6'``.

    Returns:
        (N, K, P, Q) in the memory format of ``input``.

    Raises:
        ValueError: a shape, stride, padding, dilation, activation or device that does not fit; the message names it.
        TypeError: dtypes that differ or are not floating-point, or ``relu`` that is no bool.
        RuntimeError: gradients are enabled and a tensor requires them; a forced backend that cannot take the input.
    """
    if not isinstance(relu, bool):
        raise TypeError(f"relu must be a bool; got {relu!r}")
    for name, value in (("activation", activation), ("out_activation", out_activation)):
        if value not in inference.ACTIVATIONS:
            raise ValueError(f"{name} must be None, 'relu' or 'relu6'; got {value!r}")
    if input.dim() != 4:
        raise ValueError(f"input must be (N, C, H, W); got shape {tuple(input.shape)}")
    tensors = {
        "input": input,
        "depthwise_weight": depthwise_weight,
        "pointwise_weight": pointwise_weight,
        "depthwise_bias": depthwise_bias,
        "bias": bias,
        "residual": residual,
    }
    if torch.is_grad_enabled():
        for name, t in tensors.items():
            if t is not None and t.requires_grad:
                raise RuntimeError(
                    f"separable_block_inference has no gradients, and {name} requires them: call it under "
                    "torch.no_grad(), or separable_block to train"
                )
    geometry = _geometry(input, depthwise_weight, stride, padding, dilation, "depthwise_weight")
    return inference.run(*tensors.values(), relu, activation, out_activation, *geometry)


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
    return backends.explain_problem(_problem(x, weight, geometry))


def explain_block(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    stride: Size2 = 1,
    padding: Padding = 0,
    dilation: Size2 = 1,
    activation: Literal["relu", "relu6", "elu"] | None = None,
    on_load: bool = True,
) -> str:
    """``explain`` for ``separable_block``, its backward and ``separable_block_inference``.

    Below the backends of the depthwise convolution it says whether the one that runs makes the block in one go, or why
    the block is composed of its depthwise kernels and torch's operators.  ``activation`` is that between the
    convolutions; ``on_load`` says whether there are BatchNorm's vectors or a ReLU before them.
    """
    if activation not in (None, "relu", "relu6", "elu"):
        raise ValueError(f"activation must be None, 'relu', 'relu6' or 'elu'; got {activation!r}")
    if input.dim() != 4:
        raise ValueError(f"input must be (N, C, H, W); got shape {tuple(input.shape)}")
    geometry = _geometry(input, depthwise_weight, stride, padding, dilation, "depthwise_weight")
    block._check(input, depthwise_weight, pointwise_weight, None, None, None, *geometry)
    problem = _problem(input, depthwise_weight, geometry)
    return backends.explain_block(BlockProblem(problem, pointwise_weight.shape[0], on_load, activation))


def has_block_kernels(
    input: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, stride, padding, dilation, activation
) -> bool:
    """Whether ``separable_block`` and its backward run in one go for these arguments."""
    geometry = _geometry(input, depthwise_weight, stride, padding, dilation, "depthwise_weight")
    problem = _problem(input, depthwise_weight, geometry)
    if problem.device in ("cpu", "cuda") and is_autocast_enabled(problem.device):
        problem = problem._replace(dtype=autocast_dtype(problem.device))
    b, chosen = BlockProblem(problem, pointwise_weight.shape[0], True, activation), backends.choose(problem)
    return not any(backends.why_not_block(b, chosen, backward) for backward in (False, True))


def _problem(x: Tensor, weight: Tensor, geometry) -> Problem:
    return library.problem_of(x, is_nhwc(x), x.shape, weight.shape, *geometry)


def _batched(t: Tensor, name: str) -> Tensor:
    if t.dim() == 4:
        return t
    if t.dim() == 3:
        return t.unsqueeze(0)
    raise ValueError(f"{name} must be (N, C, H, W) or (C, H, W); got shape {tuple(t.shape)}")


def _geometry(
    x: Tensor, weight: Tensor, stride: Size2, padding: Padding, dilation: Size2, name: str = "weight"
) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int]]:
    if weight.dim() != 4:
        raise ValueError(f"{name} must be (C*M, 1, R, S); got shape {tuple(weight.shape)}")
    if type(stride) is type(padding) is type(dilation) is int and stride > 0 and padding >= 0 and dilation > 0:
        return (stride, stride), (padding,) * 4, (dilation, dilation)  # what most calls have
    strides, dilations = pair(stride, "stride", 1), pair(dilation, "dilation", 1)
    return strides, resolve_padding(padding, x.shape[2:], weight.shape[2:], strides, dilations), dilations
