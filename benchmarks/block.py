"""The training blocks of Xception, one by one: as one operator, and as torch's layers.

    python benchmarks/block.py [--batch-size 4] [--dtype bfloat16] [--torchcompile]

A block is BatchNorm and ReLU, a 3x3 depthwise and a pointwise convolution.  "fused" is ``xsep.separable_block``, which
makes the statistics of the next BatchNorm too; "torch" is nn.BatchNorm2d in training, F.relu and F.conv2d twice, which
makes those of its own.  "products" is the pointwise convolution alone, by the faster of torch's two ways: what a block
would take if all else were free.  Forward and backward are timed together; tensors are channels_last.
"""

from __future__ import annotations

import argparse
import functools
from typing import Callable

import common
import pointwise
import torch
import torch.nn.functional as F
from torch import Tensor

import xsep
from xsep.ops import backends
from xsep.ops.problem import BlockProblem, Problem
from xsep.testing import assert_no_worse_than_torch

EPS = 1e-3


def fused(x: Tensor, weight: Tensor, bias: Tensor, w_dw: Tensor, w_pw: Tensor, mean: Tensor, var: Tensor):
    scale = weight * torch.rsqrt(var + EPS)
    return xsep.separable_block(x, mean, scale, bias, True, w_dw, w_pw, padding=1)


def layers(x: Tensor, weight: Tensor, bias: Tensor, w_dw: Tensor, w_pw: Tensor, *_: Tensor):
    u = F.relu(F.batch_norm(x, None, None, weight.to(x.dtype), bias.to(x.dtype), training=True, eps=EPS))
    return (F.conv2d(F.conv2d(u, w_dw, padding=1, groups=x.shape[1]), w_pw),)


def step(way: Callable, inputs: tuple[Tensor, ...], dy: Tensor, with_statistics: bool) -> None:
    outputs = way(*inputs)
    gradients = (dy, *(torch.ones_like(t) for t in outputs[1:])) if with_statistics else (dy,)
    torch.autograd.grad(outputs, inputs[:5], gradients)


def drawn(C: int, K: int, extent: int, batch_size: int, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor]:
    """What a block takes, mean and variance of x among it, and a gradient of y."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    x, dy = (
        normal(batch_size, channels, extent, extent).to(dtype).contiguous(memory_format=torch.channels_last)
        for channels in (C, K)
    )
    parameters = normal(C).abs(), normal(C), (normal(C, 1, 3, 3) / 3).to(dtype), (normal(K, C, 1, 1) / C**0.5).to(dtype)
    var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    return (*(t.requires_grad_() for t in (x, *parameters)), mean, var), dy


def check(inputs: tuple[Tensor, ...]) -> None:
    exact = layers(*(t.double() for t in inputs))[0]
    assert_no_worse_than_torch(fused(*inputs)[0].detach(), layers(*inputs)[0].detach(), exact.detach(), "y")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=4, help="default: 4")
    parser.add_argument("--dtype", choices=common.DTYPES, default="float32", help="default: float32")
    parser.add_argument("--torchcompile", action="store_true", help="also torch's layers through torch.compile")
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1; got {args.batch_size}")
    dtype = common.DTYPES[args.dtype]
    common.print_header(common.header(dtype=args.dtype, batch=str(args.batch_size)))
    problem = Problem("cpu", dtype, True, (1, 728, 19, 19), (728, 1, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    chosen = backends.choose(problem)
    for what, backward in (("forward", False), ("backward", True)):
        reason = backends.why_not_block(BlockProblem(problem, 728, True, None), chosen, backward)
        print(f"{what:22s} {chosen.name}: {'one kernel' if reason is None else f'composed, {reason}'}")
    names = ["fused", "torch", *(["compiled"] if args.torchcompile else [])]
    print(f"\n{'block':28s}" + "".join(f"{name + ' ms':>12s}" for name in (*names, "products")), end="")
    print(f"{'torch/fused':>13s}{'products/fused':>16s}{'GFLOP/s':>9s}{'GB/s':>7s}")
    totals = dict.fromkeys((*names, "products"), 0.0)
    for C, K, extent, times in pointwise.layers():
        inputs, dy = drawn(C, K, extent, args.batch_size, dtype)
        check(inputs)
        ways = {"fused": fused, "torch": layers}
        if args.torchcompile:
            ways["compiled"] = torch.compile(layers)
        calls = {name: functools.partial(step, way, inputs, dy, name == "fused") for name, way in ways.items()}
        found = {name: t.median for name, t in common.interleaved(calls, 7, 2e-3, 2.0).items()}
        products = pointwise.measure(C, K, extent, args.batch_size, dtype)
        found["products"] = min(t.median for t in products.values())
        for name in totals:
            totals[name] += times * found[name]
        pixels = args.batch_size * extent * extent
        moved = pixels * x_and_y_passes(C, K) * dy.element_size()  # x, y; then x, y, dy, dx
        print(
            f"{C:5d} -> {K:5d}  {extent:3d}x{extent:<3d} x{times:<2d}   "
            + "".join(f"{found[name] * 1e3:12.2f}" for name in totals)
            + f"{found['torch'] / found['fused']:13.2f}{found['products'] / found['fused']:16.2f}"
            f"{6 * pixels * C * K / found['fused'] / 1e9:9.0f}{moved / found['fused'] / 1e9:7.1f}"
        )
    print("\nall blocks of a step: " + ", ".join(f"{name} {total:.3f} s" for name, total in totals.items()))


def x_and_y_passes(C: int, K: int) -> int:
    """Numbers of a pixel that a fused step reads or writes: x and y, then x, dx, y and dy."""
    return 3 * C + 3 * K


if __name__ == "__main__":
    main()
