"""Guidance in any pipeline: rescale (Lin et al. 2023, Algorithm 2), kept low frequencies, any guider of diffusers."""

from .intercept import GuidanceError, GuidanceSettings
from .mixin import (
    DEFAULT_GUIDANCE_RESCALE,
    DEFAULT_KEEP_LOW_FREQUENCIES,
    GuidanceRescaleMixin,
    disable_guidance_rescale,
    enable_guidance_rescale,
)

__all__ = [
    "DEFAULT_GUIDANCE_RESCALE",
    "DEFAULT_KEEP_LOW_FREQUENCIES",
    "GuidanceError",
    "GuidanceRescaleMixin",
    "GuidanceSettings",
    "disable_guidance_rescale",
    "enable_guidance_rescale",
]
