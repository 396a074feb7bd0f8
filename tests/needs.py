"""What not every torch has, found by looking and trying: marks that skip a test where it is missing, and questions."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F


def _mark(there: bool, what: str):
    return pytest.mark.skipif(not there, reason=f"torch {torch.__version__} has no {what}")


def _works(call) -> bool:
    try:
        call()
    except RuntimeError:
        return False
    return True


opcheck = _mark(hasattr(torch.library, "opcheck"), "torch.library.opcheck")
compiling = _mark(hasattr(torch.library, "register_fake"), "register_fake: compiling and exporting are not supported")
flop_counter = _mark(importlib.util.find_spec("torch.utils.flop_counter") is not None, "torch.utils.flop_counter")
weight_norm = _mark(hasattr(torch.nn.utils.parametrizations, "weight_norm"), "parametrizations.weight_norm")

_half_on_cpu = _works(lambda: F.conv2d(torch.ones(1, 1, 1, 1).half(), torch.ones(1, 1, 1, 1).half()))
pads_unbatched_circularly = _works(lambda: F.pad(torch.ones(1, 2, 2), (1, 1, 1, 1), mode="circular"))


def convolves(dtype, device_type) -> bool:
    """Whether torch itself convolves in this dtype."""
    return _half_on_cpu or (dtype, device_type) != (torch.float16, "cpu")


def conv2d(x, w, bias=None, *options):
    """Of any dtype: where torch does not convolve in it, float32's, rounded once."""
    if convolves(x.dtype, x.device.type):
        return F.conv2d(x, w, bias, *options)
    return F.conv2d(x.float(), w.float(), None if bias is None else bias.float(), *options).to(x.dtype)
