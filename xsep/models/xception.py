"""Xception (figure 5 of arXiv:1610.02357), in the two dialects its public weights were trained in.

Modules and state-dict keys are those of timm's ``legacy_xception`` (Cadene's ``xception``).
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any, Callable, Literal, NamedTuple, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.block import FusedSequential, FusedWhereSupported, is_exactly, run_fused, run_norm_and_relu
from ..nn.layers import MaxPoolSame, make_activation, spatial_conv2d


class Preset(NamedTuple):
    """What tells implementations of the figure apart: BatchNorm's constants, padding of the pools, initial values."""

    eps: float
    momentum: float
    same_pool: bool
    glorot: bool


PRESETS = {
    "keras": Preset(eps=1e-3, momentum=0.01, same_pool=True, glorot=True),
    "timm": Preset(eps=1e-5, momentum=0.1, same_pool=False, glorot=False),
}


# Channels before, between and after the separable convolutions of each block.
BLOCKS: dict[int, tuple[int, ...]] = {
    1: (64, 128, 128),
    2: (128, 256, 256),
    3: (256, 728, 728),
    **{i: (728, 728, 728, 728) for i in range(4, 12)},
    12: (728, 728, 1024),
}

# What divides the channels of every separable convolution; None is depthwise.
SEGMENTS = (None, 1, 2, 4, 8)


class FeatureInfo(list):
    """A dict (``num_chs``, ``reduction``, ``module``) per feature map, with the accessors of timm's ``FeatureInfo``."""

    def channels(self) -> list[int]:
        return [info["num_chs"] for info in self]

    def reduction(self) -> list[int]:
        return [info["reduction"] for info in self]


def separable(in_channels: int, out_channels: int, activation: str | None, segments: int | None) -> nn.Sequential:
    """The figure's SeparableConv 3x3, under the checkpoints' names ``conv1`` (depthwise) and ``pointwise``."""
    layers: OrderedDict = OrderedDict()
    layers["conv1"] = spatial_conv2d(in_channels, in_channels, 3, segments, padding=1, bias=False)
    layers["act"] = make_activation(activation)
    layers["pointwise"] = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return nn.Sequential(layers)


class Block(nn.Module):
    """One module of the figure: separable convolutions, each [ReLU,] SeparableConv, BatchNorm, and a residual.

    ``widths`` are the channels before, between and after them.  With ``pool`` the block ends in it, and its residual is
    a 1x1 convolution of stride 2 with BatchNorm instead of the identity.  (N, widths[0], H, W) →
    (N, widths[-1], H, W), or with ``pool`` (N, widths[-1], ceil(H/2), ceil(W/2)).  ``fused`` is that of
    ``Xception``.
    """

    def __init__(
        self,
        widths: Sequence[int],
        norm: Callable[[int], nn.Module],
        pool: nn.Module | None,
        starts_with_relu: bool,
        residual: bool,
        activation: str | None,
        segments: int | None,
        fused: bool | None,
    ):
        super().__init__()
        self.residual = residual
        self.skip: nn.Module | None = None
        if residual and pool is not None:
            self.skip = nn.Conv2d(widths[0], widths[-1], 1, stride=2, bias=False)
            self.skipbn = norm(widths[-1])
        rep: list[nn.Module] = []
        for i, (in_channels, out_channels) in enumerate(zip(widths, widths[1:])):
            if i > 0 or starts_with_relu:
                # The residual takes the block's input before the first ReLU.
                rep.append(nn.ReLU(inplace=i > 0))
            rep += [separable(in_channels, out_channels, activation, segments), norm(out_channels)]
        sequential = {True: FusedSequential, False: nn.Sequential, None: FusedWhereSupported}[fused]
        self.rep = sequential(*rep, *([] if pool is None else [pool]))

    def forward(self, x: Tensor, before: Sequence[nn.Module] = ()) -> Tensor:
        """``before``: layers whose result is the input, which are called here."""
        if self.residual and isinstance(self.rep, FusedSequential):
            return self.rep.plus(x, () if self.skip is None else (self.skip, self.skipbn), before)
        for layer in before:
            x = layer(x)
        y = self.rep(x)
        if not self.residual:
            return y
        y += x if self.skip is None else self.skipbn(self.skip(x))
        return y


