"""Depthwise-separable convolution for PyTorch, as fast as memory and matrix units allow."""

from . import models, nn
from ._version import __version__
from .nn import DepthwiseConv2d, SeparableConv2d, convert
from .ops import backend, depthwise_conv2d, empty_cache, explain, separable_conv2d

__all__ = [
    "DepthwiseConv2d",
    "SeparableConv2d",
    "__version__",
    "backend",
    "convert",
    "depthwise_conv2d",
    "empty_cache",
    "explain",
    "models",
    "nn",
    "separable_conv2d",
]
