"""Noise schedules as tables of alpha_bar, and the noise level at a timestep.

In a variance-preserving process, `x_t = alpha x_0 + sigma noise` with `alpha = sqrt(alpha_bar)` and `sigma = sqrt(1 -
alpha_bar)`. A schedule is the table alpha_bar[T]; its signal-to-noise ratio is alpha_bar / (1 - alpha_bar). Tables are
float64: 1 - alpha_bar at the first timestep has only three digits in float32.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Scalar = float | Tensor


class NoiseLevel(NamedTuple):
    """How much of a sample is signal (`alpha`) and how much noise (`sigma`).

    alpha^2 + sigma^2 = 1 for levels from a table of alpha_bar, alpha + sigma = 1 in flow matching (`flow.py`);
    samplers need neither. Either two numbers, for a batch that shares one level, or two tensors that broadcast to the
    sample. Storing both, instead of their ratio, makes a zero signal-to-noise ratio an ordinary value.

    Examples:
        >>> from zsnr_diffusers.core import NoiseLevel, snr
        >>> round(snr(NoiseLevel(alpha=0.6, sigma=0.8)), 4)
        0.5625
    """

    alpha: Scalar
    sigma: Scalar


def _linear_betas(num: int, start: float, end: float) -> Tensor:
    """Betas linear from `start` to `end`, float64 [num] (Ho et al. 2020, arXiv:2006.11239, section 4)."""
    return torch.linspace(start, end, num, dtype=torch.float64)


def _scaled_linear_betas(num: int, start: float, end: float) -> Tensor:
    """Rombach et al. 2022 (arXiv:2112.10752): linear in sqrt(beta); the schedule of Stable Diffusion."""
    return torch.linspace(math.sqrt(start), math.sqrt(end), num, dtype=torch.float64) ** 2


def _sigmoid_betas(num: int, start: float, end: float) -> Tensor:
    """GeoDiff, Xu et al. 2022 (arXiv:2203.02923): a sigmoid over [-6, 6] between the two betas."""
    return torch.sigmoid(torch.linspace(-6, 6, num, dtype=torch.float64)) * (end - start) + start


def _cosine_alpha_bar(u: float) -> float:
    """alpha_bar at u in [0, 1] up to a constant factor (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17)."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace_alpha_bar(u: float) -> float:
    """alpha_bar of a Laplace-distributed log SNR (Hang et al. 2024, arXiv:2407.03297), with diffusers' guard."""
    log_snr = -0.5 * math.copysign(1.0, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
    return math.sqrt(1 / (1 + math.exp(-log_snr)))


def _alpha_bar_from_betas(betas: Tensor) -> Tensor:
    return torch.cumprod(1 - betas, dim=0)


def _alpha_bar_from_curve(curve: Callable[[float], float], num: int, max_beta: float | None = None) -> Tensor:
    """alpha_bar_t = curve((t + 1) / T) / curve(0), each beta capped at `max_beta` if given."""
    values = torch.tensor([curve(i / num) for i in range(num + 1)], dtype=torch.float64)
    if max_beta is None:
        return values[1:] / values[0]
    return _alpha_bar_from_betas((1 - values[1:] / values[:-1]).clamp(max=max_beta))


_BETAS: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": _linear_betas,
    "scaled_linear": _scaled_linear_betas,
    "sigmoid": _sigmoid_betas,
}
_CURVES: dict[str, tuple[Callable[[float], float], float | None]] = {
    "cosine": (_cosine_alpha_bar, None),
    "squaredcos_cap_v2": (_cosine_alpha_bar, 0.999),
    "laplace": (_laplace_alpha_bar, None),
}
BETA_SCHEDULES = (*_BETAS, *_CURVES)


