"""The paper's other stack of separable convolutions: VGG-style, without residual connections.

Section 4.6 gives it one sentence: "non-residual VGG-style models where all convolution layers were replaced with
depthwise separable convolutions (with a depth multiplier of 1), superior to Inception V3 on JFT at equal parameter
count".  Everything else here is this package's reading of it: VGG-16's thirteen layers and five pools, BatchNorm and
ReLU after each convolution and Xception's head (global average pool, logistic regression) as in figure 5, and channels
wide enough for about as many parameters as Inception V3.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Sequence

from torch import nn

from ..nn.layers import SeparableConv2d

# VGG-16's (64, 128, 256, 512, 512), times 3.625.
CHANNELS = (232, 464, 928, 1856, 1856)
_LAYERS = (2, 2, 3, 3, 3)


def vgg_separable(
    num_classes: int = 1000,
    in_chans: int = 3,
    channels: Sequence[int] = CHANNELS,
    drop_rate: float = 0.0,
    segments: int | None = None,
) -> nn.Sequential:
    """VGG-16 of separable convolutions; the default has 23,485,227 parameters, Inception V3 in the paper 23,626,728.

    Args:
        num_classes: outputs of the classifier ``fc``.
        in_chans: channels of the input.
        channels: of the five stages, each of two or three convolutions and a max-pool.
        drop_rate: dropout before the classifier.
        segments: of ``SeparableConv2d``, in all convolutions but the first, which has ``in_chans`` channels only.

    Input (N, in_chans, H, W), at least 32 x 32; output (N, num_classes).

    Raises:
        ValueError: not five ``channels``, or an argument that the layers refuse.
    """
    if len(channels) != len(_LAYERS):
        raise ValueError(f"channels must be {len(_LAYERS)} numbers, one per stage; got {channels!r}")
    features: list[nn.Module] = []
    width = in_chans
    for out_channels, layers in zip(channels, _LAYERS):
        for _ in range(layers):
            convolution = SeparableConv2d(
                *(width, out_channels, 3),
                padding=1,
                bias=False,
                init="keras",
                segments=segments if features else None,
            )
            features += [convolution, nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.01), nn.ReLU(inplace=True)]
            width = out_channels
        features.append(nn.MaxPool2d(2))
    classifier = nn.Linear(width, num_classes)
    nn.init.xavier_uniform_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*features),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            dropout=nn.Dropout(drop_rate),
            fc=classifier,
        )
    )
