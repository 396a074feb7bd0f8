"""What differs between the torch versions xsep runs on, and nothing else.  No other module asks for torch's version.

A stand-in takes the place of what torch itself lacks; torch 2.0.1 needs them all.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from typing import Any, Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library

try:
    from torch.utils import flop_counter
except ImportError:
    flop_counter = None  # type: ignore[assignment]


def _is_compiling() -> bool:
    return False


def fills_memory() -> bool:
    """Whether torch was told to fill new tensors with NaN."""
    deterministic = getattr(torch.utils, "deterministic", None)
    return torch.are_deterministic_algorithms_enabled() and getattr(deterministic, "fill_uninitialized_memory", False)


def itemsize(dtype: torch.dtype) -> int:
    """The bytes of a floating-point number."""
    return dtype.itemsize if hasattr(dtype, "itemsize") else torch.finfo(dtype).bits // 8


@cache
def _sums_in_bfloat16() -> bool:
    """Whether the CPU's convolutions of bfloat16 round after each addition, as torch 2.0.1's do without AVX512."""
    x, w = (torch.ones(2, 512, extent, extent, dtype=torch.bfloat16) for extent in (2, 1))
    return bool((F.conv2d(x, w) != 512).any())  # they get to 256, where 1 is half the distance of two numbers


def pointwise_conv2d(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """``F.conv2d``, which sums in float32 or wider: from a bias on, rounding after each addition costs the most."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or not _sums_in_bfloat16():
        return F.conv2d(x, w, bias)
    return F.conv2d(x.float(), w.float(), None if bias is None else bias.float()).to(x.dtype)


@contextmanager
def _disable_autocast() -> Iterator[None]:
    guard = torch._C._DisableAutocast()  # it lasts as long as the object
    try:
        yield
    finally:
        del guard


def _autocast_dtype(device_type: str) -> torch.dtype:
    return torch.get_autocast_cpu_dtype() if device_type == "cpu" else torch.get_autocast_gpu_dtype()


def _is_autocast_enabled(device_type: str) -> bool:
    if device_type == "cpu":
        return torch.is_autocast_cpu_enabled()
    return device_type == "cuda" and torch.is_autocast_enabled()


def _register_fake(name: str, *, lib: Library) -> Callable:
    def register(fake: Callable) -> None:
        lib.impl(name.split("::")[1], fake, "Meta")

    return register


def _register_autograd(name: str, backward: Callable, *, setup_context: Callable, lib: Library) -> None:
    namespace, short_name = name.split("::")
    operator = getattr(getattr(torch.ops, namespace), short_name)

    def forward(ctx, *inputs):
        guard = torch._C._AutoDispatchBelowAutograd()
        try:
            output = operator(*inputs)
        finally:
            del guard
        setup_context(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(short_name, (torch.autograd.Function,), members)
    lib.impl(short_name, function.apply, "Autograd")


def _register_flop_formula(targets: Any) -> Callable:
    return lambda formula: formula  # nothing counts


is_compiling = torch.compiler.is_compiling if hasattr(torch, "compiler") else _is_compiling
_has_queries = hasattr(torch, "get_autocast_dtype")
autocast_dtype = torch.get_autocast_dtype if _has_queries else _autocast_dtype
is_autocast_enabled = torch.is_autocast_enabled if _has_queries else _is_autocast_enabled
any_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)  # whether it may be, for some device
disable_autocast = torch._C._DisableAutocast if _has_queries else _disable_autocast
register_fake = getattr(torch.library, "register_fake", _register_fake)
register_autograd = getattr(torch.library, "register_autograd", _register_autograd)
register_flop_formula = getattr(flop_counter, "register_flop_formula", _register_flop_formula)


def grad_scaler(device_type: str, enabled: bool) -> Any:
    """Loss scaling for float16, which old torch has for CUDA only."""
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device_type, enabled=enabled)
    if enabled and device_type != "cuda":
        raise ValueError(f"torch {torch.__version__} trains in float16 on CUDA only")
    return torch.cuda.amp.GradScaler(enabled=enabled)
