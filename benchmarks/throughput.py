"""Table 3 of the Xception paper on this machine: training steps per second of Xception and Inception V3.

    python benchmarks/throughput.py                     # on CUDA if there is a GPU, else on the CPU; under two minutes
    python benchmarks/throughput.py --bench both --amp --torchcompile --results-file results/throughput.json

A training step is forward, cross-entropy, backward and an SGD update on one batch of photographs.  The variants:
"torch", the models on torch's own convolutions; "xsep", the same models with depthwise convolutions on xsep's kernels
(Inception V3 has none, so for it xsep changes nothing: its two rows show the noise of the measurement); "fused",
Xception of training blocks (``fused=True``), in inference prepared by ``xsep.fuse``; "compile" is torch's through
torch.compile.  They take turns, so that a slow moment of the machine hits them all.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import time
from pathlib import Path
from typing import Callable, Iterator, Sequence

import common
import photos
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import xsep
from xsep.ops import backends
from xsep.ops.problem import BlockProblem, Problem
from xsep.testing import assert_no_worse_than_torch

MODELS = ("xception", "inception_v3")
PAPER = {"xception": 28.0, "inception_v3": 31.0}  # steps per second of table 3, on 60 K80
CLASSES = 1000


def make_xception(variant: str) -> nn.Module:
    """Xception with depthwise convolutions of ``"xsep"`` or ``"torch"``, or ``"fused"``."""
    model = xsep.models.xception(num_classes=CLASSES, fused=variant == "fused")
    if variant == "torch":
        for module in model.modules():
            if type(module) is xsep.DepthwiseConv2d:
                module.__class__ = nn.Conv2d
    return model


def make_inception_v3(variant: str) -> nn.Module:
    from torchvision.models import inception_v3

    model = inception_v3(weights=None, aux_logits=False, init_weights=False, num_classes=CLASSES)
    return xsep.convert(model, report=None) if variant == "xsep" else model


MAKERS: dict[str, Callable[[str], nn.Module]] = {"xception": make_xception, "inception_v3": make_inception_v3}


class Run:
    """One variant of one model with its optimizer and its batch."""

    def __init__(self, name: str, variant: str, args: argparse.Namespace, x: Tensor, labels: Tensor):
        torch.manual_seed(args.seed)
        self.name, self.variant, self.x, self.labels = name, variant, x, labels
        model = MAKERS[name]("torch" if variant == "compile" else variant).to(args.device)
        if args.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.045, momentum=0.9, weight_decay=1e-5)
        self.module = model
        self.model = torch.compile(model) if variant == "compile" else model
        self.amp = torch.autocast(args.device, args.amp_dtype) if args.amp else contextlib.nullcontext()
        self.device = args.device

    def prepare(self, bench: str) -> None:
        self.module.train(bench == "train")
        if bench == "inference" and self.variant == "fused":
            # A copy: the parameters of a model that was prepared cannot be trained any more.
            self.model = self.module = xsep.fuse(copy.deepcopy(self.module), report=None)

    def train(self) -> None:
        self.accumulate(self.optimizer.zero_grad)
        self.optimizer.step()

    def accumulate(self, before_backward: Callable[[], None] = lambda: None) -> None:
        with self.amp:
            loss = F.cross_entropy(self.model(self.x), self.labels)
        before_backward()
        loss.backward()

    def inference(self) -> None:
        with torch.inference_mode(), self.amp:
            self.model(self.x)

    def timed(self, bench: str) -> float:
        step = getattr(self, bench)
        start = time.perf_counter()
        step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def peak_memory(self, bench: str) -> int | None:
        """Bytes that a step adds at its peak: allocated (CUDA) or resident (CPU, where Linux tells it).

        Gradients of the parameters are there before: of a training step, activations count.
        """
        gc.collect()
        xsep.empty_cache()
        step = self.accumulate if bench == "train" else self.inference
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            return torch.cuda.max_memory_allocated() - before
        with freed_memory_returned():
            try:
                Path("/proc/self/clear_refs").write_text("5")
                before = resident("VmRSS")
                step()
                return resident("VmHWM") - before
            except OSError:
                return None


@contextlib.contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Has glibc, where there is one, give freed memory to the system: what it held before, and what is freed inside."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, mmap_threshold = -1, -3  # of mallopt
        libc.mallopt(mmap_threshold, 128 << 10)
        libc.malloc_trim(0)
    except (OSError, AttributeError):
        yield
        return
    try:
        yield
    finally:  # the largest that glibc itself sets as large tensors are freed
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 64 << 20)


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise OSError(f"no {field} in /proc/self/status")


def check_numerics(args: argparse.Namespace) -> None:
    """Holds xsep's Xceptions against torch's in float64: their outputs, and the gradient of the input."""
    torch.manual_seed(args.seed)
    theirs = make_xception("torch").to(args.device).eval()
    exact = make_xception("torch").to(args.device).double().eval()
    exact.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 107, 107, device=args.device)
    if args.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)

    def results(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        y = model(x)
        return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]

    yours, truth = results(theirs, x), results(exact, x.double())
    for variant in ("xsep", "fused"):
        ours = make_xception(variant).to(args.device).eval()
        ours.load_state_dict(theirs.state_dict())
        mine = results(ours, x)
        for i, what in enumerate(("output", "gradient of the input")):
            assert_no_worse_than_torch(mine[i], yours[i], truth[i], f"{what} of Xception, {variant}")
    with torch.inference_mode():
        prepared = xsep.fuse(ours, report=None)(x)
    assert_no_worse_than_torch(prepared, yours[0], truth[0], "output of Xception, prepared by xsep.fuse")
    print("numerics: outputs and input gradients of xsep's Xceptions are as close to float64 as torch's\n")


def print_backends(args: argparse.Namespace) -> None:
    """The backends that cannot run here, each with its reason."""
    dtype = args.amp_dtype if args.amp else torch.float32
    sizes = (1, 728, 19, 19), (728, 1, 3, 3)
    problem = Problem(args.device, dtype, args.channels_last, *sizes, (1, 1), (1, 1, 1, 1), (1, 1))
    chosen = backends.choose(problem)
    print(f"backend: {chosen.name}")
    block = BlockProblem(problem, 728, True, None)
    for what, backward in (("forward", False), ("backward", True)):
        reason = backends.why_not_block(block, chosen, backward)
        print(f"  blocks {what}: {'one kernel' if reason is None else f'composed, {reason}'}")
    for name in backends.NAMES:
        reason = backends.BACKENDS[name].why_not(problem)
        if reason:
            print(f"  not {name}: {reason}")
    print()


def measure(runs: list[Run], bench: str, args: argparse.Namespace) -> list[dict]:
    """A row per run, from interleaved steps."""
    memory: dict[Run, int | None] = dict.fromkeys(runs)
    samples: dict[Run, list[float]] = {run: [] for run in runs}
    for run in runs:
        run.prepare(bench)
    rounds = args.num_warm_iter + args.num_bench_iter
    with tqdm(total=rounds * len(runs), desc=bench, unit="step", disable=None) as progress:
        for i in range(rounds):
            # The first step allocates what stays, and should leave no holes in the heap for the second to fill.
            with freed_memory_returned() if i == 0 else contextlib.nullcontext():
                for run in runs:
                    if i == 1 < args.num_warm_iter:
                        memory[run] = run.peak_memory(bench)
                    elif i < args.num_warm_iter:
                        run.timed(bench)
                    else:
                        samples[run].append(run.timed(bench))
                    progress.update()
    medians = {(run.name, run.variant): common.times(samples[run]).median for run in runs}
    rows = []
    for run in runs:
        found = common.times(samples[run])
        rows.append(
            {
                "bench": bench,
                "model": run.name,
                "variant": run.variant,
                "parameters": run.parameters,
                "steps_per_s": 1 / found.median,
                "images_per_s": args.batch_size / found.median,
                "ms": found.median * 1e3,
                "spread": found.spread,
                "peak_memory_mb": None if memory[run] is None else memory[run] / 1e6,  # type: ignore[operator]
                "ratio_to_torch": medians[run.name, "torch"] / found.median,
            }
        )
    return rows


def print_table(rows: list[dict], bench: str) -> None:
    print(f"\n{'training' if bench == 'train' else 'inference'}")
    print(
        f"  {'model':13s} {'variant':8s} {'parameters':>11s} {'steps/s':>8s} {'images/s':>8s} {'ms':>8s} "
        f"{'spread':>6s} {'peak MB':>8s} {'/ torch':>7s}"
    )
    for row in rows:
        memory = "n/a" if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']:.0f}"
        print(
            f"  {row['model']:13s} {row['variant']:8s} {row['parameters']:11,d} {row['steps_per_s']:8.3f} "
            f"{row['images_per_s']:8.2f} {row['ms']:8.1f} {row['spread']:6.1%} {memory:>8s} "
            f"{row['ratio_to_torch']:7.2f}"
        )
    best = best_of_torch(rows, "inception_v3")
    for row in rows:
        if row["model"] == "xception" and best is not None:
            ratio = row["steps_per_s"] / best["steps_per_s"]
            print(f"  Xception {row['variant']} / torch's best Inception V3: {ratio:.3f}", end="")
            print(f"   (paper, training on 60 K80: 28 / 31 = {28 / 31:.3f})" if bench == "train" else "")


def best_of_torch(rows: list[dict], model: str) -> dict | None:
    """torch's fastest variant of a model."""
    mine = [row for row in rows if row["model"] == model and row["variant"] in ("torch", "compile")]
    return max(mine, key=lambda row: row["steps_per_s"], default=None)


