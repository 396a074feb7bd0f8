"""The pointwise (1x1) layers of Xception: torch's convolution beside a matrix product, forward and both gradients.

    python benchmarks/pointwise.py [--batch-size 4] [--dtype bfloat16]

Both take channels_last tensors, where a pointwise convolution is the product of a (N*H*W, C) matrix and a (C, O) one.
``SeparableConv2d`` uses F.conv2d: this benchmark shows what that costs, or gains, on the machine at hand.
"""

from __future__ import annotations

import argparse

import common
import torch
import torch.nn.functional as F

# Channels in and out, number of halvings of the image before it, times it occurs.
LAYERS = (
    (64, 128, 1, 1),
    (128, 128, 1, 1),
    (128, 256, 2, 1),
    (256, 256, 2, 1),
    (256, 728, 3, 1),
    (728, 728, 3, 1),
    (728, 728, 4, 25),
    (728, 1024, 4, 1),
    (1024, 1536, 5, 1),
    (1536, 2048, 5, 1),
)


def layers(img_size: int = 299) -> list[tuple[int, int, int, int]]:
    """Channels in and out, extent and times of the layers for images of ``img_size``."""
    extents = [img_size, (img_size - 1) // 2 - 2]  # of two convolutions without padding, the first of stride 2
    while len(extents) <= 5:
        extents.append((extents[-1] + 1) // 2)
    return [(C, K, extents[halvings], times) for C, K, halvings, times in LAYERS]


def measure(C: int, K: int, extent: int, batch_size: int, dtype: torch.dtype) -> dict[str, common.Times]:
    """Forward and both gradients of a layer, by each way."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (
        torch.randn((batch_size, channels, extent, extent), generator=generator)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for channels in (C, K)
    )
    w = torch.randn((K, C, 1, 1), generator=generator).to(dtype).requires_grad_()
    x.requires_grad_()
    torch.testing.assert_close(convolution(x, w), product(x, w), rtol=2e-2, atol=1e-1)
    ways = {"conv2d": convolution, "matmul": product}
    return common.interleaved({name: lambda way=way: step(way, x, w, dy) for name, way in ways.items()}, 7, 2e-3, 2.0)


def step(forward, x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor):
    return torch.autograd.grad(forward(x, w), (x, w), dy)


def convolution(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, w)


def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    N, C, H, W = x.shape
    y = x.permute(0, 2, 3, 1).reshape(N * H * W, C) @ w.view(w.shape[0], C).T
    return y.view(N, H, W, -1).permute(0, 3, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=4, help="default: 4")
    parser.add_argument("--dtype", choices=common.DTYPES, default="float32", help="default: float32")
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1; got {args.batch_size}")
    common.print_header(common.header(dtype=args.dtype, batch=str(args.batch_size)))
    print(f"{'layer':28s} {'conv2d ms':>10s} {'matmul ms':>10s} {'conv2d GFLOP/s':>15s} {'matmul/conv2d':>14s}")
    totals = {"conv2d": 0.0, "matmul": 0.0}
    for C, O, extent, times in layers():
        found = measure(C, O, extent, args.batch_size, common.DTYPES[args.dtype])
        for name in totals:
            totals[name] += times * found[name].median
        gflops = 6 * args.batch_size * C * O * extent * extent / found["conv2d"].median / 1e9
        print(
            f"{C:5d} -> {O:5d}  {extent:3d}x{extent:<3d} x{times:<2d}   {found['conv2d'].median * 1e3:10.2f} "
            f"{found['matmul'].median * 1e3:10.2f} {gflops:15.0f} "
            f"{found['matmul'].median / found['conv2d'].median:14.2f}"
        )
    print(f"\nall of a step: conv2d {totals['conv2d']:.3f} s, matmul {totals['matmul']:.3f} s")


if __name__ == "__main__":
    main()
