"""``convert``: the depthwise convolutions of an existing model become ``DepthwiseConv2d``, in place."""

from __future__ import annotations

from typing import Callable, TypeVar

from torch import nn

from .layers import DepthwiseConv2d

Model = TypeVar("Model", bound=nn.Module)

# By name, since timm need not be installed: TensorFlow's SAME, padded at every call.
_TF_SAME = {"timm.layers.conv2d_same.Conv2dSame", "timm.models.layers.conv2d_same.Conv2dSame"}
_NAMES_SHOWN = 3


def convert(model: Model, *, report: Callable[[str], None] | None = print) -> Model:
    """Makes every depthwise ``nn.Conv2d`` (or timm ``Conv2dSame``) of ``model`` a ``DepthwiseConv2d``, in place.

    A module's class is changed and nothing else: its parameters, buffers, device, dtype, mode, hooks and every
    reference to it stay, and so do optimizers and checkpoints.  A convolution is left alone where ``groups`` is 1 or
    is not ``in_channels``, and where its class or instance has a ``forward`` that is not known here (quantized, lazy
    and parametrized ones among them).

    Args:
        model: any module, itself a convolution perhaps.
        report: is called with each line of a summary: what was replaced, what was left and why; None for silence.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    replaced: list[str] = []
    left: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not _is_convolution(module):
            continue
        reason = _why_not(module)
        if reason is not None:
            left.setdefault(reason, []).append(name)
            continue
        if full_name(module) in _TF_SAME:
            module.padding = "tf_same"
        module.__class__ = DepthwiseConv2d
        replaced.append(name)
    if report is not None:
        report(f"xsep: replaced {listed(replaced, 'convolution', 'depthwise')}")
        for reason, names in left.items():
            report(f"xsep: left {listed(names, 'convolution', reason)}")
    return model


def _is_convolution(module: nn.Module) -> bool:
    # Quantized convolutions share no base class with nn.Conv2d, only its attributes.
    return all(hasattr(module, attribute) for attribute in ("in_channels", "kernel_size", "groups"))


def _why_not(conv: nn.Module) -> str | None:
    if isinstance(conv, DepthwiseConv2d):
        return "DepthwiseConv2d already"
    if conv.groups == 1:
        return "groups=1"
    if type(conv) is not nn.Conv2d and full_name(conv) not in _TF_SAME:
        return f"{full_name(conv)} may compute something else than nn.Conv2d"
    if conv.groups != conv.in_channels:
        return f"groups={conv.groups} of {conv.in_channels} channels"
    if "forward" in vars(conv) or "_conv_forward" in vars(conv):
        return "forward was replaced on the instance"
    return None


def full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def listed(names: list[str], noun: str, what: str = "") -> str:
    """``2 convolutions, what: first, second``; no more than a few names."""
    if not names:
        return f"no {noun}"
    shown = [name or "the model itself" for name in names[:_NAMES_SHOWN]]
    if len(names) > len(shown):
        shown.append(f"{len(names) - len(shown)} more")
    return f"{len(names)} {noun}{'s' * (len(names) > 1)}{', ' * bool(what)}{what}: {', '.join(shown)}"
