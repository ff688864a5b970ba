"""Whether a pipeline has the autoencoder and the text encoders that a start was fitted with.

A start works with all models that share these two, as most fine-tunes of a base do; the UNet does not matter. A sample
of their weights is compared up to rounding, since a hash would differ between float32 and float16.
"""

from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn
from torch.nn import functional

from .start import Start

logger = logging.get_logger(__name__)

SAME, RELATED = 1e-2, 0.3
"""Largest relative distance of weights that differ by rounding (2e-3 for bfloat16), and of fine-tuned weights."""

_PER_TENSOR = 4
"""Number of values sampled from each weight tensor."""
_ENCODER = ("encoder.", "quant_conv.")
"""Of an autoencoder: exchanging the decoder does not change latents."""


def sample_weights(pipe: Any) -> dict[str, Tensor]:
    """The first values of each weight tensor of a pipeline's autoencoder and text encoders, by component.

    Components that are not loaded, quantized, or offloaded to disk are skipped.
    """
    parts = {name: getattr(pipe, name, None) for name in ("vae", "text_encoder", "text_encoder_2")}
    found = {name: _first_values(part, name) for name, part in parts.items() if isinstance(part, nn.Module)}
    return {name: values for name, values in found.items() if values is not None}


def _first_values(module: nn.Module, name: str) -> Tensor | None:
    """`sample_weights` of one component, float32, without its adapters."""
    weights = {
        key.replace(".base_layer", ""): value for key, value in module.named_parameters() if ".lora_" not in key
    }
    if name == "vae":
        weights = {key: value for key, value in weights.items() if key.startswith(_ENCODER)}
    if any(value.is_meta or not value.is_floating_point() for value in weights.values()):
        return None
    parts = [value.detach().reshape(-1)[:_PER_TENSOR].float().cpu() for _, value in sorted(weights.items())]
    # Normalized, so that every tensor counts; norms are a thousand times as large as convolutions.
    return torch.cat([functional.normalize(part, dim=0) for part in parts]) if parts else None


def check_base(start: Start, pipe: Any) -> None:
    """Refuse a start whose autoencoder or text encoders differ from those of a pipeline; warn if they are close.

    Raises:
        ValueError: with the component and the remedy.
    """
    own = sample_weights(pipe)
    for name, theirs in start.weights.items():
        if name not in own:
            continue
        same_form = own[name].shape == theirs.shape
        distance = float((own[name] - theirs).norm() / theirs.norm()) if same_form else float("inf")
        what = f"The start was fitted for {start.base or 'another base'}, and the {name} of this pipeline"
        if not distance <= RELATED:
            raise ValueError(
                f"{what} has different weights (relative distance {distance:.2g}), so its latents or prompt features "
                "are not compatible. Fit a start for this pipeline: zsnr fit-start "
                f"{pipe.config.get('_name_or_path') or 'BASE'} --train_data_dir IMAGES --output start.safetensors."
            )
        if distance > SAME:
            logger.warning(
                f"{what} was fine-tuned (relative distance {distance:.2g}); a start fitted to this pipeline is more "
                "accurate."
            )
