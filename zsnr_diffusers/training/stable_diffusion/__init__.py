"""Retraining Stable Diffusion 1.x and 2.x."""

from .config import TrainingConfig
from .task import StableDiffusionTask

__all__ = ["StableDiffusionTask", "TrainingConfig"]
