"""What a GPU's memory and arithmetic allow: predicted times of training steps and of depthwise layers.

    python benchmarks/roofline.py                                  # training steps on every GPU of the table
    python benchmarks/roofline.py --gpus H100 K80 --layers xception

Needs no GPU: models run on torch's meta device, and every operator of a step (forward and backward, without the
optimizer) is recorded with the bytes of its inputs and outputs and its FLOPs.  An operator takes as long as the slower
of the two, at a fraction of the data sheet's peak, plus the time to start a kernel.  "eager" is the recorded step as it
stands.  "fused" predicts ReLU, separable convolution and BatchNorm as one operator, which reads x and writes y, and in
the backward pass reads x, y and dy and writes dx: on a GPU there is a kernel for its forward pass only.  On a GPU,
layers are measured as well.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple, Sequence

import common
import torch
from layers import PASSES, calls, moved_bytes, tensors
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import xsep
from xsep.shapes import NETWORKS


class Gpu(NamedTuple):
    """Peak rates by the maker's data sheet: GB/s of memory, TFLOP/s without sparsity."""

    bandwidth: float
    float32: float
    matrix: float  # float16 products with float32 sums; float32's where there are no matrix units


GPUS = {
    "K80": Gpu(240, 4.1, 4.1),  # one of a board's two processors
    "V100": Gpu(900, 15.7, 125),
    "A100": Gpu(2039, 19.5, 312),
    "H100": Gpu(3350, 66.9, 989),
    "B200": Gpu(8000, 75, 2250),
    "RTX3090": Gpu(936, 35.6, 71),
    "RTX4090": Gpu(1008, 82.6, 165),
    "RTX5090": Gpu(1792, 104.8, 210),
}
# Of the peaks: memory, matrix units, plain arithmetic.  Seconds between kernels that are queued without gaps.
MEMORY, MATRIX, PLAIN = 0.9, 0.6, 0.8
START = 2e-6


class Op(NamedTuple):
    """One kernel of a step."""

    name: str
    bytes: int  # read and written
    flops: int
    is_product: bool  # of matrices: matrix units can do it

    def seconds(self, gpu: Gpu) -> float:
        peak = gpu.matrix * MATRIX if self.is_product else gpu.float32 * PLAIN
        return max(self.bytes / (gpu.bandwidth * 1e9 * MEMORY), self.flops / (peak * 1e12)) + START


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# BatchNorm reads so many of its first arguments twice: for the sums over all of them, and for the result.
TWICE = {"native_batch_norm": 1, "native_batch_norm_backward": 2}
FREE = {"view", "_unsafe_view", "t", "detach", "expand", "unsqueeze", "new_empty"}


