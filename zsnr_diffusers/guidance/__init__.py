"""Guidance rescale (Lin et al. 2023, Algorithm 2), and any guider of diffusers, in any pipeline that guides."""

from .intercept import GuidanceError, GuidanceSettings
from .mixin import (
    DEFAULT_GUIDANCE_RESCALE,
    GuidanceRescaleMixin,
    disable_guidance_rescale,
    enable_guidance_rescale,
)

__all__ = [
    "DEFAULT_GUIDANCE_RESCALE",
    "GuidanceError",
    "GuidanceRescaleMixin",
    "GuidanceSettings",
    "disable_guidance_rescale",
    "enable_guidance_rescale",
]
