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
from .compiled import CHECKOUT, DTYPES, FPROP, CompiledBackend, arguments, load, prepared
from .problem import Problem

_C, _import_error = load("_C", CHECKOUT)
_RECYCLED_BYTES = 1 << 20
_held = threading.local()


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
