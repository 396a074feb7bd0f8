"""What differs between the torch versions xsep runs on, and nothing else.  No other module asks for torch's version."""

from __future__ import annotations

from typing import Any

import torch

_DTYPE_QUERIES: dict[str, Any] = {
    "cpu": getattr(torch, "get_autocast_cpu_dtype", None),
    "cuda": getattr(torch, "get_autocast_gpu_dtype", None),
}


def autocast_dtype(device_type: str) -> torch.dtype:
    """The dtype autocast is casting to on this device type (torch >= 2.4 has one query for all of them)."""
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(device_type)
    return _DTYPE_QUERIES[device_type]()


def is_compiling() -> bool:
    """Whether ``torch.compile`` or ``torch.export`` is tracing the caller."""
    compiler = getattr(torch, "compiler", None)
    return compiler is not None and compiler.is_compiling()
