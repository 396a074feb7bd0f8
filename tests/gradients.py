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
    mine, theirs, truth = _as_vectors(ours, torch_same_dtype, ref64, what)
    assert_no_worse_than_torch(mine.to(ours[0].dtype), theirs.to(ours[0].dtype), truth, what)


def assert_mostly_no_worse_than_torch(draws, what):
    """``assert_all_no_worse_than_torch`` for the medians of several draws' largest errors, and of their mean errors.

    Where rounding decides whether a ReLU lets a number pass, the errors are those of the gradients that jump: in a deep
    network which of two results has more of them is a matter of luck.
    """
    vectors = [_as_vectors(*draw, what) for draw in draws]
    floor = 4 * torch.finfo(torch.float32).eps * max(truth.abs().max() for _, _, truth in vectors)
    errors = [[(result - truth).abs() for result in results] for *results, truth in vectors]
    for name, of, factor in (("max", torch.max, 2), ("mean", torch.mean, 1.5)):
        mine, theirs = (torch.stack([of(error) for error in each]).median() for each in zip(*errors))
        assert mine <= factor * theirs + floor, f"{what}: median of {name} {mine:.3e} > {factor} * {theirs:.3e}"


def _as_vectors(ours, torch_same_dtype, ref64, what):
    largest = [t.abs().max() for t in ref64]
    for value, theirs, truth in zip(largest, torch_same_dtype, ref64):
        # Such a gradient, as that of a bias before a BatchNorm, is mere rounding; divided by 1e-14 it hides all others.
        noise = (theirs.double() - truth).abs().max() > value
        assert not noise, f"{what}: torch's error exceeds the largest of {truth.numel()} true values, {value:.1e}"
    tiny = torch.finfo(torch.float32).tiny
    scales = [2.0 ** torch.frexp(value.clamp_min(tiny)).exponent.double() for value in largest]  # dividing is exact
    return [
        torch.cat([(t.double() / scale).flatten() for t, scale in zip(tensors, scales)])
        for tensors in (ours, torch_same_dtype, ref64)
    ]
