"""The ``triton`` backend: kernels that Triton compiles for the card at hand, NVIDIA's or AMD's, at their first use.

Under ``TRITON_INTERPRET=1`` it takes tensors of the CPU instead, through Triton's interpreter: for tests.
"""

from __future__ import annotations

import hashlib
import importlib
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..triton import configs, tuning
from .compiled import DGRAD, DGRAD_WGRAD, DTYPES, FPROP, PASSES, WGRAD, readable
from .problem import BlockProblem, Problem

_OLDEST = (3, 3)  # tuples in loops
_INTERPRETED_MULTIPROCESSORS = 2  # so that small tests have partial results to sum


class Card(NamedTuple):
    """What configurations depend on."""

    name: str
    arch_name: str
    multiprocessors: int


@lru_cache(maxsize=1)
def _launch() -> tuple[Any, str]:
    """The module that launches the kernels, or None and why there is none."""
    try:
        triton = importlib.import_module("triton")
    except Exception as error:  # a broken installation raises anything
        return None, f"Triton did not load: {error} (pip install triton)"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST:
        return None, f"it needs Triton {_OLDEST[0]}.{_OLDEST[1]} or newer, not {triton.__version__}"
    return importlib.import_module("xsep.triton.launch"), ""


class TritonBackend:
    """The maps of ``backends.FusedBackend``.

    ``tunes`` is False where configurations are the model's: in the self-test, and ``traced`` by a compiler.
    """

    name = "triton"
    family, block_family = "depthwise_triton", "block_triton"

    def __init__(self, choices: tuning.Choices, tunes: bool = True, traced: bool = False):
        self.choices, self._tunes, self._traced = choices, tunes, traced

    def why_not(self, problem: Problem) -> str | None:
        return self.why_not_kind(problem.device, problem.dtype, problem.device_index) or _why_not_sizes(problem)

    def why_not_kind(self, device: str, dtype: torch.dtype, index: int) -> str | None:
        """Why no problem of a device and dtype runs, whatever its sizes."""
        reason = self.why_absent()
        if reason is not None:
            return reason
        if device != self.device:
            where = "the CPU, under TRITON_INTERPRET=1" if self.device == "cpu" else "a GPU"
            return f"its tensors live on {where}, not on {device}"
        if dtype not in DTYPES:
            return f"it has no kernels for {dtype}"
        if self.device == "cpu":
            return "Triton's interpreter truncates to bfloat16" if dtype == torch.bfloat16 else None
        return self.why_not_card(max(index, 0)) or _why_failed(self, self.family, dtype, max(index, 0))

    def why_absent(self) -> str | None:
        """Why this installation does not have the backend."""
        return _launch()[1] or None

    def why_not_card(self, index: int) -> str | None:
        if self.device == "cpu":
            return None
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            return f"torch finds no GPU {index}"
        if torch.version.hip is None and torch.cuda.get_device_capability(index) < (7, 5):
            return f"Triton compiles for sm_75 and newer, not for {self.card(index).arch_name}"
        return None

    @property
    def device(self) -> str:
        """Where its tensors are."""
        module = _launch()[0]
        return "cpu" if module is not None and module.INTERPRETED else "cuda"

    def card(self, index: int) -> Card:
        return _card(index if self.device == "cuda" else -1)

    def kernel(self, problem: Problem, pass_: int = FPROP, relu: bool | None = None) -> str:
        """The kernels' name.  Raises ``ValueError`` if they do not take the problem."""
        reason = self.why_not(problem)
        if reason is not None:
            raise ValueError(reason)
        return self.family

    def fprop(self, p: Problem, x: Tensor, w: Tensor, bias: Tensor | None, on_load=None) -> Tensor:
        x = readable(x, p)
        return self._run(p, FPROP, on_load, lambda *how: _launch()[0].fprop(p, x, w, bias, on_load, *how))

    def dgrad(self, p: Problem, dy: Tensor, w: Tensor) -> Tensor:
        return self._backward(p, DGRAD, dy, None, w, None)[0]

    def wgrad(self, p: Problem, dy: Tensor, x: Tensor, on_load=None) -> Tensor:
        return self._backward(p, WGRAD, dy, x, None, on_load)[1]

    def dgrad_wgrad(self, p: Problem, dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        if not _launch()[0].one_pass(p):
            return self.dgrad(p, dy, w), self.wgrad(p, dy, x)
        return self._backward(p, DGRAD_WGRAD, dy, x, w, None)[:2]

    def dgrad_wgrad_on_load(self, p: Problem, dy: Tensor, x: Tensor, w: Tensor, on_load):
        """(dx, dw, dscale, dshift) through ``on_load``; the gradient of center is ``-scale * dshift``."""
        if _launch()[0].one_pass(p):
            dx, dw, sums = self._backward(p, DGRAD_WGRAD, dy, x, w, on_load)
        else:
            dx, _, sums = self._backward(p, DGRAD, dy, x, w, on_load)
            dw = self.wgrad(p, dy, x, on_load)
        return dx, dw, sums[0], sums[1]

    def why_not_block(self, b: BlockProblem, backward: bool) -> str | None:
        weighed = configs.why_not_gradients_fused if backward else configs.why_not_fused
        return self._why_no_blocks(b) or weighed(b)

    def block(self, b: BlockProblem, x: Tensor, w_dw: Tensor, w_pw: Tensor, on_load, statistics: bool):
        """(y, mean, m2), the last two empty without ``statistics``."""
        config = configs.INTERPRETED_BLOCK if self.device == "cpu" else configs.block_config(b)
        x = readable(x, b.depthwise)
        return self._run_block(b, lambda launch: launch.block(b, x, w_dw, w_pw, on_load, statistics, config))

    def block_backward(self, b: BlockProblem, dy, dmean, dm2, y, mean, x: Tensor, w_dw: Tensor, w_pw: Tensor, on_load):
        """(dx, dw_dw, dw_pw, dscale, dshift), the last two None without ``on_load``."""
        config = configs.INTERPRETED_GRADIENTS if self.device == "cpu" else configs.gradients_config(b)
        x = readable(x, b.depthwise)
        tensors = dy, dmean, dm2, y, mean, x, w_dw, w_pw, on_load
        multiprocessors = self.card(max(b.depthwise.device_index, 0)).multiprocessors
        return self._run_block(b, lambda launch: launch.block_backward(b, *tensors, config, multiprocessors))

    def why_not_block_inference(self, b: BlockProblem) -> str | None:
        return self._why_no_blocks(b) or configs.why_not_fused(b, inference=True)

    def block_inference(
        self, b: BlockProblem, x: Tensor, w_dw: Tensor, w_pw: Tensor, w_dw_bias, bias, residual, out_activation
    ) -> Tensor:
        config = configs.INTERPRETED_BLOCK if self.device == "cpu" else configs.block_config(b)
        tensors = readable(x, b.depthwise), w_dw, w_pw, w_dw_bias, bias, residual
        return self._run_block(b, lambda launch: launch.block_inference(b, *tensors, out_activation, config))

    def _why_no_blocks(self, b: BlockProblem) -> str | None:
        """Why it makes none for a dtype on a card."""
        index = max(b.depthwise.device_index, 0)
        if self.card(index).arch_name == "sm_75":
            return "Triton does not use the tensor cores of sm_75"
        return _why_failed(self, self.block_family, b.depthwise.dtype, index) if self.device == "cuda" else None

    def _run_block(self, b: BlockProblem, run):
        index = max(b.depthwise.device_index, 0)
        if self.device == "cuda" and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                return run(_launch()[0])
        return run(_launch()[0])

    def traced(self) -> TritonBackend:
        """This backend in an operator that compilation sees through."""
        return TritonBackend(self.choices, tunes=False, traced=True)

    def _backward(self, p: Problem, pass_: int, dy: Tensor, x: Tensor | None, w: Tensor | None, on_load):
        dy, x = readable(dy, p), None if x is None else readable(x, p)
        launch = _launch()[0]
        return self._run(p, pass_, on_load, lambda *how: launch.backward(p, pass_, dy, x, w, on_load, *how))

    def _run(self, p: Problem, pass_: int, on_load, run):
        if self.device == "cpu":
            return run(configs.INTERPRETED, _INTERPRETED_MULTIPROCESSORS)
        index = max(p.device_index, 0)
        card = _card(index)
        if self._traced:
            config = configs.ordered(p, pass_, card.multiprocessors)[0]
            return run(config, card.multiprocessors, _launch()[0].start_traced)
        if index != torch.cuda.current_device():
            with torch.cuda.device(index):
                return self._run(p, pass_, on_load, run)

        def start(config: configs.Config):
            return run(config, card.multiprocessors)

        if self._tunes and tuning.may_time():
            config = self.choices.choose(p, pass_, on_load is not None, card.name, card.multiprocessors, start)
        else:
            config = _first(p, pass_, card.multiprocessors)
        return start(config)

    # What the self-test asks of a backend.

    def families(self, dtype: torch.dtype) -> list[str]:
        return [self.family]

    def block_families(self, dtype: torch.dtype) -> list[str]:
        return [self.block_family]

    def only(self, family: str) -> TritonBackend:
        return TritonBackend(self.choices, tunes=False)

    def binary(self) -> str:
        import triton

        sources = b"".join(path.read_bytes() for path in sorted(Path(tuning.__file__).parent.glob("*.py")))
        return f"{hashlib.sha256(sources).hexdigest()[:16]} by Triton {triton.__version__}"

    def runtime(self) -> str:
        return f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"

    def origin(self) -> str:
        return f"{Path(tuning.__file__).parent} ({self.binary()})"


@lru_cache(maxsize=4096)
def _first(p: Problem, pass_: int, multiprocessors: int) -> configs.Config:
    return configs.ordered(p, pass_, multiprocessors)[0]


@lru_cache(maxsize=64)
def _card(index: int) -> Card:
    if index < 0:
        return Card("Triton's interpreter", "none", _INTERPRETED_MULTIPROCESSORS)
    found = torch.cuda.get_device_properties(index)
    arch = getattr(found, "gcnArchName", None) if torch.version.hip else f"sm_{found.major}{found.minor}"
    return Card(found.name, str(arch), found.multi_processor_count)


@lru_cache(maxsize=64)
def _why_failed(backend: TritonBackend, family: str, dtype: torch.dtype, index: int) -> str | None:
    from .. import selftest  # it runs this backend

    if family in selftest.known_failures(backend, dtype, index):
        return f"it failed in 'python -m xsep.selftest --backend triton' for {dtype} on this card"
    return None


def _why_not_sizes(p: Problem) -> str | None:
    extents = (p.x[2] + sum(p.pad[:2]) + p.y[2], p.x[3] + sum(p.pad[2:]) + p.y[3])
    if max(extents) >= 2**31 - 2**16:
        return "a padded extent is beyond 32 bits"
    for pass_ in range(len(PASSES)):
        for config in configs.candidates(p, pass_):
            grid = configs.grid(p, pass_, config, 1)
            if p.x[0] * grid.strips * grid.q_blocks * grid.c_blocks >= 2**31 - 2**16:
                return "it would take more than 2^31 programs"
    return None


BACKEND = TritonBackend(tuning.Choices())
