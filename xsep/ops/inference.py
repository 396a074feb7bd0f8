"""The block of a trained network as one torch operator, ``xsep::block_inference``, without derivatives.

    u = relu(x) or x;  z = activation(depthwise(u, w_dw) + w_dw_bias)
    y = out_activation(pointwise(z, w_pw) + bias + residual)

BatchNorm is no part of it: in inference it is a factor of the weights and a bias (``xsep.fuse``).  Shapes and names are
those of ``block.py``; biases and residual are of the dtype of x.

A backend that makes y in one go has two methods, ``why_not_block_inference(b)`` and
``block_inference(b, x, w_dw, w_pw, w_dw_bias, bias, residual, out_activation)``, where b is a
``BlockProblem``, its ``on_load`` the ReLU.  For the others y is composed of their depthwise fprop and torch's pointwise
convolution.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._compat import pointwise_conv2d, register_autograd, register_fake, register_flop_formula
from . import aten, backends, block
from .library import GEOMETRY, cast_first, flops, implement, lib, ops, problem_of, register_autocast, unwatched
from .problem import BlockProblem, check_same, is_nhwc, memory_format, output_sizes

ACTIVATIONS = (None, "relu", "relu6")

lib.define(
    "block_inference(Tensor x, Tensor w_dw, Tensor w_pw, Tensor? w_dw_bias, Tensor? bias, Tensor? residual, "
    f"bool relu, str? activation, str? out_activation, {GEOMETRY}) -> Tensor"
)


def compose(x, w_dw, w_pw, w_dw_bias, bias, residual, relu, activation, out_activation, stride, pad, dilation):
    """``xsep::block_inference`` of torch's own operators, which torch can transform."""
    z = aten.compose(F.relu(x) if relu else x, w_dw, w_dw_bias, stride, pad, dilation)
    y = F.conv2d(_activated(z, activation), w_pw, bias)
    return _activated(y if residual is None else y + residual, out_activation)


def _block_inference(x, w_dw, w_pw, w_dw_bias, bias, residual, relu, activation, out_activation, stride, pad, dilation):
    _check(x, w_dw, w_pw, w_dw_bias, bias, residual, stride, pad, dilation)
    p = problem_of(x, is_nhwc(x), x.shape, w_dw.shape, stride, pad, dilation)
    chosen: Any = backends.choose(p)
    b = BlockProblem(p, w_pw.shape[0], relu, activation)
    if backends.why_not_block_inference(b, chosen) is None:
        return chosen.block_inference(b, x, w_dw, w_pw, w_dw_bias, bias, residual, out_activation)
    z = chosen.fprop(p, x, w_dw, w_dw_bias, block._on_load(x, None, None, None, relu))
    z = _activated(z, activation, inplace=True)
    y = pointwise_conv2d(z, block._pointwise(w_pw), bias).contiguous(memory_format=p.memory_format)
    if residual is not None:
        y += residual
    return _activated(y, out_activation, inplace=True)


implement("block_inference", _block_inference)
register_autocast("block_inference", cast_first(6))


def _check(x, w_dw, w_pw, w_dw_bias, bias, residual, stride, pad, dilation) -> tuple[int, ...]:
    """The sizes of y.  Raises ``ValueError`` or ``TypeError`` naming the argument that does not fit."""
    N, hidden, P, Q = block._check(x, w_dw, w_pw, None, None, None, stride, pad, dilation)
    for name, weight in (("depthwise_weight", w_dw), ("pointwise_weight", w_pw)):
        check_same("input", x, name, weight)  # not of float32 with halves
    sizes = N, w_pw.shape[0], P, Q
    for name, t, expected in (
        ("depthwise_bias", w_dw_bias, (hidden,)),
        ("bias", bias, sizes[1:2]),
        ("residual", residual, sizes),
    ):
        if t is None:
            continue
        check_same("input", x, name, t)
        if tuple(t.shape) != tuple(expected):
            raise ValueError(f"{name} must have shape {tuple(expected)}; got {tuple(t.shape)}")
    return sizes


def _activated(v: Tensor, activation: str | None, inplace: bool = False) -> Tensor:
    return v if activation is None else getattr(F, activation)(v, inplace=inplace)


@register_fake("xsep::block_inference", lib=lib)
def _(x, w_dw, w_pw, w_dw_bias, bias, residual, relu, activation, out_activation, stride, pad, dilation):
    sizes = _check(x, w_dw, w_pw, w_dw_bias, bias, residual, stride, pad, dilation)
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _no_derivative(ctx, *gradients):
    raise NotImplementedError("xsep::block_inference has no derivative; xsep.separable_block has")


register_autograd("xsep::block_inference", _no_derivative, setup_context=lambda ctx, inputs, output: None, lib=lib)
run = unwatched(ops.block_inference, _block_inference, 6, cast_first(6), compose=compose)


@register_flop_formula(ops.block_inference)
def _(x, w_dw, w_pw, *args, **kwargs) -> int:
    z = output_sizes(x, w_dw, *args[6:9])
    return flops(z, w_dw) + w_pw[0] * flops(z, (1, 1, 1, 1))
