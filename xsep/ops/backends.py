"""Which implementation answers a call: a pure function of device, dtype and shape that can say why not.

The backends of a device are tried in order; the first whose ``why_not`` returns ``None`` runs.  ``with backend(name):``
or the environment variable ``XSEP_BACKEND`` forces one; a problem it cannot take then raises.  On a GPU where
``torch.backends.cudnn.benchmark`` is set and none is forced, the choice is by timing instead (``tuning.py``).
"""

from __future__ import annotations

import os
import warnings
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, Iterator, Protocol

import torch
from torch import Tensor

from . import aten, cpu, cuda, triton, tuning
from .problem import BlockProblem, Problem, check_sizes

NAMES = ("cpu", "cuda", "cuda-emulated", "triton", "aten")


class Backend(Protocol):
    """A set of implementations of the maps.  Tensors come checked; outputs are dense in ``p.memory_format``.

    ``on_load`` is (center, scale, shift, relu): u = relu(scale * (x - center) + shift) takes the place of x, padding
    being zeros of u.  The vectors hold C numbers of float32 (float64 for float64).  ``dgrad_wgrad_on_load`` makes
    (dx, dw, dscale, dshift); the gradient of center is ``-scale * dshift``.
    """

    name: str

    def why_not(self, problem: Problem) -> str | None: ...
    def fprop(self, p: Problem, x: Tensor, w: Tensor, bias: Tensor | None, on_load=None) -> Tensor: ...
    def dgrad(self, p: Problem, dy: Tensor, w: Tensor) -> Tensor: ...
    def wgrad(self, p: Problem, dy: Tensor, x: Tensor) -> Tensor: ...
    def dgrad_wgrad(self, p: Problem, dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]: ...
    def dgrad_wgrad_on_load(self, p: Problem, dy: Tensor, x: Tensor, w: Tensor, on_load) -> tuple[Tensor, ...]: ...


class FusedBackend(Backend, Protocol):
    """A backend that makes some training blocks (``block.py``) in one go: u and z are not stored.

    ``block`` makes (y, mean, m2), the last two empty without ``statistics``.  ``block_backward`` makes
    (dx, dw_dw, dw_pw, dscale, dshift), the last two None without ``on_load``.  Of dy, dmean and dm2 some may be None; y
    and mean are None where no statistics were made.  ``block_inference`` makes y of ``inference.py``.
    """

    def why_not_block(self, b: BlockProblem, backward: bool) -> str | None: ...
    def block(self, b: BlockProblem, x: Tensor, w_dw: Tensor, w_pw: Tensor, on_load, statistics: bool): ...
    def block_backward(self, b: BlockProblem, dy, dmean, dm2, y, mean, x: Tensor, w_dw, w_pw, on_load): ...
    def why_not_block_inference(self, b: BlockProblem) -> str | None: ...
    def block_inference(
        self, b: BlockProblem, x: Tensor, w_dw: Tensor, w_pw: Tensor, w_dw_bias, bias, residual, out_activation
    ) -> Tensor: ...


BACKENDS: dict[str, Any] = {  # a module stands in for a Backend
    "cpu": cpu.BACKEND,
    "cuda": cuda.CUDA,
    "cuda-emulated": cuda.EMULATED,
    "triton": triton.BACKEND,
    "aten": aten,
}

_ORDER = {"cpu": ("cpu", "aten"), "cuda": ("cuda", "triton", "aten")}
_forced: str | None = None


def _known(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}; got {name!r}")
    return name


