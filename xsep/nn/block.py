"""``FusedSequential``: ``nn.Sequential`` whose separable convolutions run as ``separable_block``."""

from __future__ import annotations

from typing import Any, Iterable, Literal, NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor, nn

from .._compat import is_compiling
from ..ops import separable_block
from ..ops.functional import has_block_kernels
from ..ops.moments import with_moments
from ..ops.problem import vector_dtype
from ..ops.residual import NO_POOL, Branch, Pool, has_residual_kernels, residual_sum
from .layers import DepthwiseConv2d, MaxPoolSame, SeparableConv2d
from .norm import KINDS, takes_statistics, vectors

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

    _everywhere = True

    def forward(self, input: Tensor) -> Tensor:
        return run_fused(self, input, self._everywhere)

    def plus(self, input: Tensor, shortcut: Iterable[nn.Module] = (), before: Iterable[nn.Module] = ()) -> Tensor:
        """``self(x)`` plus what the layers of ``shortcut``, or none, make of x, which those of ``before`` make of
        ``input``: a residual module.

        Where there are kernels for it (on a CPU, for channels_last tensors) the sum, a BatchNorm at the end of
        ``self``, a max-pool after that and a BatchNorm at the end of ``shortcut`` are made in one pass, and a pointwise
        convolution before the latter makes its statistics; a BatchNorm and a ReLU in ``before`` are applied as both
        branches load ``input``, if these begin with convolutions.
        """
        if is_exactly(self, type(self)):
            return run_fused(self, input, self._everywhere, shortcut, before)
        x = _called(before, input)
        return self(x) + _called(shortcut, x)


class FusedWhereSupported(FusedSequential):
    """``FusedSequential`` for inputs whose backend makes its blocks in one go, in backward too; else ``nn.Sequential``.

    It goes by the first block.  Compilers see ``nn.Sequential``, from which they make blocks of their own.
    """

    _everywhere = False


def run_fused(
    layers: Iterable[nn.Module],
    x: Tensor,
    everywhere: bool = True,
    shortcut: Iterable[nn.Module] | None = None,
    before: Iterable[nn.Module] = (),
) -> Tensor:
    """What ``FusedSequential(*layers)`` makes of ``x``, or, unless ``everywhere``, ``FusedWhereSupported(*layers)``.

    With ``shortcut``, what ``plus`` makes of it.
    """
    layers, before, sums = list(layers), list(before), False
    others = None if shortcut is None else list(shortcut)
    if not _is_norm_and_relu(before):
        x, before = _called(before, x), []
    steps: list[_Step] = [*layers]
    if everywhere or not is_compiling():
        sums = has_residual_kernels(x)
        fused = _steps(layers, sums)
        if everywhere or _in_one_go(fused, x):
            steps = fused
        else:
            sums = False
    projection = _projection(others, x) if sums and others is not None else None
    loads = before and projection is not None and steps and isinstance(steps[0], _Fused)
    load = _loaded(before, x) if loads else _Load(_called(before, x))
    main = _run(steps, load)
    if others is None:
        return main.made()
    if projection is not None:
        return main.made(projection.branch(load))
    skip = _called(others, load.x)
    return main.made(Branch(skip)) if sums else main.made() + skip