def print_targets(rows: list[dict], bench: str, products: float | None, args: argparse.Namespace) -> None:
    """What the training block is to reach on a CPU, and what was measured."""
    found = {(row["model"], row["variant"]): row for row in rows}
    fused, eager = found.get(("xception", "fused")), found.get(("xception", "torch"))
    theirs, inception = best_of_torch(rows, "xception"), best_of_torch(rows, "inception_v3")
    if fused is None or eager is None or theirs is None:
        return
    half = args.amp
    targets = []
    if bench == "train":
        speed = fused["steps_per_s"]
        targets.append(("steps/s of torch's best Xception", speed / theirs["steps_per_s"], 1.35 if half else 1.6, True))
        if inception is not None:
            targets.append(("steps/s of torch's best Inception V3", speed / inception["steps_per_s"], 0.9, True))
        if products is not None:
            targets.append(("time of its matrix products alone", fused["ms"] / 1e3 / products, 1.15, False))
        if fused["peak_memory_mb"] is not None:
            memory = fused["peak_memory_mb"] / eager["peak_memory_mb"]
            targets.append(("peak memory of torch's step, eager", memory, 0.45, False))
    else:
        targets.append(("steps/s of torch, eager", fused["ratio_to_torch"], 1.5, True))
        if theirs is not eager:
            targets.append(("steps/s of torch.compile", fused["steps_per_s"] / theirs["steps_per_s"], 1.0, True))
    print("\n  Xception fused, in multiples of      measured  target")
    for what, value, target, at_least in targets:
        met = "met" if (value >= target) == at_least else "missed"
        print(f"  {what:36s} {value:8.2f}  {'>=' if at_least else '<='} {target:.2f}  {met}")