def alpha_bar_table(
    beta_schedule: str = "linear",
    num_train_timesteps: int = 1000,
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
    trained_betas: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Table of alpha_bar over the training timesteps, named as in diffusers.

    Args:
        beta_schedule: `linear`, `scaled_linear`, `sigmoid`, `laplace`, `cosine` (its end is left at zero SNR, up to
            rounding) or `squaredcos_cap_v2` (the same with every beta capped at 0.999, as published and as in
            diffusers).
        num_train_timesteps: T.
        beta_start: first beta; used by schedules defined by betas.
        beta_end: last beta, likewise.
        trained_betas: explicit betas, shape [T]; overrides all of the above.

    Returns:
        float64 tensor of shape [T], strictly decreasing.

    Raises:
        ValueError: unknown schedule, T below 1, or betas outside (0, 1].

    Examples:
        >>> from zsnr_diffusers.core import alpha_bar_table
        >>> table = alpha_bar_table("scaled_linear", beta_start=0.00085, beta_end=0.012)
        >>> round(table[-1].item(), 6)
        0.00466
    """
    if trained_betas is not None:
        betas = torch.as_tensor(trained_betas, dtype=torch.float64).flatten()
    elif num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps={num_train_timesteps}: a schedule needs at least one timestep.")
    elif beta_schedule in _CURVES:
        curve, max_beta = _CURVES[beta_schedule]
        return _alpha_bar_from_curve(curve, num_train_timesteps, max_beta)
    elif beta_schedule in _BETAS:
        betas = _BETAS[beta_schedule](num_train_timesteps, beta_start, beta_end)
    else:
        raise ValueError(f"beta_schedule={beta_schedule!r} is unknown; choose one of {', '.join(BETA_SCHEDULES)}.")
    if len(betas) == 0 or not bool(((betas > 0) & (betas <= 1)).all()):
        raise ValueError(
            f"Betas must lie in (0, 1]; got {len(betas)} of them"
            + (f", from {betas.min().item():g} to {betas.max().item():g}." if len(betas) else ".")
        )
    return _alpha_bar_from_betas(betas)


def betas_of_table(alphas_cumprod: Tensor) -> Tensor:
    """beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}, of which a table is the running product; the last is 1 at zero SNR.

    Args:
        alphas_cumprod: alpha_bar, shape [T], above 0 except for the last.

    Examples:
        >>> import torch
        >>> from zsnr_diffusers.core import betas_of_table
        >>> betas_of_table(torch.tensor([0.5, 0.25, 0.0])).tolist()
        [0.5, 0.5, 1.0]
    """
    return 1 - alphas_cumprod / torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])


def shift_snr(alphas_cumprod: Tensor, scale: float) -> Tensor:
    """Divide the signal-to-noise ratio of every timestep by `scale`, as in models for large images and video.

    Hoogeboom et al. 2023 (simple diffusion, arXiv:2301.11093), section 2.1; diffusers calls it `snr_shift_scale`.

    Raises:
        ValueError: scale not above 0.

    Examples:
        >>> import torch
        >>> from zsnr_diffusers.core import shift_snr
        >>> shift_snr(torch.tensor([0.5, 0.0]), scale=3.0).tolist()
        [0.25, 0.0]
    """
    if not scale > 0:
        raise ValueError(f"snr_shift_scale={scale} must be above 0; 1 changes nothing.")
    return alphas_cumprod / (scale + (1 - scale) * alphas_cumprod)


def enforce_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that the last timestep is pure noise and the first is unchanged.

    Lin et al. 2023 (arXiv:2305.08891), Algorithm 1. Idempotent.

    Args:
        alphas_cumprod: alpha_bar, shape [T], T >= 2, decreasing.

    Returns:
        float64 tensor of shape [T] on the same device; the last value is exactly 0.

    Raises:
        ValueError: not a decreasing table of at least two values in [0, 1].

    Examples:
        >>> import torch
        >>> from zsnr_diffusers.core import enforce_zero_terminal_snr
        >>> enforce_zero_terminal_snr(torch.tensor([0.81, 0.25, 0.01]))
        tensor([0.8100, 0.2025, 0.0000], dtype=torch.float64)
    """
    if alphas_cumprod.ndim != 1 or len(alphas_cumprod) < 2:
        raise ValueError(
            f"alphas_cumprod has shape {tuple(alphas_cumprod.shape)}; zero terminal SNR needs a table of at least two "
            "timesteps."
        )
    alpha = alphas_cumprod.double().sqrt()
    first, last = alpha[0], alpha[-1]
    if not bool((alpha[1:] < alpha[:-1]).all()) or not bool(first <= 1):
        raise ValueError("alphas_cumprod must decrease strictly from at most 1 to at least 0.")
    table = ((alpha - last) * (first / (first - last))) ** 2
    table[0] = alphas_cumprod[0]  # squaring a square root would change the last digit of the value to keep
    return table


def schedule_table(
    beta_schedule: str = "linear",
    num_train_timesteps: int = 1000,
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
    trained_betas: Sequence[float] | Tensor | None = None,
    snr_shift_scale: float = 1.0,
    rescale_betas_zero_snr: bool = False,
) -> Tensor:
    """alpha_bar of the schedule that a config describes, with SNR shift and rescale to zero terminal SNR.

    Arguments and errors are those of `alpha_bar_table`, `shift_snr` and `enforce_zero_terminal_snr`, with diffusers'
    names.

    Returns:
        float64 tensor of shape [T].

    Examples:
        >>> from zsnr_diffusers.core import schedule_table
        >>> schedule_table("scaled_linear", rescale_betas_zero_snr=True)[-1].item()
        0.0
    """
    table = alpha_bar_table(beta_schedule, num_train_timesteps, beta_start, beta_end, trained_betas)
    if snr_shift_scale != 1:
        table = shift_snr(table, snr_shift_scale)
    return enforce_zero_terminal_snr(table) if rescale_betas_zero_snr else table


