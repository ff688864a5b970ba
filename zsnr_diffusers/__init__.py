"""Diffusion models that can paint truly dark and truly bright: zero terminal SNR for Hugging Face diffusers.

Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv:2305.08891).
"""

import importlib
from typing import TYPE_CHECKING, Any

# model_index.json names `zsnr_diffusers.schedulers`, and diffusers loads a custom scheduler only from a module that is
# already imported; so these are imported with the package.
from .core import enforce_zero_terminal_snr, rescale_guidance
from .guidance import GuidanceRescaleMixin, disable_guidance_rescale, enable_guidance_rescale
from .guided_run import GuidanceError
from .schedulers import (
    ZeroSNRDDIMInverseScheduler,
    ZeroSNRDDIMScheduler,
    ZeroSNRDDPMScheduler,
    ZeroSNRLCMScheduler,
    ZeroSNRMultistepScheduler,
    ZeroSNRPNDMScheduler,
)
from .versions import warn_of_untested

if TYPE_CHECKING:
    from .auditing import audit
    from .class_conditional import ClassConditionalPipeline
    from .custom_pipeline import write_custom_pipeline
    from .hub import load_pipeline
    from .lora import load_lora, save_lora
    from .pipelines import (
        ZeroSNRStableDiffusionControlNetPipeline,
        ZeroSNRStableDiffusionImg2ImgPipeline,
        ZeroSNRStableDiffusionInpaintPipeline,
        ZeroSNRStableDiffusionInstructPix2PixPipeline,
        ZeroSNRStableDiffusionPipeline,
        ZeroSNRStableDiffusionXLControlNetPipeline,
        ZeroSNRStableDiffusionXLImg2ImgPipeline,
        ZeroSNRStableDiffusionXLInpaintPipeline,
        ZeroSNRStableDiffusionXLInstructPix2PixPipeline,
        ZeroSNRStableDiffusionXLPipeline,
    )
    from .saving import save_pipeline
    from .unet import build_unet

__version__ = "0.1.0"

warn_of_untested()

# Pipelines pull in transformers, and networks the models of diffusers, which takes seconds; who only wants a scheduler
# does not wait for it.
_LAZY = {
    "ClassConditionalPipeline": "class_conditional",
    "ZeroSNRStableDiffusionControlNetPipeline": "pipelines",
    "ZeroSNRStableDiffusionImg2ImgPipeline": "pipelines",
    "ZeroSNRStableDiffusionInpaintPipeline": "pipelines",
    "ZeroSNRStableDiffusionInstructPix2PixPipeline": "pipelines",
    "ZeroSNRStableDiffusionPipeline": "pipelines",
    "ZeroSNRStableDiffusionXLControlNetPipeline": "pipelines",
    "ZeroSNRStableDiffusionXLImg2ImgPipeline": "pipelines",
    "ZeroSNRStableDiffusionXLInpaintPipeline": "pipelines",
    "ZeroSNRStableDiffusionXLInstructPix2PixPipeline": "pipelines",
    "ZeroSNRStableDiffusionXLPipeline": "pipelines",
    "audit": "auditing",
    "build_unet": "unet",
    "load_lora": "lora",
    "load_pipeline": "hub",
    "save_lora": "lora",
    "save_pipeline": "saving",
    "write_custom_pipeline": "custom_pipeline",
}

__all__ = [
    "ClassConditionalPipeline",
    "GuidanceError",
    "GuidanceRescaleMixin",
    "ZeroSNRDDIMInverseScheduler",
    "ZeroSNRDDIMScheduler",
    "ZeroSNRDDPMScheduler",
    "ZeroSNRLCMScheduler",
    "ZeroSNRMultistepScheduler",
    "ZeroSNRPNDMScheduler",
    "ZeroSNRStableDiffusionControlNetPipeline",
    "ZeroSNRStableDiffusionImg2ImgPipeline",
    "ZeroSNRStableDiffusionInpaintPipeline",
    "ZeroSNRStableDiffusionInstructPix2PixPipeline",
    "ZeroSNRStableDiffusionPipeline",
    "ZeroSNRStableDiffusionXLControlNetPipeline",
    "ZeroSNRStableDiffusionXLImg2ImgPipeline",
    "ZeroSNRStableDiffusionXLInpaintPipeline",
    "ZeroSNRStableDiffusionXLInstructPix2PixPipeline",
    "ZeroSNRStableDiffusionXLPipeline",
    "audit",
    "build_unet",
    "disable_guidance_rescale",
    "enable_guidance_rescale",
    "enforce_zero_terminal_snr",
    "load_lora",
    "load_pipeline",
    "rescale_guidance",
    "save_lora",
    "save_pipeline",
    "write_custom_pipeline",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
