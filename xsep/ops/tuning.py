"""Choice by timing, which ``torch.backends.cudnn.benchmark`` asks of xsep as it does of cuDNN.

When a pass of a problem is first seen, everything that can run it is timed on the tensors at hand: each kernel family,
and torch's own operators (cuDNN among them).  The fastest runs from then on.  What was measured can be kept in a file.
"""

from __future__ import annotations

import json
import os
import statistics
import warnings
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Callable, Iterable

import torch
from torch import Tensor

from .._files import write_json
from .._version import __version__
from .compiled import PASSES
from .problem import Problem

_FORMAT = "xsep choices"
_ROUNDS = 5
_ROUND_MS = 0.3  # of a candidate, at least, so that events resolve it

Times = dict[str, dict[str, dict[str, float]]]  # milliseconds by card, by pass and problem, by candidate


def cuda_milliseconds(calls: list[Callable[[], Any]]) -> list[float]:
    """The time of each call on the current stream: the median of interleaved rounds, all of them warmed up."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def round_of(call: Callable[[], Any], count: int) -> float:
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / count

    counts = []
    for call in calls:
        call()  # loads code and, in cuDNN, chooses an algorithm
        counts.append(max(1, min(50, round(_ROUND_MS / max(round_of(call, 1), 1e-3)))))
    rounds = [[round_of(*each) for each in zip(calls, counts)] for _ in range(_ROUNDS)]
    return [statistics.median(times) for times in zip(*rounds)]


class TimedBackend:
    """A backend that runs each pass by the fastest candidate, but with a function on load by the rule.

    ``candidates(problem, pass_)`` are the backends that could, by name; ``rule(problem)`` is the one that runs while a
    CUDA graph is captured, when nothing can be timed; ``clock`` is ``cuda_milliseconds`` or, for tests, another.
    """

    name = "timed"

    def __init__(
        self,
        candidates: Callable[[Problem, int], dict[str, Any]],
        rule: Callable[[Problem], Any],
        clock: Callable[[list[Callable[[], Any]]], list[float]] = cuda_milliseconds,
    ):
        self._candidates, self._rule, self._clock = candidates, rule, clock
        self.times: Times = {}
        self._chosen: dict[tuple[int, Problem], Any] = {}

    def why_not(self, problem: Problem) -> str | None:
        return None

    def fprop(self, p: Problem, x: Tensor, w: Tensor, bias: Tensor | None, on_load=None) -> Tensor:
        if on_load is not None:
            return self._rule(p).fprop(p, x, w, bias, on_load)
        return self._run(0, p, x, w, bias)

    def dgrad(self, p: Problem, dy: Tensor, w: Tensor) -> Tensor:
        return self._run(1, p, dy, w)

    def wgrad(self, p: Problem, dy: Tensor, x: Tensor) -> Tensor:
        return self._run(2, p, dy, x)

    def dgrad_wgrad(self, p: Problem, dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(3, p, dy, x, w)

    def dgrad_wgrad_on_load(self, p: Problem, dy: Tensor, x: Tensor, w: Tensor, on_load) -> tuple[Tensor, ...]:
        return self._rule(p).dgrad_wgrad_on_load(p, dy, x, w, on_load)

    def forget_chosen(self) -> None:
        """What was measured stays, but which candidates there are is asked anew."""
        self._chosen.clear()

    def measured(self, problem: Problem, pass_: int) -> dict[str, float]:
        """Milliseconds by candidate; empty if the pass has not been seen."""
        return self.times.get(_card_name(problem), {}).get(_key(problem, pass_), {})

    def explain(self, problem: Problem) -> Iterable[str]:
        """A line for each pass that has been timed."""
        for pass_, name in enumerate(PASSES):
            times = sorted(self.measured(problem, pass_).items(), key=lambda item: item[1])
            if times:
                yield f"    {name}: " + ", ".join(f"{candidate} {ms:.4f} ms" for candidate, ms in times)

    def _run(self, pass_: int, p: Problem, *tensors):
        chosen = self._chosen.get((pass_, p))
        if chosen is None:
            chosen = self._choose(pass_, p, tensors)
        try:
            return getattr(chosen, PASSES[pass_])(p, *tensors)
        except ValueError:  # a kernel family does not take these addresses or strides, though it took others
            return getattr(self._rule(p), PASSES[pass_])(p, *tensors)

    def _choose(self, pass_: int, p: Problem, tensors: tuple):
        candidates = self._candidates(p, pass_)
        times = {name: ms for name, ms in self.measured(p, pass_).items() if name in candidates}
        if not times and len(candidates) > 1:
            if _capturing():
                return self._rule(p)
            times = self._time(candidates, pass_, p, tensors)
            self.times.setdefault(_card_name(p), {})[_key(p, pass_)] = times
        chosen = self._chosen[pass_, p] = candidates[min(times or candidates, key=lambda name: times.get(name, 0))]
        return chosen

    def _time(self, candidates: dict[str, Any], pass_: int, p: Problem, tensors: tuple) -> dict[str, float]:
        calls, failure = {}, None
        for name, candidate in candidates.items():
            call = partial(getattr(candidate, PASSES[pass_]), p, *tensors)
            try:
                call()
            except (ValueError, RuntimeError) as error:  # not these tensors; no such kernel in torch; no memory for it
                failure = error
            else:
                calls[name] = call
        if not calls:
            raise failure or RuntimeError(f"nothing runs {PASSES[pass_]} of {p}")
        return dict(zip(calls, self._clock(list(calls.values()))))

    def save(self, path: str | os.PathLike) -> None:
        write_json(Path(path), {"format": _FORMAT, **_versions(), "milliseconds": self.times})

    def load(self, path: str | os.PathLike) -> None:
        try:
            kept = json.loads(Path(path).read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not a file of choices: {error}") from None
        if not isinstance(kept, dict) or kept.get("format") != _FORMAT or not _is_times(kept.get("milliseconds")):
            raise ValueError(f"{path} is not a file of choices that xsep.save_choices wrote")
        versions = {name: kept.get(name) for name in _versions()}
        if versions != _versions():
            warnings.warn(f"{path} is left aside: measured with {versions}, this is {_versions()}", stacklevel=3)
            return
        for card, times in kept["milliseconds"].items():
            self.times.setdefault(card, {}).update(times)
        self.forget_chosen()


def _is_times(value: Any) -> bool:
    def is_dict(value: Any, of: Callable[[Any], bool]) -> bool:
        return isinstance(value, dict) and all(map(of, value.values()))

    def is_time(value: Any) -> bool:
        return isinstance(value, (int, float)) and value >= 0

    def is_candidates(value: Any) -> bool:
        return bool(value) and is_dict(value, is_time)

    return is_dict(value, lambda card: is_dict(card, is_candidates))


def _versions() -> dict[str, str]:
    return {"xsep": __version__, "torch": str(torch.__version__)}


def _key(p: Problem, pass_: int) -> str:
    return f"{PASSES[pass_]}, {p}"


def _card_name(p: Problem) -> str:
    return p.device if p.device != "cuda" else _cuda_name(p.device_index)


@lru_cache
def _cuda_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def wanted(problem: Problem) -> bool:
    """Whether torch's flags ask for timing: results may then depend on what was fastest, in the last bits."""
    return (
        problem.device == "cuda" and torch.backends.cudnn.benchmark and not torch.are_deterministic_algorithms_enabled()
    )
