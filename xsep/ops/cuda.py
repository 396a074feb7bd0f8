"""The ``cuda`` backend on CUDA tensors, and ``cuda-emulated``: the same kernels on CPU tensors, for tests.

A call runs on the current stream of its device; outputs and workspace are torch's, so that its allocator and CUDA
graphs know them.  Nothing synchronises.  Before a card's first problem of a dtype, ``xsep.selftest`` says which kernels
to trust.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor

from .._compat import itemsize
from .compiled import CHECKOUT, DTYPES, FPROP, PASSES, CompiledBackend, load, prepared, readable
from .problem import BlockProblem, Problem

_ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2}


class CudaBackend(CompiledBackend):
    """Kernels of one compiled module; with ``family`` those of one family only, be it trusted or not."""

    def __init__(self, name: str, device: str, module_name: str, advice: str, family: str = ""):
        self.name, self.device, self.family = name, device, family
        self._built_from = (name, device, module_name, advice)
        self._only: dict[str, CudaBackend] = {}
        self.module, self._import_error = load(module_name, advice)
        self.choice_changes: Callable[[], None] = lambda: None  # what to call when other kernels will be chosen
        self._untested = False  # a choice was made while a graph was captured, when nothing can be tested

    def only(self, family: str) -> CudaBackend:
        """This backend with kernels of one family."""
        if family not in self._only:
            self._only[family] = CudaBackend(*self._built_from, family)
        return self._only[family]

    def why_not(self, problem: Problem) -> str | None:
        reason = self.why_not_kind(problem.device, problem.dtype, problem.device_index)
        if reason is not None:
            return reason
        if self.device == "cuda":
            self._test_first(problem)
        return self._why_no_family(problem)

    def why_not_kind(self, device: str, dtype: torch.dtype, index: int) -> str | None:
        """Why no problem of a device and dtype runs, whatever its sizes."""
        reason = self.why_absent()
        if reason is not None:
            return reason
        if device != self.device:
            where = "CUDA devices" if self.device == "cuda" else "the CPU"
            return f"its tensors live on {where}, not on {device}"
        if dtype not in DTYPES:
            return f"it has no kernels for {dtype}"
        return self.why_not_card(max(index, 0))

    def why_absent(self) -> str | None:
        """Why this installation does not have the backend."""
        if self.module is None:
            return self._import_error
        if not hasattr(self.module, "CudaCall"):
            return f"this installation has no CUDA kernels ({self.module.cuda})"
        return None

    def why_not_card(self, index: int) -> str | None:
        """Why nothing runs on a card."""
        if index >= len(self.module.cuda_cards()):
            version = self.module.cuda_driver_version() / 1000
            return f"its CUDA runtime finds no device {index}: the driver, for CUDA {version}, may be too old"
        reason = _why_no_code(self, index)
        if reason:
            card = self.card(index)
            return f"it has no code for {card.name}, {card.arch_name} ({self.module.cuda}): {reason}"
        return None

    def kernel(self, problem: Problem, pass_: int = FPROP, relu: bool | None = None) -> str:
        """The name of the kernel family that runs a pass on dense tensors.

        Raises ``ValueError`` if it has to be ``self.family`` and that does not take them.
        """
        return _call(self, pass_, problem, relu).family(_tensors(problem, 0, relu is not None))

    def families(self, dtype: torch.dtype) -> list[str]:
        """The kernel families of a dtype, in order of preference."""
        return self.module.cuda_families(DTYPES[dtype])

    def families_off_at_first(self, dtype: torch.dtype) -> list[str]:
        """Those that are switched off until they have passed the self-test on the card."""
        return self.module.cuda_families_off_at_first(DTYPES[dtype])

    def why_not_families(self, problem: Problem, pass_: int, address: int = 0) -> dict[str, str]:
        """Each family with the reason why it does not run a pass on tensors at ``address``; the one that does has none.

        The tensors are dense; address 0 is aligned for all.
        """
        return dict(_call(self, pass_, problem).why_not(_tensors(problem, address, False)))

    def candidates(self, problem: Problem, pass_: int) -> dict[str, CudaBackend]:
        """The families that could run a pass of a problem which the backend takes, the preferred one first."""
        reasons = self.why_not_families(problem, pass_)
        return {name: self.only(name) for name, why in reasons.items() if not why or why.startswith("comes after")}

    def set_enabled(self, dtype: torch.dtype, family: str, enabled: bool) -> None:
        """Switches a family on or off, for this process."""
        of_blocks = family in self.block_families(dtype)
        switch = self.module.cuda_set_separable_enabled if of_blocks else self.module.cuda_set_enabled
        switch(DTYPES[dtype], family, enabled)
        _why_not_block.cache_clear()
        self.choice_changes()

    def block_families(self, dtype: torch.dtype) -> list[str]:
        """The families of training blocks' kernels of a dtype, in order of preference."""
        return self.module.cuda_separable_families(DTYPES[dtype])

    def card(self, index: int) -> Any:
        """What the kernels' choice depends on: name, arch, arch_name, multiprocessors, shared_bytes."""
        return self.module.cuda_cards()[index]

    # Training blocks.

    def why_not_block(self, b: BlockProblem, backward: bool) -> str | None:
        if b.activation not in _ACTIVATIONS:
            return f"its kernels for blocks do not apply {b.activation}"
        return _why_not_block(self, b, backward)

    def block(self, b: BlockProblem, x: Tensor, w_dw: Tensor, w_pw: Tensor, on_load, statistics: bool):
        mean, m2 = (torch.empty(b.K if statistics else 0, dtype=torch.float32, device=x.device) for _ in range(2))
        y = self._block(b, x, w_dw, w_pw, on_load, (mean, m2) if statistics else (None, None))
        return y, mean, m2

    def why_not_block_inference(self, b: BlockProblem) -> str | None:
        return self.why_not_block(b, backward=False)

    def block_inference(
        self, b: BlockProblem, x: Tensor, w_dw: Tensor, w_pw: Tensor, w_dw_bias, bias, residual, out_activation
    ) -> Tensor:
        on_load = (None, None, None, True) if b.on_load else None
        return self._block(b, x, w_dw, w_pw, on_load, (None, None), (w_dw_bias, bias, residual), out_activation)

    def _block(self, b, x, w_dw, w_pw, on_load, statistics, added=(None, None, None), out_activation=None) -> Tensor:
        """y, with mean and m2 put into ``statistics`` if any."""
        p = b.depthwise
        N, _, P, Q = p.y
        x, w_dw, w_pw = readable(x, p), w_dw.contiguous(), w_pw.contiguous()
        w_dw_bias, bias = (None if t is None else t.contiguous() for t in added[:2])
        residual = None if added[2] is None else readable(added[2], p)
        y = self._empty((N, b.K, P, Q), p, x)
        center, scale, shift, relu = on_load or (None, None, None, None)
        tensors = _block_arguments(x, w_dw, w_pw, center, scale, shift, y, *statistics, w_dw_bias, bias)
        tensors += (0, (0,) * 4) if residual is None else _block_arguments(residual)
        self._start(_block_call(self, b, False, relu, out_activation), y, tensors)
        return y

    def block_backward(self, b: BlockProblem, dy, dmean, dm2, y, mean, x: Tensor, w_dw: Tensor, w_pw: Tensor, on_load):
        p = b.depthwise
        x, w_dw = _in_vectors(readable(x, p)), _aligned(w_dw.contiguous())
        w_pw_t = w_pw.reshape(b.K, -1).t().contiguous()
        if dmean is None and dm2 is None:
            y = mean = None
        else:
            dmean, dm2 = (torch.zeros_like(mean) if v is None else v.contiguous() for v in (dmean, dm2))
        dy, y = (None if t is None else _aligned(t.contiguous(memory_format=p.memory_format)) for t in (dy, y))
        dx, dw_dw, dw_pw = self._empty(p.x, p, x), x.new_empty(p.w), x.new_empty(w_pw.shape)
        center, scale, shift, relu = on_load or (None, None, None, None)
        dscale, dshift = (None, None) if on_load is None else (torch.empty_like(on_load[0]) for _ in range(2))
        made = dy, y, mean, dmean, dm2, dx, dw_dw, dw_pw, dscale, dshift
        self._start(
            _block_call(self, b, True, relu), dx, _block_arguments(x, w_dw, w_pw_t, center, scale, shift, *made)
        )
        return dx, dw_dw, dw_pw, dscale, dshift

    # What the self-test keeps and prints.

    def binary(self) -> str:
        return _hash(self.module.__file__)

    def runtime(self) -> str:
        return f"CUDA {self.module.cuda_driver_version()}"

    def origin(self) -> str:
        return f"{self.module.__file__} ({self.module.cuda})"

    def _why_no_family(self, problem: Problem) -> str | None:
        """Why some pass would have no kernel, for slices that begin anywhere."""
        for pass_, name in enumerate(PASSES):
            reasons = self.why_not_families(problem, pass_, itemsize(problem.dtype))
            if "" not in reasons.values():
                return f"no kernel takes {name}: " + "; ".join(f"{key} {reason}" for key, reason in reasons.items())
        return None

    def _test_first(self, problem: Problem) -> None:
        from .. import selftest  # it runs this backend

        if torch.cuda.is_current_stream_capturing() and not selftest.is_known(self, problem.dtype, _card(problem)):
            self._untested = True
        else:
            selftest.ensure(self, problem.dtype, _card(problem))

    def _empty(self, sizes, p: Problem, like: Tensor) -> Tensor:
        return torch.empty(sizes, dtype=p.dtype, device=like.device, memory_format=p.memory_format)

    def _run(self, pass_: int, p: Problem, out: Tensor, tensors: tuple, relu: bool | None) -> None:
        self._start(_call(self, pass_, p, relu), out, tensors)

    def _start(self, call: Any, out: Tensor, tensors: tuple) -> None:
        workspace = []

        def allocate(size: int) -> int:
            workspace.append(torch.empty(size, dtype=torch.uint8, device=out.device))
            return workspace[0].data_ptr()

        call(tensors, self._stream(out), allocate)
        if self._untested and not torch.cuda.is_current_stream_capturing():
            self._untested = False
            self.choice_changes()

    def _stream(self, out: Tensor) -> int:
        # torch.cuda.current_stream makes an object of it, which takes as long as the rest of a call.
        return torch._C._cuda_getCurrentRawStream(out.get_device()) if self.device == "cuda" else 0


