"""Diffusion models that can generate truly dark and truly bright: zero terminal SNR for Hugging Face diffusers.

Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv:2305.08891).
"""

from typing import TYPE_CHECKING

# model_index.json names `zsnr_diffusers.schedulers`, and diffusers loads a custom scheduler only from a module that is
# already imported; so these are imported with the package.
from .bridges import as_flow_model, as_v_model
from .core import enforce_zero_terminal_snr, keep_low_frequencies, rescale_guidance
from .guidance import GuidanceError, GuidanceRescaleMixin, disable_guidance_rescale, enable_guidance_rescale
from .schedulers import (
    FlowMatchEulerScheduler,
    FlowMatchMultistepScheduler,
    ZeroSNRDDIMInverseScheduler,
    ZeroSNRDDIMScheduler,
    ZeroSNRDDPMScheduler,
    ZeroSNRLCMScheduler,
    ZeroSNRMultistepScheduler,
    ZeroSNRPNDMScheduler,
)
from .utils.lazy import lazy_names
from .utils.versions import warn_of_untested_versions

if TYPE_CHECKING:
    from .auditing import audit
    from .class_conditional import ClassConditionalPipeline
    from .guidance.guider import KeepLowFrequenciesGuidance
    from .hub import load_lora, load_pipeline, save_lora, save_pipeline, write_custom_pipeline
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
    from .start import disable_start, enable_start
    from .unet import build_unet

__version__ = "0.1.0"

warn_of_untested_versions()

# Pipelines pull in transformers, networks the models of diffusers and a guider its guiders, which takes seconds; who
# only wants a scheduler does not wait for it.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ClassConditionalPipeline": "class_conditional",
        "KeepLowFrequenciesGuidance": "guidance.guider",
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
        "disable_start": "start",
        "enable_start": "start",
        "load_lora": "hub",
        "load_pipeline": "hub",
        "save_lora": "hub",
        "save_pipeline": "hub",
        "write_custom_pipeline": "hub",
    },
)

__all__ = [
    "ClassConditionalPipeline",
    "FlowMatchEulerScheduler",
    "FlowMatchMultistepScheduler",
    "GuidanceError",
    "GuidanceRescaleMixin",
    "KeepLowFrequenciesGuidance",
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
    "as_flow_model",
    "as_v_model",
    "audit",
    "build_unet",
    "disable_guidance_rescale",
    "disable_start",
    "enable_guidance_rescale",
    "enable_start",
    "enforce_zero_terminal_snr",
    "keep_low_frequencies",
    "load_lora",
    "load_pipeline",
    "rescale_guidance",
    "save_lora",
    "save_pipeline",
    "write_custom_pipeline",
]
