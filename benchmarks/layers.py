"""Depthwise convolutions layer by layer: xsep beside torch in one process, on every depthwise layer of four networks.

    python benchmarks/layers.py                               # all of it; a few minutes on 2 cores
    python benchmarks/layers.py --networks xception --batch-sizes 4 --layouts nhwc --passes fprop

A row is one pass (fprop, dgrad, wgrad, or dgrad_wgrad: both gradients) of one layer at one batch size, as users and
autograd call it: xsep.depthwise_conv2d and what its backward calls, outputs allocated by every call.  torch's side is
F.conv2d and the aten operator behind its backward, in the same layout; on a GPU the faster of cuDNN, which tries its
algorithms first, and ATen's own kernels, with cold caches.  There the Triton kernels have a column of their own; they
are xsep's side where the CUDA kernels are not installed.  GB/s counts each input read once and each output written
once; "of copy" divides it by the bandwidth of tensor.copy_ measured just before, also read plus write.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import common
import torch
from tqdm import tqdm

import xsep
from xsep.ops import cpu, library
from xsep.ops.backends import BACKENDS
from xsep.ops.problem import Problem
from xsep.shapes import NETWORKS, Shape
from xsep.testing import assert_no_worse_than_torch

PASSES = ("fprop", "dgrad", "wgrad", "dgrad_wgrad")
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
TARGETS = {"nchw": 4.0, "nhwc": 1.3}  # geometric mean of the ratios
OVERHEAD_TARGET = 15e-6  # seconds
COPY_TARGET = 0.85  # of the copy bandwidth, on rows beyond the last-level cache


def tensors(shape: Shape, dtype: torch.dtype, layout: str, device: str = "cpu"):
    """x, w, dy with their memory written, in one layout."""
    generator = torch.Generator().manual_seed(0)
    P, Q = (
        (extent + 2 * pad - kernel) // stride + 1
        for extent, pad, kernel, stride in zip((shape.H, shape.W), shape.pad[::2], (shape.R, shape.S), shape.stride)
    )
    x, dy = (
        torch.randn(sizes, generator=generator).to(device, dtype).contiguous(memory_format=LAYOUTS[layout])
        for sizes in (shape.x_sizes, (shape.N, shape.C * shape.M, P, Q))
    )
    return x, torch.randn(shape.w_sizes, generator=generator).to(device, dtype), dy


def calls(shape: Shape, name: str, x, w, dy):
    """{variant: function} of one pass."""
    geometry = shape.geometry
    padding = (shape.pad[0], shape.pad[2])

    def backward(*mask):
        return torch.ops.aten.convolution_backward(
            dy, x, w, None, shape.stride, padding, shape.dilation, False, (0, 0), shape.C, (*mask, False)
        )

    return {
        "fprop": {
            "xsep": lambda: xsep.depthwise_conv2d(x, w, None, shape.stride, shape.pad, shape.dilation),
            "torch": lambda: torch.nn.functional.conv2d(x, w, None, shape.stride, padding, shape.dilation, shape.C),
        },
        "dgrad": {
            "xsep": lambda: library.dgrad(dy, w, shape.x_sizes, *geometry),
            "torch": lambda: backward(True, False)[0],
        },
        "wgrad": {
            "xsep": lambda: library.wgrad(dy, x, shape.w_sizes, *geometry),
            "torch": lambda: backward(False, True)[1],
        },
        "dgrad_wgrad": {
            "xsep": lambda: library.dgrad_wgrad(dy, x, w, *geometry),
            "torch": lambda: backward(True, True)[:2],
        },
    }[name]


def moved_bytes(name: str, x, w, dy) -> int:
    x_bytes, w_bytes, dy_bytes = (t.numel() * t.element_size() for t in (x, w, dy))
    return {
        "fprop": x_bytes + w_bytes + dy_bytes,
        "dgrad": dy_bytes + w_bytes + x_bytes,
        "wgrad": dy_bytes + x_bytes + w_bytes,
        "dgrad_wgrad": dy_bytes + 2 * x_bytes + 2 * w_bytes,
    }[name]


def backends_on(device: str) -> list[str]:
    """xsep's, the one that it prefers first."""
    on_gpu = [name for name in ("cuda", "triton") if BACKENDS[name].why_not_kind("cuda", torch.float32, 0) is None]
    return ["cpu"] if device == "cpu" else on_gpu


def under(backend: str, call):
    def run():
        with xsep.backend(backend):
            return call()

    return run


def measure(variants, device: str, samples: int, max_seconds: float) -> dict[str, common.Times]:
    """On a GPU "torch" lets cuDNN try its algorithms, and "aten" is torch without cuDNN; "triton" is xsep's."""
    variants = {**variants, **{name: under(name, variants["xsep"]) for name in backends_on(device)[1:]}}
    if device == "cpu":
        return common.interleaved(variants, samples, 2e-3, max_seconds)

    def without_cudnn():
        with torch.backends.cudnn.flags(enabled=False):
            return variants["torch"]()

    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        return common.gpu_interleaved({**variants, "aten": without_cudnn}, samples)


