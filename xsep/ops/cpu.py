"""The ``cpu`` backend: hands tensors to the kernels of ``csrc/cpu`` as pointers and strides."""

from __future__ import annotations

import math
import threading
from functools import lru_cache
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .problem import Problem

try:
    from .. import _C  # type: ignore[attr-defined]
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _import_error = (
        f"{error} ({Path(__file__).parents[1]} is what was imported: a checkout's own folder has it after "
        "'pip install -e .' only)"
    )

name = "cpu"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_FPROP, _DGRAD, _WGRAD, _DGRAD_WGRAD = range(4)
_NONE = (0, 0, 0, 0)
_RECYCLED_BYTES = 1 << 20
_held = threading.local()


def why_not(problem: Problem) -> str | None:
    if _C is None:
        return f"the compiled module xsep._C did not load: {_import_error}"
    if problem.device != "cpu":
        return f"its tensors live on the CPU, not on {problem.device}"
    if problem.dtype not in DTYPES:
        return f"it has no kernels for {problem.dtype}"
    return None


@lru_cache(maxsize=4096)
def _call(pass_: int, p: Problem, threads: int, relu: bool | None = None):
    """The prepared kernel call; ``relu`` is None without a function on load."""
    (N, C, H, W), (K, _, R, S) = p.x, p.w
    shape = _C.ConvShape(N, C, H, W, R, S, K // C, p.stride, p.pad, p.dilation)
    return _C.DepthwiseCall(pass_, shape, DTYPES[p.dtype], p.nhwc, relu is not None, bool(relu), threads)


def _readable(t: Tensor, p: Problem) -> Tensor:
    """``t`` if the kernels can read it in place: channels (NHWC) or columns (NCHW) contiguous, whatever else."""
    if t.stride(1 if p.nhwc else 3) == 1:
        return t
    return t.contiguous(memory_format=p.memory_format)


def _run(pass_, p, x, dy, w, bias, out, dw, on_load=None, sums=None):
    call = _call(pass_, p, torch.get_num_threads(), None if on_load is None else on_load[3])
    call(*_arguments(call, p, x, dy, w, bias, out, dw, on_load, sums))


def prepared_fprop(p: Problem, x: Tensor, w: Tensor, y: Tensor) -> Callable[[], None]:
    """The kernel alone, for benchmarks: y from x and w, all of them dense."""
    call = _call(_FPROP, p, torch.get_num_threads())
    arguments = _arguments(call, p, x, None, w, None, y, None)

    def kernel(held=(x, w, y, _held.workspace)) -> None:
        call(*arguments)

    return kernel


def _arguments(call, p, x, dy, w, bias, out, dw, on_load=None, sums=None):
    workspace = _workspace(call.workspace_bytes)
    center, scale, shift = on_load[:3] if on_load is not None else (None, None, None)
    dscale, dshift = sums if sums is not None else (None, None)
    return (
        *_located(x, p),
        *_located(dy, p),
        _pointer(w),
        _pointer(bias),
        _pointer(out),
        _pointer(dw),
        workspace.data_ptr(),
        _pointer(center),
        _pointer(scale),
        _pointer(shift),
        _pointer(dscale),
        _pointer(dshift),
    )


def _workspace(size: int) -> Tensor:
    """This thread's workspace.  It stays: if it were freed, its pages would have to be cleared at every call."""
    held = getattr(_held, "workspace", None)
    if held is None or held.numel() < size:
        held = _held.workspace = torch.empty(size, dtype=torch.uint8)
    return held


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _located(t: Tensor | None, p: Problem):
    if t is None:
        return 0, _NONE
    return t.data_ptr(), t.stride()


def _empty(sizes, p: Problem) -> Tensor:
    numel = math.prod(sizes)
    if numel * p.dtype.itemsize < _RECYCLED_BYTES or not _C.recycles() or _fills_memory():
        return torch.empty(sizes, dtype=p.dtype, memory_format=p.memory_format)
    N, C, H, W = sizes
    flat = from_dlpack(_C.recycled(numel * p.dtype.itemsize)).view(p.dtype)
    return flat.view(N, H, W, C).permute(0, 3, 1, 2) if p.nhwc else flat.view(N, C, H, W)


def _fills_memory() -> bool:
    """Whether torch was told to fill new tensors with NaN."""
    return torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


def empty_cache() -> None:
    """Gives the memory that waits for the next large outputs back to the system.

    Outputs of the CPU kernels above 16 MB come from memory that is recycled when they are freed, in place of pages that
    the system would have to clear anew for each.  What waits is marked as the system's to take when it needs memory
    (``MADV_FREE`` on Linux; until then it counts as used by the process) and is at most a quarter of the machine's.
    """
    if _C is not None:
        _C.release_waiting()


# `on_load` is (center, scale, shift, relu): u = relu(scale * (x - center) + shift) takes the place of x, applied as it
# is loaded.  The vectors hold C numbers of float32 (float64 for float64).


def fprop(p: Problem, x: Tensor, w: Tensor, bias: Tensor | None, on_load=None) -> Tensor:
    x, w, y = _readable(x, p), w.contiguous(), _empty(p.y, p)
    _run(_FPROP, p, x, None, w, None if bias is None else bias.contiguous(), y, None, on_load)
    return y


def dgrad(p: Problem, dy: Tensor, w: Tensor) -> Tensor:
    dy, w, dx = _readable(dy, p), w.contiguous(), _empty(p.x, p)
    _run(_DGRAD, p, None, dy, w, None, dx, None)
    return dx


def wgrad(p: Problem, dy: Tensor, x: Tensor, on_load=None) -> Tensor:
    dy, x, dw = _readable(dy, p), _readable(x, p), torch.empty(p.w, dtype=p.dtype)
    _run(_WGRAD, p, x, dy, None, None, None, dw, on_load)
    return dw


def dgrad_wgrad(p: Problem, dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    dy, x, w = _readable(dy, p), _readable(x, p), w.contiguous()
    dx, dw = _empty(p.x, p), torch.empty(p.w, dtype=p.dtype)
    _run(_DGRAD_WGRAD, p, x, dy, w, None, dx, dw)
    return dx, dw


def dgrad_wgrad_on_load(p: Problem, dy: Tensor, x: Tensor, w: Tensor, on_load):
    """(dx, dw, dscale, dshift) through ``on_load``; the gradient of center is ``-scale * dshift``."""
    dy, x, w = _readable(dy, p), _readable(x, p), w.contiguous()
    dx, dw = _empty(p.x, p), torch.empty(p.w, dtype=p.dtype)
    dscale, dshift = (torch.empty_like(on_load[0]) for _ in range(2))
    _run(_DGRAD_WGRAD, p, x, dy, w, None, dx, dw, on_load, (dscale, dshift))
    return dx, dw, dscale, dshift
