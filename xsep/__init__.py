"""Depthwise-separable convolution for PyTorch, as fast as memory and matrix units allow."""

from .ops import backend, depthwise_conv2d, explain, separable_conv2d

__version__ = "0.1.0"
__all__ = ["backend", "depthwise_conv2d", "explain", "separable_conv2d"]
