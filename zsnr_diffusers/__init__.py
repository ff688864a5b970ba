"""Diffusion models that can generate truly dark and truly bright: zero terminal SNR for Hugging Face diffusers.

Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv:2305.08891).
"""

from typing import TYPE_CHECKING

from . import schedulers  # diffusers finds our classes only in a module that is already imported
from .utils.lazy import lazy_names
from .utils.versions import warn_of_untested_versions

if TYPE_CHECKING:
    from .auditing import audit
    from .bridges import as_flow_model, as_v_model
    from .class_conditional import ClassConditionalPipeline
    from .core import enforce_zero_terminal_snr, keep_low_frequencies, rescale_guidance
    from .guidance import GuidanceError, GuidanceRescaleMixin, disable_guidance_rescale, enable_guidance_rescale
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
    from .start import disable_start, enable_start
    from .unet import build_unet

__version__ = "0.1.0"

warn_of_untested_versions()

# torch and diffusers take seconds to import, and the commands answer before: `--help`, `--version`, a typo.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "auditing": "audit",
        "bridges": "as_flow_model as_v_model",
        "class_conditional": "ClassConditionalPipeline",
        "core": "enforce_zero_terminal_snr keep_low_frequencies rescale_guidance",
        "guidance": "GuidanceError GuidanceRescaleMixin disable_guidance_rescale enable_guidance_rescale",
        "guidance.guider": "KeepLowFrequenciesGuidance",
        "hub": "load_lora load_pipeline save_lora save_pipeline write_custom_pipeline",
        "pipelines": (
            "ZeroSNRStableDiffusionControlNetPipeline ZeroSNRStableDiffusionImg2ImgPipeline "
            "ZeroSNRStableDiffusionInpaintPipeline ZeroSNRStableDiffusionInstructPix2PixPipeline "
            "ZeroSNRStableDiffusionPipeline ZeroSNRStableDiffusionXLControlNetPipeline "
            "ZeroSNRStableDiffusionXLImg2ImgPipeline ZeroSNRStableDiffusionXLInpaintPipeline "
            "ZeroSNRStableDiffusionXLInstructPix2PixPipeline ZeroSNRStableDiffusionXLPipeline"
        ),
        "schedulers": " ".join(schedulers.CLASSES),
        "start": "disable_start enable_start",
        "unet": "build_unet",
    },
    ("auditing", "calibration", "core", "evaluation", "guidance", "hub", "schedulers", "start", "training"),
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
