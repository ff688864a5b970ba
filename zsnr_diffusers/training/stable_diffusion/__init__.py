"""Retraining Stable Diffusion 1.x, 2.x and XL."""

from .config import TrainingConfig
from .task import StableDiffusionTask

__all__ = ["StableDiffusionTask", "TrainingConfig"]
