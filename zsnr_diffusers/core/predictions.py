"""What a network predicts, brought to the pair (x_0, noise) and back.

Every prediction type is one linear combination of that pair, so each needs one line here and none needs a converter
to any other. With `x_t = alpha x_0 + sigma noise` given, the pair also follows from the prediction; for epsilon that
means a division by alpha, which at zero SNR does not exist and is refused.
"""

from torch import Tensor

from .noise import NoiseLevel

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")

EPSILON_AT_ZERO_SNR = (
    "prediction_type='epsilon' cannot be used at zero signal-to-noise ratio: at the last timestep the sample is the "
    "noise, so predicting it says nothing about the image. Retrain the model with v-prediction (python -m "
    "zsnr_diffusers.training --help); if it is a v-prediction model whose config fails to say so, pass "
    "prediction_type='v_prediction'; to sample an epsilon model on the schedule that it was trained with, pass "
    "rescale_betas_zero_snr=False."
)


def _unknown(prediction_type: str) -> ValueError:
    return ValueError(
        f"prediction_type={prediction_type!r} is not known; choose one of {', '.join(PREDICTION_TYPES)}."
    )


def check_prediction_type(prediction_type: str, zero_terminal_snr: bool) -> None:
    """Refuse an unknown prediction type, and epsilon on a schedule that ends at zero SNR.

    Raises:
        ValueError: with the value and what to do instead.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise _unknown(prediction_type)
    if zero_terminal_snr and prediction_type == "epsilon":
        raise ValueError(EPSILON_AT_ZERO_SNR)


def split_prediction(prediction_type: str, output: Tensor, x_t: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    """The clean sample and the noise that a network's output stands for.

    Args:
        prediction_type: `epsilon` (Ho et al. 2020), `sample`, or `v_prediction` (Salimans & Ho 2022,
            arXiv:2202.00512, appendix D).
        output: the network's output, any shape.
        x_t: the noisy sample that it saw, same shape.
        level: noise level of `x_t`.

    Returns:
        `(x_0, noise)`, both of that shape.

    Raises:
        ValueError: unknown prediction type, or epsilon at alpha = 0.
    """
    alpha, sigma = level
    if prediction_type == "v_prediction":
        return alpha * x_t - sigma * output, sigma * x_t + alpha * output
    if prediction_type == "sample":
        return output, (x_t - alpha * output) / sigma
    if prediction_type == "epsilon":
        if not (alpha.all() if isinstance(alpha, Tensor) else alpha):
            raise ValueError(EPSILON_AT_ZERO_SNR)
        return (x_t - sigma * output) / alpha, output
    raise _unknown(prediction_type)


def training_target(prediction_type: str, x_0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
    """What a network of this prediction type is to return for `x_t = alpha x_0 + sigma noise`.

    For `v_prediction` it is v = alpha noise - sigma x_0 (Lin et al. 2023, eq. 10).

    Raises:
        ValueError: unknown prediction type.
    """
    if prediction_type == "v_prediction":
        return level.alpha * noise - level.sigma * x_0
    if prediction_type == "sample":
        return x_0
    if prediction_type == "epsilon":
        return noise
    raise _unknown(prediction_type)
