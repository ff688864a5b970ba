"""Which of the T training timesteps a sampler visits.

`spaced_timesteps` has the three spacings of Lin et al. 2023 (arXiv:2305.08891), Table 2, in exact integer arithmetic:
in floating point the same formulas return n + 1 timesteps, the last of them -1, for 62 of n = 1..1000. A fourth,
`kappa`, concentrates steps where the signal emerges: evenly spaced in `position`, which is regular from pure noise to
clean data.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .noise import kappa, noise_level

TimestepSpacing = Literal["trailing", "kappa", "linspace", "leading"]
TIMESTEP_SPACINGS: tuple[str, ...] = get_args(TimestepSpacing)
"""Names of the spacings of `spaced_timesteps`."""

SMALLEST_SCALE, LARGEST_SCALE = 0.02, 24.0
"""Standard deviations of fine detail and of brightness, over which steps are distributed."""


class Scales(NamedTuple):
    """The standard deviations over which a run distributes its steps."""

    smallest: float
    largest: float


FEW_STEPS_SCALES = {3: Scales(0.1, 9.0), 4: Scales(0.026, 24.0), 5: Scales(0.028, 32.0), 6: Scales(0.025, 32.0)}
"""With this few steps, these ranges give smaller errors under guidance."""


PURE_NOISE = 2.0**12
"""The sigma / alpha that diffusers uses for infinity: its Euler has alpha_bar = 2^-24 at zero SNR."""


def position(kappas: Tensor, scales: Scales | None = None) -> Tensor:
    """Progress of sampling at each kappa = alpha / sigma: 0 at pure noise, `clean_position` at clean data.

    Gaussian data N(0, s^2) has x_0(kappa) proportional to s kappa / sqrt(1 + (s kappa)^2) along the exact path. This
    is its integral over log s, from the smallest to the largest scale: the network's output along the path, averaged
    over a spectrum from fine detail to brightness.
    """
    smallest, largest = scales or _all_scales()
    return (largest * kappas).asinh() - (smallest * kappas).asinh()


def clean_position(scales: Scales | None = None) -> float:
    """`position` of clean data, the end of sampling."""
    smallest, largest = scales or _all_scales()
    return math.log(largest / smallest)


def scales_of_steps(num_inference_steps: int) -> Scales:
    """The range of scales of `kappa` spacing for this step count."""
    return FEW_STEPS_SCALES.get(num_inference_steps) or _all_scales()


def _all_scales() -> Scales:
    return Scales(SMALLEST_SCALE, LARGEST_SCALE)


def _round_half_even(numerator: int, denominator: int) -> int:
    """numerator / denominator rounded to an integer, ties to even as in `numpy.round`, in exact arithmetic."""
    quotient, remainder = divmod(numerator, denominator)
    twice = 2 * remainder
    return quotient + (twice > denominator or (twice == denominator and quotient % 2 == 1))


def spaced_timesteps(timestep_spacing: str, num_inference_steps: int, alphas_cumprod: Tensor) -> list[int]:
    """The training timesteps that n sampling steps visit, counted from 0, strictly decreasing.

    Args:
        timestep_spacing: `trailing` (ends at T-1 and steps down evenly), `kappa` (starts at T-1 and is even in
            `position`), `linspace` (both ends included) or `leading` (starts at 0 and never reaches T-1 unless n = T).
        num_inference_steps: n, from 1 to T.
        alphas_cumprod: alpha_bar, shape [T]; only `kappa` reads its values.

    Raises:
        ValueError: unknown spacing, or n outside [1, T].

    Examples:
        >>> from zsnr_diffusers.core import alpha_bar_table, spaced_timesteps
        >>> spaced_timesteps("trailing", 4, alpha_bar_table())
        [999, 749, 499, 249]
    """
    check_timestep_spacing(timestep_spacing)
    n, num_train_timesteps = num_inference_steps, len(alphas_cumprod)
    last = num_train_timesteps - 1
    check_num_inference_steps(n, num_train_timesteps)
    if timestep_spacing == "trailing":
        return [_round_half_even(num_train_timesteps * k, n) - 1 for k in range(n, 0, -1)]
    if timestep_spacing == "leading":
        return [num_train_timesteps // n * k for k in range(n - 1, -1, -1)]
    if timestep_spacing == "linspace":
        # A single step also starts from pure noise, where the formula would be 0 / 0.
        return [_round_half_even(last * k, n - 1) for k in range(n - 1, -1, -1)] if n > 1 else [last]
    return position_spaced_timesteps(n, alphas_cumprod, scales_of_steps(n))


def position_spaced_timesteps(n: int, alphas_cumprod: Tensor, scales: Scales) -> list[int]:
    """n timesteps from the last one, each closest to its position among n equal `position` intervals up to clean data.

    Towards clean data, where timesteps are too far apart for this, all of them are visited.
    """
    positions = _positions_of_timesteps(alphas_cumprod, scales)
    return _evenly_positioned(n, positions, len(positions) - 1, 0, clean_position(scales))


def _positions_of_timesteps(alphas_cumprod: Tensor, scales: Scales | None = None) -> Tensor:
    """`position` of each training timestep, shape [T]."""
    levels = noise_level(alphas_cumprod.double(), torch.arange(len(alphas_cumprod)))
    return position(torch.as_tensor(kappa(levels)), scales)


def _evenly_positioned(n: int, positions: Tensor, first: int, lowest: int, end: float) -> list[int]:
    """n timesteps from `first` to at least `lowest`, each nearest to its place on the way to the position `end`."""
    start = positions[first].item()
    goals = start + (end - start) * torch.arange(n, dtype=torch.float64) / n
    nearest = (positions - goals[:, None]).abs().argmin(dim=1).tolist()
    steps = [first + 1]
    for k, timestep in enumerate(nearest):
        steps.append(min(max(timestep, lowest + n - 1 - k), steps[-1] - 1))  # room for the steps that follow
    return steps[1:]


def subdivided_timesteps(timesteps: Sequence[int], substeps: int, alphas_cumprod: Tensor) -> list[list[int]]:
    """The timesteps of `substeps` steps instead of each step of a run: itself first, then even in `position`.

    Args:
        timesteps: of the run, strictly decreasing; clean data follows them.
        substeps: steps instead of each.
        alphas_cumprod: alpha_bar, shape [T].

    Raises:
        ValueError: some step passes over too few timesteps.

    Examples:
        >>> from zsnr_diffusers.core import alpha_bar_table, subdivided_timesteps
        >>> subdivided_timesteps([999, 499], 2, alpha_bar_table())
        [[999, 707], [499, 102]]
    """
    positions = _positions_of_timesteps(alphas_cumprod)
    ends = [*positions[list(timesteps[1:])].tolist(), clean_position()]
    found = []
    for first, following, end in zip(timesteps, [*timesteps[1:], -1], ends, strict=True):
        if first - following < substeps:
            raise ValueError(f"{substeps} steps do not fit between timesteps {first} and {following}; choose fewer.")
        found.append(_evenly_positioned(substeps, positions, first, following + 1, end))
    return found


def check_num_inference_steps(num_inference_steps: int, num_train_timesteps: int) -> None:
    """Refuse a number of sampling steps that is not an integer in [1, T].

    Raises:
        ValueError: with the value and the range.
    """
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(
            f"num_inference_steps={num_inference_steps} is not possible: the model has {num_train_timesteps} "
            f"timesteps, so choose an integer from 1 to {num_train_timesteps}."
        )


def check_timestep_spacing(timestep_spacing: str) -> None:
    """Refuse a `timestep_spacing` that is not one of `TIMESTEP_SPACINGS`.

    Raises:
        ValueError: with the value and the choices.
    """
    if timestep_spacing not in TIMESTEP_SPACINGS:
        raise ValueError(
            f"timestep_spacing={timestep_spacing!r} is unknown; choose one of {', '.join(TIMESTEP_SPACINGS)}."
        )


def timesteps_of_sigmas(sigmas: Sequence[float], alphas_cumprod: Tensor, increasing: bool = False) -> list[int]:
    """The timestep nearest to each noise level, in the logarithm of its sigma / alpha.

    Args:
        sigmas: sigma / alpha, strictly decreasing (increasing, for inversion). The cleanest may be 0, where sampling
            ends and no network is called; `PURE_NOISE` is infinity. Infinity is treated as twice the sigma of T-2.
        alphas_cumprod: alpha_bar, shape [T].
        increasing: whether they lead from clean data to noise.

    Raises:
        ValueError: none above 0, a negative value or NaN, wrong order, or two that map to the same timestep.

    Examples:
        >>> from zsnr_diffusers.core import alpha_bar_table, timesteps_of_sigmas
        >>> timesteps_of_sigmas([100.0, 1.0], alpha_bar_table())
        [953, 258]
    """
    given = [math.inf if sigma == PURE_NOISE else float(sigma) for sigma in sigmas]
    found = [sigma for sigma in given if sigma != 0]
    if not found or not all(sigma >= 0 for sigma in given):
        raise ValueError(f"sigmas={given} must be numbers of at least 0, one of them above 0.")
    direction = "increase" if increasing else "decrease"
    for a, b in pairwise(given):
        if a >= b if increasing else a <= b:
            raise ValueError(f"sigmas must {direction} strictly; {b:g} follows {a:g}.")
    levels = noise_level(alphas_cumprod.double(), torch.arange(len(alphas_cumprod)))
    logs = -torch.as_tensor(kappa(levels)).log()
    if logs[-1].isinf():
        logs[-1] = logs[-2] + math.log(2)
    wanted = torch.tensor(found, dtype=torch.float64).log()
    steps: list[int] = torch.bucketize(wanted, (logs[1:] + logs[:-1]) / 2, right=True).tolist()
    for (a, s), (b, t) in pairwise(zip(found, steps, strict=True)):
        if s == t:
            raise ValueError(f"sigmas {a:g} and {b:g} both map to timestep {t}; remove one of them.")
    return steps


def check_timesteps(timesteps: Sequence[int], num_train_timesteps: int, increasing: bool = False) -> list[int]:
    """Check a caller's own sampling timesteps and return them as a list of int.

    Raises:
        ValueError: empty, not integers in [0, T-1], or not strictly decreasing (increasing, for inversion).

    Examples:
        >>> from zsnr_diffusers.core import check_timesteps
        >>> check_timesteps([999, 500, 0], num_train_timesteps=1000)
        [999, 500, 0]
    """
    given = list(timesteps)
    steps = [int(t) for t in given]
    if not steps or steps != given:
        raise ValueError(f"timesteps={given} must be one or more integers.")
    outside = [t for t in steps if not 0 <= t < num_train_timesteps]
    if outside:
        raise ValueError(f"timesteps {outside} lie outside [0, {num_train_timesteps - 1}], the range of the model.")
    wrong = [(a, b) for a, b in pairwise(steps) if (a >= b if increasing else a <= b)]
    if wrong:
        direction = "increase" if increasing else "decrease"
        raise ValueError(f"timesteps must {direction} strictly; {wrong[0][1]} follows {wrong[0][0]}.")
    return steps
