"""``python -m xsep.info``: what was built, what this machine has, and which backend operators take here and why."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from . import __version__
from .ops import backends, cuda, triton
from .ops import cpu as cpu_backend
from .ops.problem import BlockProblem, Problem


def processor() -> str:
    """The processor's name, as the operating system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def built() -> dict[str, str]:
    """What the installed binary is: compiler, instruction sets it can use here, CUDA."""
    found: dict[str, str] = {}
    if cpu_backend._C is None:
        found["compiled module"] = cpu_backend._import_error
    else:
        module = cpu_backend._C
        found["compiled module"] = str(module.__file__)
        found["compiler"] = module.compiler + (", OpenMP" if module.openmp else ", no OpenMP: one thread")
        found["CPU instruction sets"] = f"{', '.join(module.isas())} (in use: {module.current_isa()})"
        found["large outputs"] = "recycled" if module.recycles() else "allocated by torch at every call"
        found["CUDA kernels"] = module.cuda
        found["CUDA emulated"] = cuda.EMULATED.why_absent() or str(cuda.EMULATED.module.__file__)
    found["Triton kernels"] = triton.BACKEND.why_absent() or triton.BACKEND.origin()
    return found


def machine() -> dict[str, str]:
    """What this machine has."""
    found = {
        "processor": f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in torch",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()) if torch.cuda.is_available() else "not in use",
    }
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            found[f"GPU {i}"] = f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}"
    else:
        found["GPU"] = "none that torch can use"
    return found


def choices() -> str:
    """Which backend runs a 3x3 depthwise convolution, per device and dtype; of one why, and the block of it."""
    lines = []
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for nhwc in (False, True):
                p = Problem(device, dtype, nhwc, (8, 64, 56, 56), (64, 1, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
                layout = "channels_last" if nhwc else "contiguous"
                name = str(dtype).replace("torch.", "")
                lines.append(f"  {device:5s} {name:9s} {layout:14s} {backends.choose(p).name}")
    p = Problem("cpu", torch.float32, False, (8, 64, 56, 56), (64, 1, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    lines.append("For instance:")
    lines.extend("  " + line for line in backends.explain_block(BlockProblem(p, 128, True, None)).splitlines())
    return "\n".join(lines)


def main() -> None:
    print(f"xsep {__version__}")
    for title, entries in (("Built", built()), ("This machine", machine())):
        print(f"{title}:")
        for key, value in entries.items():
            print(f"  {key:21s} {value}")
    print("Backend of fprop, dgrad, wgrad and dgrad_wgrad (depthwise convolution):")
    print(choices())


if __name__ == "__main__":
    main()
