"""Models made of xsep's layers."""

from .xception import Xception, xception

__all__ = ["Xception", "xception"]
