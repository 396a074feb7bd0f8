"""The ``cpu`` backend: hands tensors to the kernels of ``csrc/cpu``."""

from __future__ import annotations

import math
import threading
from functools import lru_cache
from typing import Callable

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .._compat import fills_memory, itemsize
from .compiled import CHECKOUT, DTYPES, FPROP, CompiledBackend, arguments, load, prepared, readable, relu_of
from .problem import BlockProblem, Problem

_C, _import_error = load("_C", CHECKOUT)
_RECYCLED_BYTES = 1 << 20
_held = threading.local()
_CLAMPS = {None: (-math.inf, math.inf), "relu": (0.0, math.inf)}  # activations as the kernels know them
_STRIDED = ("x", "dy", "y_made", "residual")


class CpuBackend(CompiledBackend):
    name = device = "cpu"

    def why_not(self, problem: Problem) -> str | None:
        if _C is None:
            return _import_error
        if problem.device != "cpu":
            return f"its tensors live on the CPU, not on {problem.device}"
        if problem.dtype not in DTYPES:
            return f"it has no kernels for {problem.dtype}"
        return None

    def why_not_block(self, b: BlockProblem, backward: bool) -> str | None:
        p = b.depthwise
        if p.w[0] != p.x[1]:
            return f"its kernels for blocks have no channel multiplier; got {p.w[0] // p.x[1]}"
        if b.activation not in _CLAMPS:
            return f"its kernels for blocks have no activation {b.activation!r}"
        if p.dtype == torch.bfloat16 and "avx512_bf16" in _C.isas():
            return "torch multiplies bfloat16 with instructions of this processor that its kernels do not use"
        return None

    def block(self, b: BlockProblem, x: Tensor, w_dw: Tensor, w_pw: Tensor, on_load, statistics: bool):
        p, vector = b.depthwise, torch.float64 if x.dtype == torch.float64 else torch.float32
        call = _block_call(
            False, b, relu_of(on_load), _CLAMPS[b.activation], _CLAMPS[None], statistics, torch.get_num_threads()
        )
        y = self._empty((*p.y[:1], b.K, *p.y[2:]), p, x)
        mean, m2 = (x.new_empty(b.K if statistics else 0, dtype=vector) for _ in range(2))
        tensors = dict(x=readable(x, p), w=w_dw.contiguous(), w_pw=w_pw.contiguous(), y=y, **_vectors(on_load))
        if statistics:
            tensors.update(mean=mean, m2=m2)
        _run_block(call, tensors)
        return y, mean, m2

    def block_backward(self, b: BlockProblem, dy, dmean, dm2, y, mean, x: Tensor, w_dw: Tensor, w_pw: Tensor, on_load):
        p, statistics = b.depthwise, dmean is not None or dm2 is not None
        call = _block_call(
            True, b, relu_of(on_load), _CLAMPS[b.activation], _CLAMPS[None], statistics, torch.get_num_threads()
        )
        dx, dw_dw, dw_pw = self._empty(p.x, p, x), x.new_empty(p.w), x.new_empty(w_pw.shape)
        sums = [] if on_load is None else [torch.empty_like(on_load[0]) for _ in range(2)]
        tensors = dict(
            x=readable(x, p),
            w=w_dw.contiguous(),
            w_pw=w_pw.contiguous(),
            dx=dx,
            dw=dw_dw,
            dw_pw=dw_pw,
            **_vectors(on_load),
        )
        if dy is not None:
            tensors.update(dy=readable(dy, p))
        if statistics:
            dmean, dm2 = (torch.zeros_like(mean) if v is None else v.contiguous() for v in (dmean, dm2))
            tensors.update(y_made=readable(y, p), mean_made=mean, dmean=dmean, dm2=dm2)
        tensors.update(zip(("dscale", "dshift"), sums))
        _run_block(call, tensors)
        return dx, dw_dw, dw_pw, *(sums or (None, None))

    def _empty(self, sizes, p: Problem, like: Tensor) -> Tensor:
        size = math.prod(sizes) * itemsize(p.dtype)
        if size < _RECYCLED_BYTES or not _C.recycles() or fills_memory():
            return torch.empty(sizes, dtype=p.dtype, memory_format=p.memory_format)
        N, C, H, W = sizes
        flat = from_dlpack(_C.recycled(size)).view(p.dtype)
        return flat.view(N, H, W, C).permute(0, 3, 1, 2) if p.nhwc else flat.view(N, C, H, W)

    def _run(self, pass_: int, p: Problem, out: Tensor, tensors: tuple, relu: bool | None) -> None:
        call = _call(pass_, p, torch.get_num_threads(), relu)
        call(tensors, _workspace(call.workspace_bytes).data_ptr())


BACKEND = CpuBackend()


def prepared_fprop(p: Problem, x: Tensor, w: Tensor, y: Tensor) -> Callable[[], None]:
    """The kernel alone, for benchmarks: y from x and w, all of them dense."""
    call = _call(FPROP, p, torch.get_num_threads())
    tensors, workspace = arguments(x, None, w, None, y, None), _workspace(call.workspace_bytes)
    address = workspace.data_ptr()

    def kernel(held=(x, w, y, workspace)) -> None:
        call(tensors, address)

    return kernel


@lru_cache(maxsize=4096)
def _call(pass_: int, p: Problem, threads: int, relu: bool | None = None):
    return _C.DepthwiseCall(*prepared(_C, pass_, p, relu), threads)


@lru_cache(maxsize=4096)
def _block_call(backward: bool, b: BlockProblem, relu: bool | None, between, after, statistics: bool, threads: int):
    _, shape, *options = prepared(_C, FPROP, b.depthwise, relu)
    return _C.SeparableCall(backward, shape, b.K, *options, between, after, statistics, threads)


def _run_block(call, tensors: dict[str, Tensor]) -> None:
    """Makes a call with ``tensors`` by the names of ``SeparableArgs``; images that it reads go with their strides."""
    places = {name: (t.data_ptr(), t.stride()) if name in _STRIDED else t.data_ptr() for name, t in tensors.items()}
    call(places, _workspace(call.workspace_bytes).data_ptr())


def _vectors(on_load) -> dict[str, Tensor]:
    return {} if on_load is None else dict(zip(("center", "scale", "shift"), on_load))


def _workspace(size: int) -> Tensor:
    """This thread's workspace.  It stays: if it were freed, its pages would have to be cleared at every call."""
    held = getattr(_held, "workspace", None)
    if held is None or held.numel() < size:
        held = _held.workspace = torch.empty(size, dtype=torch.uint8)
    return held


def empty_cache() -> None:
    """Gives the memory that waits for the next large outputs back to the system.

    Outputs of the CPU kernels above 16 MB come from memory that is recycled when they are freed, in place of pages that
    the system would have to clear anew for each.  What waits is marked as the system's to take when it needs memory
    (``MADV_FREE`` on Linux; until then it counts as used by the process) and is at most a quarter of the machine's.
    """
    if _C is not None:
        _C.release_waiting()