class Record(TorchDispatchMode):
    """Keeps what runs inside it as ``ops``."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name in FREE:
            return result
        inputs = [a for a in args if isinstance(a, Tensor)]
        outputs = [r for r in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(r, Tensor)]
        formula = flop_registry.get(func._overloadpacket)
        flops = formula(*args, **(kwargs or {}), out_val=result) if formula else 0
        if name == "convolution_backward":  # two kernels, each of which reads dy
            dy, x, w = inputs[:3]
            self.ops += [Op(f"{name}: {d}", nbytes(dy, x, w), flops // 2, w.shape[1] > 1) for d in ("dx", "dw")]
        else:
            moved = nbytes(*inputs, *outputs, *inputs[: TWICE.get(name, 0)])
            is_product = name.endswith("mm") or (name == "convolution" and inputs[1].shape[1] > 1)
            self.ops.append(Op(name, moved, flops, is_product))
        return result


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, ops):
        y = x.new_empty(x.shape[0], w.shape[0], *x.shape[2:])
        ctx.save_for_backward(x, w)
        ctx.ops, ctx.flops = ops, 2 * y.numel() * w.shape[1]
        ops.append(Op("separable_block", nbytes(x, w, y), ctx.flops, True))
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        ctx.ops.append(Op("separable_block: dx, dw", 2 * nbytes(x, w, dy), 2 * ctx.flops, True))
        return x.new_empty(x.shape), w.new_empty(w.shape), None


class SeparableBlock(nn.Module):
    """Stands for the fused operator: enters its bytes and FLOPs, computes nothing."""

    def __init__(self, separable: nn.Sequential, ops: list[Op]):
        super().__init__()
        self.pointwise, self.ops = separable.pointwise, ops

    def forward(self, x: Tensor) -> Tensor:
        return _Block.apply(x, self.pointwise.weight, self.ops)


def fuse(model: nn.Module, ops: list[Op]) -> nn.Module:
    """An Xception with ``SeparableBlock`` in place of each ReLU, separable convolution and BatchNorm."""
    for block in model.modules():
        if hasattr(block, "rep"):
            kept = [m for m in block.rep if not isinstance(m, (nn.ReLU, nn.BatchNorm2d))]
            block.rep = nn.Sequential(*(SeparableBlock(m, ops) if isinstance(m, nn.Sequential) else m for m in kept))
    model.conv3, model.conv4 = SeparableBlock(model.conv3, ops), SeparableBlock(model.conv4, ops)
    model.bn3 = model.act3 = model.bn4 = nn.Identity()
    return model


def step(design: str, batch: int, dtype: torch.dtype) -> list[Op]:
    """The kernels of a training step at 299 x 299 px: "eager" or "fused" for Xception, or "inception_v3"."""
    record = Record()
    with torch.device("meta"):
        if design == "inception_v3":
            from torchvision.models import inception_v3

            model: nn.Module = inception_v3(weights=None, aux_logits=False, init_weights=False)
        else:
            model = xsep.models.xception(fused=False)
            if design == "fused":
                model = fuse(model, record.ops)
        x = torch.empty(batch, 3, 299, 299, dtype=dtype)
    model = model.to(dtype)
    with record:
        model(x).sum().backward()
    return record.ops


def print_steps(gpus: Sequence[str], batch: int, dtype: torch.dtype) -> None:
    steps = {design: step(design, batch, dtype) for design in ("eager", "fused", "inception_v3")}
    print("Predicted training step          kernels  GB/image  GFLOP/image")
    for design, ops in steps.items():
        moved, flops = sum(op.bytes for op in ops) / batch / 1e9, sum(op.flops for op in ops) / batch / 1e9
        what = design if design == "inception_v3" else f"xception, {design}"
        print(f"  {what:30s} {len(ops):7d} {moved:9.2f} {flops:12.1f}")
    print("\nPredicted images/s         xception         inception_v3   xception / inception_v3 (paper: 0.903)")
    print(f"{'':20s}{'eager':>9s}{'fused':>9s}{'':>18s}{'eager':>14s}{'fused':>9s}")
    for name in gpus:
        eager, fused, inception = (batch / sum(op.seconds(GPUS[name]) for op in ops) for ops in steps.values())
        print(f"  {name:18s}{eager:9.0f}{fused:9.0f}{inception:18.0f}{eager / inception:14.2f}{fused / inception:9.2f}")


def print_layers(gpus: Sequence[str], networks: Sequence[str], batch: int, dtype: torch.dtype) -> None:
    here = torch.cuda.is_available()
    print(
        f"\nPredicted us of depthwise layers, every byte once{'; measured: xsep channels_last, here' if here else ''}"
    )
    print(f"{'':48s}" + "".join(f"{name:>9s}" for name in gpus) + ("  measured" if here else ""))
    for network in networks:
        for shape in NETWORKS[network]:
            shape = shape._replace(N=batch)
            with torch.device("meta"):
                x = torch.empty(shape.x_sizes, dtype=dtype)
                w = torch.empty(shape.w_sizes, dtype=dtype)
                dy = torch.empty(torch.ops.xsep.fprop(x, w, None, *shape.geometry).shape, dtype=dtype)
            for name in PASSES:
                flops = 2 * dy.numel() * shape.R * shape.S * (2 if name == "dgrad_wgrad" else 1)
                op = Op(name, moved_bytes(name, x, w, dy), flops, False)
                what = f"C{shape.C} {shape.H}x{shape.W} {shape.R}x{shape.S}/{shape.stride[0]}"
                line = f"  {network:16s}{what:20s}{name:12s}" + "".join(
                    f"{op.seconds(GPUS[g]) * 1e6:9.1f}" for g in gpus
                )
                if here:
                    call = calls(shape, name, *tensors(shape, dtype, "nhwc", "cuda"))["xsep"]
                    line += f"{common.gpu_interleaved({'': call}, 15)[''].median * 1e6:10.1f}"
                print(line)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gpus", nargs="+", default=list(GPUS), choices=GPUS, metavar="NAME", help=", ".join(GPUS))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float16",
        help="float32 is predicted at the matrix rate of float16: for cards without matrix units only",
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        default=[],
        choices=NETWORKS,
        metavar="NETWORK",
        help=f"the depthwise layers of {', '.join(NETWORKS)}",
    )
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1; got {args.batch_size}")
    return args


def main() -> None:
    args = parse()
    dtype = common.DTYPES[args.dtype]
    print(
        f"{args.dtype}, batch {args.batch_size}, 299 x 299 px.  Assumed: {MEMORY:.0%} of memory's peak, {MATRIX:.0%} of"
    )
    print(
        f"of matrix units', {PLAIN:.0%} of plain arithmetic's; {START * 1e6:.0f} us to start a kernel; cold caches.\n"
    )
    print_steps(args.gpus, args.batch_size, dtype)
    if args.layers:
        print_layers(args.gpus, args.layers, args.batch_size, dtype)


if __name__ == "__main__":
    main()
