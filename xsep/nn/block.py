"""``FusedSequential``: ``nn.Sequential`` whose separable convolutions run as ``separable_block``."""

from __future__ import annotations

from typing import Any, Iterable, Literal, NamedTuple, Optional

import torch
from torch import Tensor, nn

from .._compat import is_compiling
from ..ops import separable_block
from ..ops.block import vector_dtype
from ..ops.functional import has_block_kernels
from .layers import DepthwiseConv2d, MaxPoolSame, SeparableConv2d
from .norm import KINDS, apply_vectors, takes_statistics, vectors

Activation = Optional[Literal["relu", "elu"]]

_ACTIVATIONS: dict[type, Activation] = {nn.Identity: None, nn.ReLU: "relu", nn.ELU: "elu"}


class FusedSequential(nn.Sequential):
    """``nn.Sequential`` that does not store what separable convolutions read, nor keeps what lies inside them.

    A ReLU before a separable convolution is applied as the convolution loads its input, and so is a BatchNorm before it
    if that follows another separable convolution, which makes its statistics.  A max-pool after such a BatchNorm comes
    before it, which then reads a quarter.  Parameters, buffers, their names and what is computed are those of
    ``nn.Sequential``; running statistics too.  (Where a BatchNorm's weight is 0 all of a pool's window is the same, and
    the gradient of the weight is that of another of its pixels.)

    A separable convolution is a ``SeparableConv2d``, or an ``nn.Sequential`` of a ``DepthwiseConv2d``, an activation
    (``nn.Identity``, ``nn.ReLU`` or ``nn.ELU``) and an ``nn.Conv2d`` of 1x1, without biases and padded with zeros.  All
    other layers are called as ever, as is any that has hooks or is of a subclass.

    Raises:
        ValueError: in training, an input of one value per channel, as ``nn.BatchNorm2d``.
    """

    def forward(self, input: Tensor) -> Tensor:
        return run_fused(self, input)


class FusedWhereSupported(FusedSequential):
    """``FusedSequential`` for inputs whose backend makes its blocks in one go, in backward too; else ``nn.Sequential``.

    It goes by the first block.  Compilers see ``nn.Sequential``, from which they make blocks of their own.
    """

    def forward(self, input: Tensor) -> Tensor:
        return run_fused(self, input, everywhere=False)


def run_fused(layers: Iterable[nn.Module], x: Tensor, everywhere: bool = True) -> Tensor:
    """What ``FusedSequential(*layers)`` makes of ``x``, or, unless ``everywhere``, ``FusedWhereSupported(*layers)``."""
    layers = list(layers)
    steps: list[nn.Module | _Fused | _Pooled] = [*layers]
    if everywhere or not is_compiling():
        fused = _steps(layers)
        if everywhere or _in_one_go(fused, x):
            steps = fused
    mean = m2 = None
    for step, following in zip(steps, (*steps[1:], None)):
        if isinstance(step, nn.Module):
            x = step(x)
            continue
        if isinstance(step, _Pooled):
            x = step(x, mean, m2)
            continue
        center, scale, shift = (None, None, None) if step.norm is None else vectors(step.norm, x, mean, m2)
        norm = None if following is None or isinstance(following, nn.Module) else following.norm
        w_pw = step.pointwise.weight
        if isinstance(following, _Pooled):
            w_pw = w_pw * following.sign(w_pw).view(-1, 1, 1, 1)
        x, mean, m2 = separable_block(
            x,
            center,
            scale,
            shift,
            step.relu,
            step.depthwise.weight,
            w_pw,
            step.depthwise.stride,
            step.depthwise.padding,
            step.depthwise.dilation,
            step.activation,
            statistics=norm is not None and takes_statistics(norm),
        )
    return x


def _in_one_go(steps: Iterable[nn.Module | _Fused | _Pooled], x: Tensor) -> bool:
    """Whether the backend of ``x`` has kernels for the first block of ``steps``, and for its gradients."""
    first = next((step for step in steps if isinstance(step, _Fused)), None)
    return first is not None and has_block_kernels(
        x,
        first.depthwise.weight,
        first.pointwise.weight,
        first.depthwise.stride,
        first.depthwise.padding,
        first.depthwise.dilation,
        first.activation,
    )


class _Fused(NamedTuple):
    """A separable convolution and what it applies on load."""

    norm: nn.Module | None
    relu: bool
    depthwise: DepthwiseConv2d
    activation: Activation
    pointwise: nn.Conv2d


class _Pooled(NamedTuple):
    """BatchNorm of what a separable convolution makes, and a max-pool after it.

    The largest number of a window stays the largest in a BatchNorm, or becomes the smallest where its weight is
    negative: those channels are made with the other sign, as is their ``mean``.
    """

    norm: Any
    pool: nn.Module

    def sign(self, like: Tensor) -> Tensor:
        """1 or -1 per channel."""
        if self.norm.weight is None:
            return like.new_ones(self.norm.num_features)
        return torch.where(self.norm.weight.detach() < 0, -1.0, 1.0).to(like.dtype)

    def __call__(self, y: Tensor, mean: Tensor | None, m2: Tensor | None) -> Tensor:
        sign = self.sign(y).to(vector_dtype(y))
        center, scale, shift = vectors(self.norm, y, None if mean is None else mean * sign, m2)
        return apply_vectors(self.pool(y), center * sign, scale * sign, shift)


def _steps(layers: list[nn.Module]) -> list[nn.Module | _Fused | _Pooled]:
    steps: list[nn.Module | _Fused | _Pooled] = []
    position = 0
    while position < len(layers):
        end = position
        norm: Any = layers[end] if steps and isinstance(steps[-1], _Fused) and is_any(layers[end], KINDS) else None
        end += norm is not None
        if norm is not None and end < len(layers) and _is_pool(layers[end]):
            steps.append(_Pooled(norm, layers[end]))
            position = end + 1
            continue
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


def _is_pool(layer: Any) -> bool:
    """Whether a max-pool's windows each give a number."""
    return is_exactly(layer, MaxPoolSame) or (is_exactly(layer, nn.MaxPool2d) and not layer.return_indices)


def is_exactly(module: nn.Module, kind: type) -> bool:
    """Whether a module is just that: what a subclass, a hook or another ``forward`` does is not known here."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is kind and not hooks and "forward" not in vars(module)


def is_any(module: nn.Module, kinds: Iterable[type]) -> bool:
    return any(is_exactly(module, kind) for kind in kinds)
