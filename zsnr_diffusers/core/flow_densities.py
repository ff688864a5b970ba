"""Densities of training flow times, as quantile functions that convert uniform draws to flow times."""

import torch
from torch import Tensor

from .choices import FLOW_TIME_SAMPLINGS
from .flow import flow_time, shifted_time
from .noise import noise_level


def logit_normal_times(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """The quantile of s with log(s / (1 - s)) ~ N(mean, std^2) (Esser et al. 2024, arXiv:2403.03206, section 3.1).

    Args:
        u: uniform in (0, 1), any shape.
        mean: below 0 for less noise, above 0 for more.
        std: above 0; near 1.7 the density is about flat in the middle.
    """
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def schedule_times(u: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The quantile of the flow time whose SNR is that of a uniform timestep; linear between two timesteps.

    Args:
        u: uniform in [0, 1], any shape.
        alphas_cumprod: alpha_bar, float64 [T], T >= 2; with an end at zero SNR the times reach 1.
    """
    last = len(alphas_cumprod) - 1
    times = torch.as_tensor(flow_time(noise_level(alphas_cumprod, torch.arange(last + 1))))
    place = u * last
    below = place.long().clamp(max=last - 1)
    return torch.lerp(times[below], times[below + 1], place - below)


def flow_times(
    u: Tensor,
    sampling: str = "logit_normal",
    shift: float = 1.0,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    alphas_cumprod: Tensor | None = None,
) -> Tensor:
    """Training flow times from uniform draws: the quantiles of a density, then shifted.

    Args:
        u: uniform in (0, 1), float64, any shape.
        sampling: `logit_normal`, `uniform`, or `snr`, the density that a schedule with betas has over its SNR.
        shift: see `flow.shifted_time`.
        logit_mean: of `logit_normal`.
        logit_std: likewise.
        alphas_cumprod: the schedule of `snr`, float64 [T].

    Raises:
        ValueError: unknown sampling, `snr` without a schedule, or a shift not above 0.

    Examples:
        >>> import torch
        >>> from zsnr_diffusers.core import flow_times
        >>> flow_times(torch.tensor([0.25, 0.5, 0.75]), shift=3.0)
        tensor([0.6045, 0.7500, 0.8548])
    """
    if sampling not in FLOW_TIME_SAMPLINGS:
        raise ValueError(
            f"flow_time_sampling={sampling!r} is unknown; choose one of {', '.join(FLOW_TIME_SAMPLINGS)}."
        )
    if sampling == "snr" and alphas_cumprod is None:
        raise ValueError("flow_time_sampling='snr' is the density of a schedule with betas; pass alphas_cumprod.")
    if sampling == "logit_normal":
        u = logit_normal_times(u, logit_mean, logit_std)
    elif alphas_cumprod is not None and sampling == "snr":
        u = schedule_times(u, alphas_cumprod)
    return torch.as_tensor(shifted_time(u, shift))
