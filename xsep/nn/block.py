"""``FusedSequential``: ``nn.Sequential`` whose separable convolutions run as ``separable_block``."""

from __future__ import annotations

from typing import Any, Iterable, Literal, NamedTuple, Optional

import torch
from torch import Tensor, nn

from ..ops import separable_block
from ..ops.block import vector_dtype
from .layers import DepthwiseConv2d, SeparableConv2d

Activation = Optional[Literal["relu", "elu"]]

_ACTIVATIONS: dict[type, Activation] = {nn.Identity: None, nn.ReLU: "relu", nn.ELU: "elu"}


class FusedSequential(nn.Sequential):
    """``nn.Sequential`` that does not store what separable convolutions read, nor keeps what lies inside them.

    A ReLU before a separable convolution is applied as the convolution loads its input, and so is a BatchNorm before it
    if that follows another separable convolution, which makes its statistics.  Parameters, buffers, their names and
    what is computed are those of ``nn.Sequential``; running statistics too.

    A separable convolution is a ``SeparableConv2d``, or an ``nn.Sequential`` of a ``DepthwiseConv2d``, an activation
    (``nn.Identity``, ``nn.ReLU`` or ``nn.ELU``) and an ``nn.Conv2d`` of 1x1, without biases and padded with zeros.  All
    other layers are called as ever, as is any that has hooks or is of a subclass.

    Raises:
        ValueError: in training, an input of one value per channel, as ``nn.BatchNorm2d``.
    """

    def forward(self, input: Tensor) -> Tensor:
        return run_fused(self, input)


def run_fused(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """What ``FusedSequential(*layers)`` makes of ``x``."""
    steps = _steps(list(layers))
    mean = m2 = None
    for step, following in zip(steps, (*steps[1:], None)):
        if isinstance(step, nn.Module):
            x = step(x)
            continue
        center, scale, shift = (None, None, None) if step.norm is None else _vectors(step.norm, x, mean, m2)
        norm = following.norm if isinstance(following, _Fused) else None
        x, mean, m2 = separable_block(
            x,
            center,
            scale,
            shift,
            step.relu,
            step.depthwise.weight,
            step.pointwise.weight,
            step.depthwise.stride,
            step.depthwise.padding,
            step.depthwise.dilation,
            step.activation,
            statistics=norm is not None and _takes_statistics(norm),
        )
    return x


class _Fused(NamedTuple):
    """A separable convolution and what it applies on load."""

    norm: nn.BatchNorm2d | None
    relu: bool
    depthwise: DepthwiseConv2d
    activation: Activation
    pointwise: nn.Conv2d


def _steps(layers: list[nn.Module]) -> list[nn.Module | _Fused]:
    steps: list[nn.Module | _Fused] = []
    position = 0
    while position < len(layers):
        end = position
        norm: Any = (
            layers[end] if steps and isinstance(steps[-1], _Fused) and is_exactly(layers[end], nn.BatchNorm2d) else None
        )
        end += norm is not None
        relu = end < len(layers) and is_exactly(layers[end], nn.ReLU)
        end += relu
        separable = _separable(layers[end]) if end < len(layers) else None
        steps.append(layers[position] if separable is None else _Fused(norm, relu, *separable))
        position = position + 1 if separable is None else end + 1
    return steps


def _separable(layer: nn.Module) -> tuple[DepthwiseConv2d, Activation, nn.Conv2d] | None:
    children: list[Any] = list(layer.children())
    if not (is_exactly(layer, nn.Sequential) or is_exactly(layer, SeparableConv2d)) or len(children) != 3:
        return None
    depthwise, activation, pointwise = children
    fits = (
        is_exactly(depthwise, DepthwiseConv2d)
        and (depthwise.bias, depthwise.padding_mode) == (None, "zeros")
        and any(is_exactly(activation, kind) for kind in _ACTIVATIONS)
        and getattr(activation, "alpha", 1) == 1
        and is_exactly(pointwise, nn.Conv2d)
        and (pointwise.bias, pointwise.kernel_size, pointwise.groups) == (None, (1, 1), 1)
        and (pointwise.stride, pointwise.padding) == ((1, 1), (0, 0))
    )
    return (depthwise, _ACTIVATIONS[type(activation)], pointwise) if fits else None


def is_exactly(module: nn.Module, kind: type) -> bool:
    """Whether a module is just that: what a subclass, a hook or another ``forward`` does is not known here."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is kind and not hooks and "forward" not in vars(module)


def _takes_statistics(norm: nn.BatchNorm2d) -> bool:
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def _vectors(norm: nn.BatchNorm2d, y: Tensor, mean: Tensor | None, m2: Tensor | None):
    """center, scale and shift with which ``norm(y)`` is scale * (y - center) + shift; mean and m2 are those of y.

    Running statistics are updated as ``norm`` would.
    """
    if mean is not None and m2 is not None:
        var = m2 / max(1, y.numel() // y.shape[1])
        if norm.training:
            _count(norm, y, mean.detach(), m2.detach())
    else:
        assert norm.running_mean is not None and norm.running_var is not None
        mean, var = norm.running_mean, norm.running_var.to(vector_dtype(y))
    scale = torch.rsqrt(var + norm.eps)
    return mean, scale if norm.weight is None else norm.weight * scale, norm.bias


@torch.no_grad()
def _count(norm: nn.BatchNorm2d, y: Tensor, mean: Tensor, m2: Tensor) -> None:
    """What ``nn.BatchNorm2d`` does to its buffers in training."""
    count = y.numel() // y.shape[1]
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(y.shape)}")
    if not norm.track_running_stats:
        return
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    if count > 1 and norm.running_mean is not None and norm.running_var is not None and momentum is not None:
        norm.running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        norm.running_var.mul_(1 - momentum).add_(m2 / (count - 1), alpha=momentum)
