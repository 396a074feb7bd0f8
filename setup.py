"""Builds xsep._C with CMake and Ninja; everything else is in pyproject.toml.

CUDA kernels are built where there is a CUDA toolkit, for CMAKE_CUDA_ARCHITECTURES (through CMAKE_ARGS) or
TORCH_CUDA_ARCH_LIST; by default for every major architecture that its nvcc knows, with PTX for later ones.

Environment variables: MAX_JOBS (compile jobs; default from cores and free memory), XSEP_SKIP_CUDA_BUILD=1 (no CUDA
kernels even if nvcc is here), FORCE_CUDA=1 (a missing nvcc is an error), XSEP_EMULATE_CUDA=1 (also xsep._C_emulated,
the CUDA sources on the host, for tests), CMAKE_ARGS (passed to CMake), DEBUG=1.
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
EMULATE = os.environ.get("XSEP_EMULATE_CUDA") == "1"


def find_cuda():
    """(root of a CUDA toolkit or None, why there is none).  An nvcc may be a script outside of its toolkit."""
    forced = os.environ.get("FORCE_CUDA") == "1"
    if os.environ.get("XSEP_SKIP_CUDA_BUILD") == "1" and not forced:
        return None, "skipped (XSEP_SKIP_CUDA_BUILD=1)"
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc:
        homes.insert(2, str(Path(nvcc).resolve().parents[1]))
    for home in filter(None, homes):
        if (Path(home) / "include" / "cuda_runtime.h").exists() and (Path(home) / "bin" / "nvcc").exists():
            return home, ""
    reason = "nvcc is here but no toolkit with include/cuda_runtime.h" if nvcc else "there was no nvcc"
    if forced:
        raise SystemExit(f"FORCE_CUDA=1, but {reason} (looked at {', '.join(filter(None, homes))})")
    return None, f"not built: {reason}"


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
    def build_extensions(self):
        import pybind11

        target = Path(self.get_ext_fullpath("xsep._C")).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        home, why_no_cuda = find_cuda()
        configure = [
            *("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
            f"-DCMAKE_BUILD_TYPE={'Debug' if os.environ.get('DEBUG') == '1' else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DXSEP_BUILD_PYTHON=ON",
            "-DXSEP_BUILD_TESTS=OFF",
            f"-DXSEP_EMULATE_CUDA={'ON' if EMULATE else 'OFF'}",
            f"-DXSEP_CUDA={'ON' if home else 'OFF'}",
            f"-DXSEP_NO_CUDA={why_no_cuda}",
            *([f"-DCMAKE_CUDA_COMPILER={home}/bin/nvcc"] if home else []),
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        count = jobs()
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "-j", str(count)], check=True)
        print(f"xsep: built with {count} jobs; CUDA kernels {f'by {home}/bin/nvcc' if home else why_no_cuda}")


modules = ["xsep._C", *(["xsep._C_emulated"] if EMULATE else [])]
setup(ext_modules=[Extension(name, sources=[]) for name in modules], cmdclass={"build_ext": CMakeBuild})
