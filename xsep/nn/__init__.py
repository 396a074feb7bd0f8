"""Layers over ``xsep.ops``, and ``convert``, which puts them into an existing model."""

from .block import FusedSequential
from .convert import convert
from .layers import DepthwiseConv2d, SeparableConv2d

__all__ = ["DepthwiseConv2d", "FusedSequential", "SeparableConv2d", "convert"]
