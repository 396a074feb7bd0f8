"""What the CUDA kernels of Xception's training blocks move, counted on the host emulator.

    XSEP_EMULATE_CUDA=1 pip install '.[bench]' && python benchmarks/block_bytes.py [--dtype float16] [--batch-size 4]

Tensors are channels_last; BatchNorm and ReLU are applied on load, and y has statistics.  "needed" is what a pass must
read and write of tensors: forward x and y; backward dy and y, the whole gradient of y written and read again, x and dx.
"DRAM" are the 32-byte sectors that its kernels touch, each once a launch: weights and partial sums too.  "L2 reads" are
those that a card's 132 multiprocessors ask for beyond their first-level caches.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import pointwise
import torch
from tqdm import tqdm

from xsep.ops.backends import BACKENDS
from xsep.ops.problem import BlockProblem, Problem

SECTOR = 32


class Moved(NamedTuple):
    """Bytes."""

    needed: int
    dram: int
    l2_reads: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="default: float16"
    )
    parser.add_argument("--batch-size", type=int, default=4, help="default: 4")
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1; got {args.batch_size}")
    if BACKENDS["cuda-emulated"].why_absent() is not None:
        parser.error("this installation has no emulator: install with XSEP_EMULATE_CUDA=1")
    totals = Moved(0, 0, 0)
    lines = [f"{'block':26s}{'pass':>10s}{'needed MB':>11s}{'DRAM MB':>9s}{'ratio':>7s}{'L2 reads MB':>13s}"]
    for C, K, extent, times in tqdm(pointwise.layers(), unit="block", disable=None):
        for name, moved in counted(C, K, extent, args.batch_size, getattr(torch, args.dtype)).items():
            lines.append(
                f"{C:5d} -> {K:5d} {extent:3d}x{extent:<3d} x{times:<2d}  {name:>10s}{moved.needed / 1e6:11.2f}"
                f"{moved.dram / 1e6:9.2f}{moved.dram / moved.needed:7.2f}{moved.l2_reads / 1e6:13.1f}"
            )
            totals = Moved(*(so_far + times * of_one for so_far, of_one in zip(totals, moved)))
    print("\n".join(lines))
    needed, dram, l2_reads = (total / args.batch_size / 1e9 for total in totals)
    print(f"all blocks of a step, GB an image: needed {needed:.3f}, DRAM {dram:.3f}, L2 reads {l2_reads:.3f}")


def counted(C: int, K: int, extent: int, batch_size: int, dtype: torch.dtype) -> dict[str, Moved]:
    """What forward and backward move."""

    def image(channels: int) -> torch.Tensor:
        t = torch.randn(batch_size, channels, extent, extent)
        return t.to(dtype).contiguous(memory_format=torch.channels_last)

    backend = BACKENDS["cuda-emulated"]
    x, dy, w_dw, w_pw = image(C), image(K), torch.randn(C, 1, 3, 3).to(dtype), torch.randn(K, C, 1, 1).to(dtype)
    on_load = (torch.zeros(C), torch.ones(C), torch.zeros(C), True)
    depthwise = Problem("cpu", dtype, True, tuple(x.shape), tuple(w_dw.shape), (1, 1), (1, 1, 1, 1), (1, 1))
    b = BlockProblem(depthwise, K, True, None)
    size_x, size_y = (t.numel() * t.element_size() for t in (x, dy))

    with Counting() as forward:
        y, mean, m2 = backend.block(b, x, w_dw, w_pw, on_load, True)
    with Counting() as backward:
        backend.block_backward(b, dy, mean, m2, y, mean, x, w_dw, w_pw, on_load)
    return {"forward": forward.moved(size_x + size_y), "backward": backward.moved(2 * size_x + 4 * size_y)}


class Counting:
    """Counts what kernels launched in its context move."""

    def __enter__(self) -> Counting:
        BACKENDS["cuda-emulated"].module.start_counting(multiprocessors=132)
        return self

    def __exit__(self, *raised: object) -> None:
        self.launches = BACKENDS["cuda-emulated"].module.stop_counting()

    def moved(self, needed: int) -> Moved:
        distinct = sum(each[way]["distinct_sectors"] for each in self.launches for way in ("loads", "stores"))
        after_cache = sum(each["load_sectors_after_cache"] for each in self.launches)
        return Moved(needed, SECTOR * distinct, SECTOR * after_cache)


if __name__ == "__main__":
    main()
