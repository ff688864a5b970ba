"""Fit a start to captioned images, with the autoencoder and text encoders of its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.law_fit import fit_law, split_into_folds
from ..core.noise import has_zero_terminal_snr, noise_level
from ..utils.images import ImageSource
from .base_check import sample_weights
from .data import MemoryCache, OpenCache, amplitudes_of_images, features_of_captions
from .latents import check_levels
from .report import StartReport
from .start import Start, check_noise

FEWEST_IMAGES = 24
MAX_RESOLUTION = 128
"""Default pixels per side for encoding images: enough for low frequencies, and fast."""

_SIDE = 64
"""Default size of latents, if a UNet's config does not give it."""


def fit_start(
    pipe: Any,
    images: Sequence[ImageSource],
    captions: Sequence[str | Sequence[str]] | None,
    *,
    resolution: int | None = None,
    noise: float = 0.0,
    open_cache: OpenCache = MemoryCache,
    progress: bool = True,
) -> Start:
    """Fit the distribution of low frequencies of images given their captions, for the model of a pipeline.

    Args:
        pipe: Stable Diffusion 1.x, 2.x or SDXL, or any pipeline with `encode_prompt`, an autoencoder and a scheduler
            with betas. Its UNet is not called. The start is for the noise level at which its schedule ends.
        images: paths, bytes or PIL images like those that the model should generate; cropped to squares as for
            training.
        captions: one for each image, or several, whose features are averaged; None for a start that ignores prompts.
        resolution: pixels per side for encoding; by default the model's, at most 128.
        noise: fraction of noise to keep in the low frequencies of x_T, 0 to 1. At 1, x_T has exactly the training
            distribution. Networks interpret much of this noise as brightness, so it competes with the prompt; at 0,
            images of a prompt vary as the fitted images do.
        open_cache: opens the cache for features of images and captions.
        progress: show progress bars on a terminal.

    Returns:
        The start, with a report on held-out images (`StartReport.of`).

    Raises:
        ValueError: too few images; a different number of captions, or equal captions; a schedule that ends in pure
            noise; latents that are not finite.
        ImageError: an image cannot be read.
    """
    check_noise(noise)
    check_levels(pipe.scheduler)
    level = noise_level(pipe.scheduler.alphas_cumprod.cpu().double(), -1)
    if has_zero_terminal_snr(pipe.scheduler.alphas_cumprod):
        raise ValueError("The schedule of this pipeline ends in pure noise: its model needs no start.")
    texts = check_data(len(images), captions)
    pixels = _resolution(pipe, resolution)
    features, scales = features_of_captions(pipe, texts, open_cache, progress)
    amplitudes = amplitudes_of_images(pipe, images, pixels, open_cache, progress)
    groups = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    folds = split_into_folds([groups[text] for text in texts] if features.shape[1] else range(len(texts)))
    side = _latent_side(pipe)
    numbers = range(1, amplitudes.shape[-1] + 1)
    fit = fit_law(amplitudes, features * scales, folds, level, side**2, numbers)
    law = fit.law
    law = replace(law, weight=law.weight * scales.to(law.weight), noise=noise)
    report = StartReport.of_fit(fit, len(images), len(groups) if features.shape[1] else 0, pixels)
    return Start(law, _public_name(pipe), sample_weights(pipe), report.to_dict())


def _public_name(pipe: Any) -> str:
    """A pipeline's Hub id, or the name of its folder without the path, or else its class."""
    name = str(pipe.config.get("_name_or_path") or type(pipe).__name__)
    return Path(name).resolve().name if Path(name).exists() else name


def check_data(num_images: int, captions: Sequence[str | Sequence[str]] | None) -> list[tuple[str, ...]]:
    """Captions of each image, after refusing data that cannot be fitted.

    Raises:
        ValueError: as in `fit_start`.
    """
    if num_images < FEWEST_IMAGES:
        raise ValueError(
            f"{num_images} images are too few to fit and hold out: use at least {FEWEST_IMAGES}, better hundreds, "
            "since a prompt has hundreds of features."
        )
    if captions is None:
        return [()] * num_images
    if len(captions) != num_images:
        raise ValueError(f"There are {num_images} images and {len(captions)} captions; pass one for each image.")
    texts = [(caption,) if isinstance(caption, str) else tuple(caption) for caption in captions]
    if len(set(texts)) == 1:
        raise ValueError(
            f"All {num_images} captions are {texts[0][0]!r}, so nothing can be learned from them: describe the "
            "images, or fit a start that ignores prompts (captions=None, --no_captions)."
        )
    return texts


def _latent_side(pipe: Any) -> int:
    """Default size of the model's latents, per side."""
    size = pipe.unet.config.sample_size
    return size if isinstance(size, int) else _SIDE


def _resolution(pipe: Any, asked: int | None) -> int:
    """Pixels per side for encoding, a multiple of the autoencoder's scale factor.

    Raises:
        ValueError: `asked` is not a multiple.
    """
    step = int(pipe.vae_scale_factor)
    pixels = asked or min(MAX_RESOLUTION, _latent_side(pipe) * step)
    if pixels % step or pixels < 2 * step:
        raise ValueError(f"resolution={pixels} must be a multiple of {step}, and at least {2 * step}, for this model.")
    return pixels
