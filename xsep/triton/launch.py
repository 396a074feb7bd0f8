"""The maps on tensors: allocates outputs, sets sizes and strides, and starts the kernels.

Written so that ``torch.compile`` can trace it: sizes may be symbolic.
"""

from __future__ import annotations

import math
from typing import Any, Callable

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction

from .._compat import itemsize
from ..ops.problem import BlockProblem, Problem
from . import configs
from .block import block_kernel
from .configs import DGRAD, DGRAD_WGRAD, FPROP, HELD, WGRAD, BlockConfig, Config, ceil_div
from .kernels import depthwise_backward_kernel, depthwise_fprop_kernel, reduce_partials_kernel

INTERPRETED = not isinstance(depthwise_fprop_kernel, JITFunction)  # TRITON_INTERPRET=1 was set at import
_ACC = {torch.float64: tl.float64}
_LONGEST = 31  # taps of a program's sums
_REDUCED, _REDUCED_SPLITS = 128, 8  # tile of the sum of partial results

Start = Callable[[Any, Any, tuple, dict[str, Any]], None]


def start(kernel, programs, arguments: tuple, constants: dict[str, Any]) -> None:
    kernel[(programs,)](*arguments, **constants)


def start_traced(kernel, programs, arguments: tuple, constants: dict[str, Any]) -> None:
    """In an operator that compilation sees through."""
    torch.library.wrap_triton(kernel)[(programs,)](*arguments, **constants)


def _wide(*tensors: Tensor) -> bool:
    """Whether offsets within an image need 64 bits.  Symbolic sizes may."""
    extents = [sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:])) for t in tensors]
    return not all(isinstance(extent, int) and extent < 2**31 - 2**24 for extent in extents)


def _aligned(p: Problem, *tensors: Tensor | None) -> int:
    """In NHWC, how many numbers all pixels are a multiple of, at most 16 bytes; a power of two."""
    strides = [stride for t in tensors if t is not None for stride in (t.stride(0), t.stride(2), t.stride(3))]
    align = 16 // itemsize(p.dtype) if p.nhwc else 1
    while not all(_divides(align, each) for each in (p.x[1], *strides)):
        align //= 2
    return align


def _divides(align: int, number) -> bool:
    """Of a symbolic number, whether it is known."""
    if isinstance(number, int):
        return number % align == 0
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return align == 1 or statically_known_true(number % align == 0)


def _strides(t: Tensor | None, align: int) -> tuple:
    if t is None:
        return (0,) * 4
    n, c, h, w = t.stride()
    return n // align, c, h // align, w // align


def _filters(p: Problem, w: Tensor) -> tuple[Tensor, int, int]:
    """w with its strides of k and tap; in NHWC, large filters with the taps outermost, as they are loaded."""
    K, _, R, S = p.w
    if p.nhwc and R * S > HELD:
        return w.view(K, R * S).t().contiguous(), 1, K
    return w.contiguous(), R * S, 1


def _vectors(on_load) -> tuple:
    return (None, None, None) if on_load is None else tuple(on_load[:3])


def _geometry(p: Problem) -> tuple:
    return p.pad[0], p.pad[2], *p.dilation


def _constants(p: Problem, on_load, config: Config, align: int, *tensors: Tensor | None) -> dict[str, Any]:
    """What the compiler has to know, of fprop and of the gradients alike."""
    K, _, R, S = p.w
    return dict(
        R=R,
        S=S,
        M=K // p.x[1],
        STRIDE_H=p.stride[0],
        STRIDE_W=p.stride[1],
        ON_LOAD=on_load is not None,
        RELU=on_load is not None and on_load[3],
        ALIGN=align,
        WIDE=_wide(*(t for t in tensors if t is not None)),
        ACC=_ACC.get(p.dtype, tl.float32),
        BLOCK_P=config.block_p,
        BLOCK_Q=config.block_q,
        BLOCK_C=config.block_c,
        num_warps=config.warps,
    )


