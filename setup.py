"""Builds xsep._C with CMake and Ninja; everything else is in pyproject.toml.

Environment variables: MAX_JOBS (compile jobs; default from cores and free memory), XSEP_SKIP_CUDA_BUILD=1 (no CUDA
kernels even if nvcc is here), FORCE_CUDA=1 (a missing nvcc is an error), CMAKE_ARGS (passed to CMake), DEBUG=1.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
BYTES_PER_JOB = 1 << 30  # what the largest compilation takes, with room


def find_cuda():
    """The root of a CUDA toolkit, or (None, why there is none).  An nvcc may be a script outside of its toolkit."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc:
        homes.insert(2, str(Path(nvcc).resolve().parents[1]))
    for home in filter(None, homes):
        if (Path(home) / "include" / "cuda_runtime.h").exists() and (Path(home) / "bin" / "nvcc").exists():
            return home, None
    return None, "nvcc is here but no toolkit with include/cuda_runtime.h" if nvcc else "there is no nvcc"


def cuda_plan():
    """(root of the toolkit, what the build will say of CUDA)."""
    if os.environ.get("XSEP_SKIP_CUDA_BUILD") == "1":
        return None, "skipped (XSEP_SKIP_CUDA_BUILD=1)"
    home, reason = find_cuda()
    if os.environ.get("FORCE_CUDA") == "1":
        raise SystemExit(f"FORCE_CUDA=1, but this version of xsep has no CUDA kernels (toolkit: {home or reason})")
    found = f"toolkit found at {home}" if home else reason
    return home, f"not built: this version of xsep has no CUDA kernels ({found})"


def jobs():
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        count = min(count, free // BYTES_PER_JOB)
    except (ValueError, OSError, AttributeError):
        pass
    return max(1, count)


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        _, cuda = cuda_plan()
        configure = [
            *("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
            f"-DCMAKE_BUILD_TYPE={'Debug' if os.environ.get('DEBUG') == '1' else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DXSEP_BUILD_PYTHON=ON",
            "-DXSEP_BUILD_TESTS=OFF",
            f"-DXSEP_CUDA_SUMMARY={cuda}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        count = jobs()
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "-j", str(count)], check=True)
        print(f"xsep: CPU kernels built with {count} jobs; CUDA kernels {cuda}")


setup(ext_modules=[Extension("xsep._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
