"""Pipelines of zero-SNR models without `guidance_rescale`: image-to-image, inpainting, ControlNet and more."""

import inspect

import diffusers

names = [
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionXLControlNetPipeline",
    "AnimateDiffPipeline",
]
missing = [
    name for name in names if "guidance_rescale" not in inspect.signature(getattr(diffusers, name).__call__).parameters
]
print("without guidance_rescale:", *missing)
assert not missing
