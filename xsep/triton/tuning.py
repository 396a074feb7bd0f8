"""Which configuration a Triton kernel runs with: timed once for a kind of problem, and kept on disk.

A kind is everything that changes the compiled code and the best tile, extents and channels to a power of two; a batch
that varies is none.  The model orders the candidates and the best few are timed.  Nothing is timed while a CUDA graph
is captured, under the interpreter or while torch compiles: the model's first runs, and the next call outside tunes.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, Callable

import torch

from .._compat import is_compiling
from .._files import cache_folder, write_json
from .._version import __version__
from ..ops.compiled import PASSES
from ..ops.problem import Problem
from ..ops.tuning import cuda_milliseconds
from .configs import Config, candidates, ordered

_TIMED = 3  # candidates
_FILE = "triton.json"

Clock = Callable[[list[Callable[[], Any]]], list[float]]


def kind(p: Problem, pass_: int, on_load: bool) -> str:
    """The key of a choice, without the card."""
    dtype = str(p.dtype).replace("torch.", "")
    K, _, R, S = p.w
    sizes = (1 << (size - 1).bit_length() for size in (p.x[1], p.x[2], p.x[3]))
    text = f"{PASSES[pass_]} {dtype} {'NHWC' if p.nhwc else 'NCHW'} {'x'.join(map(str, sizes))} {R}x{S}"
    text += f" multiplier {K // p.x[1]} stride {p.stride[0]},{p.stride[1]} dilation {p.dilation[0]},{p.dilation[1]}"
    return text + (" on load" if on_load else "")


class Choices:
    """The chosen configurations of this process, beside those that a file keeps.  ``clock`` is another in tests."""

    def __init__(self, path: Path | None = None, clock: Clock = cuda_milliseconds):
        self._path, self._clock = path, clock
        self._chosen: dict[tuple[str, str], Config] = {}
        self._of_problems: dict[tuple, Config] = {}  # to name the kind of a problem takes longer than to find it here
        self._lock = threading.Lock()
        self._read: dict[str, dict[str, list[int]]] | None = None

    def choose(
        self,
        p: Problem,
        pass_: int,
        on_load: bool,
        card: str,
        multiprocessors: int,
        run: Callable[[Config], Any],
    ) -> Config:
        """The fastest for this kind of problem on this model of card; ``run`` runs the problem with a candidate."""
        of_problem = card, p, pass_, on_load
        found = self._of_problems.get(of_problem)
        if found is None:
            key = card, kind(p, pass_, on_load)
            with self._lock:
                found = self._chosen.get(key) or self._kept(key, p, pass_)
                if found is None:
                    found = self._fastest(ordered(p, pass_, multiprocessors)[:_TIMED], run)
                    self._keep(key, found)
                self._chosen[key] = self._of_problems[of_problem] = found
        return found

    def _fastest(self, configs: list[Config], run: Callable[[Config], Any]) -> Config:
        if len(configs) == 1:
            return configs[0]
        times = self._clock([lambda config=config: run(config) for config in configs])  # type: ignore[misc]
        return min(zip(times, configs))[1]

    def _kept(self, key: tuple[str, str], p: Problem, pass_: int) -> Config | None:
        if self._read is None:
            self._read = _load(self._path or cache_folder() / _FILE)
        numbers = self._read.get(key[0], {}).get(key[1])
        config = Config(*numbers) if isinstance(numbers, list) and len(numbers) == 4 else None
        return config if config in candidates(p, pass_) else None

    def _keep(self, key: tuple[str, str], config: Config) -> None:
        path = self._path or cache_folder() / _FILE
        try:
            kept = _load(path)  # another process may have added to it
            kept.setdefault(key[0], {})[key[1]] = list(config)
            write_json(path, {"xsep": __version__, "configs": kept})
        except OSError:
            pass  # the next process times again


def _load(path: Path) -> dict[str, dict[str, list[int]]]:
    """What a file of this version of xsep keeps; nothing of a missing, foreign or corrupt one."""
    try:
        found = json.loads(path.read_text())
        configs = found["configs"] if found["xsep"] == __version__ else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return configs if isinstance(configs, dict) and all(isinstance(each, dict) for each in configs.values()) else {}


def may_time() -> bool:
    """Whether candidates can be timed now; not where results have to repeat, since sums depend on the tile."""
    return not (
        is_compiling() or torch.are_deterministic_algorithms_enabled() or torch.cuda.is_current_stream_capturing()
    )
