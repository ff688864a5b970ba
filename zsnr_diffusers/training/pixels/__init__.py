"""Training pixel-space networks from scratch: unconditional and class-conditional."""

from typing import TYPE_CHECKING

from ...utils.lazy import lazy_names

if TYPE_CHECKING:
    from .config import PixelTrainingConfig
    from .recipes import RECIPES
    from .task import PixelTask

__getattr__, __dir__ = lazy_names(
    __name__, {"config": "PixelTrainingConfig", "recipes": "RECIPES", "task": "PixelTask"}
)

__all__ = ["RECIPES", "PixelTask", "PixelTrainingConfig"]
