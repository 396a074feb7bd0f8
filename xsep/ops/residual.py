"""The end of a residual module as one torch operator, ``xsep::residual_sum``, and its gradients.

    out = scale * (max_pool(y) - center) + shift + skip_scale * (skip - skip_center) + skip_shift

or, without skip, relu(out), per channel: BatchNorm of what the last convolution made, after a max-pool of it, BatchNorm
of the other branch, and their sum.  y is (N, C, H, W), skip and out are (N, C, P, Q).  The vectors are of float32, or
of float64 with y.  Backward keeps y, skip and the vectors, and finds again which pixel of a window was the largest.

The operators are for backends that have kernels (``why_not_residual_sum``).  Elsewhere ``residual_sum`` is composed of
torch's, as derivatives of the gradients are everywhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._compat import (
    autocast_dtype,
    disable_autocast,
    is_autocast_enabled,
    is_compiling,
    register_autograd,
    register_fake,
)
from . import backends
from .library import differentiable_gradients, implement, lib, ops, problem_of, under_transform, unwatched
from .problem import Problem, check_same, is_nhwc, memory_format, vector_dtype

_POOL = "SymInt[2] window, SymInt[2] stride, SymInt[2] padding, bool ceil_mode"
lib.define(
    "residual_sum(Tensor y, Tensor center, Tensor scale, Tensor? shift, Tensor? skip, Tensor? skip_center, "
    f"Tensor? skip_scale, Tensor? skip_shift, {_POOL}, bool relu) -> Tensor"
)
lib.define(
    "residual_sum_backward(Tensor dout, Tensor y, Tensor center, Tensor scale, Tensor? shift, Tensor? skip, "
    f"Tensor? skip_center, Tensor? skip_scale, {_POOL}, bool relu) "
    "-> (Tensor dy, Tensor dscale, Tensor dshift, Tensor dskip, Tensor dskip_scale)"
)


class Pool(NamedTuple):
    """Arguments of ``F.max_pool2d``; as they are, nothing is pooled."""

    window: Sequence[int] = (1, 1)
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    ceil_mode: bool = False

    def extent(self, axis: int, size: int) -> int:
        """Of the output along axis 0 or 1.  The last window begins before the end of what is padded at the front."""
        span = size + 2 * self.padding[axis] - self.window[axis]
        extent = span // self.stride[axis] + 1
        if self.ceil_mode and span % self.stride[axis] and extent * self.stride[axis] < size + self.padding[axis]:
            extent += 1
        return extent


NO_POOL = Pool()


class Branch(NamedTuple):
    """A tensor, and the vectors of a BatchNorm that is to be applied to it: center and scale go together."""

    y: Any  # a tensor, or None for no branch
    center: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None


def residual_sum(main: Branch, skip: Branch | None = None, pool: Pool = NO_POOL, relu: bool = False) -> Tensor:
    """BatchNorm of a max-pool of ``main``, plus ``skip`` with its own: (N, C, P, Q), of main's dtype and format.

    Without ``skip`` there may be a ReLU at the end.

    Raises ``ValueError`` or ``TypeError`` naming what does not fit.
    """
    dtypes = main.y.dtype, *(vector_dtype(main.y),) * 3
    tensors = zip((*main, *(skip or (None,) * 4)), dtypes * 2)
    arguments: list[Any] = [*(None if t is None else t.to(dtype) for t, dtype in tensors), *pool, relu]
    if has_residual_kernels(main.y) and (is_compiling() or not under_transform()):
        return _run(*arguments)
    _check(*arguments)  # as the operator does
    return compose(*arguments)


def why_not_residual_sum(p: Problem, chosen: Any) -> str | None:
    """Why a backend has no kernels for residual sums of tensors like x of ``p``, or None: it has."""
    ask = getattr(chosen, "why_not_residual_sum", None)
    return ask(p) if ask else "it has no kernels for residual sums"


def has_residual_kernels(x: Tensor) -> bool:
    """Whether there are kernels for tensors like ``x``, whatever their sizes are, which may be symbolic."""
    if x.dim() != 4:
        return False
    dtype, device = x.dtype, x.device.type
    if device in ("cpu", "cuda") and is_autocast_enabled(device) and dtype != torch.float64:
        dtype = autocast_dtype(device)
    one = (1, 1, 1, 1)
    p = Problem(device, dtype, bool(is_nhwc(x)), one, one, (1, 1), (0, 0, 0, 0), (1, 1), x.get_device())
    return why_not_residual_sum(p, backends.choose(p)) is None


def compose(
    y, center, scale, shift, skip, skip_center, skip_scale, skip_shift, window, stride, padding, ceil_mode, relu
):
    """``residual_sum`` of torch's own operators: differentiable by torch as often as wanted."""
    pooled = y if _is_none(window, stride) else F.max_pool2d(y, window, stride, padding, ceil_mode=ceil_mode)
    out = apply_vectors(pooled, center, scale, shift)
    if skip is not None:
        out = out + (skip if skip_scale is None else apply_vectors(skip, skip_center, skip_scale, skip_shift))
    return (F.relu(out) if relu else out).to(y.dtype)


