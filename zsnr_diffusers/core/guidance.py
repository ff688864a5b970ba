"""Classifier-free guidance and its rescale."""

import torch
from torch import Tensor

from .choices import check_guidance_rescale
from .noise import NoiseLevel
from .predictions import x_0_factors

GUIDANCE_SPACES = {
    "output": None,
    "v": "v_prediction",
    "epsilon": "epsilon",
    "x_0": "sample",
    "v_prediction": "v_prediction",
    "sample": "sample",
}
"""Spaces in which guidance can be rescaled, with their prediction types; `output` is the network's own."""


def classifier_free_guidance(unconditional: Tensor, conditional: Tensor, guidance_scale: float) -> Tensor:
    """u + w (c - u) (Ho & Salimans 2022, arXiv:2207.12598; as in diffusers, w = 1 is no guidance).

    Examples:
        >>> import torch
        >>> from zsnr_diffusers.core import classifier_free_guidance
        >>> classifier_free_guidance(torch.tensor([1.0]), torch.tensor([2.0]), guidance_scale=7.5)
        tensor([8.5000])
    """
    return unconditional + guidance_scale * (conditional - unconditional)


def rescale_guidance(guided: Tensor, conditional: Tensor, guidance_rescale: float) -> Tensor:
    """Rescale the guided prediction to the standard deviation of the conditional one.

    Lin et al. 2023 (arXiv:2305.08891), Algorithm 2: per sample, `guided * std(conditional) / std(guided)`, blended
    with the unscaled value. A sample with a constant prediction (such as an ideal zero-SNR model's for a plain image
    at the first step) is not rescaled.

    Args:
        guided: prediction after classifier-free guidance, shape [B, C, ...].
        conditional: conditional prediction, same shape.
        guidance_rescale: the paper's phi, from 0 (off) to 1; it recommends 0.5 to 0.75 and uses 0.7.

    Returns:
        Tensor of that shape in the dtype of `guided`; the arithmetic is float32 or better.

    Raises:
        ValueError: phi outside [0, 1].

    Examples:
        >>> import torch
        >>> from zsnr_diffusers.core import rescale_guidance
        >>> guided, conditional = torch.tensor([[-4.0, 4.0]]), torch.tensor([[-1.0, 1.0]])
        >>> rescale_guidance(guided, conditional, guidance_rescale=1.0)
        tensor([[-1.,  1.]])
    """
    check_guidance_rescale(guidance_rescale)
    if guidance_rescale == 0:
        return guided
    wide = torch.promote_types(guided.dtype, torch.float32)
    if guided.dtype != wide:
        return rescale_guidance(guided.to(wide), conditional.to(wide), guidance_rescale).to(guided.dtype)
    return torch.addcmul(guided, guided, _std_ratio_minus_one(guided, conditional), value=guidance_rescale)


def _std_ratio_minus_one(guided: Tensor, conditional: Tensor) -> Tensor:
    """std(conditional) / std(guided) - 1 of each sample, shape [B, 1, ...]; 0 where either is constant."""
    sharpness = _inverse_std(guided)
    other = _inverse_std(conditional)
    # infinite where flat, so that the quotient is infinite or not a number in all three cases
    excess = (sharpness - other).div_(other).nan_to_num_(0.0, 0.0)
    return excess.view(-1, *[1] * (guided.ndim - 1))


def _inverse_std(x: Tensor) -> Tensor:
    """1 / std of each sample, shape [B, 1]; infinite for a constant.

    The group normalization kernel needs one pass with Welford's recurrence, which gives exactly 0 for a constant;
    `Tensor.std` is many times slower for several samples, and not exactly 0 for a constant.
    """
    x = x.contiguous()
    samples, channels = x.shape[:2]
    return torch.native_group_norm(x, None, None, samples, channels, x.numel() // (samples * channels), 1, 0.0)[2]


def rescale_guidance_in_space(
    guided: Tensor,
    conditional: Tensor,
    guidance_rescale: float,
    *,
    space: str,
    prediction_type: str,
    x_t: Tensor,
    level: NoiseLevel,
) -> Tensor:
    """Guidance rescale (Algorithm 2) of the v, noise or x_0 implied by predictions, instead of the predictions.

    Given x_t, a prediction of any type is the output plus q x_t, up to a factor to which Algorithm 2 is invariant. As
    epsilon, q = sigma / alpha for an output of v: infinite at zero SNR, where the rescaled output has a limit, the
    guided one + phi x_t cov(x_t, conditional - guided) / var(x_t). So epsilon space exists at zero SNR too.

    Args:
        guided: output after guidance, shape [B, ...].
        conditional: conditional output, same shape.
        guidance_rescale: phi, from 0 to 1.
        space: one of `GUIDANCE_SPACES`.
        prediction_type: of both outputs.
        x_t: the network's input, same shape.
        level: noise level of `x_t`, variance-preserving or of flow matching.

    Returns:
        The rescaled output, of that shape and in the dtype of `guided`.

    Raises:
        ValueError: unknown space or prediction type, phi outside [0, 1], or an epsilon output at zero SNR.
    """
    check_guidance_space(space)
    target = GUIDANCE_SPACES[space]
    if target is None or target == prediction_type:
        return rescale_guidance(guided, conditional, guidance_rescale)
    check_guidance_rescale(guidance_rescale)
    # For epsilon, q reaches thousands near zero SNR and cancels later, which needs more digits than float32 has.
    double = target == "epsilon" and guided.device.type != "mps"
    wide = torch.promote_types(guided.dtype, torch.float64 if double else torch.float32)
    g, c, x = guided.to(wide), conditional.to(wide), x_t.to(wide)
    a_output, b_output = x_0_factors(prediction_type, level)
    if target == "epsilon" and float(level.alpha) == 0:
        return (g + guidance_rescale * _regression_slope(x, c - g) * x).to(guided.dtype)
    offset = (a_output - x_0_factors(target, level)[0]) / b_output * x
    there = g + offset
    return torch.addcmul(g, there, _std_ratio_minus_one(there, c + offset), value=guidance_rescale).to(guided.dtype)


def _regression_slope(x: Tensor, y: Tensor) -> Tensor:
    """cov(x, y) / var(x) of each sample, shape [B, 1, ...]; 0 where x is constant."""
    dims = tuple(range(1, x.ndim))
    centred = x - x.mean(dim=dims, keepdim=True)
    variance = (centred * centred).sum(dim=dims, keepdim=True)
    return (centred * y).sum(dim=dims, keepdim=True) / torch.where(variance == 0, 1.0, variance)


def check_guidance_space(space: str) -> None:
    """Refuse a guidance rescale space that is not one of `GUIDANCE_SPACES`.

    Raises:
        ValueError: with the value and those that are known.
    """
    if not isinstance(space, str) or space not in GUIDANCE_SPACES:
        raise ValueError(f"space={space!r} is unknown; choose one of {', '.join(GUIDANCE_SPACES)}.")
