"""From a dense model to a mixture of experts that goes on from its weights."""

from .methods import Copy, Drop, Granular, Method, Noise
from .recipe import UpcyclingRecipe, upcycled_config
from .write import upcycle

__all__ = ["Copy", "Drop", "Granular", "Method", "Noise", "UpcyclingRecipe", "upcycle", "upcycled_config"]
