"""The initial latents of a pipeline: noise plus a start, scaled to the level of the first timestep."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.low_frequency_law import LowFrequencyLaw
from ..guidance.levels import noise_level_at


def check_levels(scheduler: Any) -> None:
    """Refuse a scheduler whose noise level at the first timestep is unknown.

    Raises:
        ValueError: with the remedy.
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"{type(scheduler).__name__} has no variance-preserving schedule (alphas_cumprod), so the signal level at "
            "its first timestep is unknown. Use one with betas, or call disable_start(pipe)."
        )


def begins_with_noise(arguments: Mapping[str, Any]) -> bool:
    """Whether a call of `prepare_latents` with these arguments returns newly drawn pure noise.

    It does not if the caller passes latents, or an image or video to start from: x_0 is then known, and the latents
    already contain its signal. An inpainting pipeline always receives the image, but uses it only below the largest
    strength.

    Args:
        arguments: of the call, by name, including defaults.
    """
    if arguments.get("latents", "") is not None:
        return False
    if "is_strength_max" in arguments:
        return bool(arguments["is_strength_max"] and arguments.get("add_noise", True))
    return not {"image", "video"} & set(arguments)


def pool_prompt(encoded: Any) -> Tensor | None:
    """Features of prompts from the result of `encode_prompt`: [B, F], float32; None if its format is unknown.

    They are the mean of the text embeddings over all tokens, and for SDXL also the pooled embedding of the second
    encoder. They depend only on embeddings, so embeddings passed instead of a prompt give the same features.
    """
    if not isinstance(encoded, tuple) or not isinstance(encoded[0], Tensor) or encoded[0].ndim != 3:
        return None
    states = encoded[0].float().mean(dim=1)
    pooled = encoded[2] if len(encoded) == 4 else None  # embeddings, negative embeddings, and the same pooled
    if not isinstance(pooled, Tensor) or pooled.ndim != 2 or len(pooled) != len(states):
        return states
    return torch.cat([states, pooled.float().to(states.device)], dim=1)


def put_in_start(latents: Tensor, law: LowFrequencyLaw, features: Tensor | None, scheduler: Any) -> Tensor:
    """Add the start to a pipeline's initial noise.

    Args:
        latents: noise times `scheduler.init_noise_sigma`, shape [B, C, h, w], or [B, C, frames, h, w] for video.
        law: distribution of the low frequencies.
        features: of the prompts, shape [b, F]; b divides B, and each is repeated. None if the law needs none.
        scheduler: after `set_timesteps`.

    Returns:
        A sample at the scheduler's first timestep; the latents unchanged if that is pure noise.

    Raises:
        ValueError: latents or features do not match the law's shape.
    """
    check_levels(scheduler)
    if latents.ndim not in (4, 5) or latents.shape[1] != law.channels:
        raise ValueError(
            f"The start is for latents of {law.channels} channels, [B, {law.channels}, h, w], but these are "
            f"{list(latents.shape)}: it was fitted for another base. Fit a start for this pipeline (zsnr fit-start), "
            "or call disable_start(pipe)."
        )
    timestep = scheduler.timesteps[0]
    level = noise_level_at(scheduler, timestep)
    if float(level.alpha) == 0:
        return latents
    mean = law.mean(_repeated(features, law, len(latents)).to(latents.device))
    noise = latents.float() / float(getattr(scheduler, "init_noise_sigma", 1.0))
    x = law.noisy(noise, mean, level)
    # For samples x_0 + sigma n, as in Euler's method, the network gets scaled samples; a copy, since some schedulers
    # count steps in this call.
    scale = copy.copy(scheduler).scale_model_input(torch.ones((), device=x.device), timestep)
    return (x / scale).to(latents.dtype)


def _repeated(features: Tensor | None, law: LowFrequencyLaw, count: int) -> Tensor:
    """Features [count, F] for each sample of a batch."""
    if law.num_features == 0:
        return torch.zeros(count, 0)
    if features is None or features.shape[1] != law.num_features or count % len(features):
        shape = "none" if features is None else list(features.shape)
        raise ValueError(
            f"The start needs {law.num_features} features per prompt for a batch of {count}, and this pipeline's "
            f"prompt embeddings give {shape}: it was fitted for other text encoders. Fit a start for this pipeline "
            "(zsnr fit-start), or call disable_start(pipe)."
        )
    return features.repeat_interleave(count // len(features), dim=0)