def products_alone(args: argparse.Namespace) -> float:
    """Seconds of the pointwise products of a training step of Xception, each by the faster of torch's two ways."""
    import pointwise

    dtype, total = args.amp_dtype if args.amp else torch.float32, 0.0
    for C, K, extent, times in tqdm(pointwise.layers(args.img_size), desc="products", leave=False, disable=None):
        total += times * min(t.median for t in pointwise.measure(C, K, extent, args.batch_size, dtype).values())
    return total


def plot(rows: list[dict], path: Path) -> None:
    """Steps per second as bars, a panel per kind of step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    benches = list(dict.fromkeys(row["bench"] for row in rows))
    figure, panels = plt.subplots(1, len(benches), figsize=(5 * len(benches), 4), squeeze=False)
    for axes, bench in zip(panels[0], benches):
        mine = [row for row in rows if row["bench"] == bench]
        names = [f"{row['model']}\n{row['variant']}" for row in mine]
        colors = [{"fused": "C0", "xsep": "C9"}.get(row["variant"], "C7") for row in mine]
        axes.bar(names, [row["steps_per_s"] for row in mine], color=colors)
        axes.set(title=bench, ylabel="steps per second")
        axes.tick_params(axis="x", labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--bench", choices=("train", "inference", "both"), default="train", help="default: train")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: both")
    add("--batch-size", type=int, help="default: 4 on a CPU, 32 on CUDA")
    add("--img-size", type=int, default=299, help="height and width of the images (default 299)")
    add("--channels-last", action=argparse.BooleanOptionalAction, default=True, help="memory format (default: yes)")
    add("--amp", action="store_true", help="autocast, to --amp-dtype")
    add("--amp-dtype", choices=("bfloat16", "float16"), default="bfloat16", help="default: bfloat16")
    add("--torchcompile", action="store_true", help="a third variant: torch's, through torch.compile")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if torch can use a GPU")
    add(
        "--num-warm-iter",
        type=int,
        default=3,
        help="steps before timing, of each variant (default 3; the second for memory)",
    )
    add("--num-bench-iter", type=int, default=5, help="timed steps of each variant (default 5)")
    add("--layers", action="store_true", help="also time each depthwise layer of Xception (see layers.py)")
    add(
        "--data", type=Path, metavar="DIR", help="a folder of photographs; default: those of scikit-image, scikit-learn"
    )
    add("--synthetic", action="store_true", help="noise in place of photographs")
    add("--results-file", type=Path, help="written when done")
    add("--results-format", choices=("json", "csv"), default="json", help="default: json")
    add("--plot", type=Path, metavar="FILE", help="steps per second as an image")
    add("--seed", type=int, default=0, help="of weights, crops and labels (default 0)")
    args = parser.parse_args(arguments)
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        common.fail("--device cuda: torch finds no GPU that it can use")
    if args.batch_size is None:
        args.batch_size = 32 if args.device == "cuda" else 4
    for flag, minimum in (("batch_size", 2), ("img_size", 75), ("num_warm_iter", 1), ("num_bench_iter", 1)):
        if getattr(args, flag) < minimum:
            common.fail(f"--{flag.replace('_', '-')} must be at least {minimum}; got {getattr(args, flag)}")
    if args.data and args.synthetic:
        common.fail("--data and --synthetic exclude each other")
    if args.layers and args.device != "cpu":
        common.fail("--layers times the CPU's kernels; it needs --device cpu")
    args.amp_dtype = common.DTYPES[args.amp_dtype]
    return args


def make_runs(args: argparse.Namespace) -> list[Run]:
    """Every variant of every model, on one batch."""
    if args.synthetic:
        x = photos.noise(args.batch_size, args.img_size, args.seed)
    else:
        images = photos.folder(args.data) if args.data else photos.shipped()
        x = photos.batch(images, args.batch_size, args.img_size, args.seed)
    x = x.to(args.device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    labels = torch.randint(CLASSES, (args.batch_size,), generator=torch.Generator().manual_seed(args.seed))
    labels = labels.to(args.device)
    variants = ["fused", "xsep", "torch"] + (["compile"] if args.torchcompile else [])
    return [
        Run(name, variant, args, x, labels)
        for name in args.models
        for variant in variants
        if (name, variant) != ("inception_v3", "fused")
    ]


def main() -> None:
    args = parse()
    found = common.header(
        args.device,
        dtype=f"autocast to {args.amp_dtype}" if args.amp else "float32",
        layout="channels_last" if args.channels_last else "contiguous",
        batch=f"{args.batch_size} x 3 x {args.img_size} x {args.img_size}",
    )
    common.print_header(found)
    print_backends(args)
    if "xception" in args.models:
        check_numerics(args)
    runs = make_runs(args)
    rows = []
    for bench in ("train", "inference") if args.bench == "both" else (args.bench,):
        measured = measure(runs, bench, args)
        print_table(measured, bench)
        if args.device == "cpu" and "xception" in args.models:
            print_targets(measured, bench, products_alone(args) if bench == "train" else None, args)
        rows += measured
    if args.layers:
        import layers

        print()
        layers.measure_all(["xception"], [args.batch_size], ["nhwc" if args.channels_last else "nchw"])
    if args.results_file:
        common.write_results(args.results_file, args.results_format, found, rows)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
