"""The CMake project on its own: the C++ tests pass, plain and under AddressSanitizer and UBSan."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def cmake(name):
    """cmake or ctest: of this environment, or the system's."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


@pytest.mark.parametrize("options", [[], ["-DXSEP_SANITIZE=ON"]], ids=["plain", "sanitized"])
def test_cpp(options, tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # for ninja
    for command in (
        [cmake("cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(tmp_path), "-DXSEP_EMULATE_CUDA=ON", *options],
        [cmake("cmake"), "--build", str(tmp_path)],
        [cmake("ctest"), "--test-dir", str(tmp_path), "--output-on-failure", "--parallel", "2"],
    ):
        run = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]
    assert "100% tests passed" in run.stdout
