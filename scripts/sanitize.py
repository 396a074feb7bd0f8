"""Runs the CUDA kernels under NVIDIA's compute-sanitizer, on the card of this machine.

    python scripts/sanitize.py                         # memcheck, racecheck, initcheck and synccheck
    python scripts/sanitize.py --tools racecheck --dtypes float16

What runs is ``python -m xsep.selftest``: every kernel family, pass and layout on small problems.  The tools slow it
down from seconds to minutes.  Exit status: 0 if no tool found an error, 1 if one did, 2 if there is no card or no tool.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time

import torch

from xsep.ops.backends import BACKENDS

TOOLS = {
    "memcheck": "accesses out of bounds or misaligned",
    "racecheck": "shared memory that threads use without a barrier between them",
    "initcheck": "global memory that is read before anything has written it",
    "synccheck": "barriers that not all threads reach",
}
FOUND = 66  # what the tools exit with when they found something


def sanitizer(path: str | None) -> str | None:
    """The compute-sanitizer that is named, or the one on PATH or of the CUDA toolkit."""
    candidates = [path] if path else ["compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer"]
    return next(filter(None, map(shutil.which, candidates)), None)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--dtypes", nargs="+", default=[], help="of the self-test; default: all")
    parser.add_argument("--device", type=int, default=0, help="index of the CUDA device")
    parser.add_argument("--sanitizer", help="path of compute-sanitizer")
    options = parser.parse_args(arguments)
    program = sanitizer(options.sanitizer)
    cuda = BACKENDS["cuda"]
    reason = cuda.why_absent() or ("" if torch.cuda.is_available() else "there is no CUDA device that torch can use")
    if not reason and program is None:
        reason = f"there is no {options.sanitizer or 'compute-sanitizer'}: it comes with the CUDA toolkit"
    if reason:
        print(f"cannot run: {reason}", file=sys.stderr)
        return 2
    selftest = [sys.executable, "-m", "xsep.selftest", "--backend", "cuda", "--device", str(options.device)]
    if options.dtypes:
        selftest += ["--dtypes", *options.dtypes]
    found = []
    for tool in options.tools:
        print(f"{tool} ({TOOLS[tool]}) ...", flush=True)
        begin = time.perf_counter()
        done = subprocess.run([str(program), "--tool", tool, "--error-exitcode", str(FOUND), *selftest])
        print(f"{tool}: {'errors' if done.returncode else 'none'} in {time.perf_counter() - begin:.0f} s\n", flush=True)
        if done.returncode:
            found.append(tool)
    print(f"errors from {', '.join(found)}" if found else "no errors")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
