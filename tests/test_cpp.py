"""The CMake project on its own: the C++ tests pass, plain and under AddressSanitizer and UBSan."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from xsep.ops.cpu import _C

ROOT = Path(__file__).parents[1]


def cmake(name):
    """cmake or ctest: of this environment, or the system's."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def build(source, folder, *options, target="all"):
    for command in (
        [cmake("cmake"), "-G", "Ninja", "-S", str(source), "-B", str(folder), *options],
        [cmake("cmake"), "--build", str(folder), "--target", target],
    ):
        run(*command)


def run(*command):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # for ninja
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


# The emulated CUDA kernels run without sanitizers in the tests of the operators.
@pytest.mark.parametrize("options", [[], ["-DXSEP_SANITIZE=ON", "-DXSEP_EMULATE_CUDA=ON"]], ids=["plain", "sanitized"])
def test_cpp(options, tmp_path):
    # Other instruction sets could not run here, and the sanitizers take minutes to compile each.
    build(ROOT, tmp_path, f"-DXSEP_ISAS={';'.join(_C.isas())}", *options)
    said = run(cmake("ctest"), "--test-dir", str(tmp_path), "--output-on-failure", "--parallel", "2")
    assert "100% tests passed" in said
