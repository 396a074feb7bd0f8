"""The ``aten`` backend: the same maps composed of torch's own operators.

It is the reference of the tests, the answer for devices and dtypes that no kernel of ours takes, and what runs under
``torch.func`` transforms and forward-mode AD.  It pads with a copy where the padding is asymmetric, and stores what a
function on load makes of x.
"""

from __future__ import annotations

from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import Problem

name = "aten"


def why_not(problem: Problem) -> str | None:
    return None


def compose(x: Tensor, w: Tensor, bias: Tensor | None, stride, pad, dilation) -> Tensor:
    """y from x (N, C, H, W) and w (C*M, 1, R, S); differentiable by torch and composable with ``torch.func``."""
    x, padding = _pad(x, pad)
    return F.conv2d(x, w, bias, tuple(stride), padding, tuple(dilation), x.shape[1])


def function_on_load(x: Tensor, on_load) -> Tensor:
    """relu(scale * (x - center) + shift) in the dtype of the vectors; ``on_load`` is (center, scale, shift, relu)."""
    center, scale, shift = (v.view(-1, 1, 1) for v in on_load[:3])
    u = scale * (x - center) + shift
    return u.relu() if on_load[3] else u


def fprop(p: Problem, x: Tensor, w: Tensor, bias: Tensor | None, on_load=None) -> Tensor:
    if on_load is not None:
        x = function_on_load(x, on_load).to(p.dtype)
    return compose(x, w, bias, p.stride, p.pad, p.dilation).contiguous(memory_format=p.memory_format)


def dgrad(p: Problem, dy: Tensor, w: Tensor) -> Tensor:
    x = torch.empty(p.x, dtype=dy.dtype, device=dy.device, memory_format=p.memory_format)
    return _convolution_backward(p, dy, x, w, (True, False))[0].contiguous(memory_format=p.memory_format)


def wgrad(p: Problem, dy: Tensor, x: Tensor) -> Tensor:
    return _convolution_backward(p, dy, x, dy.new_empty(p.w), (False, True))[1].contiguous()


def dgrad_wgrad(p: Problem, dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    dx, dw = _convolution_backward(p, dy, x, w, (True, True))
    return dx.contiguous(memory_format=p.memory_format), dw.contiguous()


def dgrad_wgrad_on_load(p: Problem, dy: Tensor, x: Tensor, w: Tensor, on_load):
    center, scale, _, relu = on_load
    u = function_on_load(x, on_load)
    du, dw = dgrad_wgrad(p, dy, u.to(p.dtype), w)
    du = du.to(u.dtype)
    if relu:
        du = du * (u > 0)
    dx = (du * scale.view(-1, 1, 1)).to(p.dtype).contiguous(memory_format=p.memory_format)
    return dx, dw, (du * (x - center.view(-1, 1, 1))).sum((0, 2, 3)), du.sum((0, 2, 3))


def _pad(x: Tensor, pad: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
    if pad[0] == pad[1] and pad[2] == pad[3]:
        return x, (pad[0], pad[2])
    return F.pad(x, [pad[2], pad[3], pad[0], pad[1]]), (0, 0)


def _convolution_backward(p: Problem, dy: Tensor, x: Tensor, w: Tensor, wanted: tuple[bool, bool]):
    x, padding = _pad(x, p.pad)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, w, None, p.stride, padding, p.dilation, False, (0, 0), p.x[1], (*wanted, False)
    )
    if wanted[0] and dx.shape[2:] != p.x[2:]:
        dx = dx[:, :, p.pad[0] : p.pad[0] + p.x[2], p.pad[2] : p.pad[2] + p.x[3]]
    return dx, dw