class Xception(nn.Module):
    """Xception with timm's interface; the defaults are the paper's network, 22,855,952 parameters.

    Args:
        preset: ``'keras'``: BatchNorm eps 1e-3 and momentum 0.01, max-pools with TensorFlow's SAME, Glorot uniform; or
            ``'timm'``: eps 1e-5, momentum 0.1, symmetric pools, He normal.  Weights trained with one give other
            features with the other.
        num_classes: 0 leaves out the classifier.
        in_chans: channels of the input.
        residual: False for figure 9's network without residual connections.
        activation: between depthwise and pointwise: None, ``'relu'`` or ``'elu'`` (figure 10).
        fc_layers: fully connected layers of 4096 units with ReLU before the classifier: 0, or 2 as in table 2.
        drop_rate: dropout before the classifier.  The paper trains with 0.5 on ImageNet and without on JFT; the
            default is Keras's and timm's.
        features_only: ``forward`` returns the feature maps that ``feature_info`` describes; there is no head.
        fused: separable convolutions apply the BatchNorm and ReLU before them on load, and backward keeps their inputs
            and results only (``xsep.nn.FusedSequential``).  The parameters and what is computed are the same.  None:
            where kernels make these blocks in one go, forward and backward (``xsep.explain_block``), and not under
            ``torch.compile``.

    Input (N, in_chans, H, W), 299 x 299 and [-1, 1] for the public weights; output (N, num_classes), or without
    classifier (N, head_hidden_size).

    Raises:
        ValueError: an unknown ``preset`` or ``activation``, a negative ``num_classes`` or ``fc_layers``, ``segments``
            that do not divide.
    """

    num_features = 2048

    def __init__(
        self,
        preset: Literal["keras", "timm"] = "keras",
        num_classes: int = 1000,
        in_chans: int = 3,
        residual: bool = True,
        activation: Literal["relu", "elu"] | None = None,
        fc_layers: int = 0,
        drop_rate: float = 0.0,
        features_only: bool = False,
        fused: bool | None = None,
        segments: int | None = None,
    ):
        super().__init__()
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
        if fc_layers < 0:
            raise ValueError(f"fc_layers must not be negative; got {fc_layers}")
        if segments not in SEGMENTS:
            raise ValueError(f"segments must be one of {', '.join(map(str, SEGMENTS))}; got {segments!r}")
        self.preset, self.in_chans, self.drop_rate, self.features_only = preset, in_chans, drop_rate, features_only
        self.activation, self.fused, self.segments = activation, fused, segments
        constants = PRESETS[preset]
        norm = partial(nn.BatchNorm2d, eps=constants.eps, momentum=constants.momentum)

        self.conv1 = nn.Conv2d(in_chans, 32, 3, stride=2, bias=False)
        self.bn1 = norm(32)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(32, 64, 3, bias=False)
        self.bn2 = norm(64)
        self.act2 = nn.ReLU(inplace=True)
        for i, widths in BLOCKS.items():
            pool = None if widths[0] == widths[-1] else MaxPoolSame() if constants.same_pool else nn.MaxPool2d(3, 2, 1)
            self.add_module(f"block{i}", Block(widths, norm, pool, i > 1, residual, activation, segments, fused))
        self.conv3 = separable(1024, 1536, activation, segments)
        self.bn3 = norm(1536)
        self.act3 = nn.ReLU(inplace=True)
        self.conv4 = separable(1536, self.num_features, activation, segments)
        self.bn4 = norm(self.num_features)
        self.act4 = nn.ReLU(inplace=True)

        self.hidden = nn.Sequential()
        self.head_hidden_size = self.num_features
        for _ in range(0 if features_only else fc_layers):
            self.hidden.append(nn.Linear(self.head_hidden_size, 4096))
            self.hidden.append(nn.ReLU(inplace=True))
            self.head_hidden_size = 4096
        self.apply(self._initialize)
        self.reset_classifier(0 if features_only else num_classes)

        self.feature_info = FeatureInfo(
            [
                dict(num_chs=64, reduction=2, module="act2"),
                dict(num_chs=128, reduction=4, module="block2.rep.0"),
                dict(num_chs=256, reduction=8, module="block3.rep.0"),
                dict(num_chs=728, reduction=16, module="block12.rep.0"),
                dict(num_chs=2048, reduction=32, module="act4"),
            ]
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.features_only:
            return self._features(x, taps=(0, 1, 2, 11))
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) → (N, 2048, about H/32, W/32)."""
        return self._features(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, 2048, h, w) → (N, num_classes), or with ``pre_logits`` the classifier's input (N, head_hidden_size)."""
        x = self.hidden(x.mean((2, 3)))
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: Literal["avg"] | None = "avg") -> None:
        """A new classifier, or none for 0.  Raises ``ValueError`` for a negative number or another ``global_pool``."""
        if num_classes < 0:
            raise ValueError(f"num_classes must not be negative; got {num_classes}")
        if global_pool not in ("avg", None):
            raise ValueError(f"global_pool must be 'avg'; got {global_pool!r}")
        self.num_classes = num_classes
        self.fc: nn.Module = nn.Identity()
        if num_classes:
            like = next(self.parameters())
            self.fc = nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
            self._initialize(self.fc)

    def _features(self, x: Tensor, taps: Sequence[int] = ()) -> list[Tensor]:
        """The last feature map, after the activated outputs of the stem (0) and of blocks where ``taps`` names them."""
        x = self.conv1(x)
        x = self.act1(self.bn1(x)) if self.fused is False else run_norm_and_relu((self.bn1, self.act1), x)
        x = self.conv2(x)
        features: list[Tensor] = []
        before: Sequence[nn.Module] = (self.bn2, self.act2)
        first: Any = self.block1
        if 0 in taps or not is_exactly(first, Block):  # which can apply them as it loads its input
            x, before = self.act2(self.bn2(x)), ()
        if 0 in taps:
            features.append(x)
        for i in BLOCKS:
            block = getattr(self, f"block{i}")
            x = block(x, before) if before else block(x)
            before = ()
            if i in taps:
                features.append(F.relu(x))
        exit_flow = (self.conv3, self.bn3, self.act3, self.conv4, self.bn4, self.act4)
        if self.fused is not False:
            return [*features, run_fused(exit_flow, x, everywhere=self.fused is True)]
        for layer in exit_flow:
            x = layer(x)
        return [*features, x]

    def _initialize(self, module: nn.Module) -> None:
        if PRESETS[self.preset].glorot:
            # With one filter per channel, torch's fans of a depthwise weight add up to Keras's.
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def xception(preset: Literal["keras", "timm"] = "keras", **options) -> Xception:
    """A new ``Xception(preset, **options)``."""
    return Xception(preset, **options)
