"""``python -m xsep.selftest``: every CUDA or Triton kernel of this installation against float64, on the card at hand.

The ``cuda`` backend runs the part for a dtype before a card's first problem of it, in a process of its own, and keeps
the verdict in ``$XDG_CACHE_HOME/xsep``, for this binary, card and driver.  A kernel family that fails is switched off
with a warning.  ``XSEP_SKIP_SELFTEST=1`` trusts all.  The ``triton`` backend heeds a verdict
of this program, and runs nothing of its own accord: compiling all cases takes minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ._files import cache_folder, write_json
from .ops import aten
from .ops.backends import BACKENDS
from .ops.compiled import DTYPES, PASSES
from .ops.cuda import CudaBackend
from .ops.problem import BlockProblem, Problem
from .shapes import NAMED, Shape

_SPECIALISED = {
    f"{k}x{k}_stride{s}": Shape(2, 24, 13, 18, k, k, 1, (s, s), (k // 2,) * 4) for k in (3, 5, 7) for s in (1, 2)
}
_DILATED = Shape(1, 24, 15, 14, 5, 5, 1, (1, 1), (4, 4, 4, 4), (2, 2))
_OTHERS = (
    *("c_lt_tile", "c_not_multiple_of_tile", "q_gt_tile", "13x13", "1x7", "4x2", "stride2_even_tf_same", "stride3"),
    *("mixed_strides", "dilated_stride2", "multiplier_stride2", "pad_ge_kernel", "batch_0"),
)
_ONE_PIXEL = Shape(2, 24, 1, 1, 3, 3, pad=(1, 1, 1, 1))
SHAPES = {
    **_SPECIALISED,
    "5x5_dilated": _DILATED,
    "one_pixel": _ONE_PIXEL,
    **{name: NAMED[name] for name in _OTHERS},
}
# Beside the passes: the training block, and its inference form.
_BLOCK, _BLOCK_BACKWARD, _BLOCK_INFERENCE = _OF_BLOCKS = "block", "block_backward", "block_inference"
_BLOCK_CHANNELS = 40  # of its y
_LOST = 3  # exit status: a kernel has made the device unusable for its process
_lock = threading.Lock()
_ensured: dict[tuple[str, torch.dtype, int], list[str]] = {}  # the families that failed


class Result(NamedTuple):
    """A pass of a kernel family on every shape it takes."""

    family: str
    dtype: torch.dtype
    pass_: str
    cases: int
    worst: float  # error in units of what is allowed
    failure: str  # of the first case that failed, or empty


class Case(NamedTuple):
    """Tensors of numbers that every dtype holds exactly, and what the passes make of them in float64."""

    what: str
    problem: Problem
    on_load: tuple | None
    x: Tensor
    w: Tensor
    bias: Tensor
    dy: Tensor
    w_pw: Tensor
    block_gradients: list[Tensor]  # dy, dmean, dm2, y, mean of the block
    block_added: list[Tensor]  # w_dw_bias, bias, residual of its inference form
    truth: dict[str, list[tuple[Tensor, Tensor]]]  # of each output: its value, the sum of the sizes of its terms


class DeviceLost(RuntimeError):
    """A kernel of ``family`` left the device in a state in which nothing runs any more in this process."""

    def __init__(self, family: str, what: str, error: Exception):
        super().__init__(f"{what}: {error}")
        self.family = family


def check(
    backend: CudaBackend,
    dtype: torch.dtype,
    card: int = 0,
    without: Sequence[str] = (),
    begin: Callable[[str], None] = lambda family: None,
) -> list[Result]:
    """Holds every family of a dtype, but those of ``without``, against float64, one after another.

    Calls ``begin`` before each.  Raises ``DeviceLost``, and what went wrong on the device before.
    """
    device = torch.device(backend.device, card) if backend.device == "cuda" else torch.device("cpu")
    _synchronize(device)
    cases = [
        _case(name, shape, dtype, nhwc, with_on_load, device)
        for name, shape in SHAPES.items()
        for nhwc in (False, True)
        for with_on_load in (False, True)
    ]
    results = []
    for family in (name for name in _families(backend, dtype) if name not in without):
        begin(family)
        for name in _OF_BLOCKS if family in backend.block_families(dtype) else PASSES:
            result = Result(family, dtype, name, 0, 0.0, "")
            for case in cases:
                result = _checked(result, backend.only(family), name, case)
            results.append(result)
    return results


def _families(backend: Any, dtype: torch.dtype) -> list[str]:
    return [*backend.families(dtype), *backend.block_families(dtype)]


def _checked(so_far: Result, family: CudaBackend, name: str, case: Case) -> Result:
    if name not in case.truth or not _takes(family, name, case):
        return so_far
    try:
        with _NanFilledMemory():
            outputs = _outputs(family, name, case)
        _synchronize(case.x.device)
    except RuntimeError as error:
        try:
            _synchronize(case.x.device)
        except RuntimeError:
            raise DeviceLost(family.family, case.what, error) from error
        return so_far._replace(cases=so_far.cases + 1, failure=so_far.failure or f"{case.what}: {error}")
    worst, failure = so_far.worst, so_far.failure
    truth = case.truth[name]
    if name == _BLOCK:
        truth = [*truth, *_statistics(outputs[0].cpu().double())]
    for ours, (value, size) in zip(outputs, truth):
        ratio = (ours.cpu().double() - value).abs() / _allowed(ours.dtype, value, size)
        largest = ratio.max().item() if ratio.numel() else 0.0
        worst = max(worst, largest)
        if not largest <= 1 and not failure:  # NaN too
            at = tuple((~(ratio <= 1)).nonzero()[0].tolist())
            failure = f"{case.what}: {ours[at].item():.9g} instead of {value[at].item():.9g} at {at}"
    return so_far._replace(cases=so_far.cases + 1, worst=worst, failure=failure)


def _takes(family: Any, name: str, case: Case) -> bool:
    p = case.problem
    if name in _OF_BLOCKS and family.why_not_kind(p.device, p.dtype, p.device_index) is not None:
        return False
    if name == _BLOCK_INFERENCE:
        return family.why_not_block_inference(_block(case, "relu6")) is None
    if name in _OF_BLOCKS:
        return family.why_not_block(_block(case), name == _BLOCK_BACKWARD) is None
    try:
        family.kernel(p, PASSES.index(name), None if case.on_load is None else case.on_load[3])
    except ValueError:
        return False
    return True


def _block(case: Case, activation: str = "relu") -> BlockProblem:
    """Its activation, where there is a function on load; else none."""
    return BlockProblem(case.problem, _BLOCK_CHANNELS, case.on_load is not None, activation if case.on_load else None)


class _NanFilledMemory(TorchDispatchMode):
    """New tensors are NaN for this thread, so that an element which a kernel does not write shows."""

    _NEW = (torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_like)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in self._NEW:
            result.fill_(torch.nan if result.is_floating_point() else 255)
        return result


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _allowed(dtype: torch.dtype, value: Tensor, size: Tensor) -> Tensor:
    """Some roundings of the accumulation, one of the output."""
    accumulation = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return 16 * accumulation * size + torch.finfo(dtype).eps / 2 * value.abs() + torch.finfo(dtype).tiny


def _outputs(backend: CudaBackend, name: str, case: Case) -> tuple[Tensor, ...]:
    p, x, w, dy = case.problem, case.x, case.w, case.dy
    if name == _BLOCK:
        return backend.block(_block(case), x, w, case.w_pw, case.on_load, True)
    if name == _BLOCK_BACKWARD:
        dy, dmean, dm2, y, mean = case.block_gradients
        made = backend.block_backward(_block(case), dy, dmean, dm2, y, mean, x, w, case.w_pw, case.on_load)
        return tuple(t for t in made if t is not None)
    if name == _BLOCK_INFERENCE:
        b, (w_dw_bias, bias, residual) = _block(case, "relu6"), case.block_added
        return (backend.block_inference(b, x, w, case.w_pw, w_dw_bias, bias, residual, b.activation),)
    if name == "fprop":
        return (backend.fprop(p, x, w, case.bias, case.on_load),)
    if name == "dgrad":
        return (backend.dgrad(p, dy, w),)
    if name == "wgrad":
        return (backend.wgrad(p, dy, x, case.on_load),)
    if case.on_load is None:
        return backend.dgrad_wgrad(p, dy, x, w)
    return backend.dgrad_wgrad_on_load(p, dy, x, w, case.on_load)


def _case(name: str, shape: Shape, dtype: torch.dtype, nhwc: bool, with_on_load: bool, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(0)
    exact = Problem("cpu", torch.float64, nhwc, shape.x_sizes, shape.w_sizes, *shape.geometry)
    problem = exact._replace(device=device.type, dtype=dtype, device_index=-1 if device.index is None else device.index)

    def draw(*sizes: int) -> Tensor:
        return torch.randint(-16, 17, sizes, generator=generator, dtype=torch.float64) / 8

    def moved(t: Tensor, to: torch.dtype = dtype) -> Tensor:
        return t.to(device, to)

    def laid_out(t: Tensor) -> Tensor:
        # Not contiguous(), which leaves an image of one pixel with the strides that it has.
        t = moved(t)
        return torch.empty_like(t, memory_format=problem.memory_format).copy_(t)

    x, w, bias, dy = draw(*shape.x_sizes), draw(*shape.w_sizes), draw(shape.w_sizes[0]), draw(*exact.y)
    w_pw = draw(_BLOCK_CHANNELS, shape.w_sizes[0], 1, 1)
    vectors = [draw(shape.C) for _ in range(3)] if with_on_load else None
    on_load = None
    if vectors is not None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        on_load = (*(moved(v, wide) for v in vectors), True)
    truth = _truth(exact, x, w, bias, dy, vectors)
    gradients, added = [], []
    if shape.M == 1:  # blocks of others have no kernels
        like_y, like_mean = (shape.N, _BLOCK_CHANNELS, *exact.y[2:]), (_BLOCK_CHANNELS,)
        gradients = [draw(*sizes) / 64 for sizes in (like_y, like_mean, like_mean)]  # so that sums stay below 65504
        gradients += [draw(*like_y), draw(*like_mean)]
        truth[_BLOCK] = [_block_truth(exact, dtype, x, w, w_pw, vectors)]
        truth[_BLOCK_BACKWARD] = _block_backward_truth(exact, dtype, gradients, x, w, w_pw, vectors)
        added = [bias, draw(_BLOCK_CHANNELS), draw(*like_y)]
        truth[_BLOCK_INFERENCE] = [_block_inference_truth(exact, dtype, x, w, w_pw, added, with_on_load)]
    block_gradients = [laid_out(t) if t.dim() == 4 else moved(t, torch.float32) for t in gradients]
    return Case(
        f"{name} {'NHWC' if nhwc else 'NCHW'}{' on_load' if with_on_load else ''}",
        *(problem, on_load, laid_out(x), moved(w), moved(bias), laid_out(dy), moved(w_pw), block_gradients),
        *([laid_out(t) if t.dim() == 4 else moved(t) for t in added], truth),
    )


def _block_truth(p: Problem, dtype: torch.dtype, x: Tensor, w: Tensor, w_pw: Tensor, vectors) -> tuple[Tensor, Tensor]:
    """y of the block, with a ReLU between the convolutions where there is a function on load.

    Kernels may round what lies between the convolutions to the dtype: that counts as so many roundings of a sum.
    """
    if vectors is not None:
        x = _on_load(x, vectors)
    z, size = _rounded_z(p, dtype, x, w, math.inf if vectors is not None else None)
    return torch.nn.functional.conv2d(z, w_pw), torch.nn.functional.conv2d(size, w_pw.abs())


def _on_load(x: Tensor, vectors) -> Tensor:
    center, scale, shift = (v.view(1, -1, 1, 1) for v in vectors)
    return (scale * (x - center) + shift).relu()


def _rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2 / (16 * torch.finfo(torch.float32).eps)


def _rounded_z(p: Problem, dtype: torch.dtype, u: Tensor, w: Tensor, high, bias=None) -> tuple[Tensor, Tensor]:
    """z between 0 and ``high``, or as it is."""
    z, size = aten.fprop(p, u, w, bias), aten.fprop(p, u.abs(), w.abs(), bias if bias is None else bias.abs())
    z = z if high is None else z.clamp(0, high)
    return z, size + _rounding(dtype) * z.abs()


def _block_inference_truth(
    p: Problem, dtype: torch.dtype, x: Tensor, w: Tensor, w_pw: Tensor, added: list[Tensor], activated: bool
) -> tuple[Tensor, Tensor]:
    """y of the inference form, ``activated`` with a ReLU on load and ReLU6 after each convolution."""
    w_dw_bias, bias, residual = added
    z, size = _rounded_z(p, dtype, x.relu() if activated else x, w, 6 if activated else None, w_dw_bias)
    y = torch.nn.functional.conv2d(z, w_pw, bias) + residual
    size = torch.nn.functional.conv2d(size, w_pw.abs(), bias.abs()) + residual.abs()
    return y.clamp(0, 6) if activated else y, size


def _block_backward_truth(p: Problem, dtype: torch.dtype, gradients, x: Tensor, w: Tensor, w_pw: Tensor, vectors):
    """The gradients of x, w, w_pw [, scale and shift]; the gradients of y and of z may be rounded, as z."""
    dy, dmean, dm2, y, mean = (t.view(1, -1, 1, 1) if t.dim() == 1 else t for t in gradients)
    count, rounding = max(1, y.numel() // y.shape[1]), _rounding(dtype)
    deviations = y - mean
    whole = dy + dmean / count + 2 * deviations * dm2
    size = dy.abs() + dmean.abs() / count + 2 * (deviations * dm2).abs() + rounding * whole.abs()
    u = x if vectors is None else _on_load(x, vectors)
    z, z_size = _rounded_z(p, dtype, u, w, math.inf if vectors is not None else None)
    products = [(whole, z), (size, z.abs()), (whole.abs(), z_size)]
    dw_pw, *sizes = (torch.einsum("nkpq,ncpq->kc", *pair).view(w_pw.shape) for pair in products)
    dz, dz_size = (
        torch.einsum("nkpq,kc->ncpq", *pair) for pair in ((whole, w_pw[..., 0, 0]), (size, w_pw[..., 0, 0].abs()))
    )
    dz_size = dz_size + rounding * dz.abs()
    if vectors is not None:
        dz, dz_size = dz * (z > 0), dz_size * (z > 0)
    dx = aten.dgrad(p, dz, w), aten.dgrad(p, dz_size, w.abs())
    dw = aten.wgrad(p, dz, u), aten.wgrad(p, dz_size, u.abs())
    of_weights = [dw, (dw_pw, sum(sizes))]
    if vectors is None:
        return [dx, *of_weights]
    through, dscale, dshift = _through_on_load(dx, x, u, vectors)
    return [through, *of_weights, dscale, dshift]


def _through_on_load(du, x: Tensor, u: Tensor, vectors):
    """The gradients of x, scale and shift from that of u; each with the sums of the sizes of its terms."""
    center, scale, _ = (v.view(1, -1, 1, 1) for v in vectors)
    du = [t * (u > 0) for t in du]
    dscale = (du[0] * (x - center)).sum((0, 2, 3)), (du[1] * (x - center).abs()).sum((0, 2, 3))
    return (du[0] * scale, du[1] * scale.abs()), dscale, tuple(t.sum((0, 2, 3)) for t in du)


def _statistics(y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Mean and sum of squared deviations of a y as it was made, with the sums of the sizes of their terms."""
    count = max(1, y.numel() // y.shape[1])
    mean = y.sum((0, 2, 3)) / count
    return [
        (mean, y.abs().sum((0, 2, 3)) / count),
        ((y - mean.view(1, -1, 1, 1)).square().sum((0, 2, 3)), y.square().sum((0, 2, 3))),
    ]


def _truth(p: Problem, x: Tensor, w: Tensor, bias: Tensor, dy: Tensor, vectors) -> dict[str, list]:
    """The outputs of each pass, with the sums of the sizes of their terms."""

    def each(f, *tensors):
        return f(p, *tensors), f(p, *(t.abs() for t in tensors))

    dx = each(aten.dgrad, dy, w)
    if vectors is None:
        dw = each(aten.wgrad, dy, x)
        return {"fprop": [each(aten.fprop, x, w, bias)], "dgrad": [dx], "wgrad": [dw], "dgrad_wgrad": [dx, dw]}
    u = _on_load(x, vectors)
    through, dscale, dshift = _through_on_load(dx, x, u, vectors)
    dw = each(aten.wgrad, dy, u)
    return {"fprop": [each(aten.fprop, u, w, bias)], "wgrad": [dw], "dgrad_wgrad": [through, dw, dscale, dshift]}


def is_known(backend: CudaBackend, dtype: torch.dtype, card: int) -> bool:
    """Whether nothing would have to be run to know which kernels to trust."""
    skipped = os.environ.get("XSEP_SKIP_SELFTEST") == "1"
    return skipped or (backend.name, dtype, card) in _ensured or _read(backend, dtype, card) is not None


def known_failures(backend: Any, dtype: torch.dtype, card: int) -> list[str]:
    """The families that failed when the self-test was last run on a card; none if it never was."""
    return [] if os.environ.get("XSEP_SKIP_SELFTEST") == "1" else _read(backend, dtype, card) or []


def ensure(backend: CudaBackend, dtype: torch.dtype, card: int) -> None:
    """Sees to it that the kernels that passed are enabled and no others, by running them if no verdict is known."""
    key = backend.name, dtype, card
    if key in _ensured or os.environ.get("XSEP_SKIP_SELFTEST") == "1":
        return
    with _lock:
        if key in _ensured:
            return
        failed = _read(backend, dtype, card)
        if failed is None and backend.device == "cuda":
            failed = _in_child(backend, dtype, card)
        if failed is None:
            failed = record(backend, dtype, card, _aside(backend, dtype, card))
        _ensured[key] = failed
    for family in failed:
        backend.set_enabled(dtype, family, False)
    on_no_card = {family for known, each in _ensured.items() if known[:2] == key[:2] for family in each}
    for family in set(backend.families_off_at_first(dtype)).difference(on_no_card):
        backend.set_enabled(dtype, family, True)
    if failed:
        warnings.warn(
            f"xsep switches {', '.join(failed)} off for {dtype}: failed in the self-test on "
            f"{backend.card(card).name}. Other kernels take over. Please report what "
            f"'python -m xsep.selftest --backend {backend.name}' and 'python -m xsep.info' print",
            stacklevel=2,
        )


def _in_child(backend: CudaBackend, dtype: torch.dtype, card: int) -> list[str] | None:
    """The families that failed, found by another process; None if that could not be.

    A kernel that touches memory which is not its own takes the CUDA context with it, or the process: the other one's,
    then.  It is of the last family that the process began with, and a further process tests the rest.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        return None  # there is no interpreter to start
    root = str(Path(__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {root!r}); from xsep.selftest import main; sys.exit(main(sys.argv[1:]))"
    options = ["--backend", backend.name, "--device", str(card), "--dtypes", str(dtype).replace("torch.", "")]
    lost: list[str] = []
    while True:
        command = [sys.executable, "-c", code, *options, *(["--without", *lost] if lost else [])]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        except OSError:
            return lost or None
        if done.returncode in (0, 1):
            failed = _read(backend, dtype, card)
            return lost or None if failed is None else failed  # it cannot be kept, or the process did not get that far
        begun = re.findall(r"^testing (\w+)", done.stdout, re.MULTILINE)
        if not begun or begun[-1] in lost:
            return lost or None
        lost.append(begun[-1])


def _aside(backend: CudaBackend, dtype: torch.dtype, card: int) -> list[Result]:
    """``check`` in a thread of its own: the caller's modes, autocast, gradients and streams stay out of it."""
    with ThreadPoolExecutor(1, "xsep.selftest") as thread:
        return thread.submit(check, backend, dtype, card).result()


def record(
    backend: CudaBackend, dtype: torch.dtype, card: int, results: list[Result], without: Sequence[str] = ()
) -> list[str]:
    """Keeps the verdict for later processes; returns the families that failed, those of ``without`` among them."""
    failed = sorted({result.family for result in results if result.failure} | set(without))
    path = _verdicts()
    try:
        kept = _load(path)
        kept.setdefault(_key(backend, card), {})[str(dtype)] = failed
        write_json(path, kept)
    except OSError:
        pass  # the next process tests again
    return failed


def _read(backend: CudaBackend, dtype: torch.dtype, card: int) -> list[str] | None:
    verdict = _load(_verdicts()).get(_key(backend, card), {}).get(str(dtype))
    known = set(_families(backend, dtype))
    return verdict if isinstance(verdict, list) and known.issuperset(verdict) else None


def _load(path: Path) -> dict:
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _verdicts() -> Path:
    return cache_folder() / "selftest.json"


def _key(backend: Any, card: int) -> str:
    return f"{backend.binary()}, {backend.card(card).name}, {_driver(backend)}"


def _driver(backend: Any) -> str:
    try:
        version = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        version = "driver"
    return f"{version} for {backend.runtime()}"


def table(results: list[Result]) -> str:
    """A line per dtype and family, a column per pass: the number of cases and the largest error."""
    lines = [f"{'':11s}{'':27s}" + "".join(f"{name:>16s}" for name in (*PASSES, *_OF_BLOCKS))]
    for dtype, family in dict.fromkeys((result.dtype, result.family) for result in results):
        cells = []
        of_family = {r.pass_: r for r in results if (r.dtype, r.family) == (dtype, family)}
        for result in (of_family.get(name) for name in (*PASSES, *_OF_BLOCKS)):
            passed = f"{result.cases} ({result.worst:.2f})" if result and result.cases else "-"
            cells.append(f"{'FAILED' if result and result.failure else passed:>16s}")
        lines.append(f"{str(dtype).removeprefix('torch.'):11s}{family:27s}" + "".join(cells))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m xsep.selftest", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--backend", choices=("cuda", "cuda-emulated", "triton"), help="default: cuda if it can run here"
    )
    names = [str(dtype).replace("torch.", "") for dtype in DTYPES]
    parser.add_argument("--dtypes", nargs="+", choices=names, default=names)
    parser.add_argument("--device", type=int, default=0, help="index of the CUDA device")
    parser.add_argument("--without", nargs="+", default=[], metavar="FAMILY", help="kernel families that failed before")
    options = parser.parse_args(arguments)
    backend = BACKENDS[options.backend or ("cuda" if torch.cuda.is_available() else "cuda-emulated")]
    reason = backend.why_absent() or backend.why_not_card(options.device)
    if reason is not None:
        print(f"{backend.name} cannot run: {reason}", file=sys.stderr)
        return 2
    card = backend.card(options.device)
    print(f"{backend.name} on {card.name}, {card.arch_name}, {_driver(backend)}")
    print(backend.origin())
    results = []
    for dtype in (dtype for dtype, name in zip(DTYPES, names) if name in options.dtypes):
        without = [family for family in options.without if family in _families(backend, dtype)]
        begun: list[str] = []

        def begin(family: str, dtype=dtype, begun=begun) -> None:
            print(f"testing {family}, {dtype}", flush=True)
            begun.append(family)

        try:
            of_dtype = check(backend, dtype, options.device, without, begin)
        except DeviceLost as error:
            print(f"LOST {error.family}, {dtype}: {error}")
            not_run = [family for family in _families(backend, dtype) if family not in (*begun, *without)]
            print(f"not run, since nothing runs on the device any more: {', '.join(not_run) or 'nothing'}")
            print(f"'--without {' '.join((*without, error.family))}' tests without it.")
            return _LOST
        record(backend, dtype, options.device, of_dtype, without)
        results.extend(of_dtype)
    print(table(results))
    failures = [result for result in results if result.failure]
    for result in failures:
        print(f"FAILED {result.family}, {result.dtype}, {result.pass_}: {result.failure}")
    print("A cell: the number of cases, and the largest error in units of what is allowed.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
