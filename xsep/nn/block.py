"""``FusedSequential``: ``nn.Sequential`` whose separable convolutions run as ``separable_block``."""

from __future__ import annotations

from typing import Any, Iterable, Literal, NamedTuple, Optional

from torch import Tensor, nn

from ..ops import separable_block
from .layers import DepthwiseConv2d, SeparableConv2d
from .norm import KINDS, takes_statistics, vectors

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
        center, scale, shift = (None, None, None) if step.norm is None else vectors(step.norm, x, mean, m2)
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
            statistics=norm is not None and takes_statistics(norm),
        )
    return x


class _Fused(NamedTuple):
    """A separable convolution and what it applies on load."""

    norm: nn.Module | None
    relu: bool
    depthwise: DepthwiseConv2d
    activation: Activation
    pointwise: nn.Conv2d


def _steps(layers: list[nn.Module]) -> list[nn.Module | _Fused]:
    steps: list[nn.Module | _Fused] = []
    position = 0
    while position < len(layers):
        end = position
        norm: Any = layers[end] if steps and isinstance(steps[-1], _Fused) and is_any(layers[end], KINDS) else None
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
        and is_any(activation, _ACTIVATIONS)
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


def is_any(module: nn.Module, kinds: Iterable[type]) -> bool:
    return any(is_exactly(module, kind) for kind in kinds)
