"""The ``cpu`` backend: hands tensors to the kernels of ``csrc/cpu`` as pointers and strides."""

from __future__ import annotations

from .problem import Problem

name = "cpu"


def why_not(problem: Problem) -> str | None:
    return "not built yet"
