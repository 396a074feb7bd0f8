"""Models made of xsep's layers."""

from .vgg_separable import vgg_separable
from .xception import Xception, xception

__all__ = ["Xception", "vgg_separable", "xception"]
