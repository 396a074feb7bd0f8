"""Uninitialised memory is NaN in every test: what a kernel does not write shows.  And the backends under test.

Torch 2.0.1 cannot fill memory: there only the self-test's tests do it.
"""

import os
from contextlib import contextmanager

# Before OpenMP is loaded: threads that wait for others spin otherwise, and take the cores from the tests beside them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported, its own functions too

from conv_cases import DTYPES

import xsep
from xsep.ops import cpu
from xsep.ops.backends import BACKENDS

settings.register_profile("xsep", deadline=None, derandomize=True)
settings.load_profile("xsep")

CUDA = ("cuda-emulated", pytest.param("cuda", marks=pytest.mark.gpu))
TRITON = ("triton",) if not torch.cuda.is_available() else (pytest.param("triton", marks=pytest.mark.gpu),)


@pytest.fixture(autouse=True)
def nan_filled_memory():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """Sets torch's number of threads; the test's changes end with it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu", *CUDA])
def backend(request):
    """Each backend of compiled kernels, forced; its ``device`` is where tensors have to be."""
    with running(request.param) as found:
        yield found


@pytest.fixture(params=["cpu", *CUDA, *TRITON])
def any_backend(request):
    """``backend``, and Triton's, which is slow where it is interpreted."""
    with running(request.param) as found:
        yield found


@pytest.fixture(params=[*(f"cpu {isa}" for isa in cpu._C.isas()), *CUDA, *TRITON])
def kernels(request):
    """``any_backend``, the CPU's with each instruction set."""
    name, *isa = request.param.split()
    before = cpu._C.current_isa()
    with running(name) as found:
        cpu._C.set_isa(isa[0] if isa else before)
        yield found
        cpu._C.set_isa(before)


@pytest.fixture(params=CUDA)
def cuda(request):
    """The backends of the CUDA kernels, forced."""
    with running(request.param) as found:
        yield found


def interpreted(found):
    """Whether a backend is Triton's under the interpreter: no bfloat16, and milliseconds for each tap of each tile."""
    return found.name == "triton" and found.device == "cpu"


def dtypes(found):
    """Those that a backend takes, which compiled kernels do with all."""
    return [dtype for dtype in DTYPES if dtype != torch.bfloat16 or not interpreted(found)]


@contextmanager
def running(name):
    """Forces a backend, or skips the test where it cannot run."""
    found = BACKENDS[name]
    if name == "cuda-emulated" and found.why_absent() is not None:
        # Where the tests' environment asks for the module, not having it is a failure.
        end = pytest.fail if os.environ.get("XSEP_EMULATE_CUDA") == "1" else pytest.skip
        end(f"install with XSEP_EMULATE_CUDA=1 in the environment: {found.why_absent()}")
    if name == "triton" and found.why_absent() is not None:
        pytest.skip(found.why_absent())
    if name == "cuda" or (name == "triton" and found.device == "cuda"):
        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device that torch can use")
        if found.why_absent() is not None:
            pytest.skip(found.why_absent())
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = (
            False  # torch's error is the yardstick
        )
    with xsep.backend(name):
        yield found
