"""Weights of Xception in the files of timm, Keras and this package."""

from .loading import Loaded, build, load, save

__all__ = ["Loaded", "build", "load", "save"]
