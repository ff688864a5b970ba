"""Steps with timesteps and weights fitted to one model, as stored in a scheduler's config.

The weights of a step are those of the last outputs in x_s / sigma_s, newest first, and in the last step those in the
data. A step also keeps x_t / sigma_t, times a factor. A constant output is exact where the sum of the weights is
kappa_s - kappa_t, and 1 at last, and the factor 1, and 0 at last. Fitted ones are near that; `kappas` says for which
noise levels they are. Where it is missing, the sums have to say so.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from .multistep import updates_from_weights
from .noise import NoiseLevel, kappa, noise_level
from .solvers import Update
from .spacing import check_timesteps

WITHOUT = "pass calibration=None to sample without it, or fit it again (zsnr calibrate)."
TOLERANCE = 1e-5
"""How far a kappa, or a sum of weights from its closed form, may be: rounding is far below, other schedules above."""


class CalibratedSteps(NamedTuple):
    """The steps of one step count: timesteps [n] from T-1 down; of each step the weights of its outputs, and a factor.

    The factor in `keeps` is that of x_t / sigma_t.
    """

    timesteps: list[int]
    weights: list[list[float]]
    keeps: list[float]

    def updates(self, path: Sequence[NoiseLevel]) -> list[Update]:
        """These steps as sampler updates; `path` has the noise levels of the timesteps."""
        return updates_from_weights(path, self.weights, self.keeps)


def read_calibration(calibration: Mapping[Any, Any], alphas_cumprod: Tensor, most: int) -> dict[int, CalibratedSteps]:
    """The calibrated steps that a scheduler's `calibration` config holds, by their number.

    Args:
        calibration: by step count, a mapping with `timesteps` and `weights`, alpha / sigma of the timesteps as
            `kappas`, and factors of x_t / sigma_t as `keeps` (1, and 0 at last); other entries are ignored.
        alphas_cumprod: alpha_bar of the schedule, shape [T].
        most: how many outputs a step may combine. Entries of fewer are valid; their i-th step combines min(i, fewer).

    Raises:
        ValueError: an invalid format, or it does not fit the schedule or `most`.
    """
    if not isinstance(calibration, Mapping):
        raise ValueError(f"calibration={calibration!r} must map step counts to timesteps and weights; {WITHOUT}")
    return {
        parse_num_inference_steps(key): _parse_calibrated_steps(str(key), entry, alphas_cumprod, most)
        for key, entry in calibration.items()
    }


def parse_num_inference_steps(key: Any) -> int:
    """The number of inference steps of a key of a `calibration` config, which JSON stores as a string.

    Raises:
        ValueError: it is not a number.
    """
    try:
        return int(str(key))
    except ValueError:
        raise ValueError(f"calibration has the key {key!r}, which is not a step count; {WITHOUT}") from None


def _parse_calibrated_steps(key: str, entry: Any, alphas_cumprod: Tensor, most: int) -> CalibratedSteps:
    """One entry of a `calibration` config, checked against the noise schedule."""
    try:
        timesteps = check_timesteps(entry["timesteps"], len(alphas_cumprod))
        weights = [[float(weight) for weight in row] for row in entry["weights"]]
        made_for = [float(value) for value in entry.get("kappas", [])]
        keeps = [float(value) for value in entry.get("keeps", [1.0] * (len(timesteps) - 1) + [0.0])]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read: {error}"
        raise ValueError(f"calibration of {key} steps {reason}; {WITHOUT}") from error
    _check_calibration_shape(key, timesteps, weights, keeps, len(alphas_cumprod), most)
    kappas = [float(kappa(noise_level(alphas_cumprod.double(), timestep))) for timestep in timesteps]
    if made_for:
        _check_kappas(key, timesteps, made_for, kappas)
        _check_finite(key, [*weights, keeps])
    else:
        _check_weight_sums(key, weights, [b - a for a, b in pairwise(kappas)] + [1.0])
    return CalibratedSteps(timesteps, weights, keeps)


def _check_calibration_shape(
    key: str,
    timesteps: list[int],
    weights: list[list[float]],
    keeps: list[float],
    num_timesteps: int,
    most: int,
) -> None:
    """Refuse timesteps and rows of weights that are not one per step, do not start at T-1, or have a wrong length."""
    n = parse_num_inference_steps(key)
    if not len(timesteps) == len(weights) == len(keeps) == n:
        raise ValueError(
            f"calibration of {key} steps has {len(timesteps)} timesteps, {len(weights)} rows of weights and "
            f"{len(keeps)} factors (keeps); {WITHOUT}"
        )
    if timesteps[0] != num_timesteps - 1:
        raise ValueError(
            f"calibration of {key} steps begins at timestep {timesteps[0]}, but the schedule at {num_timesteps - 1}; "
            f"{WITHOUT}"
        )
    used = max(map(len, weights))
    if used > most:
        raise ValueError(
            f"calibration of {key} steps uses {used} outputs in a step, but this solver_order and corrector use at "
            f"most {most}: it was fitted for other settings; {WITHOUT}"
        )
    for i, row in enumerate(weights, 1):
        if len(row) != min(i, used):
            raise ValueError(
                f"calibration of {key} steps has {len(row)} weights in step {i}, where {min(i, used)} outputs are "
                f"combined; {WITHOUT}"
            )


def _check_kappas(key: str, timesteps: list[int], made_for: list[float], kappas: list[float]) -> None:
    """Refuse a calibration of other noise levels than those that the schedule has at its timesteps."""
    if len(made_for) != len(timesteps):
        raise ValueError(f"calibration of {key} steps has {len(made_for)} kappas; {WITHOUT}")
    for timestep, wanted, found in zip(timesteps, made_for, kappas, strict=True):
        if not math.isclose(wanted, found, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            raise ValueError(
                f"calibration of {key} steps was fitted for another noise schedule: alpha / sigma at timestep "
                f"{timestep} was {wanted:g}, and this schedule has {found:g}; {WITHOUT}"
            )


def _check_finite(key: str, weights: list[list[float]]) -> None:
    """Refuse weights that are not finite."""
    for row in weights:
        if not all(map(math.isfinite, row)):
            raise ValueError(f"calibration of {key} steps has the weights {row}, which are not finite; {WITHOUT}")


def _check_weight_sums(key: str, weights: list[list[float]], wanted: list[float]) -> None:
    """Refuse rows of weights whose sums differ from those of the noise schedule: kappa_s - kappa_t, then 1."""
    for i, (row, total) in enumerate(zip(weights, wanted, strict=True), 1):
        if not math.isclose(sum(row), total, rel_tol=TOLERANCE):  # false for NaN
            raise ValueError(
                f"calibration of {key} steps was fitted for another noise schedule: the weights of step {i} have the "
                f"sum {sum(row):g}, and this schedule needs {total:g}; {WITHOUT}"
            )
