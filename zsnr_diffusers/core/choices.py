"""Names of choices, with checks and defaults, for command lines.

Imports only the standard library, so that options are listed and checked before torch is imported.
"""

import math
from numbers import Integral, Real
from typing import Literal, get_args

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")
"""Prediction types, with diffusers' names."""

EPSILON_AT_ZERO_SNR = (
    "prediction_type='epsilon' cannot be used at zero signal-to-noise ratio: at the last timestep the sample is the "
    "noise, so predicting it says nothing about the image. Retrain the model with v-prediction (python -m "
    "zsnr_diffusers.training --help); if it is a v-prediction model with a wrong config, pass "
    "prediction_type='v_prediction'; to sample an epsilon model with its training schedule, pass "
    "rescale_betas_zero_snr=False."
)


def unknown_prediction_error(prediction_type: str) -> ValueError:
    """The error for a `prediction_type` that is not one of `PREDICTION_TYPES`."""
    return ValueError(f"prediction_type={prediction_type!r} is unknown; choose one of {', '.join(PREDICTION_TYPES)}.")


def check_known_prediction_type(prediction_type: str) -> None:
    """Refuse a `prediction_type` that is not one of `PREDICTION_TYPES`.

    Raises:
        ValueError: with the value and the choices.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise unknown_prediction_error(prediction_type)


def check_prediction_type(prediction_type: str, zero_terminal_snr: bool) -> None:
    """Refuse `flow_prediction` with a schedule of betas, and epsilon with one that ends at zero SNR.

    Raises:
        ValueError: with the value and the remedy.
    """
    check_known_prediction_type(prediction_type)
    if prediction_type == "flow_prediction":
        raise ValueError(
            "prediction_type='flow_prediction' means flow matching, which has no betas; use "
            "FlowMatchMultistepScheduler."
        )
    if zero_terminal_snr and prediction_type == "epsilon":
        raise ValueError(EPSILON_AT_ZERO_SNR)


FlowTimeSampling = Literal["logit_normal", "uniform", "snr"]
FLOW_TIME_SAMPLINGS: tuple[str, ...] = get_args(FlowTimeSampling)
"""Names of the densities from which `flow_times` draws training times."""


def check_shift(shift: float) -> None:
    """Refuse a flow-time shift that is not a finite number above 0.

    Raises:
        ValueError: with the value and what is possible.
    """
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift={shift} must be above 0: 1 keeps flow time, 3 is Stable Diffusion 3's.")


VARIANCE_TYPES = ("fixed_small", "fixed_large")


def check_variance_type(variance_type: str) -> None:
    """Refuse a DDPM `variance_type` that is not one of `VARIANCE_TYPES`.

    Raises:
        ValueError: with the value and those that are known.
    """
    if variance_type not in VARIANCE_TYPES:
        raise ValueError(f"variance_type={variance_type!r} is unknown; choose one of {', '.join(VARIANCE_TYPES)}.")


def check_guidance_rescale(guidance_rescale: float) -> None:
    """Refuse a guidance rescale phi outside [0, 1].

    Raises:
        ValueError: with the value and the recommended range.
    """
    if not isinstance(guidance_rescale, Real) or not 0 <= guidance_rescale <= 1:
        raise ValueError(
            f"guidance_rescale={guidance_rescale!r} must lie in [0, 1]; 0.7 is the usual value, 0 is off."
        )


def check_keep_low_frequencies(k: int) -> None:
    """Refuse a number of low frequencies that is negative or not an integer.

    Raises:
        ValueError: with the value and what it means.
    """
    if not isinstance(k, Integral) or isinstance(k, bool) or k < 0:
        raise ValueError(
            f"keep_low_frequencies={k!r} must be an integer of at least 0: 1 keeps the mean of the conditional "
            "prediction, 2 its lowest 2 x 2 frequencies, 0 is off."
        )


MIN_SNR_AT_ZERO_SNR = (
    "loss_weighting='min_snr' gives the last timestep weight 0 at zero terminal SNR, so this timestep would not be "
    "trained. Use 'min_snr_floored', which is the same for an SNR of 1 or more, and positive below."
)

LOSS_WEIGHTINGS = ("constant", "min_snr_floored", "soft_min_snr_floored", "min_snr")
"""Names of the weightings of `loss_weights`."""


def check_loss_weighting(loss_weighting: str, zero_terminal_snr: bool, snr_gamma: float) -> None:
    """Refuse a weighting that leaves the last timestep untrained, and a gamma below its floor.

    Raises:
        ValueError: with the value and the remedy.

    Examples:
        >>> from zsnr_diffusers.core import check_loss_weighting
        >>> check_loss_weighting("min_snr_floored", zero_terminal_snr=True, snr_gamma=5.0)
    """
    if loss_weighting == "min_snr" and zero_terminal_snr:
        raise ValueError(MIN_SNR_AT_ZERO_SNR)
    floored = loss_weighting.endswith("_floored")
    if loss_weighting in LOSS_WEIGHTINGS[1:] and not snr_gamma > floored:
        reason = f", the floor of {loss_weighting!r}; the paper uses 5" if floored else ""
        raise ValueError(f"snr_gamma={snr_gamma} must be above {int(floored)}{reason}.")


DEFAULT_GUIDANCE_RESCALE = 0.7
"""The paper's choice at guidance scale 7.5 (Lin et al. 2023, arXiv:2305.08891, section 3.4)."""

DEFAULT_KEEP_LOW_FREQUENCIES = 4
"""For text-to-image from zero SNR: the smallest value with which brightness at guidance scale 7.5 is at most 1.3 times
as far from the data's as without guidance (`examples/benchmarks/guidance_brightness.py`).
"""