def _empty(p: Problem, sizes, like: Tensor) -> Tensor:
    return torch.empty(sizes, dtype=p.dtype, device=like.device, memory_format=p.memory_format)


def fprop(
    p: Problem,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    on_load,
    config: Config,
    multiprocessors: int,
    start: Start = start,
) -> Tensor:
    y = _empty(p, p.y, x)
    N, _, P, Q = p.y
    _, C, H, W = p.x
    grid = configs.grid(p, FPROP, config, multiprocessors)
    programs = N * grid.strips * grid.q_blocks * grid.c_blocks
    if isinstance(programs, int) and programs == 0:
        return y
    filters, w_k, w_tap = _filters(p, w)
    bias = None if bias is None else bias.contiguous()
    tensors = x, filters, bias, y, *_vectors(on_load)
    align = _aligned(p, x, y)
    sizes = H, W, P, Q, C // align, *_geometry(p)
    start(
        depthwise_fprop_kernel,
        programs,
        (*tensors, *_strides(x, align), *_strides(y, align), w_k, w_tap, *sizes, *grid),
        dict(_constants(p, on_load, config, align, x, y), HAS_BIAS=bias is not None),
    )
    return y


def backward(
    p: Problem,
    pass_: int,
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    on_load,
    config: Config,
    multiprocessors: int,
    start: Start = start,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dw, sums): what ``pass_`` asks for; ``sums`` are the gradients of scale and shift, (2, C), on load.

    DGRAD_WGRAD takes problems that ``one_pass`` allows.
    """
    wants_dx, wants_dw = pass_ in (DGRAD, DGRAD_WGRAD), pass_ in (WGRAD, DGRAD_WGRAD)
    (N, C, H, W), (K, _, R, S), (P, Q) = p.x, p.w, p.y[2:]
    dx = _empty(p, p.x, dy) if wants_dx else None
    wide_dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    grid = configs.grid(p, pass_, config, multiprocessors)
    units = N * grid.strips * grid.q_blocks
    # Programs share the sums of larger filters among them, a row of taps each.
    taps = R * S if R * S <= HELD or not wants_dw else min(S, _LONGEST)
    chunks = ceil_div(R * S, taps)
    summed = wants_dw or on_load is not None
    splits = configs.splits(units, grid.c_blocks * chunks, multiprocessors) if summed else units
    nothing = isinstance(units, int) and units == 0
    partials = torch.empty((splits, R * S, K), dtype=wide_dtype, device=dy.device) if wants_dw else None
    with_sums = wants_dx and on_load is not None
    sums = torch.empty((splits, 2, C), dtype=wide_dtype, device=dy.device) if with_sums else None
    if not nothing:
        filters, w_k, w_tap = (None, 0, 0) if w is None else _filters(p, w)
        tensors = x, dy, filters, dx, partials, sums, *_vectors(on_load)
        align = _aligned(p, x, dy, dx)
        strides = (each for t in (x, dy, dx) for each in _strides(t, align))
        sizes = H, W, P, Q, C // align, *_geometry(p)
        start(
            depthwise_backward_kernel,
            grid.c_blocks * splits * chunks,
            (*tensors, *strides, w_k, w_tap, *sizes, *grid, units, splits),
            dict(_constants(p, on_load, config, align, x, dy, dx), DGRAD=wants_dx, WGRAD=wants_dw, TAPS=taps),
        )
    dw = out = None
    if partials is not None:
        dw = _reduced(partials, torch.empty(p.w, dtype=p.dtype, device=dy.device), R * S, 1, start)
    if sums is not None:
        out = _reduced(sums, torch.empty((2, C), dtype=wide_dtype, device=dy.device), 1, C, start)
    return dx, dw, out


def one_pass(p: Problem) -> bool:
    """Whether both gradients come of one pass: each filter has a channel of its own, and all taps fit in a program."""
    return p.w[0] == p.x[1] and p.w[2] * p.w[3] <= HELD


def _reduced(partials: Tensor, out: Tensor, out_k: int, out_tap: int, start: Start) -> Tensor:
    """out, of which k and tap have these strides: the sums of partials (splits, taps, columns) over splits."""
    count, taps, columns = partials.shape
    start(
        reduce_partials_kernel,
        ceil_div(taps * columns, _REDUCED),
        (partials, out, count, columns, taps, out_k, out_tap),
        dict(BLOCK=_REDUCED, BLOCK_SPLITS=_REDUCED_SPLITS, num_warps=4),
    )
    return out


def block(
    b: BlockProblem,
    x: Tensor,
    w_dw: Tensor,
    w_pw: Tensor,
    on_load,
    statistics: bool,
    config: BlockConfig,
    start: Start = start,
) -> tuple[Tensor, Tensor, Tensor]:
    p, K = b.depthwise, b.K
    (N, C, H, W), (_, _, R, S), (P, Q) = p.x, p.w, p.y[2:]
    pixels = N * P * Q
    y = torch.empty((N, K, P, Q), dtype=p.dtype, device=x.device, memory_format=p.memory_format)
    tiles, k_blocks = ceil_div(pixels, config.pixels), ceil_div(K, config.block_k)
    parts = torch.empty((tiles, 3, K), dtype=torch.float32, device=x.device) if statistics else None
    if pixels > 0:
        align = _aligned(p, x)
        align_k = math.gcd(K, 16 // itemsize(p.dtype))
        x_n, _, x_h, x_w = _strides(x, align)
        start(
            block_kernel,
            tiles * k_blocks,
            (
                x,
                w_dw.reshape(C, R * S).t().contiguous(),
                w_pw.reshape(K, C).contiguous(),
                y,
                parts,
                *_vectors(on_load),
                *(x_n, x_h, x_w, H, W, P, Q, C // align, K // align_k, pixels),
                *(*_geometry(p), k_blocks),
            ),
            dict(
                R=R,
                S=S,
                STRIDE_H=p.stride[0],
                STRIDE_W=p.stride[1],
                ON_LOAD=b.on_load,
                RELU=b.on_load and on_load[3],
                ACTIVATE=b.activation == "relu",
                STATISTICS=statistics,
                ALIGN=align,
                ALIGN_K=align_k,
                WIDE=pixels >= 2**31 - 2**16,
                BLOCK=config.pixels,
                BLOCK_C=config.block_c,
                BLOCK_K=config.block_k,
                num_warps=config.warps,
                num_stages=1,  # a second would keep a tile of x for each tap in shared memory
            ),
        )
    if parts is None:
        nothing = x.new_empty(0, dtype=torch.float32)
        return y, nothing, nothing.clone()
    return (y, *_merged(parts, config.pixels, pixels))


def _merged(parts: Tensor, full: int, pixels: int) -> tuple[Tensor, Tensor]:
    """Mean and m2 of all pixels from those of tiles, ``full`` pixels each but for the last; zeros of none.

    Of tiles alike, m2 is the sum of theirs and ``full`` times that of their means; the last joins by Chan's formula.
    Means are taken from the first tile's: where they are large, their differences are not.
    """
    whole, rest = divmod(pixels, full)
    mean = m2 = parts.new_zeros(parts.shape[2])
    if pixels == 0:
        return mean, m2.clone()
    first = parts[0, 0]
    means = parts[:, 0] - first + parts[:, 1]
    if whole:
        variance, mean = torch.var_mean(means[:whole], 0, correction=0)
        m2 = parts[:whole, 2].sum(0) + variance * (full * whole)
    if rest:
        delta = means[whole] - mean
        mean = mean + delta * (rest / pixels)
        m2 = m2 + parts[whole, 2] + delta * delta * (full * whole * rest / pixels)
    return first + mean, m2
