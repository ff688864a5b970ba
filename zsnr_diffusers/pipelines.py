"""Pipelines with a default guidance rescale of 0.7; otherwise identical to diffusers'.

The text-to-image ones also keep the lowest 4 x 4 frequencies of the conditional prediction: their first step is at
zero SNR, where guidance extrapolates only brightness. Editing starts from an image, and an instruction such as "make
it night" may require this extrapolation.
"""

from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
)

from .core.choices import DEFAULT_GUIDANCE_RESCALE, DEFAULT_KEEP_LOW_FREQUENCIES
from .guidance.mixin import GuidanceRescaleMixin


class ZeroSNRStableDiffusionPipeline(GuidanceRescaleMixin, StableDiffusionPipeline):
    """Text-to-image."""

    default_guidance_rescale = DEFAULT_GUIDANCE_RESCALE
    default_keep_low_frequencies = DEFAULT_KEEP_LOW_FREQUENCIES


class ZeroSNRStableDiffusionImg2ImgPipeline(GuidanceRescaleMixin, StableDiffusionImg2ImgPipeline):
    """Image-to-image; diffusers' class has no guidance rescale."""

    default_guidance_rescale = DEFAULT_GUIDANCE_RESCALE


class ZeroSNRStableDiffusionInpaintPipeline(GuidanceRescaleMixin, StableDiffusionInpaintPipeline):
    """Inpainting; diffusers' class has no guidance rescale."""

    default_guidance_rescale = DEFAULT_GUIDANCE_RESCALE


class ZeroSNRStableDiffusionControlNetPipeline(GuidanceRescaleMixin, StableDiffusionControlNetPipeline):
    """Text-to-image with a control image; diffusers' class has no guidance rescale."""

    default_guidance_rescale = DEFAULT_GUIDANCE_RESCALE


class ZeroSNRStableDiffusionInstructPix2PixPipeline(GuidanceRescaleMixin, StableDiffusionInstructPix2PixPipeline):
    """Image editing by instruction; rescaled to the prediction conditioned on both."""

    default_guidance_rescale = DEFAULT_GUIDANCE_RESCALE


class ZeroSNRStableDiffusionXLPipeline(GuidanceRescaleMixin, StableDiffusionXLPipeline):
    """Text-to-image with SDXL."""

    default_guidance_rescale = DEFAULT_GUIDANCE_RESCALE
    default_keep_low_frequencies = DEFAULT_KEEP_LOW_FREQUENCIES


class ZeroSNRStableDiffusionXLImg2ImgPipeline(GuidanceRescaleMixin, StableDiffusionXLImg2ImgPipeline):
    """Image-to-image with SDXL."""

    default_guidance_rescale = DEFAULT_GUIDANCE_RESCALE


class ZeroSNRStableDiffusionXLInpaintPipeline(GuidanceRescaleMixin, StableDiffusionXLInpaintPipeline):
    """Inpainting with SDXL."""

    default_guidance_rescale = DEFAULT_GUIDANCE_RESCALE


class ZeroSNRStableDiffusionXLControlNetPipeline(GuidanceRescaleMixin, StableDiffusionXLControlNetPipeline):
    """Text-to-image with a control image and SDXL; diffusers' class has no guidance rescale."""

    default_guidance_rescale = DEFAULT_GUIDANCE_RESCALE


class ZeroSNRStableDiffusionXLInstructPix2PixPipeline(GuidanceRescaleMixin, StableDiffusionXLInstructPix2PixPipeline):
    """Image editing by instruction with SDXL; rescaled to the prediction conditioned on both."""

    default_guidance_rescale = DEFAULT_GUIDANCE_RESCALE
