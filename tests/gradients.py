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
    """The tolerance rule for lists of tensors, as one vector in which each is divided by its largest true value.

    A model has hundreds of gradients, and a bias of sixteen numbers says little about who is closer to the truth.
    """
    scales = [t.abs().max().clamp_min(torch.finfo(torch.float32).tiny) for t in ref64]
    vectors = (
        torch.cat([(t.double() / scale).flatten() for t, scale in zip(tensors, scales)])
        for tensors in (ours, torch_same_dtype, ref64)
    )
    mine, theirs, truth = vectors
    assert_no_worse_than_torch(mine.to(ours[0].dtype), theirs.to(ours[0].dtype), truth, what)
