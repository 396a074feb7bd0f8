"""What the tests of layers and models share: an output with all its gradients, and their comparison with torch's."""

import torch

from xsep.testing import assert_no_worse_than_torch


def results(model, x):
    """The output, and the gradients of a weighted sum of it by input and parameters."""
    x = x.detach().requires_grad_()
    y = model(x)
    # Exact in every dtype, and mostly of one sign: where sums cancel, the better result is a matter of luck.
    weights = (torch.arange(y.numel(), device=y.device) % 7 - 2).to(y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *model.parameters()])]


def assert_all_no_worse_than_torch(ours, torch_same_dtype, ref64, what):
    """The tolerance rule for lists of tensors, as one vector in which each is divided by about its largest true value.

    A model has hundreds of gradients, and a bias of sixteen numbers says little about who is closer to the truth.
    """
    largest = [t.abs().max() for t in ref64]
    for value, theirs, truth in zip(largest, torch_same_dtype, ref64):
        # Such a gradient, as that of a bias before a BatchNorm, is mere rounding; divided by 1e-14 it hides all others.
        noise = (theirs.double() - truth).abs().max() > value
        assert not noise, f"{what}: torch's error exceeds the largest of {truth.numel()} true values, {value:.1e}"
    tiny = torch.finfo(torch.float32).tiny
    scales = [2.0 ** torch.frexp(value.clamp_min(tiny)).exponent.double() for value in largest]  # dividing is exact
    vectors = (
        torch.cat([(t.double() / scale).flatten() for t, scale in zip(tensors, scales)])
        for tensors in (ours, torch_same_dtype, ref64)
    )
    mine, theirs, truth = vectors
    assert_no_worse_than_torch(mine.to(ours[0].dtype), theirs.to(ours[0].dtype), truth, what)
