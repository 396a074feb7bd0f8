"""What the benchmarks share: the header, timing of interleaved variants, the copy bandwidth, results as files."""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import torch

import xsep
from xsep import info

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def commit() -> str:
    """The commit of this checkout, with a plus sign if files differ from it."""
    run = dict(cwd=Path(__file__).parent, capture_output=True, text=True)
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], check=True, **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain"], check=True, **run).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git checkout)"
    return head + ("+" if changed else "")


def load_average() -> str:
    """Work waiting on this machine apart from us; timings with a busy neighbour are worth little."""
    try:
        return f"{os.getloadavg()[0]:.2f} over the last minute"
    except OSError:
        return "unknown"


TRIED = "when this version was published they had run on an H100 alone"


def header(device: str = "cpu", **entries: str) -> dict[str, str]:
    """What a measurement depends on."""
    found = {
        "xsep": f"{xsep.__version__}, commit {commit()}",
        **{key: value for key, value in info.machine().items() if key != "GPU" or device != "cpu"},
        "CPU kernels": info.built().get("CPU instruction sets", "none"),
        **({"CUDA kernels": f"{info.built().get('CUDA kernels')}; {TRIED}"} if device == "cuda" else {}),
        "load": load_average(),
        **entries,
    }
    return found


def print_header(found: dict[str, str]) -> None:
    for key, value in found.items():
        print(f"{key:22s} {value}")
    print(flush=True)


class Times(NamedTuple):
    """Seconds per call: the median of the samples, and the 20th and 80th percentile."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Half the distance between the percentiles, relative to the median."""
        return (self.high - self.low) / 2 / self.median


def times(samples: Sequence[float]) -> Times:
    if len(samples) < 2:
        return Times(samples[0], samples[0], samples[0])
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return Times(tenths[4], tenths[1], tenths[7])


def _quickest(call: Callable[[], object], times: int) -> float:
    """Seconds of the quickest of some calls."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def interleaved(
    variants: dict[str, Callable[[], object]], samples: int, sample_seconds: float, max_seconds: float
) -> dict[str, Times]:
    """Times variants that compute the same, a sample of each in turn, so that a slow moment hits them all.

    A sample repeats the call to last about ``sample_seconds``, after as many calls without a clock: the first ones find
    the caches full of the other variants' outputs.  Ends after ``samples`` of each, or when ``max_seconds`` are over,
    but not before three.
    """
    repeats = {name: max(1, round(sample_seconds / max(_quickest(call, 4), 1e-7))) for name, call in variants.items()}
    found: dict[str, list[float]] = {name: [] for name in variants}
    begin = time.perf_counter()
    for i in range(samples):
        if i >= 3 and time.perf_counter() - begin > max_seconds:
            break
        for name, call in variants.items():
            for _ in range(repeats[name]):
                call()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            found[name].append((time.perf_counter() - start) / repeats[name])
    return {name: times(values) for name, values in found.items()}


def gpu_interleaved(variants: dict[str, Callable[[], object]], samples: int) -> dict[str, Times]:
    """As ``interleaved``, on the current GPU: each call between CUDA events, with cold caches."""
    other = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    found: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in variants}
    for i in range(samples + 3):  # the first three choose algorithms and fill the allocator
        for name, call in variants.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            other.zero_()
            start.record()
            call()
            end.record()
            if i >= 3:
                found[name].append((start, end))
    torch.cuda.synchronize()
    return {name: times([a.elapsed_time(b) * 1e-3 for a, b in events]) for name, events in found.items()}


def copy_bandwidth(device: str = "cpu", megabytes: int = 256) -> float:
    """Bytes per second, read and written, of ``torch.Tensor.copy_`` between arrays beyond every cache."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.zeros_like(source)
    call = {"copy": lambda: target.copy_(source)}
    measured = interleaved(call, 15, 0.0, 2.0) if device == "cpu" else gpu_interleaved(call, 15)
    return 2 * source.numel() * source.element_size() / measured["copy"].median


def last_level_cache(device: str = "cpu") -> int:
    """Bytes of the last-level cache, 32 MB where the system does not tell."""
    if device != "cpu":
        return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 32 << 20)
    for name in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE"):
        try:
            if os.sysconf(name) > 0:
                return os.sysconf(name)
        except (ValueError, OSError):
            pass
    return 32 << 20


def write_results(path: Path, kind: str, found: dict[str, str], rows: list[dict]) -> None:
    """JSON ({header, rows}) or CSV (a row per line, the header as leading comments)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "json":
        path.write_text(json.dumps({"header": found, "rows": rows}, indent=1) + "\n")
        return
    with path.open("w", newline="") as file:
        for key, value in found.items():
            file.write(f"# {key}: {value}\n")
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def fail(message: str) -> None:
    """Ends the program with a message and no traceback."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
