"""Encode images to the scaled latents x_0 that a UNet is trained on, with a pipeline's autoencoder."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def pixel_values(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size as a tensor [B, 3, H, W] in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) for image in images]))
    return pixels.permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def encode_images(vae: Any, pixels: Tensor) -> Tensor:
    """Means of the latents of images, scaled as the UNet sees them, float32 [B, C, h, w] on the CPU.

    Args:
        vae: an autoencoder of diffusers.
        pixels: [B, 3, H, W] in [-1, 1].
    """
    with _out_of_float16(vae):
        parameter = next(vae.parameters())
        latents = vae.encode(pixels.to(parameter.device, parameter.dtype)).latent_dist.mean.float().cpu()
    config = vae.config
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (torch.tensor(config[key]).reshape(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
        return (latents - mean) / std * config["scaling_factor"]
    return (latents - (config.get("shift_factor") or 0.0)) * config["scaling_factor"]


@contextlib.contextmanager
def _out_of_float16(vae: Any) -> Iterator[None]:
    """Temporarily convert an autoencoder to float32 if it overflows in float16, as SDXL's config declares."""
    dtype = next(vae.parameters()).dtype
    if dtype != torch.float16 or not vae.config.get("force_upcast"):
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(dtype)
