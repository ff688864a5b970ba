"""Flow matching: the noise levels (1 - s, s), their shifts, and conversion to variance-preserving levels and back.

At flow time s a sample is x_s = (1 - s) x_0 + s noise (Lipman et al. 2023, arXiv:2210.02747; Liu et al. 2023,
arXiv:2209.03003, rectified flow). Its signal-to-noise ratio at s = 1 is exactly zero, so results for zero terminal SNR
apply; the update rule in `solvers.py` needs only kappa and sigma.

Two levels with the same kappa have the same sample up to a factor (Diff2Flow, arXiv:2506.02221), pure noise included:
x_flow = x_vp / (alpha + sigma), and back x_vp = x_flow / hypot(1 - s, s).
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from .choices import check_shift
from .noise import NoiseLevel, Scalar
from .spacing import Scales, clean_position, position, scales_of_steps

TimeShiftType = Literal["exponential", "linear"]
TIME_SHIFT_TYPES: tuple[str, ...] = get_args(TimeShiftType)

_STOCK_SPACING_TOLERANCE = 1e-5
"""Tolerance of sigmas that a pipeline passes in float32."""


def flow_level(s: Scalar) -> NoiseLevel:
    """The level of flow time s: 0 at clean data, 1 at pure noise.

    Examples:
        >>> from zsnr_diffusers.core import flow_level
        >>> flow_level(0.25)
        NoiseLevel(alpha=0.75, sigma=0.25)
    """
    return NoiseLevel(1 - s, s)


def flow_time(level: NoiseLevel) -> Scalar:
    """The flow time of the same signal-to-noise ratio: sigma / (alpha + sigma).

    Examples:
        >>> from zsnr_diffusers.core import NoiseLevel, flow_time
        >>> round(flow_time(NoiseLevel(0.8, 0.6)), 4)
        0.4286
    """
    return level.sigma / (level.alpha + level.sigma)


def variance_preserving(level: NoiseLevel) -> NoiseLevel:
    """The noise level of the same signal-to-noise ratio with alpha^2 + sigma^2 = 1.

    Examples:
        >>> from zsnr_diffusers.core import NoiseLevel, variance_preserving
        >>> variance_preserving(NoiseLevel(3.0, 4.0))
        NoiseLevel(alpha=0.6, sigma=0.8)
    """
    norm = sample_scale(level)
    return NoiseLevel(level.alpha / norm, level.sigma / norm)


def sample_scale(level: NoiseLevel) -> Scalar:
    """Scale of a sample at this level relative to one of the same SNR with alpha^2 + sigma^2 = 1.

    Examples:
        >>> from zsnr_diffusers.core import flow_level, sample_scale
        >>> round(sample_scale(flow_level(0.5)), 4)
        0.7071
    """
    alpha, sigma = level
    if isinstance(alpha, Tensor) or isinstance(sigma, Tensor):
        return torch.hypot(torch.as_tensor(alpha), torch.as_tensor(sigma))
    return math.hypot(alpha, sigma)


def euler_step(x_s: Tensor, velocity: Tensor, s: Scalar, r: Scalar) -> Tensor:
    """x_r = x_s + (r - s) velocity, where velocity is noise - x_0: exact for single-point data.

    Args:
        x_s: samples, any shape.
        velocity: what the network returns for them, same shape.
        s: their flow times, which broadcast to them.
        r: target flow times, likewise.
    """
    return x_s + (r - s) * velocity


def shifted_time(s: Scalar, shift: float) -> Scalar:
    """Flow time whose sigma / alpha is `shift` times that of s (Esser et al. 2024, arXiv:2403.03206, eq. 23).

    Raises:
        ValueError: shift not above 0.

    Examples:
        >>> from zsnr_diffusers.core import shifted_time
        >>> shifted_time(0.5, shift=3.0)
        0.75
    """
    check_shift(shift)
    return shift * s / (1 + (shift - 1) * s)


def unshifted_time(s: Scalar, shift: float) -> Scalar:
    """Inverse of `shifted_time`: the flow time before the shift."""
    return shifted_time(s, 1 / shift)


def dynamic_shift(mu: float, time_shift_type: str = "exponential") -> float:
    """The shift of flow times for diffusers' `mu`, which a pipeline computes from the number of tokens.

    Args:
        mu: log of the shift, or for `linear` the shift itself.
        time_shift_type: as in diffusers.

    Raises:
        ValueError: unknown type, or a shift not above 0.
    """
    if time_shift_type not in TIME_SHIFT_TYPES:
        raise ValueError(
            f"time_shift_type={time_shift_type!r} is unknown; choose one of {', '.join(TIME_SHIFT_TYPES)}."
        )
    shift = math.exp(mu) if time_shift_type == "exponential" else float(mu)
    check_shift(shift)
    return shift


def trailing_times(num_inference_steps: int, shift: float = 1.0, shift_terminal: float | None = None) -> list[float]:
    """Flow times 1, (n - 1) / n, ..., 1 / n, shifted: what pipelines of diffusers pass as `sigmas`.

    Args:
        num_inference_steps: n, at least 1.
        shift: see `shifted_time`.
        shift_terminal: the last time; the times in between are stretched (LTX-Video). A single step stays at 1.

    Examples:
        >>> from zsnr_diffusers.core import trailing_times
        >>> trailing_times(4)
        [1.0, 0.75, 0.5, 0.25]
    """
    check_num_flow_steps(num_inference_steps)
    times = [(num_inference_steps - i) / num_inference_steps for i in range(num_inference_steps)]
    return stretch_to_terminal([float(shifted_time(s, shift)) for s in times], shift_terminal)


def stretch_to_terminal(times: Sequence[float], shift_terminal: float | None) -> list[float]:
    """Stretch flow times linearly so that 1 stays and the last is `shift_terminal`; a copy if that is None.

    Raises:
        ValueError: an end outside (0, 1).
    """
    if shift_terminal is None:
        return list(times)
    if not 0 < shift_terminal < 1:
        raise ValueError(f"shift_terminal={shift_terminal} must lie between 0 and 1.")
    if times[-1] == 1:
        return list(times)
    stretch = (1 - shift_terminal) / (1 - times[-1])
    return [1 - (1 - s) * stretch for s in times]


def kappa_times(num_inference_steps: int) -> list[float]:
    """n flow times from 1, evenly spaced in `position`: the times of `kappa` spacing, independent of a model's shift.

    Examples:
        >>> from zsnr_diffusers.core import kappa_times
        >>> [round(s, 3) for s in kappa_times(4)]
        [1.0, 0.9, 0.609, 0.206]
    """
    check_num_flow_steps(num_inference_steps)
    scales = scales_of_steps(num_inference_steps)
    goals = clean_position(scales) * torch.arange(num_inference_steps, dtype=torch.float64) / num_inference_steps
    return (1 / (1 + _kappas_at_positions(goals, scales))).tolist()


def _kappas_at_positions(goals: Tensor, scales: Scales) -> Tensor:
    """Inverse of `spacing.position`, kappa at each position, by bisection in log kappa down to rounding; 0 at 0."""
    low, high = torch.full_like(goals, -50.0), torch.full_like(goals, 50.0)
    for _ in range(64):
        middle = (low + high) / 2
        below = position(middle.exp(), scales) < goals
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(goals > 0, low.exp(), 0.0)


def is_stock_spacing(times: Sequence[float]) -> bool:
    """Whether flow times are 1, (n - 1) / n, ..., 1 / n: what pipelines pass by default.

    Also accepts an end at 1 / T, as computed by some pipelines from timesteps.
    """
    n = len(times)
    plain = all(abs(s - (n - i) / n) < _STOCK_SPACING_TOLERANCE for i, s in enumerate(times))
    return plain or (n > 1 and _is_linspace(times) and times[0] == 1 and times[-1] <= 1e-3 + _STOCK_SPACING_TOLERANCE)


def _is_linspace(times: Sequence[float]) -> bool:
    """Whether flow times are evenly spaced, up to float32 rounding."""
    step = (times[-1] - times[0]) / (len(times) - 1)
    return all(abs(s - (times[0] + step * i)) < _STOCK_SPACING_TOLERANCE for i, s in enumerate(times))


def check_flow_times(sigmas: Sequence[float]) -> list[float]:
    """Check a caller's own flow times (`sigmas`) and return them without a final 0 for clean data.

    Raises:
        ValueError: none at all, outside (0, 1], or not strictly decreasing.
    """
    times = [float(s) for s in sigmas]
    if times and times[-1] == 0:
        times = times[:-1]
    if not times or not all(0 < s <= 1 for s in times):
        raise ValueError(f"sigmas={[float(s) for s in sigmas]} must lie in (0, 1], at least one of them.")
    for a, b in pairwise(times):
        if a <= b:
            raise ValueError(f"sigmas must decrease strictly; {b:g} follows {a:g}.")
    return times


def check_num_flow_steps(num_inference_steps: int) -> None:
    """Refuse a number of flow-matching sampling steps that is not an integer of at least 1.

    Raises:
        ValueError: with the value.
    """
    if not (isinstance(num_inference_steps, int) and num_inference_steps >= 1):
        raise ValueError(f"num_inference_steps={num_inference_steps!r} must be an integer of at least 1.")
