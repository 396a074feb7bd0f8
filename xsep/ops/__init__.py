"""The operators of xsep: the public functions over ``torch.ops.xsep``."""

from .backends import backend
from .cpu import empty_cache
from .functional import depthwise_conv2d, explain, separable_conv2d

__all__ = ["backend", "depthwise_conv2d", "empty_cache", "explain", "separable_conv2d"]
