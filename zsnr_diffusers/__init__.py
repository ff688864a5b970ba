"""Diffusion models that can paint truly dark and truly bright: zero terminal SNR for Hugging Face diffusers.

Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv:2305.08891).
"""

import importlib
from typing import TYPE_CHECKING, Any

# model_index.json names `zsnr_diffusers.schedulers`, and diffusers loads a custom scheduler only from a module that is
# already imported; so these are imported with the package.
from .core import enforce_zero_terminal_snr, rescale_guidance
from .guidance import GuidanceRescaleMixin, disable_guidance_rescale, enable_guidance_rescale
from .schedulers import (
    ZeroSNRDDIMInverseScheduler,
    ZeroSNRDDIMScheduler,
    ZeroSNRDDPMScheduler,
    ZeroSNRLCMScheduler,
    ZeroSNRMultistepScheduler,
    ZeroSNRPNDMScheduler,
)

if TYPE_CHECKING:
    from .pipelines import ZeroSNRStableDiffusionImg2ImgPipeline, ZeroSNRStableDiffusionPipeline

__version__ = "0.1.0"

# Pipelines pull in transformers, which takes seconds; who only wants a scheduler does not wait for it.
_LAZY = {
    "ZeroSNRStableDiffusionImg2ImgPipeline": "pipelines",
    "ZeroSNRStableDiffusionPipeline": "pipelines",
}

__all__ = [
    "GuidanceRescaleMixin",
    "ZeroSNRDDIMInverseScheduler",
    "ZeroSNRDDIMScheduler",
    "ZeroSNRDDPMScheduler",
    "ZeroSNRLCMScheduler",
    "ZeroSNRMultistepScheduler",
    "ZeroSNRPNDMScheduler",
    "ZeroSNRStableDiffusionImg2ImgPipeline",
    "ZeroSNRStableDiffusionPipeline",
    "disable_guidance_rescale",
    "enable_guidance_rescale",
    "enforce_zero_terminal_snr",
    "rescale_guidance",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
