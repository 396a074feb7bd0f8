"""``fuse``: a trained model becomes one for inference, in place: BatchNorm goes into weights, ReLU into kernels."""

from __future__ import annotations

import copy
from typing import Any, Callable, Iterable, NamedTuple, Sequence, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..ops import separable_block_inference
from .block import FusedSequential, is_any, is_exactly
from .convert import full_name, listed
from .layers import DepthwiseConv2d, SeparableConv2d
from .norm import KINDS

Model = TypeVar("Model", bound=nn.Module)

_ACTIVATIONS: dict[type, str] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}
_CONVOLUTIONS = nn.Conv2d, DepthwiseConv2d
# By name, since timm and torchvision need not be installed: children that ``forward`` calls one after the other.
_STEM = "conv1", "bn1", "act1", "conv2", "bn2", "act2"
_EXIT = "conv3", "bn3", "act3", "conv4", "bn4", "act4"
_RUNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "xsep.models.xception.Xception": (_STEM, _EXIT),
    "xsep.models.xception.Block": (("skip", "skipbn"),),
    "timm.models.xception.Xception": (_STEM, _EXIT),
    "timm.models.xception.Block": (("skip", "skipbn"),),
}
_SEPARABLE = {"timm.models.xception.SeparableConv2d": ("conv1", "pointwise")}
# Modules that add their input to what the layers of that name make of it, where the condition holds.
_RESIDUAL: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "xsep.models.xception.Block": ("rep", lambda block: block.residual and block.skip is None),
    "timm.models.xception.Block": ("rep", lambda block: block.skip is None),
    "torchvision.models.mobilenetv2.InvertedResidual": ("conv", lambda block: block.use_res_connect),
}


class InferenceBlock(nn.Module):
    """``separable_block_inference`` with its weights and options, made of two convolutions by ``fuse``.

    Input (N, C, H, W), and perhaps a residual to be added; output (N, K, P, Q).  Parameters require no gradients.
    """

    depthwise_weight: nn.Parameter
    depthwise_bias: nn.Parameter | None
    pointwise_weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        depthwise: nn.Conv2d,
        pointwise: nn.Conv2d,
        relu: bool,
        activation: str | None,
        out_activation: str | None,
    ):
        super().__init__()
        self.in_channels = depthwise.in_channels
        self.options = {
            "stride": depthwise.stride,
            "padding": depthwise.padding,
            "dilation": depthwise.dilation,
            "relu": relu,
            "activation": activation,
            "out_activation": out_activation,
        }
        for name, convolution in (("depthwise", depthwise), ("pointwise", pointwise)):
            weight = convolution.weight.detach().contiguous()
            self.register_parameter(f"{name}_weight", nn.Parameter(weight, requires_grad=False))
            bias = convolution.bias
            bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
            self.register_parameter("bias" if name == "pointwise" else "depthwise_bias", bias)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        tensors = self.depthwise_weight, self.pointwise_weight, self.depthwise_bias, self.bias
        return _run(input, self.in_channels, *tensors, residual, self.options)

    def extra_repr(self) -> str:
        K, hidden = self.pointwise_weight.shape[:2]
        options = (f"{name}={value}" for name, value in self.options.items())
        return ", ".join((f"{self.in_channels}, {hidden}, {K}", *options))


# A leaf for torch.fx, as the convolutions of layers.py are.
@torch.fx.wrap
def _run(input, in_channels, depthwise_weight, pointwise_weight, depthwise_bias, bias, residual, options):
    if input.dim() != 4 or input.shape[1] != in_channels:
        raise ValueError(f"input must be (N, {in_channels}, H, W); got shape {tuple(input.shape)}")
    tensors = input, depthwise_weight, pointwise_weight, depthwise_bias, bias, residual
    return separable_block_inference(*tensors, **options)


class FusedResidual(nn.Module):
    """x plus what ``layers`` make of x, the last of which, an ``InferenceBlock``, adds it."""

    layers: nn.Sequential

    def forward(self, x: Tensor) -> Tensor:
        *others, last = self.layers
        y = x
        for layer in others:
            y = layer(y)
        return last(y, x)


