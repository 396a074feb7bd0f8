"""Compiles the CUDA kernels with nvcc for one architecture after another: registers, spills, stack and time.

    python scripts/compile_all.py                    # sm_75 to sm_121
    python scripts/compile_all.py sm_90a --kernels   # a line for each kernel

Prints per architecture the kernels, the most registers of a thread, the kernels that spill or need a stack, and the
seconds of compilation; then, in bytes, the spills and stack of those that do.  Exits with 1 if a source fails, or a
kernel needs local memory.  For sm_37: compile_sm37.py.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ptxas import UNITS, CompileError, compile_unit

ARCHITECTURES = [f"sm_{number}" for number in (75, 80, 86, 89, 90, 100, 103, 110, 120, 121)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES, help=f"default: {' '.join(ARCHITECTURES)}")
    parser.add_argument(
        "--nvcc", default=shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc", help="default: %(default)s"
    )
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time, default %(default)s")
    parser.add_argument("--kernels", action="store_true", help="a line for every kernel")
    args = parser.parse_args()

    row = "{:14s}{:>9s}{:>11s}{:>8s}{:>7s}{:>9s}".format
    print(row("architecture", "kernels", "registers", "spills", "stack", "seconds"))
    fine = True
    for architecture in args.architectures:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
            pending = [pool.submit(compile_unit, args.nvcc, unit, architecture, Path(folder)) for unit in UNITS]
        kernels, seconds = [], 0.0
        for unit, future in zip(UNITS, pending):
            try:
                compiled = future.result()
            except CompileError as error:
                print(f"{unit} does not compile for {architecture}:\n{error}", file=sys.stderr)
                fine = False
                continue
            kernels += [(unit, kernel) for kernel in compiled.kernels]
            seconds += compiled.seconds
        most = max((k.registers for _, k in kernels), default=0)
        spill, stack = sum(k.spills > 0 for _, k in kernels), sum(k.stack > 0 for _, k in kernels)
        print(row(architecture, *map(str, (len(kernels), most, spill, stack, round(seconds)))), flush=True)
        for unit, k in kernels:
            if args.kernels or k.local:
                print(f"{unit.type_name:>14s}{k.registers:20d}{k.spills:8d}{k.stack:7d}  {k.name}")
        fine = fine and not any(k.local for _, k in kernels)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
