"""Depthwise-separable convolution for PyTorch, as fast as memory and matrix units allow."""

from . import checkpoints, models, nn
from ._version import __version__
from .nn import DepthwiseConv2d, SeparableConv2d, convert, fuse
from .ops import (
    backend,
    depthwise_conv2d,
    empty_cache,
    explain,
    load_choices,
    save_choices,
    separable_block,
    separable_block_inference,
    separable_conv2d,
)

__all__ = [
    "DepthwiseConv2d",
    "SeparableConv2d",
    "__version__",
    "backend",
    "checkpoints",
    "convert",
    "depthwise_conv2d",
    "empty_cache",
    "explain",
    "fuse",
    "load_choices",
    "models",
    "nn",
    "save_choices",
    "separable_block",
    "separable_block_inference",
    "separable_conv2d",
]
