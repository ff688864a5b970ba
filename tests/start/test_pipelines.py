"""A start in every UNet pipeline of the installed diffusers, built from small components."""

import contextlib
import inspect

import diffusers
import pytest
import torch
from cases import thirds
from small_pipelines import PIPELINES
from starts import StoppedError
from third_parties import PIPELINE_WARNINGS

from zsnr_diffusers import disable_start, enable_start
from zsnr_diffusers.core.low_frequency_law import LowFrequencyLaw
from zsnr_diffusers.start import Start, latents
from zsnr_diffusers.start import mixin as module

pytestmark = PIPELINE_WARNINGS


def begins_with_its_own_noise(name):
    """Whether a pipeline makes its latents by the method that is wrapped, and says what its prompt is."""
    cls = getattr(diffusers, name)
    prepare = getattr(cls, "prepare_latents", None)
    taken = prepare is not None and "latents" in inspect.signature(prepare).parameters
    return taken and hasattr(cls, "encode_prompt") and "Audio" not in name


NAMES = [name for name in sorted(PIPELINES) if begins_with_its_own_noise(name)]
NO_BETAS = {"DreamLitePipeline", "StableCascadeDecoderPipeline", "StableCascadePriorPipeline"}
"""Of flow matching, or with a schedule of their own."""
GIVEN = {"StableDiffusionDiffEditPipeline"}
"""Begins with the latents that the caller has inverted."""


def on_a_flawed_schedule(pipe):
    """On the betas of Stable Diffusion, wherever the pipeline's own end in pure noise."""
    if float(pipe.scheduler.alphas_cumprod[-1]) < 1e-6:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, rescale_betas_zero_snr=False)
    return pipe


def first_sample(pipe, small, monkeypatch):
    """What the pipeline begins with: arguments of `put_in_start`, and what it returned; None if it was not called."""
    seen = []

    def watched(*args):
        seen.append((*args, latents.put_in_start(*args)))
        raise StoppedError

    monkeypatch.setattr(module, "put_in_start", watched)
    with contextlib.suppress(StoppedError):
        pipe(**small.arguments())
    return seen[0] if seen else None


@thirds(["name"], NAMES)
def test_the_start_is_in_what_every_pipeline_begins_with(name, monkeypatch):
    small = PIPELINES[name]
    pipe = small.build()
    law = LowFrequencyLaw.of_amplitudes(torch.full((4, 1, 1), 3.0), noise=0.0)
    if name in NO_BETAS:
        with pytest.raises(ValueError, match="has no variance-preserving schedule"):
            enable_start(pipe, Start(law))
        return
    enable_start(on_a_flawed_schedule(pipe), Start(law))
    begun = first_sample(pipe, small, monkeypatch)
    if {"mask_image", "video"} & set(small.arguments()) or name in GIVEN:
        assert begun is None  # at a strength below 1 the image is in the latents
        return
    x, _, features, scheduler, started = begun
    assert x.shape[1] == 4
    assert features is not None
    assert features.ndim == 2
    assert len(x) % len(features) == 0
    means = scheduler.scale_model_input(started, scheduler.timesteps[0]).mean(dim=tuple(range(2, x.ndim)))
    level = scheduler.alphas_cumprod[int(scheduler.timesteps[0])] ** 0.5
    torch.testing.assert_close(means, 3 * level * torch.ones_like(means), rtol=1e-2, atol=1e-3)  # sigmas between
    assert type(disable_start(pipe)).__module__.startswith("diffusers.")
