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
from ..ops.problem import BlockProblem, Problem, dense_strides
from . import configs
from .block import block_dgrad_kernel, block_kernel, block_wgrad_kernel, through_statistics_kernel
from .configs import DGRAD, DGRAD_WGRAD, FPROP, HELD, WGRAD, BlockConfig, Config, GradientsConfig, ceil_div
from .kernels import depthwise_backward_kernel, depthwise_fprop_kernel, reduce_partials_kernel

INTERPRETED = not isinstance(depthwise_fprop_kernel, JITFunction)  # TRITON_INTERPRET=1 was set at import
_ACC = {torch.float64: tl.float64}
_LONGEST = 31  # taps of a program's sums
_REDUCED, _REDUCED_SPLITS = 128, 8  # tile of the sum of partial results
_THROUGH, _THROUGH_K = 2048, 64  # numbers of a program that only passes over them, and channels
_STAGES = 3  # of the product that makes dz: slices of its factors under way

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
    # Inductor allocates torch.empty without its memory format and then copies what is in it into the other format.
    return torch.empty_strided(sizes, dense_strides(sizes, p.nhwc), dtype=p.dtype, device=like.device)


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
    """(y, mean, m2), the last two empty without ``statistics``."""
    tiles = ceil_div(_pixels(b), config.pixels)
    parts = torch.empty((tiles, 3, b.K), dtype=torch.float32, device=x.device) if statistics else None
    y = _block(b, x, w_dw, w_pw, parts, on_load, (None,) * 3, None, config, start)
    if parts is None:
        nothing = x.new_empty(0, dtype=torch.float32)
        return y, nothing, nothing.clone()
    return (y, *_merged(parts, config.pixels, _pixels(b)))


def block_inference(
    b: BlockProblem,
    x: Tensor,
    w_dw: Tensor,
    w_pw: Tensor,
    w_dw_bias: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    out_activation: str | None,
    config: BlockConfig,
    start: Start = start,
) -> Tensor:
    added = (
        None if w_dw_bias is None else w_dw_bias.contiguous(),
        None if bias is None else bias.contiguous(),
        None if residual is None else residual.contiguous(memory_format=torch.channels_last),
    )
    on_load = (None, None, None, True) if b.on_load else None
    return _block(b, x, w_dw, w_pw, None, on_load, added, out_activation, config, start)