def apply_vectors(y: Tensor, center: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """scale * (y - center) + shift per channel, of the vectors' dtype."""
    sizes = [-1 if axis == 1 else 1 for axis in range(y.dim())]
    normalized = (y.to(vector_dtype(y)) - center.view(sizes)) * scale.view(sizes)
    return normalized if shift is None else normalized + shift.view(sizes)


def _is_none(window, stride) -> bool:
    return (*window, *stride) == (1, 1, 1, 1)


def _check(
    y, center, scale, shift, skip, skip_center, skip_scale, skip_shift, window, stride, padding, ceil_mode, relu
):
    """The pool as a problem, its window the filter.  Raises ``ValueError`` or ``TypeError``."""
    if y.dim() != 4:
        raise ValueError(f"y must be (N, C, H, W); got shape {tuple(y.shape)}")
    (N, C, H, W), pool = y.shape, Pool(window, stride, padding, ceil_mode)
    if any(2 * padding[axis] > window[axis] for axis in (0, 1)):
        raise ValueError(f"padding must be at most half of the window {tuple(window)}; got {tuple(padding)}")
    P, Q = pool.extent(0, H), pool.extent(1, W)
    named = dict(center=center, scale=scale, shift=shift)
    for name, vector in (*named.items(), *zip(_SKIP_VECTORS, (skip_center, skip_scale, skip_shift))):
        if vector is None:
            continue
        if tuple(vector.shape) != (C,):
            raise ValueError(f"{name} must have shape ({C},); got {tuple(vector.shape)}")
        if vector.dtype != vector_dtype(y):
            raise TypeError(f"{name} must be of {vector_dtype(y)} with y of {y.dtype}; got {vector.dtype}")
    if (skip_center is None) != (skip_scale is None) or (skip is None and skip_scale is not None):
        raise ValueError("skip_center and skip_scale go together, and only with skip")
    if skip is not None and relu:
        raise ValueError("relu must be False with skip")
    if skip is not None:
        check_same("y", y, "skip", skip)
        if tuple(skip.shape) != (N, C, P, Q):
            raise ValueError(f"skip must have shape {(N, C, P, Q)}; got {tuple(skip.shape)}")
    pads = [pad for axis, count in ((0, P), (1, Q)) for pad in (padding[axis], _behind(pool, axis, y.shape, count))]
    return problem_of(y, is_nhwc(y), y.shape, (C, 1, *window), stride, pads, (1, 1))


_SKIP_VECTORS = "skip_center", "skip_scale", "skip_shift"


def _behind(pool: Pool, axis: int, sizes, count: int) -> int:
    """How far the last window reaches beyond the end."""
    reach = (count - 1) * pool.stride[axis] + pool.window[axis] - sizes[2 + axis] - pool.padding[axis]
    return reach if reach > 0 else 0


def _chosen(p: Problem) -> Any:
    chosen = backends.choose(p)
    reason = why_not_residual_sum(p, chosen)
    if reason is not None:
        raise RuntimeError(f"xsep::residual_sum has no kernel for {p} on {chosen.name}: {reason}")
    return chosen


def _residual_sum(*arguments):
    p, relu = _check(*arguments), arguments[-1]
    main, skip = _filled(*arguments[:4]), arguments[4:8]
    return _chosen(p).residual_sum(p, main, Branch(*skip) if skip[2] is None else _filled(*skip), relu)


def _residual_sum_backward(dout, y, center, scale, shift, skip, skip_center, skip_scale, *options):
    p, relu = _check(y, center, scale, shift, skip, skip_center, skip_scale, None, *options), options[-1]
    dout = dout.contiguous(memory_format=p.memory_format)
    other = Branch(None if skip_scale is None else skip, skip_center, skip_scale)
    return _chosen(p).residual_sum_backward(p, dout, _filled(y, center, scale, shift), other, relu)


def _filled(y, center, scale, shift) -> Branch:
    return Branch(y, center, scale, torch.zeros_like(scale) if shift is None else shift)


implement("residual_sum", _residual_sum)
implement("residual_sum_backward", _residual_sum_backward)


@register_fake("xsep::residual_sum", lib=lib)
def _(*arguments):
    return _like(arguments[0], _check(*arguments).y)


@register_fake("xsep::residual_sum_backward", lib=lib)
def _(dout, y, center, scale, shift, skip, skip_center, skip_scale, *options):
    p, C = _check(y, center, scale, shift, skip, skip_center, skip_scale, None, *options), y.shape[1]
    dskip, of_skip = (y.new_empty(0), 0) if skip_scale is None else (_like(y, p.y), C)
    return _like(y, y.shape), *(scale.new_empty(size) for size in (C, C)), dskip, scale.new_empty(of_skip)


def _like(y: Tensor, sizes) -> Tensor:
    return torch.empty(sizes, dtype=y.dtype, device=y.device, memory_format=memory_format(y))


def _setup_context(ctx, inputs, output):
    tensors = list(inputs[:8])
    if tensors[6] is None:  # skip itself has the gradient of the sum
        tensors[4] = None
    ctx.save_for_backward(*tensors)
    ctx.options = inputs[8:]
    ctx.set_materialize_grads(False)


def _backward(ctx, dout):
    needs = ctx.needs_input_grad
    if dout is None:
        return (None,) * len(needs)
    y, center, scale, shift, skip, skip_center, skip_scale, _ = ctx.saved_tensors
    found: list[Tensor | None] = [None] * len(needs)
    if torch.is_grad_enabled():  # derivatives of the gradients are wanted
        kept = [need and t is not None for need, t in zip(needs, ctx.saved_tensors)]
        with disable_autocast():
            composed = differentiable_gradients(lambda *t: compose(*t, *ctx.options), ctx.saved_tensors, kept, (dout,))
        found[: len(composed)] = composed
    else:
        dy, dscale, dshift, dskip, dskip_scale = _gradients(
            dout, y, center, scale, shift, skip, skip_center, skip_scale, *ctx.options
        )
        found[:4] = dy, -scale * dshift, dscale, dshift
        if skip_scale is not None:
            found[4:8] = dskip, -skip_scale * dshift, dskip_scale, dshift.clone()
    if skip is None:
        found[4] = dout
    return tuple(g if need else None for g, need in zip(found, needs))


def _no_derivative(ctx, *gradients):
    raise NotImplementedError("xsep::residual_sum_backward has no derivative; differentiate xsep::residual_sum twice")


register_autograd("xsep::residual_sum", _backward, setup_context=_setup_context, lib=lib)
register_autograd(
    "xsep::residual_sum_backward", _no_derivative, setup_context=lambda ctx, inputs, output: None, lib=lib
)
_run = unwatched(ops.residual_sum, _residual_sum, 8, None, _setup_context, _backward)
_gradients = unwatched(ops.residual_sum_backward, _residual_sum_backward, 8)
