"""Training as in section 4 of the Xception paper: ``python -m xsep.train``, and ``fit`` for any module."""

from .loop import Options, fit
from .metrics import mean_average_precision
from .recipes import RECIPES, Recipe

__all__ = ["RECIPES", "Options", "Recipe", "fit", "mean_average_precision"]