def _called(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _in_one_go(steps: Iterable[_Step], x: Tensor) -> bool:
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


class _Load(NamedTuple):
    """A tensor, and the function that is applied as it is loaded."""

    x: Tensor
    center: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    relu: bool = False


def _is_norm_and_relu(layers: Sequence[nn.Module]) -> bool:
    return len(layers) == 2 and is_any(layers[0], KINDS) and is_exactly(layers[1], nn.ReLU)


def run_norm_and_relu(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """BatchNorm and ReLU, in one pass after that for the statistics where there are kernels."""
    if is_compiling() or not _is_norm_and_relu(layers) or not has_residual_kernels(x):
        return _called(layers, x)
    load = _loaded(layers, x)
    return residual_sum(Branch(*load[:4]), relu=True)


def _loaded(layers: Sequence[nn.Module], x: Tensor) -> _Load:
    """A BatchNorm and a ReLU as a function on load."""
    norm: Any = layers[0]
    y, mean, m2 = with_moments(x) if takes_statistics(norm) else (x, None, None)
    center, scale, shift = vectors(norm, x, mean, m2)
    return _Load(y, center, scale, shift, True)


class _Fused(NamedTuple):
    """A separable convolution and what it applies on load."""

    norm: nn.Module | None
    relu: bool
    depthwise: DepthwiseConv2d
    activation: Activation
    pointwise: nn.Conv2d


class _Applied(NamedTuple):
    """BatchNorm of what a separable convolution makes, ahead of anything else: a max-pool after it or None, a ReLU.

    The largest number of a window stays the largest in a BatchNorm, or becomes the smallest where its weight is
    negative: those channels are made with the other sign, as is their ``mean``.
    """

    norm: Any
    pool: Any
    relu: bool = False

    def sign(self, like: Tensor) -> Tensor:
        """1 or -1 per channel."""
        if self.norm.weight is None:
            return like.new_ones(self.norm.num_features)
        return torch.where(self.norm.weight.detach() < 0, -1.0, 1.0).to(like.dtype)

    def branch(self, y: Tensor, mean: Tensor | None, m2: Tensor | None) -> Branch:
        if self.pool is None:
            return Branch(y, *vectors(self.norm, y, mean, m2))
        sign = self.sign(y).to(vector_dtype(y))
        center, scale, shift = vectors(self.norm, y, None if mean is None else mean * sign, m2)
        return Branch(y, center * sign, scale * sign, shift)

    def windows(self, y: Tensor) -> Pool:
        if self.pool is None:
            return NO_POOL
        if isinstance(self.pool, MaxPoolSame):
            return Pool(*self.pool.windows(y))
        pool = self.pool
        return Pool(_pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding), pool.ceil_mode)


_Step = Union[nn.Module, _Fused, _Applied]


class _Made(NamedTuple):
    """What steps made of a tensor; its last BatchNorm and max-pool may be left to be applied."""

    main: Branch
    pool: Pool = NO_POOL
    relu: bool = False

    def made(self, skip: Branch | None = None) -> Tensor:
        """With them applied, plus ``skip``."""
        if self.main.scale is not None and not (self.relu and skip is not None):
            return residual_sum(self.main, skip, self.pool, self.relu)
        y = self.made() if self.relu else self.main.y
        if skip is None:
            return y
        return y + (skip.y if skip.scale is None else residual_sum(skip))


def _run(steps: Sequence[_Step], load: _Load) -> _Made:
    """Only a separable convolution can be the first of ``steps`` where there is a function to be applied."""
    mean = m2 = None
    made = _Made(Branch(load.x))
    for step, following in zip(steps, (*steps[1:], None)):
        if isinstance(step, _Applied):
            made = _Made(step.branch(made.main.y, mean, m2), step.windows(made.main.y), step.relu)
            continue
        x = made.made()
        if isinstance(step, nn.Module):
            made = _Made(Branch(step(x)))
            continue
        if step.norm is not None:
            load = _Load(x, *vectors(step.norm, x, mean, m2))
        elif step is not steps[0]:
            load = _Load(x)
        norm = None if following is None or isinstance(following, nn.Module) else following.norm
        w_pw = step.pointwise.weight
        if isinstance(following, _Applied) and following.pool is not None:
            w_pw = w_pw * following.sign(w_pw).view(-1, 1, 1, 1)
        y, mean, m2 = separable_block(
            *load[:4],
            load.relu or step.relu,
            step.depthwise.weight,
            w_pw,
            step.depthwise.stride,
            step.depthwise.padding,
            step.depthwise.dilation,
            step.activation,
            statistics=norm is not None and takes_statistics(norm),
        )
        made = _Made(Branch(y))
    return made


class _Projection(NamedTuple):
    """The other branch of a residual module: a pointwise convolution and a BatchNorm, which is left to be applied.

    The convolution is a separable one, whose filters are a pixel, so it makes the statistics.
    """

    filters: Tensor
    convolution: Any
    norm: Any

    def branch(self, load: _Load) -> Branch:
        w, stride = self.convolution.weight, self.convolution.stride
        statistics = takes_statistics(self.norm)
        y, mean, m2 = separable_block(*load, self.filters, w, stride, statistics=statistics)
        return Branch(y, *vectors(self.norm, y, mean, m2))


def _projection(layers: list[nn.Module], x: Tensor) -> _Projection | None:
    """Layers that are one, if the backend of ``x`` has kernels for it."""
    if len(layers) != 2 or not _is_pointwise(layers[0]) or not is_any(layers[1], KINDS):
        return None
    convolution: Any = layers[0]
    filters = x.new_ones(x.shape[1], 1, 1, 1)
    supported = has_block_kernels(x, filters, convolution.weight, convolution.stride, 0, 1, None)
    return _Projection(filters, convolution, layers[1]) if supported else None


def _steps(layers: list[nn.Module], sums: bool) -> list[_Step]:
    """``sums``: a BatchNorm without a pool after it is applied by a kernel, too."""
    steps: list[_Step] = []
    position = 0
    while position < len(layers):
        end = position
        norm: Any = layers[end] if steps and isinstance(steps[-1], _Fused) and is_any(layers[end], KINDS) else None
        end += norm is not None
        if norm is not None and end < len(layers) and _is_pool(layers[end]):
            steps.append(_Applied(norm, layers[end]))
            position = end + 1
            continue
        relu = end < len(layers) and is_exactly(layers[end], nn.ReLU)
        end += relu
        separable = _separable(layers[end]) if end < len(layers) else None
        if separable is not None:
            steps.append(_Fused(norm, relu, *separable))
            position = end + 1
            continue
        if norm is None or not sums:
            steps.append(layers[position])
            position += 1
            continue
        steps.append(_Applied(norm, None, relu))
        position = end
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
        and _is_pointwise(pointwise)
        and pointwise.stride == (1, 1)
    )
    return (depthwise, _ACTIVATIONS[type(activation)], pointwise) if fits else None


def _is_pointwise(layer: Any) -> bool:
    return (
        is_exactly(layer, nn.Conv2d)
        and (layer.bias, layer.kernel_size, layer.groups) == (None, (1, 1), 1)
        and layer.padding == (0, 0)
    )


def _is_pool(layer: Any) -> bool:
    """Whether a layer is a max-pool that is known here, and its windows each give a number."""
    return is_exactly(layer, MaxPoolSame) or (
        is_exactly(layer, nn.MaxPool2d) and not layer.return_indices and _pair(layer.dilation) == (1, 1)
    )


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def is_exactly(module: nn.Module, kind: type) -> bool:
    """Whether a module is just that: what a subclass, a hook or another ``forward`` does is not known here."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is kind and not hooks and "forward" not in vars(module)


def is_any(module: nn.Module, kinds: Iterable[type]) -> bool:
    return any(is_exactly(module, kind) for kind in kinds)