SCHEDULE_NAMES = tuple(inspect.signature(schedule_table).parameters)
"""Settings of a scheduler config that describe its noise schedule."""


def noise_level(alphas_cumprod: Tensor, timesteps: Tensor | int) -> NoiseLevel:
    """alpha and sigma at one or several timesteps of a schedule's table.

    Args:
        alphas_cumprod: alpha_bar, shape [T].
        timesteps: integers in [0, T-1]; shape [B], or a single number.

    Returns:
        `NoiseLevel` of two tensors in the table's dtype, shape [B] or scalar.

    Examples:
        >>> from zsnr_diffusers.core import alpha_bar_table, enforce_zero_terminal_snr, noise_level
        >>> noise_level(enforce_zero_terminal_snr(alpha_bar_table()), 999)
        NoiseLevel(alpha=tensor(0., dtype=torch.float64), sigma=tensor(1., dtype=torch.float64))
    """
    alpha_bar = alphas_cumprod[timesteps]
    return NoiseLevel(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def noise_level_of_ratio(ratio: float) -> NoiseLevel:
    """The variance-preserving noise level whose sigma / alpha is `ratio`, as in EDM and its samplers."""
    alpha = (1 + ratio**2) ** -0.5
    return NoiseLevel(alpha, ratio * alpha)


def kappa(level: NoiseLevel) -> Scalar:
    """Root of the signal-to-noise ratio, alpha / sigma, of a level with sigma > 0: 0 at pure noise.

    Examples:
        >>> from zsnr_diffusers.core import NoiseLevel, kappa
        >>> kappa(NoiseLevel(alpha=0.0, sigma=1.0))
        0.0
    """
    return level.alpha / level.sigma


def snr(level: NoiseLevel) -> Scalar:
    """Signal-to-noise ratio (alpha / sigma)^2 of a level with sigma > 0.

    Examples:
        >>> from zsnr_diffusers.core import NoiseLevel, snr
        >>> snr(NoiseLevel(alpha=0.0, sigma=1.0))
        0.0
    """
    ratio: Scalar = kappa(level) ** 2
    return ratio


def add_noise(x_0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
    """x_t = alpha x_0 + sigma noise (Ho et al. 2020, eq. 4), for any two tensors of one shape.

    Examples:
        >>> import torch
        >>> from zsnr_diffusers.core import NoiseLevel, add_noise
        >>> add_noise(torch.ones(2), torch.tensor([0.0, 1.0]), NoiseLevel(0.5, 0.25)).tolist()
        [0.5, 0.75]
    """
    return level.alpha * x_0 + level.sigma * noise


def has_zero_terminal_snr(alphas_cumprod: Tensor) -> bool:
    """Whether a schedule alpha_bar [T] ends at zero SNR, which diffusers may store as alpha_bar = 2^-24."""
    return float(alphas_cumprod[-1]) < 1e-6


def transition(cleaner: NoiseLevel, noisier: NoiseLevel) -> NoiseLevel:
    """The level with which `add_noise` moves a sample from one level to a noisier one: a step of q(x_t | x_s).

    x_t ~ N((alpha_t / alpha_s) x_s, 1 - (alpha_t / alpha_s)^2), the product of all steps in between (Ho et al. 2020,
    eq. 2). At pure noise, nothing of the sample remains.

    Args:
        cleaner: level of x_s; alpha above 0.
        noisier: level of x_t, with an alpha no larger; 0 at zero terminal SNR.

    Raises:
        ValueError: the step starts from pure noise or leads to a cleaner level.

    Examples:
        >>> from zsnr_diffusers.core import NoiseLevel, transition
        >>> transition(NoiseLevel(0.8, 0.6), NoiseLevel(0.0, 1.0))
        NoiseLevel(alpha=0.0, sigma=1.0)
    """
    alpha_s, alpha_t = (torch.as_tensor(level.alpha) for level in (cleaner, noisier))
    if not bool(((alpha_s > 0) & (alpha_t <= alpha_s)).all()):
        raise ValueError(f"A step of noise must lead to a noisier level; {noisier} is not noisier than {cleaner}.")
    kept = noisier.alpha / cleaner.alpha
    return NoiseLevel(kept, ((1 - kept) * (1 + kept)) ** 0.5)
