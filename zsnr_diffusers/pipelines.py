"""Stable Diffusion pipelines that wear the guidance-rescale mixin."""

from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from .guidance import DEFAULT_GUIDANCE_RESCALE, GuidanceRescaleMixin


class ZeroSNRStableDiffusionPipeline(GuidanceRescaleMixin, StableDiffusionPipeline):
    """Text to image with guidance rescale 0.7 unless told otherwise; everything else is stock's."""

    default_guidance_rescale = DEFAULT_GUIDANCE_RESCALE


class ZeroSNRStableDiffusionImg2ImgPipeline(GuidanceRescaleMixin, StableDiffusionImg2ImgPipeline):
    """Image to image with guidance rescale, which stock's does not have; everything else is stock's."""

    default_guidance_rescale = DEFAULT_GUIDANCE_RESCALE