def fuse(model: Model, *, report: Callable[[str], None] | None = print) -> Model:
    """Prepares a trained model for inference, in place: BatchNorm and activations go into the convolutions.

    A BatchNorm after a convolution becomes part of its weight and bias, computed in float64 and rounded once.  A
    depthwise and a pointwise convolution with what goes round them, [ReLU,] depthwise [, BatchNorm] [, ReLU or ReLU6],
    pointwise [, BatchNorm] [, ReLU or ReLU6], become one ``InferenceBlock``.  What is known to be called in a row is
    looked at: the layers of an ``nn.Sequential``, which is taken to be called as a whole, those of ``SeparableConv2d``
    and of Xception, timm's ``legacy_xception`` too.  Where a block of Xception or of torchvision's ``mobilenet_v2``
    ends in one, it adds the residual.  Modules of other classes or with hooks are left alone.

    The modules that are taken up become ``nn.Identity``, as in ``torch.ao.quantization.fuse_modules``; the names of the
    others stay.  No parameter requires gradients afterwards, and the model cannot be trained again: keep a copy of it.

    Args:
        model: any module in eval mode.
        report: is called with each line of a summary: what was fused, what was left and why; None for silence.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: it or a module in it is in training mode; the message names it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if module.training:
            raise ValueError(f"model must be in eval mode; {name or 'the model itself'} is in training mode")
    done = _Done([], [], {})
    for slots in _sequences(model):
        _fuse_sequence(slots, done)
    lines = _summary(model, done)
    added = [name for name, module in modules.items() if _add_residual(module)]
    if added:
        lines.insert(1, f"fused {listed(added, 'residual sum')}")
    model.requires_grad_(False)
    if report is not None:
        for line in lines:
            report(f"xsep: {line}")
    return model


class _Slot(NamedTuple):
    """A place in a sequence: the module ``name`` is a child of ``parent``."""

    name: str
    parent: nn.Module
    key: str

    @property
    def module(self) -> Any:
        return getattr(self.parent, self.key)

    def put(self, module: nn.Module) -> None:
        setattr(self.parent, self.key, module.eval())


class _Done(NamedTuple):
    fused: list[str]
    folded: list[str]
    left: dict[str, str]  # depthwise convolutions, and why they were not fused


def _children(module: nn.Module) -> Sequence[str] | None:
    """The children of a module that calls them in a row and does nothing else."""
    if not is_exactly(module, type(module)):
        return None
    keys: Sequence[str] | None = _SEPARABLE.get(full_name(module))
    if type(module) is SeparableConv2d:
        keys = "depthwise", "activation", "pointwise"
    if type(module).forward in (nn.Sequential.forward, FusedSequential.forward):
        keys = list(module._modules)
    return keys if keys is not None and all(isinstance(getattr(module, key), nn.Module) for key in keys) else None


def _sequences(model: nn.Module) -> list[list[_Slot]]:
    """Modules that are called in a row, each row as long as it gets."""
    seen: set[int] = set()
    shared: set[int] = set()  # in several places, of which not all are in the same row
    for _, module in model.named_modules(remove_duplicate=False):
        (shared if id(module) in seen else seen).add(id(module))
    inner: set[int] = set()

    def flat(prefix: str, parent: nn.Module, keys: Iterable[str]) -> list[_Slot]:
        slots = []
        for key in keys:
            child, name = getattr(parent, key), f"{prefix}.{key}" if prefix else key
            below = None if id(child) in shared else _children(child)
            if below is None:
                slots.append(_Slot(name, parent, key))
            else:
                inner.add(id(child))
                slots += flat(name, child, below)
        return slots

    rows = []
    for name, module in model.named_modules():
        keys = _children(module)
        if keys is not None and id(module) not in inner:
            rows.append(flat(name, module, keys))
        elif keys is None and "forward" not in vars(module):
            for run in _RUNS.get(full_name(module), ()):
                if getattr(module, run[0]) is not None:
                    rows.append(flat(name, module, run))
    return [[slot for slot in row if not is_exactly(slot.module, nn.Identity)] for row in rows]


def _fuse_sequence(slots: list[_Slot], done: _Done) -> None:
    position = 0  # nothing before it is taken up any more
    for start, slot in enumerate(slots):
        if start < position or not is_any(slot.module, _CONVOLUTIONS):
            continue
        end, norm = _take_norm(slots, start + 1)
        if _is_depthwise(slot.module):
            reason = _why_not_separable(slots, start)
            if reason is None:
                position = _fuse_separable(slots, position, start, done)
                continue
            done.left[slot.name] = reason
        if norm is not None:
            slot.put(_folded(slot.module, norm.module))
            _take_up([norm])
            done.folded.append(norm.name)
            position = end


def _why_not_separable(slots: list[_Slot], start: int) -> str | None:
    depthwise = slots[start].module
    if depthwise.padding_mode != "zeros":
        return f"padding_mode={depthwise.padding_mode!r}"
    end, _ = _take_norm(slots, start + 1)
    end, _ = _take_activation(slots, end)
    if end == len(slots):
        return "nothing known to follow"
    pointwise = slots[end].module
    if not _is_pointwise(pointwise):
        return f"followed by {type(pointwise).__name__}"
    if (pointwise.weight.dtype, pointwise.weight.device) != (depthwise.weight.dtype, depthwise.weight.device):
        return "of another dtype or device than the pointwise convolution"
    return None


def _fuse_separable(slots: list[_Slot], position: int, start: int, done: _Done) -> int:
    """Fuses what goes with the depthwise convolution at ``start``, and returns where it ends."""
    relu = start > position and is_exactly(slots[start - 1].module, nn.ReLU)
    if relu and slots[start - 1].module.inplace:
        # What it overwrites must be nobody else's: the result of a layer that makes a new tensor.
        relu = start > 1 and (start - 1 == position or is_any(slots[start - 2].module, (*_CONVOLUTIONS, *KINDS)))
    end, norm = _take_norm(slots, start + 1)
    end, activation = _take_activation(slots, end)
    pointwise = slots[end]
    end, out_norm = _take_norm(slots, end + 1)
    end, out_activation = _take_activation(slots, end)
    depthwise = slots[start]
    block = InferenceBlock(
        _folded(depthwise.module, norm and norm.module),
        _folded(pointwise.module, out_norm and out_norm.module),
        relu,
        activation,
        out_activation,
    )
    done.fused.append(depthwise.name)
    done.folded.extend(slot.name for slot in (norm, out_norm) if slot is not None)
    _take_up(slots[start - relu : end])
    depthwise.put(block)
    return end


def _take_up(slots: Iterable[_Slot]) -> None:
    for slot in slots:
        slot.put(nn.Identity())


def _take_norm(slots: list[_Slot], position: int) -> tuple[int, _Slot | None]:
    if position < len(slots) and _why_not_folded(slots[position].module) is None:
        return position + 1, slots[position]
    return position, None


def _take_activation(slots: list[_Slot], position: int) -> tuple[int, str | None]:
    if position < len(slots) and is_any(slots[position].module, _ACTIVATIONS):
        return position + 1, _ACTIVATIONS[type(slots[position].module)]
    return position, None


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, DepthwiseConv2d) or (
        isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
    )


def _is_pointwise(module: nn.Module) -> bool:
    return (
        is_exactly(module, nn.Conv2d)
        and (module.kernel_size, module.stride, module.groups) == ((1, 1), (1, 1), 1)
        and module.padding in ((0, 0), "valid", "same")
    )


def _why_not_folded(norm: nn.Module) -> str | None:
    if not is_any(norm, KINDS):
        return "with hooks or of a class that is not known"
    return "without running statistics" if norm.running_mean is None or norm.running_var is None else None


def _folded(convolution: nn.Conv2d, norm: _BatchNorm | None) -> nn.Conv2d:
    """A convolution that computes ``norm(convolution(x))``."""
    if norm is None:
        return convolution
    weight, bias = convolution.weight, convolution.bias
    vectors = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    wide: Any = (t.detach().to("cpu", torch.float64) if isinstance(t, Tensor) else t for t in (weight, bias, *vectors))
    # torch's own function computes in the dtypes it is given.
    folded = fuse_conv_bn_weights(*wide)
    made = copy.deepcopy(convolution)
    made.weight, made.bias = (nn.Parameter(t.detach().to(weight.device, weight.dtype)) for t in folded)
    return made


def _add_residual(module: nn.Module) -> bool:
    """Makes a module a ``FusedResidual`` if it is a known one that ends in an ``InferenceBlock``."""
    key, condition = _RESIDUAL.get(full_name(module), ("", None))
    if condition is None or "forward" in vars(module) or not condition(module):
        return False
    keys = _children(getattr(module, key))
    layers = [] if keys is None else _layers(getattr(module, key))
    if not layers or not is_exactly(layers[-1], InferenceBlock) or layers[-1].options["out_activation"] is not None:
        return False
    delattr(module, key)
    module.__class__ = FusedResidual
    module.layers = nn.Sequential(*layers).eval()
    return True


def _layers(module: nn.Module) -> list[Any]:
    keys = _children(module)
    if keys is None:
        return [] if is_exactly(module, nn.Identity) else [module]
    return [layer for key in keys for layer in _layers(getattr(module, key))]


def _summary(model: nn.Module, done: _Done) -> list[str]:
    lines = [f"fused {listed(done.fused, 'separable convolution')}", f"folded {listed(done.folded, 'BatchNorm')}"]
    left: dict[tuple[str, str], list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            reason = _why_not_folded(module) or "no convolution known to come before"
            left.setdefault(("BatchNorm", reason), []).append(name)
        elif _is_depthwise(module):
            reason = done.left.get(name, "with hooks, or of a class or in a place that is not known")
            left.setdefault(("depthwise convolution", reason), []).append(name)
    return [*lines, *(f"left {listed(names, what, reason)}" for (what, reason), names in left.items())]
