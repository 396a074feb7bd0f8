"""The CUDA sources as units of compilation, their PTX, and what ``ptxas -v`` says of them: for scripts and tests."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parents[1] / "csrc"


class Unit(NamedTuple):
    """A source for one element type."""

    group: str
    dtype: str

    @property
    def source(self) -> Path:
        return CSRC / "cuda" / f"{self.group}.cu"

    @property
    def type_name(self) -> str:
        return self.dtype.replace("xsep::", "")

    def __str__(self) -> str:
        return f"{self.group}.cu for {self.type_name}"


UNITS = [
    Unit(g, t) for g in ("nhwc", "nchw", "generic", "separable") for t in ("float", "xsep::half_t", "xsep::bfloat16_t")
]
UNITS.append(Unit("generic", "double"))


class Usage(NamedTuple):
    """What a kernel needs of a thread's registers and, in bytes, of local memory."""

    family: str
    constants: tuple[int, ...]  # of its template arguments
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def name(self) -> str:
        return f"{self.family}<{', '.join(map(str, self.constants))}>" if self.constants else self.family

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads

    @property
    def local(self) -> bool:
        """It needs local memory."""
        return bool(self.stack or self.spills)


class CompileError(Exception):
    """Its text is what the compiler said."""


ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*\n"
    r"(?:.*\n)*?.*\b(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r"(?:.*\n)*?.*Used (\d+) registers"
)


def kernel(symbol: str) -> tuple[str, tuple[int, ...]]:
    """The family of a kernel and the constants among its template arguments, from its mangled name."""
    family, arguments = re.fullmatch(r"\w*?([a-z_]+_kernel)I(\w*)", symbol).groups()
    return family, tuple(int(n) for n in re.findall(r"L[ib](\d+)E", arguments))


def usage(said: str) -> list[Usage]:
    """From what ``ptxas -v`` said: every kernel of a unit."""
    found = []
    for symbol, stack, stores, loads, registers in ENTRY.findall(said):
        found.append(Usage(*kernel(symbol), int(registers), int(stack), int(stores), int(loads)))
    if not found or len(found) != said.count("Compiling entry function"):
        raise CompileError(f"ptxas -v in a form that is not understood:\n{said}")
    return found


def run(*command: str | Path) -> str:
    """What a compiler says."""
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise CompileError(done.stdout)
    return done.stdout


class Compiled(NamedTuple):
    kernels: list[Usage]
    seconds: float
    cubin: Path


def compile_unit(nvcc: str, unit: Unit, architecture: str, folder: Path) -> Compiled:
    """By nvcc, into a file in ``folder``."""
    begin = time.perf_counter()
    out = folder / re.sub(r"\W+", "_", f"{unit} {architecture}")
    said = run(*_command(nvcc, unit, architecture), "-cubin", "-Xptxas", "-v", "-o", out)
    return Compiled(usage(said), time.perf_counter() - begin, out)


def ptx(nvcc: str, unit: Unit, architecture: str) -> str:
    return run(*_command(nvcc, unit, architecture), "-ptx", "-o", "-")


def _command(nvcc: str, unit: Unit, architecture: str) -> list[str | Path]:
    flags = ["-std=c++17", "-O3", f"-arch={architecture}", f"-DXSEP_T={unit.dtype}"]
    return [nvcc, *flags, "-I", CSRC, unit.source]
