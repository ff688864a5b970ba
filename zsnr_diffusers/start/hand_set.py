"""Starts that are set by hand: a brightness, a color, or a small image."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from ..core.dct import dct
from ..core.low_frequency_law import LowFrequencyLaw
from ..utils.images import ImageSource, load_rgb
from .encoding import encode_images, pixel_values
from .start import Start, check_noise

MAX_FREQUENCIES = 8
"""Number of frequencies per side; x_T contains almost nothing of higher ones."""

_SIDE = 128
"""Pixels of the longer side of the encoded image."""


def hand_set_start(
    pipe: Any,
    *,
    brightness: float | None = None,
    color: tuple[float, float, float] | None = None,
    image: ImageSource | None = None,
    noise: float = 0.0,
) -> Start:
    """Create a start that ignores prompts, from a brightness, a color or an image.

    Args:
        pipe: pipeline whose autoencoder encodes the image.
        brightness: mean luminance of images, from -1 (black) to 1 (white).
        color: mean color, red, green and blue from 0 to 1.
        image: path, bytes or PIL image whose lowest frequencies are used: as many as its shorter side has pixels, at
            most 8. It is stretched to the size of the generated image.
        noise: fraction of noise to keep in these frequencies, 0 to 1, as in `fit_start`.

    Raises:
        ValueError: not exactly one is passed, or it is out of range.
        ImageError: the image cannot be read.
    """
    if sum(value is not None for value in (brightness, color, image)) != 1:
        raise ValueError("Pass exactly one of brightness, color and image.")
    check_noise(noise)
    if image is not None:
        small = load_rgb(image)
        return _of_image(pipe, small, min(MAX_FREQUENCIES, *small.size), noise)
    color = color if brightness is None else _gray(brightness)
    if color is None or len(color) != 3 or not all(0 <= part <= 1 for part in color):
        raise ValueError(f"color={color} must be red, green and blue, each in [0, 1].")
    flat = Image.new("RGB", (_SIDE, _SIDE), tuple(round(255 * part) for part in color))
    return _of_image(pipe, flat, 1, noise)


def _gray(brightness: float) -> tuple[float, float, float]:
    """The gray color of a brightness in [-1, 1], each channel in [0, 1]."""
    if not -1 <= brightness <= 1:
        raise ValueError(f"brightness={brightness} must lie in [-1, 1], from black to white.")
    level = (brightness + 1) / 2
    return level, level, level


def _of_image(pipe: Any, image: Image.Image, frequencies: int, noise: float) -> Start:
    """The start with an image's low frequencies."""
    step = int(pipe.vae_scale_factor) * 2
    scale = _SIDE / max(image.size)
    width, height = (max(step, round(side * scale / step) * step) for side in image.size)
    latents = encode_images(pipe.vae, pixel_values([image.resize((width, height), Image.Resampling.BICUBIC)]))[0]
    sides = latents.shape[1:]
    amplitudes = dct(latents, (frequencies, frequencies)) / (sides[0] * sides[1]) ** 0.5
    if not bool(torch.isfinite(amplitudes).all()):
        raise ValueError(
            f"This pipeline's autoencoder returns latents that are not finite ({pipe.vae.dtype}): load it in float32."
        )
    return Start(LowFrequencyLaw.of_amplitudes(amplitudes, noise))
