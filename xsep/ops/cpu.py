"""The ``cpu`` backend: hands tensors to the kernels of ``csrc/cpu``."""

from __future__ import annotations

import math
import threading
from functools import lru_cache
from typing import Any, Callable

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .._compat import fills_memory, itemsize
from .compiled import CHECKOUT, DTYPES, FPROP, CompiledBackend, arguments, fprop_arguments, load, prepared, readable
from .problem import BlockProblem, Problem, dense_strides, vector_dtype

_C, _import_error = load("_C", CHECKOUT)
_RECYCLED_BYTES = 1 << 20
_held = threading.local()
_CLAMPS = {None: (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}  # activations of the kernels


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

    def prepared_fprop(self, p: Problem, x_strides, threads: int) -> Callable[..., Tensor] | None:
        """``fprop`` of tensors like these, without a function on load; None where x cannot be read in place."""
        if x_strides[1 if p.nhwc else 3] != 1:
            return None
        call, (strides, size) = _call(FPROP, p, threads), _dense(p.y, p.nhwc, p.dtype)

        def run(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
            recycled = size >= _RECYCLED_BYTES
            y = self._empty(p.y, p, x) if recycled else torch.empty_strided(p.y, strides, dtype=p.dtype)
            w, bias = w.contiguous(), None if bias is None else bias.contiguous()
            call(fprop_arguments(x, x_strides, w, bias, y), _workspace(call.workspace_bytes).data_ptr())
            return y

        return run

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
        y = self._empty_y(b, x)
        mean, m2 = (x.new_empty(b.K if statistics else 0, dtype=vector_dtype(x)) for _ in range(2))
        made = dict(y=y, mean=mean, m2=m2) if statistics else dict(y=y)
        _run_block(b, on_load, dict(x=x), dict(w=w_dw, w_pw=w_pw), made, statistics=statistics)
        return y, mean, m2

    def block_backward(self, b: BlockProblem, dy, dmean, dm2, y, mean, x: Tensor, w_dw: Tensor, w_pw: Tensor, on_load):
        statistics = dmean is not None or dm2 is not None
        images, read = dict(x=x, dy=dy), dict(w=w_dw, w_pw=w_pw)
        if statistics:
            images.update(y_made=y)
            read.update(mean_made=mean)
            read.update(dmean=torch.zeros_like(mean) if dmean is None else dmean)
            read.update(dm2=torch.zeros_like(mean) if dm2 is None else dm2)
        dx, dw_dw, dw_pw = self._empty(b.depthwise.x, b.depthwise, x), x.new_empty(w_dw.shape), x.new_empty(w_pw.shape)
        sums = (None, None) if on_load is None else (torch.empty_like(on_load[0]), torch.empty_like(on_load[0]))
        made = dict(dx=dx, dw=dw_dw, dw_pw=dw_pw, dscale=sums[0], dshift=sums[1])
        _run_block(b, on_load, images, read, made, backward=True, statistics=statistics)
        return dx, dw_dw, dw_pw, *sums

    def why_not_block_inference(self, b: BlockProblem) -> str | None:
        return self.why_not_block(b, backward=False)

    def block_inference(
        self, b: BlockProblem, x: Tensor, w_dw: Tensor, w_pw: Tensor, w_dw_bias, bias, residual, out_activation
    ) -> Tensor:
        y, on_load = self._empty_y(b, x), (None, None, None, True) if b.on_load else None
        read = dict(w=w_dw, w_pw=w_pw, w_bias=w_dw_bias, bias=bias)
        _run_block(b, on_load, dict(x=x, residual=residual), read, dict(y=y), after=out_activation)
        return y

    def moments(self, p: Problem, y: Tensor) -> tuple[Tensor, Tensor]:
        mean, m2 = (y.new_empty(y.shape[1], dtype=vector_dtype(y)) for _ in range(2))
        _run_named(_moments_call(p, torch.get_num_threads()), p, dict(x=y), {}, dict(mean=mean, m2=m2))
        return mean, m2

    def why_not_residual_sum(self, p: Problem) -> str | None:
        return None if p.nhwc else "its kernels for residual sums are for channels_last tensors"

    def residual_sum(self, p: Problem, main, skip, relu: bool) -> Tensor:
        out = self._empty(p.y, p, main.y)
        call = _residual_call(False, p, skip.scale is not None, relu, torch.get_num_threads())
        read = dict(center=main.center, scale=main.scale, shift=main.shift)
        read.update(skip_center=skip.center, skip_scale=skip.scale, skip_shift=skip.shift)
        _run_named(call, p, dict(y=main.y, skip=skip.y), read, dict(out=out))
        return out

    def residual_sum_backward(self, p: Problem, dout: Tensor, main, skip, relu: bool) -> tuple[Tensor, ...]:
        vectors = skip.scale is not None
        dy, dskip = self._empty(p.x, p, dout), self._empty(p.y, p, dout) if vectors else dout.new_empty(0)
        dscale, dshift = torch.empty_like(main.scale), torch.empty_like(main.scale)
        dskip_scale = main.scale.new_empty(p.x[1] if vectors else 0)
        read = dict(center=main.center, scale=main.scale, shift=main.shift)
        read.update(skip_center=skip.center, skip_scale=skip.scale)
        made = dict(dy=dy, dscale=dscale, dshift=dshift)
        if vectors:
            made.update(dskip=dskip, dskip_scale=dskip_scale)
        call = _residual_call(True, p, vectors, relu, torch.get_num_threads())
        _run_named(call, p, dict(dout=dout, y=main.y, skip=skip.y), read, made)
        return dy, dscale, dshift, dskip, dskip_scale

    def _empty_y(self, b: BlockProblem, x: Tensor) -> Tensor:
        N, _, P, Q = b.depthwise.y
        return self._empty((N, b.K, P, Q), b.depthwise, x)

    def _empty(self, sizes, p: Problem, like: Tensor) -> Tensor:
        strides, size = _dense(sizes, p.nhwc, p.dtype)
        if size < _RECYCLED_BYTES or not _C.recycles() or fills_memory():
            return torch.empty_strided(sizes, strides, dtype=p.dtype)
        # No view of anything: torch refuses to change a view in place that an operator with a backward has made.
        return from_dlpack(_C.recycled(DTYPES[p.dtype], sizes, p.nhwc))

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
def _dense(sizes: tuple[int, ...], nhwc: bool, dtype: torch.dtype) -> tuple[tuple[int, ...], int]:
    """Strides and bytes of an output."""
    return dense_strides(sizes, nhwc), math.prod(sizes) * itemsize(dtype)


@lru_cache(maxsize=4096)
def _call(pass_: int, p: Problem, threads: int, relu: bool | None = None):
    return _C.DepthwiseCall(*prepared(_C, pass_, p, relu), threads)


@lru_cache(maxsize=4096)
def _block_call(backward: bool, b: BlockProblem, vectors: bool, relu: bool, after, statistics: bool, threads: int):
    _, shape, dtype, nhwc, _, _ = prepared(_C, FPROP, b.depthwise, None)
    clamps = _CLAMPS[b.activation], _CLAMPS[after]
    return _C.SeparableCall(backward, shape, b.K, dtype, nhwc, vectors, relu, *clamps, statistics, threads)


@lru_cache(maxsize=4096)
def _moments_call(p: Problem, threads: int):
    return _C.MomentsCall(p.x, DTYPES[p.dtype], p.nhwc, threads)


@lru_cache(maxsize=4096)
def _residual_call(backward: bool, p: Problem, skip_vectors: bool, relu: bool, threads: int):
    _, shape, dtype, _, _, _ = prepared(_C, FPROP, p, None)
    return _C.ResidualSumCall(backward, shape, dtype, skip_vectors, relu, threads)


def _run_block(b: BlockProblem, on_load, images, read, made, backward=False, statistics=False, after=None) -> None:
    center, scale, shift, relu = on_load or (None, None, None, False)
    read.update(center=center, scale=scale, shift=shift)
    call = _block_call(backward, b, center is not None, relu, after, statistics, torch.get_num_threads())
    _run_named(call, b.depthwise, images, read, made)


def _run_named(call, p: Problem, images: dict, read: dict, made: dict) -> None:
    """Makes a call with tensors by the names of its arguments' fields; those it does not have are None.

    ``images`` are read in place where their strides allow it.
    """
    images = {name: readable(t, p) for name, t in images.items() if t is not None}
    read = {name: t.contiguous() for name, t in read.items() if t is not None}
    places: dict[str, Any] = {name: (t.data_ptr(), t.stride()) for name, t in images.items()}
    places.update({name: t.data_ptr() for name, t in (*read.items(), *made.items()) if t is not None})
    call(places, _workspace(call.workspace_bytes).data_ptr())


def _workspace(size: int) -> Tensor:
    """This thread's workspace.  It stays: if it were freed, its pages would have to be cleared at every call."""
    held = getattr(_held, "workspace", None)
    if held is None or held.numel() < size:
        held = _held.workspace = torch.empty(size, dtype=torch.uint8)
    return held


def empty_cache() -> None:
    """Gives the memory that waits for the next large outputs back to the system.

    Outputs of the CPU kernels of 1 MB and more come from memory that is recycled when they are freed, in place of pages
    that the system would have to clear for each.  What waits is marked as the system's to take when it needs memory
    (``MADV_FREE`` on Linux; until then it counts as used by the process) and is at most a quarter of the machine's.
    """
    if _C is not None:
        _C.release_waiting()
