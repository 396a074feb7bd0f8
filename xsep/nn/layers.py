"""``DepthwiseConv2d`` and ``SeparableConv2d``: ``nn.Conv2d``'s arguments, parameters and initial values."""

from __future__ import annotations

import math
from typing import Any, Callable, Literal, NamedTuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import depthwise_conv2d
from ..ops.geometry import Padding, Size2, pair, resolve_padding

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
Activation = Union[None, str, Callable[[Tensor], Tensor]]

_ACTIVATIONS: dict[str | None, type[nn.Module]] = {None: nn.Identity, "relu": nn.ReLU, "elu": nn.ELU}


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise 2-D convolution: ``nn.Conv2d`` with ``groups=in_channels``, run by ``xsep.ops.depthwise_conv2d``.

    Parameters, initial values (for the same seed) and state dict are those of ``nn.Conv2d``: ``weight`` is
    (out_channels, 1, kh, kw), ``bias`` (out_channels,) or None.  It has no state of its own, so that ``xsep.convert``
    only has to change a module's class.

    Args:
        in_channels: channels of the input, at least 1.
        out_channels: a positive multiple of ``in_channels``.
        kernel_size, stride, dilation: an int or a pair (vertical, horizontal), at least 1.
        padding: an int, a pair, four ints (top, bottom, left, right), ``'valid'``, ``'same'`` (torch's, stride 1 only)
            or ``'tf_same'`` (TensorFlow's SAME, any stride).
        bias: whether there is one.
        padding_mode: ``'zeros'``, ``'reflect'``, ``'replicate'`` or ``'circular'``; all but the first pad with a copy.
        device, dtype: of the parameters.

    Input (N, in_channels, H, W) or (in_channels, H, W), dtype and device of the parameters unless under autocast;
    output (N, out_channels, P, Q) or (out_channels, P, Q), in the input's memory format.

    Raises:
        ValueError: an argument, or an input's shape, that does not fit; the message names it.
        TypeError: an argument that is no int, tuple or string where one is due.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2,
        stride: Size2 = 1,
        padding: Padding = 0,
        dilation: Size2 = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device=None,
        dtype=None,
    ):
        _check_channels(in_channels, out_channels)
        sizes = _checked_sizes(kernel_size, stride, padding, dilation)
        super().__init__(
            *(in_channels, out_channels, sizes.kernel_size, sizes.stride, 0, sizes.dilation, in_channels),
            *(bias, padding_mode, device, dtype),
        )
        self.padding = sizes.padding

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _convolve(
            input, weight, bias, self.in_channels, self.stride, self.padding, self.dilation, self.padding_mode
        )


# A leaf for torch.fx, as F.conv2d is one for nn.Conv2d: what reads shapes cannot be traced symbolically.
@torch.fx.wrap
def _convolve(input, weight, bias, in_channels, stride, padding, dilation, padding_mode):
    # The operator takes any input whose channels divide the filters: it cannot know that a channel is missing.
    if input.dim() not in (3, 4) or input.shape[-3] != in_channels:
        raise ValueError(
            f"input must be (N, {in_channels}, H, W) or ({in_channels}, H, W); got shape {tuple(input.shape)}"
        )
    if padding_mode != "zeros":
        top, bottom, left, right = resolve_padding(padding, input.shape[-2:], weight.shape[-2:], stride, dilation)
        input, padding = F.pad(input, [left, right, top, bottom], mode=padding_mode), 0
    return depthwise_conv2d(input, weight, bias, stride, padding, dilation)


def _check_channels(in_channels: int, out_channels: int) -> None:
    for name, value in {"in_channels": in_channels, "out_channels": out_channels}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an int, at least 1; got {value!r}")
    if out_channels % in_channels:
        raise ValueError(f"out_channels must be a multiple of in_channels={in_channels}; got {out_channels}")


class _Sizes(NamedTuple):
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: Any  # a name, a pair, or four ints if asymmetric
    dilation: tuple[int, int]


def _checked_sizes(kernel_size: Size2, stride: Size2, padding: Padding, dilation: Size2) -> _Sizes:
    sizes = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    for name, value in sizes.items():
        if not isinstance(value, (int, str, tuple, list)):
            raise TypeError(f"{name} must be an int or a tuple of ints; got {value!r}")
    kernel_size, stride = pair(kernel_size, "kernel_size", 1), pair(stride, "stride", 1)
    dilation = pair(dilation, "dilation", 1)
    resolved = resolve_padding(padding, kernel_size, kernel_size, stride, dilation)
    if isinstance(padding, str):
        return _Sizes(kernel_size, stride, padding, dilation)
    symmetric = resolved[0] == resolved[1] and resolved[2] == resolved[3]
    return _Sizes(kernel_size, stride, (resolved[0], resolved[2]) if symmetric else resolved, dilation)


def spatial_conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: Size2,
    segments: int | None = None,
    stride: Size2 = 1,
    padding: Padding = 0,
    dilation: Size2 = 1,
    bias: bool = True,
    padding_mode: PaddingMode = "zeros",
    device=None,
    dtype=None,
) -> nn.Conv2d:
    """The convolution of a separable one that sees neighbours: of each of ``segments`` groups of channels by itself.

    None or ``in_channels``: each channel by itself, a ``DepthwiseConv2d``.  Fewer: torch's grouped convolution, down to
    1, the regular convolution.  Raises ``ValueError`` where ``segments`` does not divide ``in_channels``, and for
    padding that only ``DepthwiseConv2d`` has.
    """
    if segments is None or segments == in_channels:
        return DepthwiseConv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, bias, padding_mode, device, dtype
        )
    _check_channels(in_channels, out_channels)
    if not isinstance(segments, int) or isinstance(segments, bool) or segments < 1 or in_channels % segments:
        raise ValueError(f"segments must be None or divide in_channels={in_channels}; got {segments!r}")
    sizes = _checked_sizes(kernel_size, stride, padding, dilation)
    if sizes.padding == "tf_same" or (isinstance(sizes.padding, tuple) and len(sizes.padding) == 4):
        raise ValueError(f"padding={padding!r} needs a depthwise convolution, not segments={segments}")
    return nn.Conv2d(in_channels, out_channels, *sizes, segments, bias, padding_mode, device, dtype)


