"""The latents that a pipeline begins with: noise, into which a start is put at the level of the first timestep."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.low_frequency_law import LowFrequencyLaw
from ..guidance.levels import noise_level_at


def check_levels(scheduler: Any) -> None:
    """Refuse a scheduler of which the noise level of the first timestep is not known.

    Raises:
        ValueError: with what to use.
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"{type(scheduler).__name__} has no variance-preserving schedule (alphas_cumprod), so how much of an "
            "image is left at its first timestep is not known. Use one with betas, or call disable_start(pipe)."
        )


def begins_with_noise(arguments: Mapping[str, Any]) -> bool:
    """Whether a call of `prepare_latents` with these arguments returns pure noise of its own.

    It does not where the caller gives latents, and where an image or video to start from is given: x_0 is known then,
    and what is left of it is in the latents already. An inpainting pipeline is given the image at every strength, and
    uses it below the largest.

    Args:
        arguments: of the call, by name, with the defaults of those that were not passed.
    """
    if arguments.get("latents", "") is not None:
        return False
    if "is_strength_max" in arguments:
        return bool(arguments["is_strength_max"] and arguments.get("add_noise", True))
    return not {"image", "video"} & set(arguments)


def pool_prompt(encoded: Any) -> Tensor | None:
    """Features of prompts out of what `encode_prompt` returned: [B, F], float32; None if it is of another form.

    They are the mean of the text states over all tokens, and for SDXL the pooled state of the second encoder beside
    it. They come from embeddings alone, so those that are passed to a call in place of a prompt have the same.
    """
    if not isinstance(encoded, tuple) or not isinstance(encoded[0], Tensor) or encoded[0].ndim != 3:
        return None
    states = encoded[0].float().mean(dim=1)
    pooled = encoded[2] if len(encoded) == 4 else None  # states, negative states, and the same pooled
    if not isinstance(pooled, Tensor) or pooled.ndim != 2 or len(pooled) != len(states):
        return states
    return torch.cat([states, pooled.float().to(states.device)], dim=1)


def put_in_start(latents: Tensor, law: LowFrequencyLaw, features: Tensor | None, scheduler: Any) -> Tensor:
    """Latents with the start in them, in the place of a pipeline's own noise.

    Args:
        latents: noise times `scheduler.init_noise_sigma`, shape [B, C, h, w], or of video [B, C, frames, h, w].
        law: of the low frequencies.
        features: of the prompts, shape [b, F]; b divides B, and each is repeated. None if the law needs none.
        scheduler: after `set_timesteps`.

    Returns:
        What the scheduler calls a sample at its first timestep; the latents themselves if that is pure noise.

    Raises:
        ValueError: latents or features of another shape than the law's.
    """
    check_levels(scheduler)
    if latents.ndim not in (4, 5) or latents.shape[1] != law.channels:
        raise ValueError(
            f"The start is for latents of {law.channels} channels, [B, {law.channels}, h, w], and these are "
            f"{list(latents.shape)}: it was fitted for another base. Fit one for this pipeline (zsnr fit-start), or "
            "call disable_start(pipe)."
        )
    timestep = scheduler.timesteps[0]
    level = noise_level_at(scheduler, timestep)
    if float(level.alpha) == 0:
        return latents
    mean = law.mean(_repeated(features, law, len(latents)).to(latents.device))
    noise = latents.float() / float(getattr(scheduler, "init_noise_sigma", 1.0))
    x = law.noisy(noise, mean, level)
    # Where samples are x_0 + sigma n, as for Euler's method, the network gets them divided; a copy, since some
    # schedulers count their steps from there.
    scale = copy.copy(scheduler).scale_model_input(torch.ones((), device=x.device), timestep)
    return (x / scale).to(latents.dtype)


def _repeated(features: Tensor | None, law: LowFrequencyLaw, count: int) -> Tensor:
    """Features [count, F] for each sample of a batch."""
    if law.num_features == 0:
        return torch.zeros(count, 0)
    if features is None or features.shape[1] != law.num_features or count % len(features):
        shape = "none" if features is None else list(features.shape)
        raise ValueError(
            f"The start takes {law.num_features} features of each prompt for a batch of {count}, and this pipeline's "
            f"prompt embeddings give {shape}: it was fitted for other text encoders. Fit one for this pipeline (zsnr "
            "fit-start), or call disable_start(pipe)."
        )
    return features.repeat_interleave(count // len(features), dim=0)