def check(shape: Shape, name: str, dtype: torch.dtype, layout: str, device: str = "cpu") -> None:
    """Holds one image's result against float64, by the tolerance rule.  Raises ``AssertionError``."""
    x, w, dy = tensors(shape._replace(N=1), dtype, layout, device)
    found = calls(shape._replace(N=1), name, x, w, dy)
    truth = calls(shape._replace(N=1), name, x.double(), w.double(), dy.double())["torch"]()
    with torch.no_grad():
        results = [found["xsep"](), found["torch"](), truth]
    for ours, theirs, exact in zip(*((r if isinstance(r, tuple) else (r,)) for r in results)):
        assert_no_worse_than_torch(ours, theirs, exact, f"{name} of {shape} in {layout}")


def overhead() -> float:
    """Seconds that xsep.depthwise_conv2d takes beyond its kernel, without gradients, in one thread."""
    x = torch.randn(1, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    w, y = torch.randn(16, 1, 3, 3), torch.empty_like(x)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        problem = Problem("cpu", x.dtype, True, (1, 16, 8, 8), (16, 1, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
        kernel = cpu.prepared_fprop(problem, x, w, y)
        with torch.no_grad():
            found = common.interleaved(
                {"operator": lambda: xsep.depthwise_conv2d(x, w, padding=1), "kernel": kernel}, 21, 5e-3, 2.0
            )
    finally:
        torch.set_num_threads(threads)
    return found["operator"].median - found["kernel"].median


def tiny_training(device: str, layers: int = 20) -> dict[str, common.Times]:
    """Seconds a layer of forward and backward under autocast, of layers so tiny that kernels hardly count."""
    x = torch.randn(1, 16, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(16, 1, 3, 3, device=device, requires_grad=True) for _ in range(layers)]

    def training(convolve):
        def step():
            y = x
            with torch.autocast(device, torch.bfloat16 if device == "cpu" else torch.float16):
                for w in weights:
                    y = convolve(y, w)
            y.sum().backward()
            for w in weights:
                w.grad = None
            if device == "cuda":
                torch.cuda.synchronize()

        return step

    convolutions = {
        "xsep": lambda y, w: xsep.depthwise_conv2d(y, w, padding=1),
        "torch": lambda y, w: torch.nn.functional.conv2d(y, w, padding=1, groups=16),
    }
    found = common.interleaved({name: training(each) for name, each in convolutions.items()}, 21, 5e-3, 4.0)
    return {name: common.Times(*(value / layers for value in values)) for name, values in found.items()}


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def summary(rows: list[dict]) -> list[str]:
    """Each target beside what was measured."""
    lines = []
    for layout in LAYOUTS:
        mine = [row for row in rows if row["layout"] == layout]
        if not mine:
            continue
        slower = [row for row in mine if row["ratio"] < 1]
        lines.append(
            f"{layout.upper()}: geometric mean {geometric_mean([row['ratio'] for row in mine]):.2f}x torch "
            f"(target {TARGETS[layout]}x); {len(slower)} of {len(mine)} rows slower than torch (target 0)"
        )
        lines += [f"  slower: {describe(row)}  {row['ratio']:.2f}x" for row in slower]
        beyond = [row for row in mine if row["beyond_cache"]]
        short = [row for row in beyond if row["of_copy"] < COPY_TARGET]
        lines.append(
            f"{layout.upper()}: {len(beyond)} rows exceed the last-level cache; {len(short)} of them below "
            f"{COPY_TARGET:.0%} of the copy bandwidth (target 0)"
        )
        lines += [f"  below: {describe(row)}  {row['of_copy']:.0%}" for row in short]
    return lines


def describe(row: dict) -> str:
    stride = f"/{row['stride']}" if row["stride"] > 1 else ""
    return (
        f"{row['network']:15s} {row['layout']} N{row['N']:<3d} C{row['C']:<5d} {row['H']:3d}x{row['W']:<3d} "
        f"{row['kernel']}x{row['kernel']}{stride:2s} {row['pass']:11s}"
    )


def plot(rows: list[dict], path: Path) -> None:
    """Ratio to torch over the bytes moved, a panel per layout, a colour per pass."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layouts = [layout for layout in LAYOUTS if any(row["layout"] == layout for row in rows)]
    figure, panels = plt.subplots(1, len(layouts), figsize=(6 * len(layouts), 4.5), sharey=True, squeeze=False)
    for axes, layout in zip(panels[0], layouts):
        for name in PASSES:
            mine = [row for row in rows if row["layout"] == layout and row["pass"] == name]
            axes.scatter([row["bytes"] / 1e6 for row in mine], [row["ratio"] for row in mine], s=14, label=name)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="bytes moved (MB)", title=layout.upper())
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("speed relative to torch")
    panels[0][-1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME",
                        help="of " + ", ".join(NETWORKS))  # fmt: skip
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="default: all")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 16], metavar="N")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: both")
    parser.add_argument("--dtype", choices=common.DTYPES, default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: cuda if torch can use a GPU")  # fmt: skip
    parser.add_argument("--samples", type=int, default=11, help="per variant and row (default 11)")
    parser.add_argument("--max-seconds", type=float, default=1.5, help="spent on a row after its third sample")
    parser.add_argument("--results-file", type=Path, help="written when done")
    parser.add_argument("--results-format", choices=("json", "csv"), default="json")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="ratio to torch over bytes, as an image")
    args = parser.parse_args()
    if min(args.batch_sizes) < 1:
        parser.error(f"--batch-sizes must be at least 1; got {args.batch_sizes}")
    if args.samples < 1:
        parser.error(f"--samples must be at least 1; got {args.samples}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU that it can use")
    if not backends_on(args.device):
        parser.error("--device cuda: " + "; ".join(str(BACKENDS[name].why_absent()) for name in ("cuda", "triton")))
    return args


def measure_all(
    networks: list[str],
    batch_sizes: list[int],
    layouts: list[str],
    passes: tuple[str, ...] = PASSES,
    dtype: torch.dtype = torch.float32,
    samples: int = 11,
    max_seconds: float = 1.5,
    device: str = "cpu",
) -> list[dict]:
    """Checks, times and prints every row; the numerics of a layer are checked before its first timing."""
    copy = common.copy_bandwidth(device)
    cache = common.last_level_cache(device)
    print(f"copy bandwidth {copy / 1e9:.1f} GB/s, last-level cache {cache >> 20} MB\n")
    ours, *others = backends_on(device)
    title = "".join(f" {name + ' ms':>9s}" for name in (ours, "torch", *others))
    print(f"{'':62s}{title} {'spread':>6s} {'GB/s':>6s} {'of copy':>7s} {'ratio':>6s}")
    work = [
        (network, shape._replace(N=batch), layout, name)
        for network in networks
        for shape in NETWORKS[network]
        for layout in layouts
        for name in passes
        for batch in batch_sizes
    ]
    rows = []
    with torch.no_grad(), xsep.backend(ours), tqdm(work, unit="row", disable=None) as progress:
        for network, shape, layout, name in progress:
            if shape.N == batch_sizes[0]:
                for backend in (ours, *others):
                    with xsep.backend(backend):
                        check(shape, name, dtype, layout, device)
            x, w, dy = tensors(shape, dtype, layout, device)
            measured = measure(calls(shape, name, x, w, dy), device, samples, max_seconds)
            mine = measured.pop("xsep")
            beside = {f"{name}_ms": measured.pop(name).median * 1e3 for name in others}
            theirs = min(measured.values())
            moved = moved_bytes(name, x, w, dy)
            row = {
                "network": network,
                "layout": layout,
                "pass": name,
                "N": shape.N,
                "C": shape.C,
                "H": shape.H,
                "W": shape.W,
                "kernel": shape.R,
                "stride": shape.stride[0],
                "ms": mine.median * 1e3,
                "torch_ms": theirs.median * 1e3,
                **beside,
                **({"aten_ms": measured["aten"].median * 1e3} if "aten" in measured else {}),
                "spread": mine.spread,
                "torch_spread": theirs.spread,
                "bytes": moved,
                "gb_per_s": moved / mine.median / 1e9,
                "of_copy": moved / mine.median / copy,
                "beyond_cache": moved > cache,
                "ratio": theirs.median / mine.median,
            }
            rows.append(row)
            progress.write(
                f"{describe(row)} {row['ms']:9.3f} {row['torch_ms']:9.3f} "
                + "".join(f"{milliseconds:9.3f} " for milliseconds in beside.values())
                + f"{row['spread']:6.0%} "
                f"{row['gb_per_s']:6.1f} {row['of_copy']:7.0%} {row['ratio']:6.2f}"
            )
    print()
    print("\n".join(summary(rows)))
    if device == "cpu":
        beyond, target = overhead() * 1e6, OVERHEAD_TARGET * 1e6
        print(f"xsep.depthwise_conv2d takes {beyond:.1f} us beyond its kernel (target {target:.0f} us)")
    tiny = {name: f"{values.median * 1e6:.0f} us" for name, values in tiny_training(device).items()}
    print(f"Forward and backward of a tiny layer under autocast: xsep {tiny['xsep']}, torch {tiny['torch']}")
    return rows


def main() -> None:
    args = parse()
    found = common.header(args.device, dtype=args.dtype)
    common.print_header(found)
    rows = measure_all(
        args.networks,
        args.batch_sizes,
        args.layouts,
        tuple(args.passes),
        common.DTYPES[args.dtype],
        args.samples,
        args.max_seconds,
        args.device,
    )
    if args.results_file:
        common.write_results(args.results_file, args.results_format, found, rows)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
