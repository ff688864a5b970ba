"""Which of the T training timesteps a sampler visits, in exact integer arithmetic.

Lin et al. 2023 (arXiv:2305.08891), Table 2. In floating point the same formulas return n + 1 timesteps, the last of
them -1, for 62 of n = 1..1000; integers do not.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

TimestepSpacing = Literal["trailing", "leading", "linspace"]
TIMESTEP_SPACINGS: tuple[str, ...] = get_args(TimestepSpacing)


def _round_half_even(numerator: int, denominator: int) -> int:
    """Exact counterpart of `numpy.round`, so that the steps are stock's wherever stock's are right."""
    quotient, remainder = divmod(numerator, denominator)
    twice = 2 * remainder
    return quotient + (twice > denominator or (twice == denominator and quotient % 2 == 1))


def spaced_timesteps(timestep_spacing: str, num_inference_steps: int, num_train_timesteps: int) -> list[int]:
    """The visited timesteps, counted from 0, strictly decreasing.

    Args:
        timestep_spacing: `trailing` (ends at T-1 and steps down evenly), `linspace` (both ends included) or `leading`
            (starts at 0 and never reaches T-1 unless n = T).
        num_inference_steps: n, from 1 to T.
        num_train_timesteps: T.

    Raises:
        ValueError: unknown spacing, or n outside [1, T].
    """
    n, last = num_inference_steps, num_train_timesteps - 1
    if not 1 <= n <= num_train_timesteps:
        raise ValueError(
            f"num_inference_steps={n} is not possible: the model knows {num_train_timesteps} timesteps, so choose a "
            f"whole number from 1 to {num_train_timesteps}."
        )
    if timestep_spacing == "trailing":
        return [_round_half_even(num_train_timesteps * k, n) - 1 for k in range(n, 0, -1)]
    if timestep_spacing == "leading":
        return [num_train_timesteps // n * k for k in range(n - 1, -1, -1)]
    if timestep_spacing == "linspace":
        # One step alone starts from pure noise too, where the formula has 0 / 0.
        return [_round_half_even(last * k, n - 1) for k in range(n - 1, -1, -1)] if n > 1 else [last]
    raise ValueError(
        f"timestep_spacing={timestep_spacing!r} is not known; choose one of {', '.join(TIMESTEP_SPACINGS)}."
    )


def check_timesteps(timesteps: Sequence[int], num_train_timesteps: int) -> list[int]:
    """A caller's own timesteps, checked.

    Raises:
        ValueError: none at all, not whole numbers in [0, T-1], or not strictly decreasing.
    """
    given = list(timesteps)
    steps = [int(t) for t in given]
    if not steps or steps != given:
        raise ValueError(f"timesteps={given} must be whole numbers, at least one of them.")
    outside = [t for t in steps if not 0 <= t < num_train_timesteps]
    if outside:
        raise ValueError(f"timesteps {outside} lie outside [0, {num_train_timesteps - 1}], the range of the model.")
    rising = [(a, b) for a, b in pairwise(steps) if a <= b]
    if rising:
        raise ValueError(f"timesteps must decrease strictly; {rising[0][1]} follows {rising[0][0]}.")
    return steps