if os.environ.get("XSEP_BACKEND"):
    _forced = _known(os.environ["XSEP_BACKEND"], "XSEP_BACKEND")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces a backend for every thread of the process (backward may run in another) while the context is open.

    ``name`` is one of ``cpu``, ``cuda``, ``cuda-emulated``, ``triton``, ``aten``; another raises ``ValueError``.  An
    operator that the forced backend cannot take raises ``RuntimeError`` with the reason.
    """
    global _forced
    before, _forced = _forced, _known(name, "backend")
    try:
        yield
    finally:
        _forced = before


def forced() -> str | None:
    """The name of the backend that is forced."""
    return _forced


def choose(problem: Problem) -> Backend:
    """The backend that runs ``problem``.  Raises ``ValueError`` for sizes that do not fit together."""
    chosen = _choose(problem, _forced)
    return TIMED if _forced is None and tuning.wanted(problem) else chosen


def why_not_block(b: BlockProblem, chosen: Backend, backward: bool) -> str | None:
    """Why the backend that was chosen for the depthwise maps composes a block of them, or None: it has a kernel."""
    ask = getattr(chosen, "why_not_block", None)
    return ask(b, backward) if ask else "it has no kernels for blocks"


def why_not_block_inference(b: BlockProblem, chosen: Backend) -> str | None:
    """The same for the block of a trained network (``inference.py``)."""
    ask = getattr(chosen, "why_not_block_inference", None)
    return ask(b) if ask else "it has no kernels for blocks in inference"


@lru_cache(maxsize=4096)
def _choose(problem: Problem, forced: str | None) -> Backend:
    check_sizes(*problem[3:8])
    if forced is not None:
        reason = BACKENDS[forced].why_not(problem)
        if reason is not None:
            raise RuntimeError(f"backend {forced!r} is forced but cannot run {problem}: {reason}")
        return BACKENDS[forced]
    order = _ORDER.get(problem.device, ("aten",))
    for name in order:
        if BACKENDS[name].why_not(problem) is None:
            break
    if name == "aten" and order[0] != "aten":
        _warn_once(problem.device, problem.dtype, BACKENDS[order[0]].why_not(problem))
    return BACKENDS[name]


def compiled_by_triton(device: str, dtype: torch.dtype, index: int) -> bool:
    """Whether Triton runs all operators of a device and dtype: compilers see through them then."""
    if device != "cuda" or BACKENDS["triton"].why_not_kind(device, dtype, index) is not None:
        return False
    if _forced is not None:
        return _forced == "triton"
    return BACKENDS["cuda"].why_not_kind(device, dtype, index) is not None


def candidates(problem: Problem, pass_: int) -> dict[str, Any]:
    """Everything that can run a pass on the problem's device, by name: each kernel family is one."""
    found: dict[str, Any] = {}
    for name in _ORDER.get(problem.device, ("aten",)):
        if BACKENDS[name].why_not(problem) is None:
            families = getattr(BACKENDS[name], "candidates", None)
            found.update(families(problem, pass_) if families else {name: BACKENDS[name]})
    return found


TIMED = tuning.TimedBackend(candidates, lambda problem: _choose(problem, None))


def _choice_changes() -> None:
    _choose.cache_clear()
    TIMED.forget_chosen()


for _backend in (cuda.CUDA, cuda.EMULATED):
    _backend.choice_changes = _choice_changes


def save_choices(path: str | os.PathLike) -> None:
    """Writes what ``torch.backends.cudnn.benchmark`` made xsep measure to a JSON file, for ``load_choices``.

    A choice belongs to a pass of a problem (sizes, dtype, layout) on a model of card.  Raises ``OSError``.
    """
    TIMED.save(path)


def load_choices(path: str | os.PathLike) -> None:
    """Adds the choices of a file that ``save_choices`` wrote, so that they need not be measured again.

    Raises ``OSError``, or ``ValueError`` for another kind of file.  Choices that other versions of xsep or torch
    measured are left aside with a warning.
    """
    TIMED.load(path)


@cache
def _warn_once(device: str, dtype: torch.dtype, reason: str | None) -> None:
    warnings.warn(f"xsep runs torch's own kernels for {dtype} on {device}: {reason}", stacklevel=2)


def explain_problem(problem: Problem) -> str:
    """A line per backend: which one runs ``problem``, and why the others do not."""
    lines = [str(problem)]
    chosen: str | None = None
    try:
        chosen = _choose(problem, _forced).name
    except RuntimeError as error:
        lines.append(f"  raises: {error}")
    order = _ORDER.get(problem.device, ("aten",))
    for name in NAMES:
        reason = BACKENDS[name].why_not(problem)
        if name == chosen:
            kernel = getattr(BACKENDS[name], "kernel", None)
            reason = "runs" + (" (forced)" if _forced else "") + (f": {kernel(problem)}" if kernel else "")
        elif reason is None:
            reason = "could run, but another is forced" if _forced else f"could run; comes after {chosen}"
            if not _forced and name not in order:
                reason = "could run if forced"
        lines.append(f"  {name:14s} {reason}")
    if _forced is None and tuning.wanted(problem):
        lines.append("  but torch.backends.cudnn.benchmark is set: what was fastest when a pass was first seen runs")
        lines.extend(TIMED.explain(problem))
    return "\n".join(lines)


def explain_block(b: BlockProblem) -> str:
    """``explain_problem`` of the depthwise convolution, and whether its backend makes a block of it in one go."""
    lines = [explain_problem(b.depthwise)]
    try:
        chosen = choose(b.depthwise)
    except RuntimeError:
        return lines[0]
    lines.append(f"its block: {b.K} channels, {b.activation or 'nothing'} between the convolutions, on {chosen.name}")
    reasons = {}
    if b.activation != "relu6":  # which training does not have
        reasons = {"forward": why_not_block(b, chosen, False), "backward": why_not_block(b, chosen, True)}
    if b.activation != "elu":  # which inference does not have
        reasons["inference"] = why_not_block_inference(b, chosen)
    for name, reason in reasons.items():
        lines.append(f"  {name:14s} " + ("runs in one go" if reason is None else f"is composed: {reason}"))
    return "\n".join(lines)
