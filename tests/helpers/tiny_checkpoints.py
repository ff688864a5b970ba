"""Stable Diffusions of the three layouts that single files have, small, and such files marked as others mark them."""

from functools import cache

import torch
from diffusers import DDIMScheduler
from published_models import RESOLUTION, independent, networks, published_pipeline
from safetensors.torch import save_file

from zsnr_diffusers.hub.ldm_format import original_checkpoint

KINDS = ("1", "2", "xl")
V, EPSILON = "v_prediction", "epsilon"

_PUBLISHED = {"1": "1.5", "2": "2.1-base", "xl": "xl"}


def sd_scheduler(prediction_type="epsilon", zero_snr=False):
    """DDIM with Stable Diffusion's betas: as first published, or as for a model of zero terminal SNR."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing" if zero_snr else "leading",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=zero_snr,
    )


def tiny_pipeline(kind, scheduler=None):
    """A new pipeline, every weight of it random: some are ones or zeros by default, and would not show a mix-up."""
    pipe = independent(_random(kind))
    pipe.scheduler = scheduler or sd_scheduler()
    return pipe


@cache
def _random(kind):
    pipe, generator = published_pipeline(_PUBLISHED[kind]), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in networks(pipe).values():
            for parameter in part.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return pipe


def settings(scheduler):
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def says(pipe):
    return pipe.scheduler.config["prediction_type"], pipe.scheduler.config["rescale_betas_zero_snr"]


def assert_same_weights(pipe, other):
    for name, part in networks(pipe).items():
        weights, others = part.state_dict(), getattr(other, name).state_dict()
        assert list(weights) == list(others)
        for key, tensor in weights.items():
            assert torch.equal(tensor, others[key]), (name, key)


@cache
def checkpoint(kind):
    """The weights of `tiny_pipeline` in the original layout; do not change them."""
    return original_checkpoint(tiny_pipeline(kind))


def write_file(path, kind, keys=(), metadata=None):
    """A checkpoint with empty tensors of these names, and this metadata."""
    save_file(checkpoint(kind) | {key: torch.empty(0) for key in keys}, path, metadata)
    return path


def generate(pipe, n=3, **changes):
    call = {"num_inference_steps": n, "guidance_scale": 4.0, "output_type": "latent"}
    call |= dict.fromkeys(("height", "width"), RESOLUTION)
    generator = torch.Generator().manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    return pipe("a dark landscape", generator=generator, **{**call, **changes}).images
