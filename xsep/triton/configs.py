"""Tile sizes of the Triton kernels: a small set per kind of problem, and a model of the bytes that orders them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .._compat import itemsize
from ..ops.problem import BlockProblem, Problem

FPROP, DGRAD, WGRAD, DGRAD_WGRAD = range(4)  # as in ops.compiled
HELD = 9  # taps of the largest filter whose weights and sums a program's registers hold
_ROWS = 16  # of a strip, while its length is no question of filling the card
_PROGRAMS = 4  # a multiprocessor, at least, before strips grow longer
# Beside a byte from memory: one that the halo of a tile brings from the second-level cache, and the arithmetic of one
# output that a tile computes beyond the edge.
_HALO, _IDLE = 0.4, 0.5
# An instruction of each of an H100's lanes, in bytes from its memory; instructions of a tap: convert and multiply-add,
# with a ReLU also compare and select, with a function on load also subtract, multiply-add and select.
_INSTRUCTION = 0.1
_TAP, _TAP_RELU, _TAP_ON_LOAD = 2, 4, 7
_BLOCK_PROGRAMS = 1  # of the gradients of blocks, a multiprocessor: registers have room for no more
_TORCH_TILE = 1 / 128 + 1 / 256  # of torch's products of halves: what is read of both factors for a multiply-add
_SUMMED = 2048  # pixels, at least, of a partial sum for the pointwise weights
_SLOT = 160 << 10  # bytes of dz that a program may keep: those of all programs are to stay in the second-level cache


class Config(NamedTuple):
    """A tile of ``block_p`` x ``block_q`` pixels and ``block_c`` channels, the work of ``warps`` warps."""

    block_p: int
    block_q: int
    block_c: int
    warps: int


# Under the interpreter a tile's size is free and the number of programs is not.
INTERPRETED = Config(16, 16, 64, 1)


class BlockConfig(NamedTuple):
    """A tile of ``pixels`` x ``block_k`` of a block's y, made of ``block_c`` channels of x at a time."""

    pixels: int
    block_c: int
    block_k: int
    warps: int


class GradientsConfig(NamedTuple):
    """Tiles of a block's gradients.

    ``wgrad``: a program sums ``block_k`` x ``block_c`` gradients of w_pw, ``pixels`` at a time.  ``dgrad``: it makes
    ``pixels`` x ``block_c`` of dz, ``block_k`` channels of y at a time, and uses ``x_pixels`` at a time.
    """

    wgrad: BlockConfig
    dgrad: BlockConfig
    x_pixels: int


INTERPRETED_BLOCK = BlockConfig(128, 64, 64, 1)
INTERPRETED_GRADIENTS = GradientsConfig(INTERPRETED_BLOCK, INTERPRETED_BLOCK, 128)


class Grid(NamedTuple):
    """How tiles cover a problem: strips of ``rows`` rows, by ``strips``, ``q_blocks`` and ``c_blocks``."""

    rows: int
    strips: int
    q_blocks: int
    c_blocks: int


def ceil_div(a, b):
    return (a + b - 1) // b


