"""Layers over ``xsep.ops``, and ``convert`` and ``fuse``, which put them into an existing model."""

from .block import FusedSequential
from .convert import convert
from .fuse import fuse
from .layers import DepthwiseConv2d, MaxPoolSame, SeparableConv2d
from .norm import SyncBatchNorm2d

__all__ = [
    "DepthwiseConv2d",
    "FusedSequential",
    "MaxPoolSame",
    "SeparableConv2d",
    "SyncBatchNorm2d",
    "convert",
    "fuse",
]