def _block(b, x, w_dw, w_pw, parts, on_load, added, out_activation, config, start: Start) -> Tensor:
    """y; ``added`` are the depthwise bias, the bias and the residual, or None each."""
    N, _, P, Q = b.depthwise.y
    y = torch.empty((N, b.K, P, Q), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    pixels, k_blocks = _pixels(b), ceil_div(b.K, config.block_k)
    if pixels > 0:
        align, align_k = _aligned(b.depthwise, x), _aligned_k(b)
        tensors = x, _taps_first(w_dw), w_pw.reshape(b.K, -1).contiguous(), y, parts, *_vectors(on_load), *added
        start(
            block_kernel,
            ceil_div(pixels, config.pixels) * k_blocks,
            (*tensors, *_sizes(b, x, align, align_k), pixels, *_geometry(b.depthwise), k_blocks),
            dict(
                _block_constants(b, on_load, align, align_k, config),
                OUT_ACTIVATION=out_activation,
                WIDE=_wide_pixels(b),
            ),
        )
    return y


def block_backward(
    b: BlockProblem,
    dy,
    dmean,
    dm2,
    y,
    mean,
    x: Tensor,
    w_dw: Tensor,
    w_pw: Tensor,
    on_load,
    config: GradientsConfig,
    multiprocessors: int,
    start: Start = start,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dx, dw_dw, dw_pw, dscale, dshift), the last two None without a function on load."""
    if dmean is None and dm2 is None:
        g = dy.contiguous(memory_format=torch.channels_last)
    else:
        g = _through_statistics(b, dy, dmean, dm2, y, mean, start)
    dw_pw = _block_wgrad(b, g, x, w_dw, on_load, config.wgrad, multiprocessors, start)
    dx, dw_dw, sums = _block_dgrad(b, g, x, w_dw, w_pw, on_load, config, multiprocessors, start)
    return dx, dw_dw, dw_pw, *((None, None) if sums is None else sums)


def _through_statistics(b: BlockProblem, dy, dmean, dm2, y, mean, start: Start) -> Tensor:
    """The whole gradient of y: dy + dmean / count + 2 (y - mean) dm2, where what is None is zero."""
    pixels, align_k = _pixels(b), _aligned_k(b)
    g = torch.empty_like(y, memory_format=torch.channels_last)
    offset = torch.zeros_like(mean) if dmean is None else dmean / max(1, pixels)
    slope = torch.zeros_like(mean) if dm2 is None else 2 * dm2
    if pixels > 0:
        y, dy = (None if t is None else t.contiguous(memory_format=torch.channels_last) for t in (y, dy))
        block_k = min(_THROUGH_K, 1 << (b.K - 1).bit_length())
        tile, k_blocks = _THROUGH // block_k, ceil_div(b.K, block_k)
        start(
            through_statistics_kernel,
            ceil_div(pixels, tile) * k_blocks,
            (dy, y, mean.contiguous(), offset, slope, g, pixels, b.K // align_k, k_blocks),
            dict(ALIGN_K=align_k, BLOCK=tile, BLOCK_K=block_k, num_warps=4),
        )
    return g


def _block_wgrad(
    b: BlockProblem,
    g: Tensor,
    x: Tensor,
    w_dw: Tensor,
    on_load,
    config: BlockConfig,
    multiprocessors: int,
    start: Start,
) -> Tensor:
    """The gradient of w_pw from the whole one of y."""
    C, vectors = x.shape[1], _vectors(on_load)
    align, align_k = _aligned(b.depthwise, x), _aligned_k(b)
    k_blocks, c_blocks = ceil_div(b.K, config.block_k), ceil_div(C, config.block_c)
    splits = configs.wgrad_splits(b, config, multiprocessors)
    partials = torch.empty((splits, 1, b.K * C), dtype=torch.float32, device=x.device)
    if splits > 0:
        start(
            block_wgrad_kernel,
            k_blocks * c_blocks * splits,
            (
                *(x, _taps_first(w_dw), g, partials, *vectors),
                *(*_sizes(b, x, align, align_k), _pixels(b), *_geometry(b.depthwise), k_blocks, c_blocks, splits),
            ),
            dict(_block_constants(b, on_load, align, align_k, config), WIDE=_wide_pixels(b)),
        )
    return _reduced(partials, torch.empty((b.K, C, 1, 1), dtype=x.dtype, device=x.device), 1, 1, start)


def _block_dgrad(
    b: BlockProblem,
    g: Tensor,
    x: Tensor,
    w_dw: Tensor,
    w_pw: Tensor,
    on_load,
    config: GradientsConfig,
    multiprocessors: int,
    start: Start,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dx, dw_dw, sums) from the whole gradient of y; ``sums``, (2, C), are those of scale and shift, on load."""
    p, tile = b.depthwise, config.dgrad
    N, C, _, _ = p.x
    taps = p.w[2] * p.w[3]
    align, align_k = _aligned(p, x), _aligned_k(b)
    grid, ring = configs.gradients_grid(b, tile, multiprocessors), configs.ring(b, tile)
    dx = _empty(p, p.x, x)
    partials = torch.empty((grid.splits, taps, C), dtype=torch.float32, device=x.device)
    sums = None if on_load is None else torch.empty((grid.splits, 2, C), dtype=torch.float32, device=x.device)
    if grid.splits > 0:
        programs = grid.c_blocks * grid.splits
        scratch = torch.empty((programs, ring, tile.block_c), dtype=p.dtype, device=x.device)
        start(
            block_dgrad_kernel,
            programs,
            (
                *(x, _taps_first(w_dw), w_pw.reshape(b.K, C).contiguous(), g, scratch, dx, partials, sums),
                *(*_vectors(on_load), *_sizes(b, x, align, align_k), *_geometry(p)),
                *(grid.rows, grid.strips, N * grid.strips, grid.c_blocks, grid.splits, ring),
            ),
            dict(
                _block_constants(b, on_load, align, align_k, tile),
                BLOCK_X=config.x_pixels,
                STAGES=_STAGES,
            ),
        )
    dw_dw = _reduced(partials, torch.empty(p.w, dtype=p.dtype, device=x.device), taps, 1, start)
    if sums is not None:
        sums = _reduced(sums, torch.empty((2, C), dtype=torch.float32, device=x.device), 1, C, start)
    return dx, dw_dw, sums


def _pixels(b: BlockProblem) -> int:
    N, _, P, Q = b.depthwise.y
    return N * P * Q


def _wide_pixels(b: BlockProblem) -> bool:
    return _pixels(b) >= 2**31 - 2**16


def _aligned_k(b: BlockProblem) -> int:
    return math.gcd(b.K, 16 // itemsize(b.depthwise.dtype))


def _taps_first(w_dw: Tensor) -> Tensor:
    return w_dw.flatten(1).t().contiguous()


def _sizes(b: BlockProblem, x: Tensor, align: int, align_k: int) -> tuple:
    """Strides of n, h and w, and extents."""
    (_, C, H, W), (_, _, P, Q) = b.depthwise.x, b.depthwise.y
    x_n, _, x_h, x_w = _strides(x, align)
    return x_n, x_h, x_w, H, W, P, Q, C // align, b.K // align_k


def _block_constants(b: BlockProblem, on_load, align: int, align_k: int, config: BlockConfig) -> dict[str, Any]:
    """What the compiler has to know, of every kernel of blocks; ``on_load`` without vectors is a ReLU alone."""
    _, _, R, S = b.depthwise.w
    return dict(
        R=R,
        S=S,
        STRIDE_H=b.depthwise.stride[0],
        STRIDE_W=b.depthwise.stride[1],
        ON_LOAD=on_load is not None and on_load[0] is not None,
        RELU=on_load is not None and on_load[3],
        ACTIVATION=b.activation,
        ALIGN=align,
        ALIGN_K=align_k,
        BLOCK=config.pixels,
        BLOCK_C=config.block_c,
        BLOCK_K=config.block_k,
        num_warps=config.warps,
        num_stages=1,  # a second would keep a tile of x for each tap in shared memory
    )


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
