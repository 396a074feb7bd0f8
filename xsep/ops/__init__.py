"""The operators of xsep: the public functions over ``torch.ops.xsep``."""

from .backends import backend, load_choices, save_choices
from .cpu import empty_cache
from .functional import depthwise_conv2d, explain, separable_block, separable_block_inference, separable_conv2d

__all__ = [
    "backend",
    "depthwise_conv2d",
    "empty_cache",
    "explain",
    "load_choices",
    "save_choices",
    "separable_block",
    "separable_block_inference",
    "separable_conv2d",
]
