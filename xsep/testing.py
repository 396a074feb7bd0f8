"""The tolerance rule of xsep's tests, for anyone who wants to check a layer of their own with it."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_no_worse_than_torch(ours: Tensor, torch_same_dtype: Tensor, ref64: Tensor, what: str) -> None:
    """Raises ``AssertionError`` unless ``ours`` is about as close to the float64 truth as torch's own result.

    ``ours`` and ``torch_same_dtype`` are results in the dtype under test, ``ref64`` the float64 result on the inputs
    already rounded to it.  Allowed: twice torch's largest error and 1.5 times its mean error, plus
    ``4 eps_fp32 max|ref|``, since torch can be exact by luck.  Only the mean bound catches truncation to bfloat16.
    """
    assert ours.shape == ref64.shape, f"{what}: shape {tuple(ours.shape)} instead of {tuple(ref64.shape)}"
    if ref64.numel() == 0:
        return
    eps = torch.finfo(torch.float32).eps if ours.dtype != torch.float64 else torch.finfo(torch.float64).eps
    floor = 4 * eps * ref64.abs().max()
    error, torch_error = ((t.double() - ref64).abs() for t in (ours, torch_same_dtype))
    assert torch.isfinite(error).all(), f"{what}: not finite"
    assert error.max() <= 2 * torch_error.max() + floor, f"{what}: max {error.max():.3e} > 2 * {torch_error.max():.3e}"
    assert error.mean() <= 1.5 * torch_error.mean() + floor, (
        f"{what}: mean {error.mean():.3e} > 1.5 * {torch_error.mean():.3e}"
    )
