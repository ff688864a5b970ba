"""Training of Stable Diffusion 1.x, 2.x and SDXL."""

from typing import TYPE_CHECKING

from ...utils.lazy import lazy_names

if TYPE_CHECKING:
    from .config import TrainingConfig
    from .task import StableDiffusionTask

__getattr__, __dir__ = lazy_names(__name__, {"config": "TrainingConfig", "task": "StableDiffusionTask"})

__all__ = ["StableDiffusionTask", "TrainingConfig"]
