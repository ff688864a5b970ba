"""Training pixel-space networks from scratch: unconditional and class-conditional."""

from .config import PixelTrainingConfig
from .recipes import RECIPES
from .task import PixelTask

__all__ = ["RECIPES", "PixelTask", "PixelTrainingConfig"]
