"""Classifier-free guidance and its rescale."""

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from .noise import NoiseLevel
from .predictions import x_0_factors

GUIDANCE_SPACES = {
    "output": None,
    "v": "v_prediction",
    "epsilon": "epsilon",
    "x_0": "sample",
    "v_prediction": "v_prediction",
    "sample": "sample",
}
"""Where guidance can be rescaled, and the prediction type of each; `output` is what the network predicts."""


def classifier_free_guidance(unconditional: Tensor, conditional: Tensor, guidance_scale: float) -> Tensor:
    """u + w (c - u) (Ho & Salimans 2022, arXiv:2207.12598; as in diffusers, w = 1 is no guidance)."""
    return unconditional + guidance_scale * (conditional - unconditional)


def rescale_guidance(guided: Tensor, conditional: Tensor, guidance_rescale: float) -> Tensor:
    """Bring the guided prediction back to the spread of the conditional one.

    Lin et al. 2023 (arXiv:2305.08891), Algorithm 2: per sample, `guided * std(conditional) / std(guided)`, blended
    with the unscaled value. A sample of which either prediction has no spread at all (what an ideal zero-SNR model
    returns for a plain image at the first step) is left unscaled.

    Args:
        guided: prediction after classifier-free guidance, shape [B, C, ...].
        conditional: conditional prediction, same shape.
        guidance_rescale: the paper's phi, from 0 (off) to 1; it recommends 0.5 to 0.75 and uses 0.7.

    Returns:
        Tensor of that shape in the dtype of `guided`; the arithmetic is float32 or better.

    Raises:
        ValueError: phi outside [0, 1].
    """
    check_guidance_rescale(guidance_rescale)
    if guidance_rescale == 0:
        return guided
    wide = torch.promote_types(guided.dtype, torch.float32)
    if guided.dtype != wide:
        return rescale_guidance(guided.to(wide), conditional.to(wide), guidance_rescale).to(guided.dtype)
    return torch.addcmul(guided, guided, _excess(guided, conditional), value=guidance_rescale)


def _excess(guided: Tensor, conditional: Tensor) -> Tensor:
    """std(conditional) / std(guided) - 1 of each sample, shape [B, 1, ...]; 0 where either is flat."""
    sharpness = _inverse_spread(guided)
    other = _inverse_spread(conditional)
    # infinite where flat, so that the quotient is infinite or not a number in all three cases
    excess = (sharpness - other).div_(other).nan_to_num_(0.0, 0.0)
    return excess.view(-1, *[1] * (guided.ndim - 1))


