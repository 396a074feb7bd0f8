"""The torch operators: schema, shapes, derivatives, autocast, FLOP counts.

    y      = xsep::fprop(x, w, bias)
    dx     = xsep::dgrad(dy, w)
    dw     = xsep::wgrad(dy, x)
    dx, dw = xsep::dgrad_wgrad(dy, x, w)      one pass over dy, picked by fprop's backward

The first three (bias aside) are bilinear and closed: the derivative of each is made of the other two, so every order
of derivative exists.  x is (N, C, H, W), w is (C*M, 1, R, S), y is (N, C*M, P, Q); pad is (top, bottom, left, right).
An output has the memory format of the first tensor beside it: y and dx of x in fprop and dgrad_wgrad, dx of dy in
dgrad.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, Callable

import torch
from torch import Tensor
from torch.library import Library

from .._compat import (
    any_autocast,
    autocast_dtype,
    disable_autocast,
    is_autocast_enabled,
    is_compiling,
    register_autograd,
    register_fake,
    register_flop_formula,
)
from . import aten, backends
from .problem import Problem, check_alike, check_same, check_sizes, is_nhwc, memory_format, nhwc_strides

GEOMETRY = "SymInt[2] stride, SymInt[4] pad, SymInt[2] dilation"

lib = Library("xsep", "DEF")
lib.define(f"fprop(Tensor x, Tensor w, Tensor? bias, {GEOMETRY}) -> Tensor")
lib.define(f"dgrad(Tensor dy, Tensor w, SymInt[] x_sizes, {GEOMETRY}) -> Tensor")
lib.define(f"wgrad(Tensor dy, Tensor x, SymInt[] w_sizes, {GEOMETRY}) -> Tensor")
lib.define(f"dgrad_wgrad(Tensor dy, Tensor x, Tensor w, {GEOMETRY}) -> (Tensor, Tensor)")
ops = torch.ops.xsep
_PLAIN = (Tensor, torch.nn.Parameter)
_AUTOCAST = ("cpu", "cuda")  # the devices whose autocast the operators follow


def problem_of(t: Tensor, nhwc: bool, x_sizes, w_sizes, stride, pad, dilation) -> Problem:
    sizes = tuple(x_sizes), tuple(w_sizes), tuple(stride), tuple(pad), tuple(dilation)
    try:
        return _problem(t.device, t.dtype, nhwc, *sizes)
    except TypeError:  # the symbolic sizes of fakes have no hash
        return _problem.__wrapped__(t.device, t.dtype, nhwc, *sizes)


@lru_cache(maxsize=4096)
def _problem(device: torch.device, dtype: torch.dtype, nhwc: bool, x, w, stride, pad, dilation) -> Problem:
    index = -1 if device.type == "cpu" or device.index is None else device.index
    return Problem(device.type, dtype, nhwc, x, w, stride, pad, dilation, index)


def _check_dy(dy: Tensor, sizes) -> None:
    if tuple(dy.shape) != tuple(sizes):
        raise ValueError(f"dy must have shape {tuple(sizes)}; got {tuple(dy.shape)}")


def _check_bias(x_kind: tuple, w_sizes, kind: tuple, sizes) -> None:
    check_alike("input", x_kind, "bias", kind)
    if tuple(sizes) != (w_sizes[0],):
        raise ValueError(f"bias must have shape ({w_sizes[0]},); got {tuple(sizes)}")


def _fprop(x, w, bias, stride, pad, dilation):
    like = (x.dtype, x.device), x.shape, x.stride(), (w.dtype, w.device), w.shape
    like_bias = None if bias is None else ((bias.dtype, bias.device), bias.shape)
    geometry = tuple(stride), tuple(pad), tuple(dilation)
    return _fprop_like(*like, like_bias, geometry, backends.forced(), torch.get_num_threads())(x, w, bias)


@lru_cache(maxsize=4096)
def _fprop_like(x_kind, sizes, strides, w_kind, w_sizes, bias, geometry, forced, threads) -> Callable:
    """``_fprop`` of tensors alike: finding out what does not depend on their data takes longer than small kernels."""
    check_alike("input", x_kind, "weight", w_kind)
    if bias is not None:
        _check_bias(x_kind, w_sizes, *bias)
    dtype, device = x_kind
    p = _problem(device, dtype, len(sizes) == 4 and nhwc_strides(strides), tuple(sizes), tuple(w_sizes), *geometry)
    prepare = getattr(backends.choose(p), "prepared_fprop", None)
    run = None if prepare is None else prepare(p, strides, threads)
    return run or (lambda x, w, bias: backends.choose(p).fprop(p, x, w, bias))


def _dgrad(dy, w, x_sizes, stride, pad, dilation):
    check_same("dy", dy, "weight", w)
    p = problem_of(dy, is_nhwc(dy), x_sizes, w.shape, stride, pad, dilation)
    chosen = backends.choose(p)
    _check_dy(dy, p.y)
    return chosen.dgrad(p, dy, w)


def _wgrad(dy, x, w_sizes, stride, pad, dilation):
    check_same("dy", dy, "input", x)
    p = problem_of(x, is_nhwc(x), x.shape, w_sizes, stride, pad, dilation)
    chosen = backends.choose(p)
    _check_dy(dy, p.y)
    return chosen.wgrad(p, dy, x)


def _dgrad_wgrad(dy, x, w, stride, pad, dilation):
    check_same("dy", dy, "input", x)
    check_same("input", x, "weight", w)
    p = problem_of(x, is_nhwc(x), x.shape, w.shape, stride, pad, dilation)
    chosen = backends.choose(p)
    _check_dy(dy, p.y)
    return chosen.dgrad_wgrad(p, dy, x, w)


def implement(name: str, kernel: Callable) -> None:
    """Makes ``kernel`` that of an operator on every device."""
    for key in ("CPU", "CUDA", "CompositeExplicitAutograd"):
        lib.impl(name, kernel, key)


implement("fprop", _fprop)
implement("dgrad", _dgrad)
implement("wgrad", _wgrad)
implement("dgrad_wgrad", _dgrad_wgrad)


def under_transform() -> bool:
    # register_autograd operators fail under torch.func.grad and answer jvp with a silent zero.
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _watched() -> bool:
    """Whether a mode, transform, tracer or profiler has to see operators.

    Where none has, nor a subclass of Tensor, a kernel can be called: torch's dispatcher takes longer than small
    kernels, about 12 us, and several times that with a backward in Python.
    """
    return bool(
        under_transform()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
        or torch._C._autograd._profiler_enabled()
    )


Cast = Callable[[torch.dtype, tuple], tuple]  # (the active dtype, an operator's arguments): what it is called with


def cast_first(count: int) -> Cast:
    """The first ``count`` arguments, tensors or None, take the active dtype; like torch this leaves float64 alone."""
    return lambda dtype, arguments: (*(cast(t, dtype) for t in arguments[:count]), *arguments[count:])


def cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t


def _under_autocast(device_type: str, run: Callable, casts: Cast, *arguments):
    # torch.library.register_autocast fixes one dtype; this follows the active one.
    dtype = autocast_dtype(device_type)
    with disable_autocast():
        return run(*casts(dtype, arguments))


def register_autocast(name: str, casts: Cast) -> None:
    """What ``casts`` does to the arguments of an operator under autocast.  Nothing that the operator calls is cast."""
    for device_type in _AUTOCAST:
        kernel = partial(_under_autocast, device_type, getattr(ops, name), casts)
        lib.impl(name, kernel, "Autocast" + device_type.upper())


def _function(kernel: Callable, setup_context: Callable, backward: Callable) -> Any:
    def forward(ctx, *arguments):
        output = kernel(*arguments)
        setup_context(ctx, arguments, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(kernel.__name__, (torch.autograd.Function,), methods)


def unwatched(
    operator,
    kernel: Callable,
    count: int,
    casts: Cast | None = None,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    compose: Callable | None = None,
) -> Callable:
    """``operator``, with as little between caller and ``kernel`` as gradients and autocast allow.

    The first ``count`` arguments are tensors or None.  ``casts`` is ``register_autocast``'s, if that was called,
    ``setup_context`` and ``backward`` are ``register_autograd``'s; without them gradients are left to the operator.
    ``compose`` makes the same of torch's own operators, for ``torch.func`` transforms and forward-mode AD.
    """
    with_gradients = operator
    if setup_context is not None and backward is not None:
        with_gradients = _function(kernel, setup_context, backward).apply

    def call(*arguments):
        if is_compiling():
            return operator(*arguments)
        some: Any = None  # of the tensors
        plain, needs = True, False
        for t in arguments[:count]:
            if t is not None:
                some, plain, needs = t, plain and type(t) in _PLAIN, needs or t.requires_grad
        if not plain or _watched():
            return (compose if compose is not None and under_transform() else operator)(*arguments)
        if casts is not None and any_autocast():
            device_type = some.device.type
            if device_type in _AUTOCAST and is_autocast_enabled(device_type):
                return _under_autocast(device_type, call, casts, *arguments)
        return (with_gradients if needs and torch.is_grad_enabled() else kernel)(*arguments)

    return call


@register_fake("xsep::fprop", lib=lib)
def _(x, w, bias, stride, pad, dilation):
    check_same("input", x, "weight", w)
    if bias is not None:
        _check_bias((x.dtype, x.device), w.shape, (bias.dtype, bias.device), bias.shape)
    sizes = check_sizes(x.shape, w.shape, stride, pad, dilation)
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


@register_fake("xsep::dgrad", lib=lib)
def _(dy, w, x_sizes, stride, pad, dilation):
    check_sizes(x_sizes, w.shape, stride, pad, dilation)
    return torch.empty(x_sizes, dtype=dy.dtype, device=dy.device, memory_format=memory_format(dy))


@register_fake("xsep::wgrad", lib=lib)
def _(dy, x, w_sizes, stride, pad, dilation):
    check_sizes(x.shape, w_sizes, stride, pad, dilation)
    return torch.empty(w_sizes, dtype=x.dtype, device=x.device)


@register_fake("xsep::dgrad_wgrad", lib=lib)
def _(dy, x, w, stride, pad, dilation):
    check_sizes(x.shape, w.shape, stride, pad, dilation)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    return dx, torch.empty(w.shape, dtype=x.dtype, device=x.device)


def _keep(count: int):
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:count])
        ctx.has_bias = len(inputs) == 6 and isinstance(inputs[2], Tensor)
        ctx.geometry = inputs[-3:]

    return setup_context


def _as(t: Tensor, like: Tensor) -> Tensor:
    """``t`` dense in the memory format of ``like``: an incoming gradient may be expanded or in the other layout."""
    return t.contiguous(memory_format=memory_format(like))


def _fprop_backward(ctx, dy):
    x, w = ctx.saved_tensors
    need_x, need_w, need_bias = ctx.needs_input_grad[:3]
    dy = _as(dy, x)
    dx = dw = dbias = None
    if need_x and need_w:
        dx, dw = dgrad_wgrad(dy, x, w, *ctx.geometry)
    elif need_x:
        dx = dgrad(dy, w, x.shape, *ctx.geometry)
    elif need_w:
        dw = wgrad(dy, x, w.shape, *ctx.geometry)
    if ctx.has_bias and need_bias:
        dbias = dy.sum((0, 2, 3))
    return dx, dw, dbias, None, None, None


def _dgrad_backward(ctx, ddx):
    dy, w = ctx.saved_tensors
    need_dy, need_w = ctx.needs_input_grad[:2]
    ddx = _as(ddx, dy)
    ddy = fprop(ddx, w, None, *ctx.geometry) if need_dy else None
    dw = wgrad(dy, ddx, w.shape, *ctx.geometry) if need_w else None
    return ddy, dw, None, None, None, None


def _wgrad_backward(ctx, ddw):
    dy, x = ctx.saved_tensors
    need_dy, need_x = ctx.needs_input_grad[:2]
    ddy = fprop(x, ddw, None, *ctx.geometry) if need_dy else None
    dx = dgrad(_as(dy, x), ddw, x.shape, *ctx.geometry) if need_x else None
    return ddy, dx, None, None, None, None


def _dgrad_wgrad_backward(ctx, ddx, ddw):
    dy, x, w = ctx.saved_tensors
    need_dy, need_x, need_w = ctx.needs_input_grad[:3]
    ddx = _as(ddx, x)
    ddy = dx = dw = None
    if need_dy:
        ddy = fprop(ddx, w, None, *ctx.geometry) + fprop(x, ddw, None, *ctx.geometry)
    if need_x:
        dx = dgrad(_as(dy, x), ddw, x.shape, *ctx.geometry)
    if need_w:
        dw = wgrad(dy, ddx, w.shape, *ctx.geometry)
    return ddy, dx, dw, None, None, None


register_autograd("xsep::fprop", _fprop_backward, setup_context=_keep(2), lib=lib)
register_autograd("xsep::dgrad", _dgrad_backward, setup_context=_keep(2), lib=lib)
register_autograd("xsep::wgrad", _wgrad_backward, setup_context=_keep(2), lib=lib)
register_autograd("xsep::dgrad_wgrad", _dgrad_wgrad_backward, setup_context=_keep(3), lib=lib)
register_autocast("fprop", cast_first(3))

fprop = unwatched(ops.fprop, _fprop, 3, cast_first(3), _keep(2), _fprop_backward, aten.compose)
dgrad = unwatched(ops.dgrad, _dgrad, 2)
wgrad = unwatched(ops.wgrad, _wgrad, 2)
dgrad_wgrad = unwatched(ops.dgrad_wgrad, _dgrad_wgrad, 3)


def differentiable_gradients(compose: Callable, tensors, needs, gradients) -> list[Tensor | None]:
    """The gradients of an operator as functions that torch can differentiate: those of ``compose(*tensors)``.

    Of ``tensors``, some of which may be None, those that ``needs`` says; ``gradients`` are those of what is composed.
    """
    # Of aliases, since a tensor may be a function of another: center is often one of x.
    aliases: list[Any] = [None if t is None else t.view_as(t) for t in tensors]
    made = compose(*aliases)
    outputs = (made,) if isinstance(made, Tensor) else made
    outputs, gradients = zip(*((output, g) for output, g in zip(outputs, gradients) if g is not None))
    wanted = [t for t, need in zip(aliases, needs) if need]
    found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True))
    return [next(found) if need else None for need in needs[: len(aliases)]]


if hasattr(torch.library, "triton_op"):
    from ..triton.library import see_through

    see_through(lib, backends.BACKENDS["triton"], backends.compiled_by_triton)


def flops(y_sizes, w_sizes) -> int:
    N, K, P, Q = y_sizes
    return 2 * N * K * P * Q * w_sizes[2] * w_sizes[3]


@register_flop_formula(ops.fprop)
def _(x, w, bias, stride, pad, dilation, *args, out_shape=None, **kwargs) -> int:
    return flops(out_shape, w)


@register_flop_formula(ops.dgrad)
def _(dy, w, *args, **kwargs) -> int:
    return flops(dy, w)


@register_flop_formula(ops.wgrad)
def _(dy, x, w_sizes, *args, **kwargs) -> int:
    return flops(dy, w_sizes)


@register_flop_formula(ops.dgrad_wgrad)
def _(dy, x, w, *args, **kwargs) -> int:
    return 2 * flops(dy, w)
