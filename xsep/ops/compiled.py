"""What the backends on compiled kernels share: the four maps, on tensors that become pointers and strides."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .problem import Problem

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
PASSES = ("fprop", "dgrad", "wgrad", "dgrad_wgrad")
FPROP, DGRAD, WGRAD, DGRAD_WGRAD = range(4)
_NONE = (0, 0, 0, 0)


def load(name: str, advice: str) -> tuple[Any, str]:
    """A compiled module of this package, or None and why it did not load."""
    try:
        return importlib.import_module(f"xsep.{name}"), ""
    except ImportError as error:
        return None, f"the compiled module xsep.{name} did not load: {error} ({advice})"


CHECKOUT = (
    f"{Path(__file__).parents[1]} is what was imported: a checkout's own folder has it after 'pip install -e .' only"
)


def prepared(module: Any, pass_: int, p: Problem, relu: bool | None) -> tuple:
    """The first arguments of a prepared call; ``relu`` is None without a function on load."""
    (N, C, H, W), (K, _, R, S) = p.x, p.w
    shape = module.ConvShape(N, C, H, W, R, S, K // C, p.stride, p.pad, p.dilation)
    return pass_, shape, DTYPES[p.dtype], p.nhwc, relu is not None, bool(relu)


def arguments(x, dy, w, bias, out, dw, on_load=None, sums=None) -> tuple:
    """The tensors of a call, or None for what its pass does not have, as a prepared call takes them."""
    vectors = (None, None, None) if on_load is None else on_load[:3]
    made = (w, bias, out, dw, *vectors, *((None, None) if sums is None else sums))
    x_at, x_strides = (0, _NONE) if x is None else (x.data_ptr(), x.stride())
    dy_at, dy_strides = (0, _NONE) if dy is None else (dy.data_ptr(), dy.stride())
    return (x_at, x_strides, dy_at, dy_strides, *[0 if t is None else t.data_ptr() for t in made])


def fprop_arguments(x: Tensor, x_strides: tuple[int, ...], w: Tensor, bias: Tensor | None, y: Tensor) -> tuple:
    """``arguments(x, None, w, bias, y, None)`` in less time."""
    bias_at = 0 if bias is None else bias.data_ptr()
    return x.data_ptr(), x_strides, 0, _NONE, w.data_ptr(), bias_at, y.data_ptr(), 0, 0, 0, 0, 0, 0


def readable(t: Tensor, p: Problem) -> Tensor:
    """``t`` if the kernels can read it in place: channels (NHWC) or columns (NCHW) contiguous, whatever else."""
    if t.stride(1 if p.nhwc else 3) == 1:
        return t
    return t.contiguous(memory_format=p.memory_format)


class CompiledBackend:
    """The maps of ``backends.Backend``; a subclass says where outputs come from and how a call is made."""

    def _empty(self, sizes, p: Problem, like: Tensor) -> Tensor:
        """An output, dense in the layout of ``p``."""
        raise NotImplementedError

    def _run(self, pass_: int, p: Problem, out: Tensor, tensors: tuple, relu: bool | None) -> None:
        """Makes a call with ``arguments(...)``; ``out`` is one of its outputs."""
        raise NotImplementedError

    def fprop(self, p: Problem, x: Tensor, w: Tensor, bias: Tensor | None, on_load=None) -> Tensor:
        x, w, y = readable(x, p), w.contiguous(), self._empty(p.y, p, x)
        bias = None if bias is None else bias.contiguous()
        self._run(FPROP, p, y, arguments(x, None, w, bias, y, None, on_load), relu_of(on_load))
        return y

    def dgrad(self, p: Problem, dy: Tensor, w: Tensor) -> Tensor:
        dy, w, dx = readable(dy, p), w.contiguous(), self._empty(p.x, p, dy)
        self._run(DGRAD, p, dx, arguments(None, dy, w, None, dx, None), None)
        return dx

    def wgrad(self, p: Problem, dy: Tensor, x: Tensor, on_load=None) -> Tensor:
        dy, x, dw = readable(dy, p), readable(x, p), x.new_empty(p.w)
        self._run(WGRAD, p, dw, arguments(x, dy, None, None, None, dw, on_load), relu_of(on_load))
        return dw

    def dgrad_wgrad(self, p: Problem, dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        dy, x, w = readable(dy, p), readable(x, p), w.contiguous()
        dx, dw = self._empty(p.x, p, x), x.new_empty(p.w)
        self._run(DGRAD_WGRAD, p, dx, arguments(x, dy, w, None, dx, dw), None)
        return dx, dw

    def dgrad_wgrad_on_load(self, p: Problem, dy: Tensor, x: Tensor, w: Tensor, on_load):
        dy, x, w = readable(dy, p), readable(x, p), w.contiguous()
        dx, dw = self._empty(p.x, p, x), x.new_empty(p.w)
        sums = torch.empty_like(on_load[0]), torch.empty_like(on_load[0])
        self._run(DGRAD_WGRAD, p, dx, arguments(x, dy, w, None, dx, dw, on_load, sums), on_load[3])
        return (dx, dw, *sums)


def relu_of(on_load) -> bool | None:
    """Whether a function on load ends in a ReLU; None without one."""
    return None if on_load is None else on_load[3]
