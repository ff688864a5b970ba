"""Guidance in any pipeline: rescale (Lin et al. 2023, Algorithm 2), kept low frequencies, and diffusers' guiders."""

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from ..core.choices import DEFAULT_GUIDANCE_RESCALE, DEFAULT_KEEP_LOW_FREQUENCIES
    from .intercept import GuidanceError, GuidanceSettings
    from .mixin import GuidanceRescaleMixin, disable_guidance_rescale, enable_guidance_rescale

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        ".core.choices": "DEFAULT_GUIDANCE_RESCALE DEFAULT_KEEP_LOW_FREQUENCIES",
        "intercept": "GuidanceError GuidanceSettings",
        "mixin": "GuidanceRescaleMixin disable_guidance_rescale enable_guidance_rescale",
    },
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
