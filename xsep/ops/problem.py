"""One depthwise convolution as a hashable value: what the choice of a backend depends on, and checks of shapes."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple, Sequence

import torch
from torch import Tensor

from .geometry import output_extent


class _Fields(NamedTuple):
    device: str
    dtype: torch.dtype
    nhwc: bool
    x: tuple[int, ...]
    w: tuple[int, ...]
    stride: tuple[int, ...]
    pad: tuple[int, ...]
    dilation: tuple[int, ...]
    device_index: int = -1  # -1: the CPU


class Problem(_Fields):  # a tuple that keeps what was computed of it
    """x is (N, C, H, W), w is (C*M, 1, R, S), y is (N, C*M, P, Q); pad is (top, bottom, left, right)."""

    @cached_property
    def y(self) -> tuple[int, ...]:
        return output_sizes(self.x, self.w, self.stride, self.pad, self.dilation)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.nhwc else torch.contiguous_format

    def __str__(self) -> str:
        layout = "NHWC" if self.nhwc else "NCHW"
        x, w = ("x".join(map(str, sizes)) for sizes in (self.x, self.w))
        dtype = str(self.dtype).replace("torch.", "")
        return (
            f"{dtype} {layout} x {x}, w {w}, stride {self.stride}, pad {self.pad}, dilation {self.dilation} "
            f"on {self.device}"
        )


class BlockProblem(NamedTuple):
    """A training block (``block.py``) whose depthwise convolution is ``depthwise``; y has K channels."""

    depthwise: Problem
    K: int
    on_load: bool  # u is not x
    activation: str | None


def is_nhwc(t: Tensor) -> bool:
    """Whether the channels are the contiguous axis; slices of channels_last tensors count, NCHW wins where both fit."""
    return nhwc_strides(t.stride())


def nhwc_strides(strides: Sequence[int]) -> bool:
    """``is_nhwc`` of a tensor with these."""
    return strides[1] == 1 and strides[3] != 1


def memory_format(t: Tensor) -> torch.memory_format:
    return torch.channels_last if is_nhwc(t) else torch.contiguous_format


def output_sizes(x: Sequence[int], w: Sequence[int], stride, pad, dilation) -> tuple[int, ...]:
    P = output_extent(x[2], w[2], stride[0], pad[0], pad[1], dilation[0])
    Q = output_extent(x[3], w[3], stride[1], pad[2], pad[3], dilation[1])
    return x[0], w[0], P, Q


def dense_strides(sizes: Sequence[int], nhwc: bool) -> tuple[int, ...]:
    """Of a tensor (N, C, H, W)."""
    _, C, H, W = sizes
    return (C * H * W, 1, C * W, C) if nhwc else (C * H * W, H * W, W, 1)


def check_sizes(x: Sequence[int], w: Sequence[int], stride, pad, dilation, weight="weight") -> tuple[int, ...]:
    """The sizes of y.  Raises ``ValueError`` naming the first argument that does not fit; works on symbolic sizes.

    ``weight`` is what the caller calls w.
    """
    if len(x) != 4:
        raise ValueError(f"input must be 4-D (N, C, H, W); got shape {tuple(x)}")
    if len(w) != 4 or w[1] != 1:
        raise ValueError(f"{weight} must be (C*M, 1, R, S); got shape {tuple(w)}")
    if x[1] < 1 or w[0] < 1 or w[0] % x[1] != 0:
        raise ValueError(f"{weight}'s {w[0]} filters must be a positive multiple of input's {x[1]} channels")
    for name, values, count, minimum in (("stride", stride, 2, 1), ("pad", pad, 4, 0), ("dilation", dilation, 2, 1)):
        if len(values) != count or any(isinstance(v, int) and v < minimum for v in values):
            raise ValueError(f"{name} must be {count} ints, each at least {minimum}; got {tuple(values)}")
    for axis, name in ((0, "height"), (1, "width")):
        span = dilation[axis] * (w[2 + axis] - 1) + 1
        padded = x[2 + axis] + pad[2 * axis] + pad[2 * axis + 1]
        if w[2 + axis] < 1:
            raise ValueError(f"{weight} must not be empty; got shape {tuple(w)}")
        if padded < span:
            raise ValueError(
                f"filter {name} {span} (kernel {w[2 + axis]}, dilation {dilation[axis]}) is larger than the padded "
                f"input {name} {padded}"
            )
    return output_sizes(x, w, stride, pad, dilation)


def vector_dtype(t: Tensor) -> torch.dtype:
    """The dtype of the vectors that go with a tensor."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def check_same(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """Raises unless two tensors share dtype and device, as ``F.conv2d`` does."""
    check_alike(name_a, (a.dtype, a.device), name_b, (b.dtype, b.device))


def check_alike(name_a: str, a: tuple, name_b: str, b: tuple) -> None:
    """``check_same`` of (dtype, device)."""
    if a[0] != b[0]:
        raise TypeError(f"{name_a} and {name_b} must have the same dtype; got {a[0]} and {b[0]}")
    if a[1] != b[1]:
        raise ValueError(f"{name_a} and {name_b} must be on the same device; got {a[1]} and {b[1]}")
