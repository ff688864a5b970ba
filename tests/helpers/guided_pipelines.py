"""Pipelines under guidance: what they generate, and what goes through their denoiser and scheduler."""

from types import SimpleNamespace

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


def by_hand(guider, step, steps, t, conditional, unconditional):
    """What a guider of diffusers makes of two predictions at a step."""
    guider.set_state(step, steps, t)
    if hasattr(guider, "prepare_inputs_from_block_state"):
        batches = guider.prepare_inputs({"noise_pred": (conditional, unconditional)})
    else:  # older diffusers
        state = SimpleNamespace(c=conditional, u=unconditional)
        batches = guider.prepare_inputs(state, {"noise_pred": ("c", "u")})
    return guider(batches)[0]


def clean(pipe):
    """Nothing hangs on the denoiser or the scheduler."""
    return not pipe.unet._forward_hooks and "step" not in vars(pipe.scheduler)