def candidates(p: Problem, pass_: int) -> tuple[Config, ...]:
    """The configurations worth trying; what is compiled ahead of time in tests is the union over all problems.

    A thread holds 8 numbers of a tile, in NHWC 16 bytes of the channels of a pixel or two; 4 in NCHW, where each has an
    address of its own.  wgrad holds as many sums for each tap: 4 numbers, so that they stay in registers; 2 in NCHW,
    for filters of more than 9 taps and with a multiplier, where x and dy are of different channels.  Half of all that
    for float64.  Tiles of several rows, for images that do not fill a tile's columns, take registers for rows too:
    dgrad's are half as large.
    """
    gradients_of_w, double = pass_ in (WGRAD, DGRAD_WGRAD), itemsize(p.dtype) == 8
    if not p.nhwc:
        count = (256 if gradients_of_w else 512) >> double
        shapes = [(count // columns, columns, 1) for columns in (16, 32, 64)] + [(8, 16, 1 if gradients_of_w else 2)]
    else:
        few = p.w[2] * p.w[3] <= HELD and p.w[0] == p.x[1]
        count = ((512 if few else 256) if gradients_of_w else 1024) >> double
        shapes = []
        for rows, channels in ((1, 64), (2, 64), (1, 32), (4, 32)):
            pixels = (count >> (pass_ == DGRAD and rows > 1)) // channels
            shapes.append((rows, pixels // rows, channels))
    return tuple(Config(*shape, warps=4) for shape in shapes)


def grid(p: Problem, pass_: int, config: Config, multiprocessors: int) -> Grid:
    """Strips as long as leaves enough programs for the card; of fixed length for symbolic sizes."""
    (_, _, height, width), channels = _tiled(p, pass_)
    q_blocks, c_blocks = ceil_div(width, config.block_q), ceil_div(channels, config.block_c)
    rows = _ROWS * config.block_p
    if all(isinstance(size, int) for size in (*p.x, *p.w)):
        others = max(1, p.x[0] * q_blocks * c_blocks)
        strips = min(ceil_div(height, config.block_p), max(1, _PROGRAMS * multiprocessors // others))
        rows = max(1, ceil_div(ceil_div(height, strips), config.block_p)) * config.block_p
    return Grid(rows, ceil_div(height, rows), q_blocks, c_blocks)


def splits(units, blocks, multiprocessors: int):
    """Programs a block of channels, each with partial sums of its own: enough for the card, no more than units."""
    wanted = max(1, _PROGRAMS * multiprocessors // blocks) if isinstance(blocks, int) else _PROGRAMS * multiprocessors
    return min(units, wanted) if isinstance(units, int) else torch.sym_min(units, wanted)


def _tiled(p: Problem, pass_: int):
    """The sizes and channels that the tiles of a pass cover: outputs of fprop, pixels of x for the gradients."""
    if pass_ == FPROP:
        return p.y, p.w[0]
    return p.x, p.w[0] if pass_ == WGRAD else p.x[1]


def cost(p: Problem, pass_: int, config: Config, multiprocessors: int) -> float:
    """What a configuration's bytes take, in bytes from memory."""
    (N, _, height, width), channels = _tiled(p, pass_)
    g = grid(p, pass_, config, multiprocessors)
    stride = p.stride if pass_ == FPROP else (1, 1)
    spans = [1 + (p.w[2 + axis] - 1) * p.dilation[axis] for axis in range(2)]
    tile = g.rows, config.block_q
    halo = math.prod((stride[axis] * (tile[axis] - 1) + spans[axis]) / (stride[axis] * tile[axis]) for axis in range(2))
    covered = ceil_div(height, config.block_p) * config.block_p * g.q_blocks * config.block_q
    idle = covered / max(1, height * width) * g.c_blocks * config.block_c / channels - 1
    x, y = math.prod(p.x) * itemsize(p.dtype), math.prod(p.y) * itemsize(p.dtype)
    read, other = (x, y) if pass_ == FPROP else (y, x)
    if pass_ == DGRAD_WGRAD:
        other += x
    return read + other + _HALO * (halo - 1) * read + _IDLE * idle * (read + other)


def ordered(p: Problem, pass_: int, multiprocessors: int) -> list[Config]:
    """The candidates, the one with the least bytes first; as they stand for symbolic sizes."""
    found = list(candidates(p, pass_))
    if all(isinstance(size, int) for size in (*p.x, *p.w)):
        found.sort(key=lambda config: cost(p, pass_, config, multiprocessors))
    return found


def block_config(b: BlockProblem) -> BlockConfig:
    """As many channels of y as registers have room for; a thread loads 16 bytes of x for a tap."""
    if itemsize(b.depthwise.dtype) == 4:
        return BlockConfig(32, 16, 64, warps=4)
    block_k = max(16, 1 << (b.K - 1).bit_length())
    return BlockConfig(64, 32, min(block_k, 256), warps=8 if block_k >= 128 else 4)


def gradients_config(b: BlockProblem) -> GradientsConfig:
    """Sums of gradients fill the registers: 64 of a thread in wgrad, 4 for each tap beside 32 of dz in dgrad.

    With a ReLU z is made beside dz: half as many pixels, and in halves some registers are spilled all the same.
    """
    if itemsize(b.depthwise.dtype) == 4:
        return GradientsConfig(BlockConfig(32, 32, 64, warps=4), BlockConfig(64, 32, 16, warps=8), x_pixels=32)
    block_k = min(256, max(16, 1 << (b.K - 1).bit_length()))
    wgrad = BlockConfig(32, 64, block_k, warps=8)
    return GradientsConfig(wgrad, BlockConfig(128 if b.activation is None else 64, 64, 32, warps=8), x_pixels=16)


def ring(b: BlockProblem, config: BlockConfig) -> int:
    """Pixels of dz that a program of dgrad keeps: what a tile of x meets, and one tile more; a power of two."""
    p = b.depthwise
    (_, _, _, W), (_, _, P, Q) = p.x, p.y
    rows = ((config.pixels + W - 2) // max(1, W) + (p.w[2] - 1) * p.dilation[0]) // p.stride[0] + 1
    return 1 << (min(rows, P) * Q + config.pixels - 1).bit_length()


class GradientsGrid(NamedTuple):
    """How programs share x: strips of ``rows`` rows, which ``splits`` programs for each block of channels take."""

    rows: int
    strips: int
    c_blocks: int
    splits: int


def gradients_grid(b: BlockProblem, config: BlockConfig, multiprocessors: int) -> GradientsGrid:
    """The strips with which a program has the fewest rows to go through, counting those of which dz is made twice.

    For so many strips a program, as many as there can be in all.
    """
    p = b.depthwise
    N, C, H, _ = p.x
    c_blocks = ceil_div(C, config.block_c)
    programs = max(1, _BLOCK_PROGRAMS * multiprocessors // c_blocks)
    least = max(1, ceil_div(N, programs))
    found = []
    for each in range(least, least + 4):
        rows = max(1, ceil_div(H, each * programs // max(1, N)))
        found.append((each * (rows + (p.w[2] - 1) * p.dilation[0]), rows))
    rows = min(found)[1]
    strips = ceil_div(H, rows)
    return GradientsGrid(rows, strips, c_blocks, min(N * strips, programs))


def wgrad_splits(b: BlockProblem, config: BlockConfig, multiprocessors: int) -> int:
    """Partial sums of the gradient of w_pw: as many as the card has room for, of not too few pixels."""
    N, _, P, Q = b.depthwise.y
    programs = ceil_div(b.K, config.block_k) * ceil_div(b.depthwise.x[1], config.block_c)
    return min(ceil_div(N * P * Q, _SUMMED), max(1, _BLOCK_PROGRAMS * multiprocessors // programs))


def why_not_fused(b: BlockProblem, inference: bool = False) -> str | None:
    """Why to compose a block, from its sizes: what one kernel saves, z written and read, against what it does more.

    The depthwise part is made again for each tile of K; and for float32, whose sums no tensor core makes as torch does,
    torch's matrix product is taken to be twice as fast.
    """
    p, config = b.depthwise, block_config(b)
    reason = _why_not_kind(b)
    if reason is not None:
        return reason
    tiles = ceil_div(b.K, config.block_k)
    if ceil_div(p.x[0] * p.y[2] * p.y[3], config.pixels) * tiles >= 2**31 - 2**16:
        return "it would take more than 2^31 programs"
    instructions = (tiles - 1) * _depthwise_instructions(b, inference)
    if p.dtype == torch.float32:
        instructions += tiles * config.block_k
    if instructions * _INSTRUCTION > 2 * itemsize(p.dtype):
        return f"by the model, to store z costs less than what one kernel does more for {b.K} channels of {p.dtype}"
    return None


def why_not_gradients_fused(b: BlockProblem) -> str | None:
    """The same for its gradients: z and dz written and read, and passes of a ReLU, against what their kernels do more.

    z is made for each tile of K, and once more for its ReLU; dz goes through the second-level cache, and more than with
    torch's larger tiles do the factors of products, which in float32 take twice as long; and partial sums for the
    pointwise weights are written and read.
    """
    p, config = b.depthwise, gradients_config(b)
    reason = _why_not_kind(b)
    if reason is not None:
        return reason
    if p.w[2] * p.w[3] > HELD:
        return f"it makes gradients of blocks with filters of up to {HELD} taps only"
    if max(p.x[2] * p.x[3], p.y[2] * p.y[3]) >= 2**31 - 2**16:
        return "an image has more than 2^31 pixels"
    kept = ring(b, config.dgrad) * config.dgrad.block_c * itemsize(p.dtype)
    if kept > _SLOT:
        return f"{kept >> 10} KB of dz for each program would not stay in the caches"
    again = ceil_div(b.K, config.wgrad.block_k) - 1 + (b.activation is not None)
    instructions = again * _depthwise_instructions(b, inference=False)
    if p.dtype == torch.float32:
        instructions += 2 * b.K
    size = itemsize(p.dtype)
    products = 1 / config.dgrad.block_c + 1 / config.dgrad.pixels + 1 / config.wgrad.block_c - 2 * _TORCH_TILE
    more = instructions * _INSTRUCTION + _HALO * size * (2 + b.K * products) + 2 * 4 * b.K / _SUMMED
    if more > size * (4 if b.activation is None else 9):
        return (
            f"by the model, to store z and dz costs less than what its kernels do more for {b.K} channels of {p.dtype}"
        )
    return None


def _why_not_kind(b: BlockProblem) -> str | None:
    p = b.depthwise
    if not p.nhwc:
        return "it makes blocks of channels_last tensors only"
    if p.w[0] != p.x[1]:
        return "it makes no blocks with a channel multiplier"
    if b.activation not in (None, "relu", "relu6"):
        return f"it makes no blocks with {b.activation} between the convolutions"
    if p.dtype == torch.float64:
        return "it makes no blocks of float64"
    return None


def _depthwise_instructions(b: BlockProblem, inference: bool) -> int:
    """For a number of z; in inference the function on load is a ReLU."""
    on_load = _TAP_RELU if inference else _TAP_ON_LOAD
    return b.depthwise.w[2] * b.depthwise.w[3] * (on_load if b.on_load else _TAP)
