"""A small class-conditional pipeline, and latents of it."""

from tiny_pipelines import seeded, tiny_unet

import zsnr_diffusers
from zsnr_diffusers import ClassConditionalPipeline

V = {"prediction_type": "v_prediction"}


def build(scheduler=None, classes=3):
    unet = tiny_unet(num_class_embeds=classes + 1 if classes else None)
    pipe = ClassConditionalPipeline(unet, scheduler or zsnr_diffusers.ZeroSNRDDIMScheduler(**V))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate_classes(pipe, labels=(0, 2), **kwargs):
    arguments = {"num_inference_steps": 4, "guidance_scale": 3.0, "generator": seeded(), "output_type": "latent"}
    return pipe(labels if labels is None else [*labels], **{**arguments, **kwargs}).images