def _inverse_spread(x: Tensor) -> Tensor:
    """1 / std of each sample, shape [B, 1]; infinite for a constant.

    The kernel of group normalisation goes through the values once, by Welford's recurrence, which gives exactly 0 for
    a constant; `Tensor.std` is many times as slow over several samples, and tiny but not 0 for a constant.
    """
    x = x.contiguous()
    samples, channels = x.shape[:2]
    return torch.native_group_norm(x, None, None, samples, channels, x.numel() // (samples * channels), 1, 0.0)[2]


def rescale_guidance_in_space(
    guided: Tensor,
    conditional: Tensor,
    guidance_rescale: float,
    *,
    space: str,
    prediction_type: str,
    x_t: Tensor,
    level: NoiseLevel,
) -> Tensor:
    """Algorithm 2 on what the predictions say of v, of the noise or of x_0, rather than on the predictions themselves.

    Given x_t, a prediction of any type is, up to a factor that Algorithm 2 does not see, the output plus q x_t. As
    epsilon, q = sigma / alpha for an output of v: infinite at zero SNR, where the rescaled output has a limit, the
    guided one + phi x_t cov(x_t, conditional - guided) / var(x_t). So epsilon space exists at zero SNR too.

    Args:
        guided: output after guidance, shape [B, ...].
        conditional: conditional output, same shape.
        guidance_rescale: phi, from 0 to 1.
        space: one of `GUIDANCE_SPACES`.
        prediction_type: of both outputs.
        x_t: the sample that they were made from, same shape.
        level: noise level of `x_t`, variance-preserving or of flow matching.

    Returns:
        The rescaled output, of that shape and in the dtype of `guided`.

    Raises:
        ValueError: unknown space or prediction type, phi outside [0, 1], or an epsilon output at zero SNR.
    """
    check_space(space)
    target = GUIDANCE_SPACES[space]
    if target is None or target == prediction_type:
        return rescale_guidance(guided, conditional, guidance_rescale)
    check_guidance_rescale(guidance_rescale)
    # As epsilon, q reaches thousands near zero SNR and is taken away again: that takes more digits than float32 has.
    double = target == "epsilon" and guided.device.type != "mps"
    wide = torch.promote_types(guided.dtype, torch.float64 if double else torch.float32)
    g, c, x = guided.to(wide), conditional.to(wide), x_t.to(wide)
    a_output, b_output = x_0_factors(prediction_type, level)
    if target == "epsilon" and float(level.alpha) == 0:
        return (g + guidance_rescale * _slope(x, c - g) * x).to(guided.dtype)
    offset = (a_output - x_0_factors(target, level)[0]) / b_output * x
    there = g + offset
    return torch.addcmul(g, there, _excess(there, c + offset), value=guidance_rescale).to(guided.dtype)


def _slope(x: Tensor, y: Tensor) -> Tensor:
    """cov(x, y) / var(x) of each sample, shape [B, 1, ...]; 0 where x has no spread."""
    dims = tuple(range(1, x.ndim))
    centred = x - x.mean(dim=dims, keepdim=True)
    variance = (centred * centred).sum(dim=dims, keepdim=True)
    return (centred * y).sum(dim=dims, keepdim=True) / torch.where(variance == 0, 1.0, variance)


def guidance_weights(
    guided: Tensor, predictions: Sequence[Tensor], sample: Tensor | None = None
) -> tuple[list[float], bool] | None:
    """The weights with which a guided prediction was combined from others: how a pipeline guides, read off its result.

    Every guidance of the classifier-free kind is affine, `guided = sum_i w_i prediction_i` with `sum_i w_i = 1`:
    u + w (c - u), the three terms of InstructPix2Pix (Brooks et al. 2023, arXiv:2211.09800, eq. 3), perturbed
    attention guidance. The w_i are found by least squares: first as the same numbers everywhere, then for each sample
    and each entry of its first dimension, since some pipelines guide every frame of a video with a scale of its own.

    Args:
        guided: shape [B, ...].
        predictions: at least two tensors of that shape.
        sample: what they were made from, same shape. Where some of it is in `guided`, predictions were changed before
            they were combined, and are no explanation.

    Returns:
        The mean of each weight, and whether they explain `guided` to within the rounding of the least precise dtype;
        None where the predictions are equal, so that nothing can be told apart.
    """
    # The fit itself has float64's rounding, so no tensor counts as more exact than float32.
    eps = max(torch.finfo(dtype).eps for dtype in (torch.float32, guided.dtype, predictions[0].dtype))
    shape = (len(guided), guided.shape[1] if guided.ndim > 2 else 1, -1)
    tensors = (guided, *predictions) if sample is None else (guided, *predictions, sample)
    every = max(1, guided.numel() // (shape[0] * shape[1] * 256))  # a thousand values tell as much as all
    rows = torch.stack([x.detach().reshape(shape)[..., ::every] for x in tensors]).cpu().double()
    target, first, differences = rows[0] - rows[1], rows[1], rows[2 : len(predictions) + 1] - rows[1]
    spread = _rms(differences)
    scale = (_rms(first) ** 2 + spread**2) ** 0.5
    if not spread > 4 * eps * scale:
        return None
    columns = differences
    if sample is not None:  # as large as the others, whatever its units
        columns = torch.cat([differences, rows[-1:] * (spread / (_rms(rows[-1]) or 1.0))])
    for parts in (1, shape[0] * shape[1]):
        matrix = columns.reshape(len(columns), parts, -1).permute(1, 2, 0)
        right = target.reshape(parts, -1, 1)
        weights = _least_squares(matrix, right, rcond=4 * eps).squeeze(-1)
        left = _rms(right - matrix @ weights.unsqueeze(-1))
        of_predictions, of_sample = weights[:, : len(differences)], weights[:, len(differences) :]
        rounding = eps * scale * (1 + 2 * float(of_predictions.abs().sum(dim=1).max()))
        means = of_predictions.mean(dim=0).tolist()
        if left <= rounding and (sample is None or float(of_sample.abs().max()) * spread <= rounding / 8):
            return [1 - sum(means), *means], True
    return [1 - sum(means), *means], False


def _least_squares(matrix: Tensor, right: Tensor, rcond: float) -> Tensor:
    """The solution of each system, shape [parts, columns, 1]."""
    if matrix.shape[-1] == 1:  # by far the most pipelines, and a tenth of the time
        return ((matrix.mT @ right) / (matrix.mT @ matrix)).nan_to_num()
    # Where two predictions are equal but for rounding, what multiplies their difference means nothing; the rank that
    # `rcond` allows leaves it out.
    return torch.linalg.lstsq(matrix, right, rcond=rcond, driver="gelsd").solution


def _rms(x: Tensor) -> float:
    return float(x.square().mean()) ** 0.5


def check_guidance_rescale(guidance_rescale: float) -> None:
    """Refuse a phi outside [0, 1].

    Raises:
        ValueError: with the value and the recommended range.
    """
    if not isinstance(guidance_rescale, Real) or not 0 <= guidance_rescale <= 1:
        raise ValueError(
            f"guidance_rescale={guidance_rescale!r} must lie in [0, 1]; 0.7 is the usual value, 0 is off."
        )


def check_space(space: str) -> None:
    """Refuse an unknown space.

    Raises:
        ValueError: with the value and those that are known.
    """
    if not isinstance(space, str) or space not in GUIDANCE_SPACES:
        raise ValueError(f"space={space!r} is not known; choose one of {', '.join(GUIDANCE_SPACES)}.")
