"""Prediction types, and the clean sample x_0 that a prediction implies.

Every prediction type is a linear combination of x_0 and noise, so each needs one line and no pairwise converters.
Given `x_t = alpha x_0 + sigma noise`, x_0 follows from the prediction; for epsilon this requires a division by alpha,
which is refused at zero SNR.
"""

import math

from torch import Tensor

from .choices import EPSILON_AT_ZERO_SNR, unknown_prediction_error
from .noise import NoiseLevel, Scalar


def x_0_factors(prediction_type: str, level: NoiseLevel) -> tuple[Scalar, Scalar]:
    """Factors (a, b) with which x_0 = a x_t + b output.

    Args:
        prediction_type: `epsilon` (Ho et al. 2020), `sample`, `v_prediction` (Salimans & Ho 2022, arXiv:2202.00512,
            appendix D), or `flow_prediction`, noise - x_0 (Lipman et al. 2023, arXiv:2210.02747).
        level: noise level of `x_t`; alpha^2 + sigma^2 need not be 1.

    Raises:
        ValueError: unknown prediction type, or epsilon at alpha = 0.

    Examples:
        >>> from zsnr_diffusers.core import NoiseLevel, x_0_factors
        >>> x_0_factors("v_prediction", NoiseLevel(0.8, 0.6))
        (0.8, -0.6)
    """
    alpha, sigma = level
    if prediction_type == "v_prediction":
        norm = alpha**2 + sigma**2
        return alpha / norm, -sigma / norm
    if prediction_type == "sample":
        return 0.0, 1.0
    if prediction_type == "flow_prediction":
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)
    if prediction_type == "epsilon":
        if not (alpha.all() if isinstance(alpha, Tensor) else alpha):
            raise ValueError(EPSILON_AT_ZERO_SNR)
        return 1 / alpha, -sigma / alpha
    raise unknown_prediction_error(prediction_type)


def dynamic_threshold(x_0: Tensor, ratio: float = 0.995, max_value: float = 1.0) -> Tensor:
    """Scale down each sample's predicted x_0 so that a given fraction of its pixels lies in [-1, 1]; clip the rest.

    Saharia et al. 2022 (Imagen, arXiv:2205.11487), section 2.3; for pixel-space models. The threshold is the quantile
    of |x_0|, at least 1 and at most `max_value`.

    Args:
        x_0: shape [B, ...], floating point.
        ratio: the quantile, in [0, 1].
        max_value: 1 is plain clipping.

    Examples:
        >>> import torch
        >>> from zsnr_diffusers.core import dynamic_threshold
        >>> dynamic_threshold(torch.tensor([[-4.0, 0.0, 2.0]]), ratio=1.0, max_value=10.0).tolist()
        [[-1.0, 0.0, 0.5]]
    """
    # `torch.quantile` refuses more than 16 million values.
    sizes = x_0.abs().flatten(1).sort(dim=1).values
    place = ratio * (sizes.shape[1] - 1)
    below, above = sizes[:, math.floor(place)], sizes[:, math.ceil(place)]
    threshold = (below + (above - below) * (place % 1)).clamp(1.0, max_value).reshape(-1, *[1] * (x_0.ndim - 1))
    return x_0.clamp(-threshold, threshold) / threshold


def training_target(prediction_type: str, x_0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
    """Training target of a prediction type at `x_t = alpha x_0 + sigma noise`.

    For `v_prediction` it is v = alpha noise - sigma x_0 (Lin et al. 2023, eq. 10), for `flow_prediction` the velocity
    of the straight path, noise - x_0.

    Raises:
        ValueError: unknown prediction type.

    Examples:
        >>> import torch
        >>> from zsnr_diffusers.core import NoiseLevel, training_target
        >>> training_target("v_prediction", torch.ones(1), torch.zeros(1), NoiseLevel(0.0, 1.0))
        tensor([-1.])
    """
    if prediction_type == "v_prediction":
        return level.alpha * noise - level.sigma * x_0
    if prediction_type == "sample":
        return x_0
    if prediction_type == "flow_prediction":
        return noise - x_0
    if prediction_type == "epsilon":
        return noise
    raise unknown_prediction_error(prediction_type)


def converted_prediction(
    output: Tensor, x_t: Tensor, level: NoiseLevel, prediction_type: str, wanted: str, wanted_level: NoiseLevel
) -> Tensor:
    """Convert a network output to another prediction type, at a noise level of the same signal-to-noise ratio.

    Args:
        output: the network's prediction, shape [B, ...].
        x_t: the network's input, same shape.
        level: of `x_t`, with sigma > 0.
        prediction_type: of `output`.
        wanted: prediction type of the result.
        wanted_level: noise level of the result, such as (1 - s, s) of a schedule's (alpha, sigma).

    Raises:
        ValueError: unknown prediction type, or from epsilon at alpha = 0.

    Examples:
        >>> import torch
        >>> from zsnr_diffusers.core import NoiseLevel, converted_prediction
        >>> v, x_t, level = torch.tensor([1.0]), torch.tensor([2.0]), NoiseLevel(0.0, 1.0)
        >>> converted_prediction(v, x_t, level, "v_prediction", "sample", level)
        tensor([-1.])
    """
    a, b = x_0_factors(prediction_type, level)
    x_0 = a * x_t + b * output
    return training_target(wanted, x_0, (x_t - level.alpha * x_0) / level.sigma, wanted_level)


def ideal_output(
    prediction_type: str, x_t: Tensor, level: NoiseLevel, mean: Tensor | float, spread: Tensor | float
) -> Tensor:
    """The ideal network output for data N(mean, spread^2): its prediction is exactly E[x_0 | x_t].

    E[x_0 | x_t] = mean + alpha spread^2 / (alpha^2 spread^2 + sigma^2) (x_t - alpha mean). A spread of 0 means
    single-point data, which every correct sampler reaches with any step count.

    Args:
        prediction_type: as in `training_target`.
        x_t: samples of any shape.
        level: their noise level, with sigma > 0; alpha may be 0.
        mean: of the data, broadcasts to `x_t`.
        spread: standard deviation of the data, likewise.

    Raises:
        ValueError: unknown prediction type.

    Examples:
        >>> import torch
        >>> from zsnr_diffusers.core import NoiseLevel, ideal_output
        >>> ideal_output("sample", torch.tensor([2.0]), NoiseLevel(0.0, 1.0), mean=0.5, spread=1.0)
        tensor([0.5000])
    """
    alpha, sigma = level
    x_0 = mean + alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * (x_t - alpha * mean)
    return training_target(prediction_type, x_0, (x_t - alpha * x_0) / sigma, level)
