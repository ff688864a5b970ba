"""Weights of the training loss by noise level, including some that keep training the last timestep.

Each is written for the squared error of v, in terms of alpha^2 and sigma^2, whose sum is 1: snr / (snr + 1) is alpha^2
and 1 / (snr + 1) is sigma^2. So nothing is divided by either, and a signal-to-noise ratio of zero is an ordinary
value.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .choices import LOSS_WEIGHTINGS, check_loss_weighting
from .noise import NoiseLevel
from .predictions import x_0_factors


def _min_snr_weights(signal: Tensor, noise: Tensor, gamma: float) -> Tensor:
    """min(snr, gamma) / (snr + 1), the loss weight for v (Hang et al. 2023, arXiv:2303.09556)."""
    return torch.minimum(signal, gamma * noise)


def _soft_min_snr_weights(signal: Tensor, noise: Tensor, gamma: float) -> Tensor:
    """Loss weight for v; for x_0 it is 1 / (1 / snr + 1 / gamma) (Crowson et al. 2024, HDiT, arXiv:2401.11605)."""
    return signal * gamma * noise / (signal + gamma * noise)


def _apply_weight_floor(weights: Tensor, noise: Tensor) -> Tensor:
    """Raise loss weights for v to at least weight 1 for x_0: truncated SNR (Salimans & Ho 2022, arXiv:2202.00512)."""
    return torch.maximum(weights, noise)


_V_WEIGHTS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "min_snr_floored": lambda signal, noise, gamma: _apply_weight_floor(_min_snr_weights(signal, noise, gamma), noise),
    "soft_min_snr_floored": lambda signal, noise, gamma: _apply_weight_floor(
        _soft_min_snr_weights(signal, noise, gamma), noise
    ),
    "min_snr": _min_snr_weights,
}


def loss_weights(
    loss_weighting: str, level: NoiseLevel, prediction_type: str = "v_prediction", snr_gamma: float = 5.0
) -> Tensor:
    """lambda_t, the weight of a network's squared error at a noise level (Lin et al. 2023, eq. 11).

    - `constant`: 1 for the network's own prediction type, as in Lin et al. (v) and Ho et al. 2020 (epsilon).
    - `min_snr_floored`: max(min(snr, gamma), 1) / (snr + 1) for v, which is 1 at the last timestep of zero SNR.
    - `soft_min_snr_floored`: the same with snr gamma / (snr + gamma) instead of the minimum.
    - `min_snr`: without the floor, for a schedule that does not end at zero SNR.

    An error of x_0 is sigma times, one of epsilon alpha times that of v, so their weights are those for v over sigma^2
    and alpha^2: a weighting defines the same loss for all prediction types.

    Args:
        loss_weighting: one of `LOSS_WEIGHTINGS`.
        level: tensors of any shape.
        prediction_type: what the network predicts.
        snr_gamma: the SNR above which weights decrease.

    Returns:
        tensor of the level's shape and dtype, positive and finite.

    Raises:
        ValueError: an unknown weighting or prediction type, a gamma that is too small, and `min_snr` or epsilon at
            alpha = 0.

    Examples:
        >>> from zsnr_diffusers.core import NoiseLevel, loss_weights
        >>> loss_weights("min_snr_floored", NoiseLevel(0.0, 1.0))
        tensor(1.)
    """
    alpha, sigma = torch.as_tensor(level.alpha), torch.as_tensor(level.sigma)
    check_loss_weighting(loss_weighting, not bool(alpha.all()), snr_gamma)
    if loss_weighting == "constant":
        return torch.ones_like(alpha)
    if loss_weighting not in _V_WEIGHTS:
        raise ValueError(f"loss_weighting={loss_weighting!r} is unknown; choose one of {', '.join(LOSS_WEIGHTINGS)}.")
    _, factor = x_0_factors(prediction_type, level)
    weights = _V_WEIGHTS[loss_weighting](alpha**2, sigma**2, snr_gamma)
    # An error of the output is `factor` times as large in x_0, and one of v sigma times.
    return weights * (factor / sigma) ** 2


def level_features(level: NoiseLevel, count: int) -> Tensor:
    """cos(2 k phi) for k < count, with tan(phi) = sigma / alpha: smooth, and finite from clean data to pure noise.

    As phi runs from 0 to pi / 2, these are the Fourier series of any continuous function of the noise level.

    Args:
        level: tensors of any shape.
        count: features.

    Returns:
        tensor of the level's shape and one dimension more.

    Examples:
        >>> from zsnr_diffusers.core import NoiseLevel, level_features
        >>> level_features(NoiseLevel(0.0, 1.0), count=3)
        tensor([ 1., -1.,  1.])
    """
    phi = torch.atan2(torch.as_tensor(level.sigma), torch.as_tensor(level.alpha))
    return torch.cos(2 * phi[..., None] * torch.arange(count, device=phi.device))


def uncertainty_loss(loss: Tensor, log_variance: Tensor) -> Tensor:
    """loss / e^u + u, minimal if u is the logarithm of the expected loss.

    With u as a trained function of the noise level, every level contributes equally to the gradient, including the
    last one: Karras et al. 2024 (EDM2, arXiv:2312.02696), after Kendall et al. 2018 (arXiv:1705.07115).

    Args:
        loss: of each sample, shape [B].
        log_variance: u at each sample's level, shape [B].

    Examples:
        >>> import torch
        >>> from zsnr_diffusers.core import uncertainty_loss
        >>> uncertainty_loss(torch.tensor([2.0]), torch.tensor([0.0])).tolist()
        [2.0]
    """
    return loss * torch.exp(-log_variance) + log_variance