@lru_cache
def _hash(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def _card(p: Problem) -> int:
    return max(p.device_index, 0)


@lru_cache(maxsize=8192)
def _call(backend: CudaBackend, pass_: int, p: Problem, relu: bool | None = None):
    module = backend.module
    return module.CudaCall(*prepared(module, pass_, p, relu), _card(p), backend.family)


@lru_cache(maxsize=8192)
def _block_call(
    backend: CudaBackend, b: BlockProblem, backward: bool, relu: bool | None, out_activation: str | None = None
):
    module, p = backend.module, b.depthwise
    _, shape, dtype, nhwc, _, relu = prepared(module, FPROP, p, relu)
    options = dtype, nhwc, _ACTIVATIONS[b.activation], _ACTIVATIONS[out_activation], relu
    return module.CudaSeparableCall(backward, shape, b.K, *options, _card(p), backend.family)


@lru_cache(maxsize=8192)
def _why_not_block(backend: CudaBackend, b: BlockProblem, backward: bool) -> str | None:
    strides = torch.empty(b.depthwise.x, device="meta", memory_format=b.depthwise.memory_format).stride()
    zeros = (0,) * 15 if backward else (*(0,) * 11, strides)
    reasons = _block_call(backend, b, backward, None).why_not((0, strides, *zeros))
    if backend.family:  # which runs though another be preferred, or it be switched off
        others = "comes after", "is switched off"
        reasons = [(name, "" if why.startswith(others) else why) for name, why in reasons if name == backend.family]
    if any(not reason for _, reason in reasons):
        return None
    return "; ".join(f"{family}: {reason}" for family, reason in reasons) or f"it has none for {b.depthwise.dtype}"


def _block_arguments(x: Tensor, *others: Tensor | None) -> tuple:
    return x.data_ptr(), x.stride(), *(0 if t is None else t.data_ptr() for t in others)


def _aligned(t: Tensor) -> Tensor:
    return t if t.data_ptr() % 16 == 0 else torch.empty_like(t).copy_(t)


def _in_vectors(x: Tensor) -> Tensor:
    """``x``, or a copy where its pixels are not aligned to vectors of channels."""
    return _aligned(x) if all(x.stride(i) % 4 == 0 for i in (0, 2, 3)) else torch.empty_like(x).copy_(x)


@lru_cache
def _why_no_code(backend: CudaBackend, index: int) -> str:
    return backend.module.cuda_why_no_code(index)


def _tensors(p: Problem, address: int, on_load: bool) -> tuple:
    """The arguments of a call on dense tensors at one address, to ask what it would do."""
    x, y = (torch.empty(sizes, device="meta", memory_format=p.memory_format) for sizes in (p.x, p.y))
    w, bias, out, dw = (0,) * 4
    return address, x.stride(), address, y.stride(), w, bias, out, dw, *(64 if on_load else 0,) * 3, 0, 0


CUDA = CudaBackend("cuda", "cuda", "_C", CHECKOUT)
EMULATED = CudaBackend("cuda-emulated", "cpu", "_C_emulated", "XSEP_EMULATE_CUDA=1 at installation builds it")
