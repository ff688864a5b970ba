"""Resizing as in the code behind published metrics; other methods change FID by several points.

Parmar et al. 2022 (arXiv:2104.11222) compare them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch


def resize_like_tensorflow1(images: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear resize to `size` x `size` as `tf.image.resize_bilinear` of TensorFlow 1 (align_corners=False).

    Output pixel i is sampled at i h / size, not at (i + 1/2) h / size - 1/2, so images shift towards the upper left;
    larger images are not smoothed.

    Args:
        images: [n, c, h, w] of any dtype.
        size: the side of the result.

    Returns:
        float32 [n, c, size, size] in the scale of the input, not rounded.
    """
    rows, columns = (_bilinear_neighbors(length, size, images.device) for length in images.shape[-2:])
    pixels = images.float()
    upper, lower = (_interpolate_columns(pixels[..., index, :], columns) for index in rows[:2])
    return upper + (lower - upper) * rows[2][:, None]


def _interpolate_columns(
    pixels: torch.Tensor, columns: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Linear interpolation along the width, at the columns and weights of `_bilinear_neighbors`."""
    left, right, weight = columns
    return pixels[..., left] + (pixels[..., right] - pixels[..., left]) * weight


def _bilinear_neighbors(
    length: int, size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixel before and after each output position, and the weight of the latter; float32, as in TensorFlow."""
    import torch

    scale = torch.tensor(length, dtype=torch.float32) / size
    position = torch.arange(size, dtype=torch.float32) * scale
    before = position.floor().long().clamp(max=length - 1)
    after = (before + 1).clamp(max=length - 1)
    return before.to(device), after.to(device), (position - before).to(device)


def resize_like_pillow(images: torch.Tensor, size: int) -> torch.Tensor:
    """Pillow's bicubic resize, smoothing when it shrinks, of uint8 [n, 3, h, w] to uint8 [n, 3, size, size]."""
    import torch

    if images.shape[-2:] == (size, size):
        return images
    pictures = [Image.fromarray(array) for array in images.permute(0, 2, 3, 1).cpu().numpy()]
    resized = np.stack([np.asarray(p.resize((size, size), Image.Resampling.BICUBIC)) for p in pictures])
    return torch.from_numpy(resized).permute(0, 3, 1, 2)


def quantize(images: torch.Tensor) -> torch.Tensor:
    """Convert floating-point images in [-1, 1] to uint8, rounded and clipped as in diffusers before saving an image.

    Raises:
        ValueError: values that are not floating-point, or not finite.
    """
    import torch

    if not images.is_floating_point() or not bool(images.isfinite().all()):
        raise ValueError(f"expected finite floating-point values in [-1, 1], got {images.dtype}")
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
