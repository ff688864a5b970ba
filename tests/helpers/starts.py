"""Starts for published models, and what a pipeline begins with."""

import functools
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from landscapes import make_landscapes
from published_models import published_pipeline

from zsnr_diffusers.core.low_frequency_law import LowFrequencyLaw
from zsnr_diffusers.start import Start, fit_start
from zsnr_diffusers.start.base_check import sample_weights
from zsnr_diffusers.start.latents import pool_prompt

MODELS = ("1.5", "2.1-base", "xl")


def quiet(name):
    """A published model of epsilon without progress bars, for the caller to change."""
    pipe = published_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def photos():
    """Paths and captions of 40 images; do not change them."""
    folder = make_landscapes(tempfile.mkdtemp(prefix="photos-"), count=40, image_size=64)
    rows = [json.loads(line) for line in Path(folder, "metadata.jsonl").read_text().splitlines()]
    return [folder / row["file_name"] for row in rows], [row["text"] for row in rows]


def with_colors_as_latents(pipe):
    """The pipeline, whose autoencoder gives colors averaged over its squares, and their mean as the fourth channel.

    One of random weights normalizes the brightness of an image away, which a trained one does not.
    """

    def encode(pixels):
        colors = torch.nn.functional.avg_pool2d(pixels, pipe.vae_scale_factor)
        latents = torch.cat([colors, colors.mean(dim=1, keepdim=True)], dim=1) / pipe.vae.config.scaling_factor
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=latents))

    pipe.vae.encode = encode
    return pipe


@functools.cache
def fitted(name):
    """The start of a published model, fitted to `photos` with `with_colors_as_latents`."""
    return fit_start(with_colors_as_latents(quiet(name)), *photos(), progress=False)


def features_of(pipe, prompts):
    """Features of prompts by the pipeline's own encoders."""
    call = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with torch.no_grad():
        return pool_prompt(pipe.encode_prompt(prompt=prompts, **call))


def strong_start(pipe, num_features=None):
    """A start whose mean depends on the prompt and is far from what noise has; for features of the pipeline's prompts.

    Its covariance is not diagonal.
    """
    size = features_of(pipe, ["a"]).shape[1] if num_features is None else num_features
    channels = pipe.vae.config.latent_channels
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(channels * 4, size, generator=generator)
    factor = torch.randn(channels * 4, channels * 4, generator=generator)
    bias = torch.randn(channels, 2, 2, generator=generator)
    bounds = torch.stack([torch.full_like(bias, -50), torch.full_like(bias, 50)])
    return Start(LowFrequencyLaw(bias, weight, factor @ factor.mT / 10, bounds), "strong", sample_weights(pipe))


class StoppedError(Exception):
    """Raised in place of a network call, to look at what a pipeline begins with."""


def first_input(pipe, call=None, **kwargs):
    """What the network is given at the first step, (sample, timestep), one prediction's share of it.

    Args:
        pipe: whose call is stopped there.
        call: arguments, in place of a prompt and sizes.
        kwargs: more of them.
    """
    seen = []

    def stop(module, args, kwargs):
        seen.append((args[0] if args else kwargs["sample"], args[1] if len(args) > 1 else kwargs["timestep"]))
        raise StoppedError

    hook = pipe.unet.register_forward_pre_hook(stop, with_kwargs=True)
    arguments = (
        {"prompt": "a dark landscape", "guidance_scale": 1.0, "height": 64, "width": 64} if call is None else call
    )
    try:
        pipe(**{**arguments, **kwargs})
    except StoppedError:
        pass
    finally:
        hook.remove()
    return seen[0]
