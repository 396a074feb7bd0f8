"""Shows how wide the accesses to global memory are in the machine code of the kernels.

    python scripts/sass.py                  # sm_80 and sm_90a, the specialised kernels with 3x3 filters
    python scripts/sass.py sm_120 --all     # all filters

A column is the number of instructions that load (LDG), copy to shared memory (LDGSTS) or store (STG) so many bytes a
thread.  The disassembler is cuobjdump: the one of --cuobjdump, else of PATH, else beside nvcc, else of the installed
triton package.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ptxas import UNITS, compile_unit, kernel, run

SPECIALISED = [unit for unit in UNITS if unit.group in ("nhwc", "nchw")]
ACCESS = re.compile(r"\b(LDGSTS|LDG|STG)((?:\.[A-Z0-9]+)*) ")
BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # else 4
WIDTHS = (16, 8, 4, 2)


class Accesses(NamedTuple):
    """Of a kernel, by the name of the instruction and the bytes of a thread."""

    family: str
    constants: tuple[int, ...]
    count: Counter

    def widest(self, *names: str) -> int:
        return max(bytes for name, bytes in self.count if name in names)


def find_cuobjdump(nvcc: str | None) -> str | None:
    """Its path: see above for the order."""
    triton = importlib.util.find_spec("triton")
    places = [
        shutil.which("cuobjdump"),
        Path(nvcc).resolve().parent / "cuobjdump" if nvcc else None,
        Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None,
    ]
    return next((str(place) for place in places if place and Path(place).exists()), None)


def accesses(cuobjdump: str, cubin: Path) -> list[Accesses]:
    """Of each kernel of a compiled unit."""
    functions = run(cuobjdump, "-sass", cubin).split("Function : ")[1:]
    return [Accesses(*kernel(function.split()[0]), _count(function)) for function in functions]


def _count(code: str) -> Counter:
    count: Counter = Counter()
    for name, modifiers in ACCESS.findall(code):
        count[name, next((BYTES[m] for m in modifiers.split(".") if m in BYTES), 4)] += 1
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", default=["sm_80", "sm_90a"], help="default: sm_80 sm_90a")
    parser.add_argument("--all", action="store_true", help="filters of all sizes, not only 3x3")
    parser.add_argument(
        "--nvcc", default=shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc", help="default: %(default)s"
    )
    parser.add_argument("--cuobjdump", help="default: see above")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time, default %(default)s")
    args = parser.parse_args()
    cuobjdump = args.cuobjdump or find_cuobjdump(args.nvcc)
    if cuobjdump is None:
        print("there is no cuobjdump: it comes with the CUDA toolkit, and with triton", file=sys.stderr)
        return 2

    columns = [(name, width) for name in ("LDG", "LDGSTS", "STG") for width in WIDTHS if (name, width) != ("LDGSTS", 2)]
    print(" " * 56 + "".join(f"{name + ' ' + str(width):>10s}" for name, width in columns))
    work = [(unit, architecture) for architecture in args.architectures for unit in SPECIALISED]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:

        def disassemble(item):
            return accesses(cuobjdump, compile_unit(args.nvcc, *item, Path(folder)).cubin)

        for (unit, architecture), kernels in zip(work, pool.map(disassemble, work)):
            for k in sorted(kernels, key=lambda k: (k.family, k.constants)):
                if k.constants and (args.all or k.constants[0] == 3):
                    name = f"{k.family.replace('_kernel', '')}<{', '.join(map(str, k.constants))}>"
                    numbers = "".join(f"{k.count[column]:10d}" for column in columns)
                    print(f"{architecture:8s}{unit.type_name:11s}{name:37s}{numbers}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
