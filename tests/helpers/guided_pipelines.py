"""Pipelines under guidance: what they generate, and what goes through their denoiser and scheduler."""

import torch
from diffusers import StableDiffusionImg2ImgPipeline
from tiny_pipelines import IMAGE


def generate(pipe, **kwargs):
    """Latents of two images, from seeds of their own."""
    arguments = {
        "num_inference_steps": 4,
        "guidance_scale": 7.5,
        "output_type": "latent",
        "num_images_per_prompt": 2,
        "generator": [torch.Generator().manual_seed(seed) for seed in (1, 2)],
    }
    if isinstance(pipe, StableDiffusionImg2ImgPipeline):
        arguments |= {"image": IMAGE, "strength": 1.0}
    return pipe("a dark landscape", **(arguments | kwargs)).images


def watched_calls(pipe):
    """What goes through denoiser and scheduler while the pipeline runs."""
    seen = {"unet": [], "scheduler": []}
    pipe.unet.register_forward_hook(lambda module, args, output: seen["unet"].append(output[0]), prepend=True)
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda output, *args, **kwargs: (
        seen["scheduler"].append(output),
        step(output, *args, **kwargs),
    )[1]
    return seen


def clean(pipe):
    """Nothing hangs on the denoiser or the scheduler."""
    return not pipe.unet._forward_hooks and "step" not in vars(pipe.scheduler)