class SeparableConv2d(nn.Module):
    """Depthwise convolution, optional activation, pointwise (1x1) convolution.

    Children ``depthwise`` (``DepthwiseConv2d``, in_channels → in_channels * depth_multiplier) and ``pointwise``
    (``nn.Conv2d``, → out_channels).  The paper's layer (section 4.7) has no activation in between and no bias;
    ``SeparableConv2d(..., padding='tf_same', bias=(False, True), init='keras')`` is Keras's ``SeparableConv2D``.

    Args:
        kernel_size, stride, padding, dilation, padding_mode: of the depthwise convolution, as in ``DepthwiseConv2d``.
        bias: one bool for both convolutions, or a pair (depthwise, pointwise).
        depth_multiplier: filters per input channel, at least 1.
        activation: between the two: None, ``'relu'``, ``'elu'`` or a callable, a module for instance.
        init: ``'torch'`` (``nn.Conv2d``'s), or ``'keras'``: Glorot uniform with Keras's fans, biases zero.
        device, dtype: of the parameters.
        segments: the paper's spectrum (sections 1.2 and 5): into how many segments, each of in_channels / segments
            channels, the spatial convolution divides its input.  None is depthwise, a segment per channel; 1 a regular
            convolution, (in_channels * depth_multiplier, in_channels, kh, kw), 2 halves that, and so on; it must divide
            ``in_channels``.  The spatial convolution stays the child ``depthwise``, torch's own where it is not
            depthwise, and stays the first of the two; the section has the pointwise one first, as Inception has, and
            calls the order unimportant in a stack of layers.

    Input (N, in_channels, H, W) or (in_channels, H, W); output (N, out_channels, P, Q) or (out_channels, P, Q).

    Raises:
        ValueError, TypeError: an argument, or an input's shape, that does not fit; the message names it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2,
        stride: Size2 = 1,
        padding: Padding = 0,
        dilation: Size2 = 1,
        bias: bool | tuple[bool, bool] = True,
        padding_mode: PaddingMode = "zeros",
        depth_multiplier: int = 1,
        activation: Activation = None,
        init: Literal["torch", "keras"] = "torch",
        device=None,
        dtype=None,
        segments: int | None = None,
    ):
        super().__init__()
        if not isinstance(depth_multiplier, int) or depth_multiplier < 1:
            raise ValueError(f"depth_multiplier must be an int, at least 1; got {depth_multiplier!r}")
        if not isinstance(out_channels, int) or out_channels < 1:
            raise ValueError(f"out_channels must be an int, at least 1; got {out_channels!r}")
        if init not in ("torch", "keras"):
            raise ValueError(f"init must be 'torch' or 'keras'; got {init!r}")
        biases = tuple(bias) if isinstance(bias, (tuple, list)) else (bias, bias)
        if len(biases) != 2:
            raise ValueError(f"bias must be a bool or a pair of bools (depthwise, pointwise); got {bias!r}")
        self.init = init
        hidden = in_channels * depth_multiplier
        self.depthwise = spatial_conv2d(
            in_channels,
            hidden,
            kernel_size,
            segments,
            stride,
            padding,
            dilation,
            biases[0],
            padding_mode,
            device,
            dtype,
        )
        self.activation = make_activation(activation)
        self.pointwise = nn.Conv2d(hidden, out_channels, 1, bias=biases[1], device=device, dtype=dtype)
        if init == "keras":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters anew, as ``init`` says."""
        if self.init == "torch":
            self.depthwise.reset_parameters()
            self.pointwise.reset_parameters()
            return
        if isinstance(self.depthwise, DepthwiseConv2d):
            # Keras reads its depthwise kernel (kh, kw, C, M) as C inputs and M outputs; torch's fans of
            # (C*M, 1, kh, kw) differ from that unless M is 1.
            kh, kw = self.depthwise.kernel_size
            C, M = self.depthwise.in_channels, self.depthwise.out_channels // self.depthwise.in_channels
            limit = math.sqrt(6 / (kh * kw * C + kh * kw * M))
            nn.init.uniform_(self.depthwise.weight, -limit, limit)
        else:
            nn.init.xavier_uniform_(self.depthwise.weight)
        nn.init.xavier_uniform_(self.pointwise.weight)
        for convolution in (self.depthwise, self.pointwise):
            if convolution.bias is not None:
                nn.init.zeros_(convolution.bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.pointwise(self.activation(self.depthwise(input)))


def make_activation(activation: Activation) -> Callable[[Tensor], Tensor]:
    """A new module for a name or None (the identity); a callable passes.  Raises ``ValueError`` for another name."""
    if callable(activation):
        return activation
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be None, 'relu', 'elu' or a callable; got {activation!r}")
    return _ACTIVATIONS[activation]()


class MaxPoolSame(nn.Module):
    """3x3 max-pool of stride 2 with TensorFlow's SAME: (N, C, H, W) → (N, C, ceil(H/2), ceil(W/2))."""

    def forward(self, x: Tensor) -> Tensor:
        window, stride, padding, ceil_mode = self.windows(x)
        return F.max_pool2d(x, window, stride, padding, ceil_mode=ceil_mode)

    def windows(self, x: Tensor) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], bool]:
        """``F.max_pool2d``'s kernel_size, stride, padding and ceil_mode for ``x``."""
        # SAME pads an odd extent by one on both sides and an even one at its end only, which is what ceil_mode adds.
        return (3, 3), (2, 2), (x.shape[2] % 2, x.shape[3] % 2), True
