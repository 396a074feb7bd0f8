"""The Triton kernels as operators that ``torch.compile`` and AOTInductor see through: ``xsep_triton::fprop`` etc.

``xsep::fprop`` and its kin stay what users call and what exported programs hold.  Where Triton is what runs them on a
device, compilation replaces them by these, whose kernels the compiler then launches itself.  That is decided by device
and dtype alone, since sizes may be symbolic; configurations are the model's.
"""

from functools import lru_cache
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.library import Library, register_torch_dispatch

from ..ops.problem import Problem, is_nhwc

Ints = Sequence[int]


def see_through(lib: Library, backend: Any, runs: Callable[[str, torch.dtype, int], bool]) -> None:
    """Lets compilers see through the operators of ``lib`` where Triton runs: ``runs(device, dtype, index)``."""
    for name in ("fprop", "dgrad", "wgrad", "dgrad_wgrad"):

        def rule(mode, operator, types, args, kwargs, name=name):
            t = args[0]
            if _exporting() or not runs(t.device.type, t.dtype, t.get_device()):
                return mode.__torch_dispatch__(operator, types, args, kwargs)
            with mode:
                return _operators(backend)[name](*args, **(kwargs or {}))

        register_torch_dispatch(f"xsep::{name}", FunctionalTensorMode, rule, lib=lib)


def _exporting() -> bool:
    """Whether the graph is to hold operators rather than kernels."""
    from torch.export import _trace

    disabled = getattr(_trace, "custom_triton_ops_decomposition_disabled", None)
    return disabled is not None and disabled()


@lru_cache
def _operators(backend: Any) -> Dict[str, Callable]:
    # Not at import: to define them is to load Triton.
    from torch.library import triton_op

    traced = backend.traced()

    def problem(t: Tensor, x: Ints, w: Ints, stride: Ints, pad: Ints, dilation: Ints) -> Problem:
        geometry = tuple(stride), tuple(pad), tuple(dilation)
        return Problem(t.device.type, t.dtype, is_nhwc(t), tuple(x), tuple(w), *geometry, t.get_device())

    def fprop(x: Tensor, w: Tensor, bias: Optional[Tensor], stride: Ints, pad: Ints, dilation: Ints) -> Tensor:
        return traced.fprop(problem(x, x.shape, w.shape, stride, pad, dilation), x, w, bias)

    def dgrad(dy: Tensor, w: Tensor, x_sizes: Ints, stride: Ints, pad: Ints, dilation: Ints) -> Tensor:
        return traced.dgrad(problem(dy, x_sizes, w.shape, stride, pad, dilation), dy, w)

    def wgrad(dy: Tensor, x: Tensor, w_sizes: Ints, stride: Ints, pad: Ints, dilation: Ints) -> Tensor:
        return traced.wgrad(problem(x, x.shape, w_sizes, stride, pad, dilation), dy, x)

    def dgrad_wgrad(dy: Tensor, x: Tensor, w: Tensor, stride: Ints, pad: Ints, dilation: Ints) -> Tuple[Tensor, Tensor]:
        return traced.dgrad_wgrad(problem(x, x.shape, w.shape, stride, pad, dilation), dy, x, w)

    maps = (fprop, dgrad, wgrad, dgrad_wgrad)
    return {each.__name__: triton_op(f"xsep_triton::{each.__name__}", each, mutates_args={}) for each in maps}
