"""Classifier-free guidance and its rescale."""

import torch
from torch import Tensor


def classifier_free_guidance(unconditional: Tensor, conditional: Tensor, guidance_scale: float) -> Tensor:
    """u + w (c - u) (Ho & Salimans 2022, arXiv:2207.12598; as in diffusers, w = 1 is no guidance)."""
    return unconditional + guidance_scale * (conditional - unconditional)


def _spread(x: Tensor) -> Tensor:
    """Standard deviation of each sample, shape [B, 1, ...]; exactly 0 where it is mere rounding.

    The mean of N equal float32 numbers is off by a few units in the last place, so the spread of a constant comes out
    tiny but not zero, and a ratio of two such numbers is arbitrary.
    """
    dims = tuple(range(1, x.ndim))
    spread = x.std(dim=dims, keepdim=True)
    rounding = 16 * torch.finfo(x.dtype).eps * x.abs().amax(dim=dims, keepdim=True)
    return torch.where(spread > rounding, spread, 0.0)


def rescale_guidance(guided: Tensor, conditional: Tensor, guidance_rescale: float) -> Tensor:
    """Bring the guided prediction back to the spread of the conditional one.

    Lin et al. 2023 (arXiv:2305.08891), Algorithm 2: per sample, `guided * std(conditional) / std(guided)`, blended
    with the unscaled value. A sample of which either prediction has no spread at all (what an ideal zero-SNR model
    returns for a plain image at the first step) is left unscaled.

    Args:
        guided: prediction after classifier-free guidance, shape [B, ...].
        conditional: conditional prediction, same shape.
        guidance_rescale: the paper's phi, from 0 (off) to 1; it recommends 0.5 to 0.75 and uses 0.7.

    Returns:
        Tensor of that shape in the dtype of `guided`; the arithmetic is float32 or better.

    Raises:
        ValueError: phi outside [0, 1].
    """
    check_guidance_rescale(guidance_rescale)
    if guidance_rescale == 0:
        return guided
    wide = torch.promote_types(guided.dtype, torch.float32)
    spread_guided, spread_conditional = _spread(guided.to(wide)), _spread(conditional.to(wide))
    flat = (spread_guided == 0) | (spread_conditional == 0)
    factor = torch.where(flat, 1.0, spread_conditional / torch.where(flat, 1.0, spread_guided))
    return (guided * (guidance_rescale * factor + (1 - guidance_rescale))).to(guided.dtype)


def check_guidance_rescale(guidance_rescale: float) -> None:
    """Refuse a phi outside [0, 1].

    Raises:
        ValueError: with the value and the recommended range.
    """
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale={guidance_rescale} must lie in [0, 1]; 0.7 is the usual value, 0 is off.")
