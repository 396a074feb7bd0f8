"""The training block as one torch operator: ``xsep::block`` and its gradients, ``xsep::block_backward``.

    u        = relu(scale * (x - center) + shift)    per channel: the BatchNorm and ReLU before; padding is zeros of u
    z        = activation(depthwise(u, w_dw))
    y        = pointwise(z, w_pw)
    mean, m2 = per channel of y: the mean, and the sum of the squared deviations from it

x is (N, C, H, W), w_dw (C*M, 1, R, S), w_pw (K, C*M, 1, 1), y (N, K, P, Q).  The vectors are of float32, or of float64
with x.  The weights are of x's dtype, or of float32 with halves: then each pass rounds them to x's dtype, and backward
keeps the parameters.  Of all this it keeps x, y, the weights and the vectors; it makes u and z again.

A backend may have kernels for a pass (``backends.FusedBackend``).  Otherwise it is composed of the backend's depthwise
maps and torch's pointwise convolution: z is stored while a pass runs, u only by the ``aten`` backend.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._compat import disable_autocast, register_autograd, register_fake, register_flop_formula
from . import aten, backends
from .library import (
    GEOMETRY,
    cast,
    cast_first,
    differentiable_gradients,
    flops,
    implement,
    lib,
    ops,
    problem_of,
    register_autocast,
    unwatched,
)
from .problem import BlockProblem, check_alike, check_sizes, is_nhwc, memory_format, output_sizes, vector_dtype

_PART_ELEMENTS = 1 << 22  # of y that are widened to the vectors' dtype at a time

_VECTORS = "Tensor? center, Tensor? scale, Tensor? shift, bool relu"
lib.define(
    f"block(Tensor x, Tensor w_dw, Tensor w_pw, {_VECTORS}, str? activation, {GEOMETRY}, bool statistics) "
    "-> (Tensor y, Tensor mean, Tensor m2)"
)
lib.define(
    "block_backward(Tensor? dy, Tensor? dmean, Tensor? dm2, Tensor? y, Tensor? mean, "
    f"Tensor x, Tensor w_dw, Tensor w_pw, {_VECTORS}, str? activation, {GEOMETRY}) "
    "-> (Tensor dx, Tensor dw_dw, Tensor dw_pw, Tensor dcenter, Tensor dscale, Tensor dshift)"
)


def compose(x, w_dw, w_pw, center, scale, shift, relu, activation, stride, pad, dilation, statistics):
    """``xsep::block`` of torch's own operators: differentiable by torch as often as wanted; it keeps u, z and y."""
    w_dw, w_pw, on_load = w_dw.to(x.dtype), w_pw.to(x.dtype), _on_load(x, center, scale, shift, relu)
    u = x if on_load is None else aten.function_on_load(x, on_load).to(x.dtype)
    z = aten.compose(u, w_dw, None, stride, pad, dilation)
    y = F.conv2d(_activated(z, activation), w_pw)
    if not statistics:
        return y, _no_vector(x), _no_vector(x)
    return y, *compose_statistics(y)


