"""The operators of xsep: the public functions over ``torch.ops.xsep``."""

from .backends import backend
from .functional import depthwise_conv2d, explain, separable_conv2d

__all__ = ["backend", "depthwise_conv2d", "explain", "separable_conv2d"]