def compose_statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    """mean and m2 of torch's own operators, which torch can transform; they widen all of y."""
    wide = y.to(vector_dtype(y))
    mean = wide.sum((0, 2, 3)) / max(y.numel() // y.shape[1], 1)
    return mean, (wide - mean.view(-1, 1, 1)).square().sum((0, 2, 3))


def _block(x, w_dw, w_pw, center, scale, shift, relu, activation, stride, pad, dilation, statistics):
    _check(x, w_dw, w_pw, center, scale, shift, stride, pad, dilation)
    p = problem_of(x, is_nhwc(x), x.shape, w_dw.shape, stride, pad, dilation)
    chosen: Any = backends.choose(p)
    w_dw, w_pw, on_load = w_dw.to(x.dtype), w_pw.to(x.dtype), _on_load(x, center, scale, shift, relu)
    b = BlockProblem(p, w_pw.shape[0], on_load is not None, activation)
    if backends.why_not_block(b, chosen, backward=False) is None:
        return chosen.block(b, x, w_dw, w_pw, on_load, statistics)
    z = chosen.fprop(p, x, w_dw, None, on_load)
    y = F.conv2d(_activated(z, activation), _pointwise(w_pw)).contiguous(memory_format=p.memory_format)
    return (y, *(statistics_of(y) if statistics else (_no_vector(x), _no_vector(x))))


def _block_backward(
    dy, dmean, dm2, y, mean, x, w_dw, w_pw, center, scale, shift, relu, activation, stride, pad, dilation
):
    p = problem_of(x, is_nhwc(x), x.shape, w_dw.shape, stride, pad, dilation)
    chosen: Any = backends.choose(p)
    on_load = _on_load(x, center, scale, shift, relu)
    b = BlockProblem(p, w_pw.shape[0], on_load is not None, activation)
    fused = backends.why_not_block(b, chosen, backward=True) is None
    run = chosen.block_backward if fused else partial(_compose_backward, chosen)
    weights = w_dw.to(x.dtype), w_pw.to(x.dtype)
    dx, dw_dw, dw_pw, dscale, dshift = run(b, dy, dmean, dm2, y, mean, x, *weights, on_load)
    return dx, dw_dw.to(w_dw.dtype), dw_pw.to(w_pw.dtype), *_vector_gradients(x, on_load, dscale, dshift)


def _compose_backward(chosen, b: BlockProblem, dy, dmean, dm2, y, mean, x, w_dw, w_pw, on_load):
    """``FusedBackend.block_backward`` of the backend's depthwise maps and torch's pointwise convolution."""
    p = b.depthwise
    if dmean is not None or dm2 is not None:
        dy = _through_statistics(dy, dmean, dm2, y, mean)
    dy = dy.contiguous(memory_format=p.memory_format)
    v = chosen.fprop(p, x, w_dw, None, on_load)
    z, options = _activated(v, b.activation), ((1, 1), (0, 0), (1, 1), False, (0, 0), 1, (True, True, False))
    dz, dw_pw, _ = torch.ops.aten.convolution_backward(dy, z, _pointwise(w_pw), None, *options)
    del dy, z
    dv = _activation_backward(dz, v, b.activation).contiguous(memory_format=p.memory_format)
    del dz, v
    if on_load is None:
        return (*chosen.dgrad_wgrad(p, dv, x, w_dw), dw_pw.contiguous(), None, None)
    dx, dw_dw, dscale, dshift = chosen.dgrad_wgrad_on_load(p, dv, x, w_dw, on_load)
    return dx, dw_dw, dw_pw.contiguous(), dscale, dshift


def _vector_gradients(x: Tensor, on_load, dscale, dshift) -> tuple[Tensor, ...]:
    """Of center, scale and shift; none without a function on load."""
    if on_load is None:
        return tuple(_no_vector(x) for _ in range(3))
    return -on_load[1] * dshift, dscale, dshift


def _casts(dtype: torch.dtype, arguments: tuple) -> tuple:
    """Under autocast; weights of float32 are rounded by the passes, so that no rounded ones are kept."""
    x, *weights = arguments[:3]
    return cast(x, dtype), *(w if w.dtype == torch.float32 else cast(w, dtype) for w in weights), *arguments[3:]


implement("block", _block)
implement("block_backward", _block_backward)
register_autocast("block", _casts)
register_autocast("block_backward", cast_first(0))


def _check(x, w_dw, w_pw, center, scale, shift, stride, pad, dilation) -> tuple[int, ...]:
    """The sizes of z.  Raises ``ValueError`` or ``TypeError`` naming the argument that does not fit."""
    if not x.is_floating_point():
        raise TypeError(f"input must be of a floating-point dtype; got {x.dtype}")
    for name, weight in (("depthwise_weight", w_dw), ("pointwise_weight", w_pw)):
        dtype = weight.dtype if weight.dtype == vector_dtype(x) else x.dtype
        check_alike("input", (dtype, x.device), name, (weight.dtype, weight.device))
    sizes = check_sizes(x.shape, w_dw.shape, stride, pad, dilation, "depthwise_weight")
    if w_pw.dim() != 4 or tuple(w_pw.shape[1:]) != (sizes[1], 1, 1) or w_pw.shape[0] < 1:
        raise ValueError(f"pointwise_weight must be (K, {sizes[1]}, 1, 1); got shape {tuple(w_pw.shape)}")
    for name, vector in (("center", center), ("scale", scale), ("shift", shift)):
        if vector is None:
            continue
        if tuple(vector.shape) != (x.shape[1],):
            raise ValueError(f"{name} must have shape ({x.shape[1]},); got {tuple(vector.shape)}")
        if vector.dtype != vector_dtype(x):
            raise TypeError(f"{name} must be of {vector_dtype(x)} with input of {x.dtype}; got {vector.dtype}")
        if vector.device != x.device:
            raise ValueError(f"input and {name} must be on the same device; got {x.device} and {vector.device}")
    return sizes


def _on_load(x, center, scale, shift, relu):
    """What the backends take, missing vectors filled in; None where u is x."""
    if center is None and scale is None and shift is None and not relu:
        return None

    def filled(vector, value):
        return x.new_full((x.shape[1],), value, dtype=vector_dtype(x)) if vector is None else vector.contiguous()

    return filled(center, 0), filled(scale, 1), filled(shift, 0), relu


def _no_vector(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=vector_dtype(x))


def _pointwise(w_pw: Tensor) -> Tensor:
    # Strides of channels_last, which torch would then give y, whatever those of z are.
    return w_pw.reshape(w_pw.shape[:2]).view(w_pw.shape)


def _activated(v: Tensor, activation: str | None) -> Tensor:
    return v if activation is None else getattr(F, activation)(v)


def _activation_backward(dz: Tensor, v: Tensor, activation: str | None) -> Tensor:
    """The gradient of v from that of ``_activated(v)``."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dz, v, 0)
    if activation == "elu":  # of v: where elu(v) is about -1, its rounding is as large as its slope
        return torch.ops.aten.elu_backward(dz, 1, 1, 1, False, v)
    return dz


def _parts(*tensors: Tensor):
    """Pieces of a few images, so that what is widened stays small; none of an empty batch."""
    N = tensors[0].shape[0]
    images = max(1, _PART_ELEMENTS * N // max(1, tensors[0].numel()))
    return zip(*(t.split(images) for t in tensors)) if N else ()


def statistics_of(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations per channel; zeros for an empty batch.

    The deviations are summed about the mean as it comes out first: what they sum to corrects its rounding.
    """
    dtype, count = vector_dtype(y), max(1, y.numel() // y.shape[1])
    zero = y.new_zeros(y.shape[1], dtype=dtype)
    mean = sum((part.sum((0, 2, 3), dtype=dtype) for (part,) in _parts(y)), zero) / count
    total, squares = zero, zero
    for (part,) in _parts(y):
        deviations = part - mean.view(-1, 1, 1)
        total = total + deviations.sum((0, 2, 3))
        squares = squares + deviations.square_().sum((0, 2, 3))
    return mean + total / count, squares - total * total / count


def _through_statistics(dy, dmean, dm2, y: Tensor, mean: Tensor) -> Tensor:
    """The whole gradient of y: dy + dmean / count + 2 (y - mean) dm2, where what is None is zero."""
    count = max(1, y.numel() // y.shape[1])
    slope = 2 * dm2 if dm2 is not None else torch.zeros_like(mean)
    offset = dmean / count if dmean is not None else torch.zeros_like(mean)
    total = torch.empty_like(y)
    for to, part, given in _parts(total, y, total if dy is None else dy):
        gradient = part - mean.view(-1, 1, 1)
        gradient.mul_(slope.view(-1, 1, 1)).add_(offset.view(-1, 1, 1))
        to.copy_(gradient if dy is None else gradient.add_(given))
    return total


@register_fake("xsep::block", lib=lib)
def _(x, w_dw, w_pw, center, scale, shift, relu, activation, stride, pad, dilation, statistics):
    N, _, P, Q = _check(x, w_dw, w_pw, center, scale, shift, stride, pad, dilation)
    K = w_pw.shape[0]
    y = torch.empty((N, K, P, Q), dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    return y, *(x.new_empty(K if statistics else 0, dtype=vector_dtype(x)) for _ in range(2))


@register_fake("xsep::block_backward", lib=lib)
def _(dy, dmean, dm2, y, mean, x, w_dw, w_pw, center, scale, shift, relu, activation, stride, pad, dilation):
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    on_load = center is not None or scale is not None or shift is not None or relu
    vectors = (x.new_empty(x.shape[1] if on_load else 0, dtype=vector_dtype(x)) for _ in range(3))
    return dx, w_dw.new_empty(w_dw.shape), w_pw.new_empty(w_pw.shape), *vectors


def _setup_context(ctx, inputs, output):
    tensors, ctx.options, ctx.statistics = inputs[:6], inputs[6:-1], inputs[-1]
    ctx.save_for_backward(*tensors, *(output[:2] if ctx.statistics else (None, None)))
    ctx.set_materialize_grads(False)


def _backward(ctx, *gradients):
    *tensors, y, mean = ctx.saved_tensors
    gradients = gradients if ctx.statistics else (gradients[0], None, None)
    if all(g is None for g in gradients):
        return (None,) * len(ctx.needs_input_grad)
    if torch.is_grad_enabled():  # derivatives of the gradients are wanted
        with disable_autocast():
            options = *ctx.options, ctx.statistics
            needs = ctx.needs_input_grad
            found = differentiable_gradients(lambda *t: compose(*t, *options), tensors, needs, gradients)
    else:
        found = _gradients(*gradients, y, mean, *tensors, *ctx.options)
    needed = (g if need else None for g, need in zip(found, ctx.needs_input_grad))
    return (*needed, *(None,) * (len(ctx.options) + 1))


def _no_derivative(ctx, *gradients):
    raise NotImplementedError("xsep::block_backward has no derivative; differentiate xsep::block twice instead")


register_autograd("xsep::block", _backward, setup_context=_setup_context, lib=lib)
register_autograd("xsep::block_backward", _no_derivative, setup_context=lambda ctx, inputs, output: None, lib=lib)
run = unwatched(ops.block, _block, 6, _casts, _setup_context, _backward, compose)
_gradients = unwatched(ops.block_backward, _block_backward, 11, cast_first(0))


@register_flop_formula(ops.block)
def _(x, w_dw, w_pw, *args, **kwargs) -> int:
    z = output_sizes(x, w_dw, *args[5:8])
    return flops(z, w_dw) + _pointwise_flops(z, w_pw)


@register_flop_formula(ops.block_backward)
def _(dy, dmean, dm2, y, mean, x, w_dw, w_pw, *args, **kwargs) -> int:
    z = output_sizes(x, w_dw, *args[5:8])
    return 3 * flops(z, w_dw) + 2 * _pointwise_flops(z, w_pw)


def _pointwise_flops(z_sizes, w_pw) -> int:
    return w_pw[0] * flops(z_sizes, (1, 1, 1, 1))
