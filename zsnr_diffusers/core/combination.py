"""Infer from its result how a pipeline combined predictions for guidance."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_ROWS, _VALUES = 256, 256
"""Size of the subset of a sample that is used, entries of its first dimension and values of each; it is sufficient."""


class Combination(NamedTuple):
    """guided = factor * sum_i w_i prediction_i + of_sample * sample, with sum_i w_i = 1."""

    weights: tuple[float, ...]
    """The w_i, or their mean if they differ between parts."""
    factor: float = 1.0
    """-1 if the result is negated, because the network's time runs backwards. Only the sign if the result is
    normalized to the norm of a prediction.
    """
    of_sample: float = 0.0
    """Not 0 if predictions are first converted to x_0, and the result to noise."""

    @property
    def conditional(self) -> int:
        """Index of the conditional prediction, the one with the largest weight."""
        return self.weights.index(max(self.weights))

    def apply_to(self, prediction: Tensor, sample: Tensor) -> Tensor:
        """The guided prediction if all predictions equaled this one; maps a guider's result to the pipeline's form."""
        if (self.factor, self.of_sample) == (1.0, 0.0):
            return prediction
        if self.of_sample == 0:
            return self.factor * prediction
        wide = torch.promote_types(prediction.dtype, torch.float32)
        return (self.factor * prediction.to(wide) + self.of_sample * sample.to(wide)).to(sample.dtype)

    def refit(self, guided: Tensor, predictions: Sequence[Tensor], sample: Tensor) -> "Combination | None":
        """The same guidance weights with factor and sample coefficient fitted to another step; None if none fit.

        Conversions to x_0 and back are rounded more towards the end of sampling, so the tolerance is larger than in
        the initial fit.
        """
        rows = _subsample((guided, *predictions, sample), (len(guided), guided.shape[1] if guided.ndim > 2 else 1))
        combined = sum(weight * row for weight, row in zip(self.weights, rows[1:-1], strict=True))
        columns = torch.stack([torch.as_tensor(combined), rows[-1]]).flatten(1)
        found, _ = _fit_within_rounding(columns.T[None], rows[0].reshape(1, -1, 1), 1e-3, 0.0)
        return None if found is None else self._replace(factor=float(found[0, 0]), of_sample=float(found[0, 1]))


_NOTHING = 1e-3
"""A factor that is only rounding."""

_LARGEST = 256.0
"""Maximum sum of absolute weights. For almost equal predictions, meaningless larger weights would explain any result.
"""


def find_combination(guided: Tensor, predictions: Sequence[Tensor], sample: Tensor) -> Combination | None:
    """How a pipeline combined predictions into its guided one, as a `Combination`; None if no combination explains it.

    Tries `guidance_weights`; the opposite sign; an additional multiple of the sample; and a positive factor for each
    entry of the first dimension, since some pipelines normalize the result to the norm of the conditional prediction,
    per token, per row, or in total.

    Args:
        guided: shape [B, ...].
        predictions: at least two tensors of that shape, not all equal.
        sample: input of the predictions, same shape.
    """
    # In single precision, the residual suffices to detect predictions that were mixed with the sample.
    seen = sample if guided.dtype.itemsize < 4 else None
    for sign in (1.0, -1.0):
        found = guidance_weights(sign * guided, predictions, seen)
        if found is not None and found[1]:
            return Combination(tuple(found[0]), sign)
    return _fit_with_sample(guided, predictions, sample) or _fit_with_scales(guided, predictions)


def find_combination_of_equals(guided: Tensor, prediction: Tensor) -> Combination | None:
    """`find_combination` for equal predictions; None if the guided one is neither this value nor its negative."""
    g, p = (x[0, 0] for x in _subsample((guided, prediction), (1, 1)))
    # A large scale multiplies their rounding differences.
    most = min(0.5, 128 * _rounding_eps(guided, prediction))
    for sign in (1.0, -1.0):
        if _rms(g - sign * p) <= most * _rms(p):
            return Combination((1.0,), sign)
    return None


def _fit_with_sample(guided: Tensor, predictions: Sequence[Tensor], sample: Tensor) -> Combination | None:
    """Fit a guidance combination with one factor and a share of the sample; None if that does not explain `guided`."""
    rows = _subsample((guided, *predictions, sample), (len(guided), guided.shape[1] if guided.ndim > 2 else 1))
    target, first, differences, x = rows[0], rows[1], rows[2:-1] - rows[1], rows[-1:]
    columns = torch.cat([first[None], differences, x]).flatten(1)
    size = _rms(first) + _rms(x)
    found, rounding = _fit_within_rounding(
        columns.T[None], target.reshape(1, -1, 1), _rounding_eps(guided, predictions[0]), size
    )
    if found is None:
        return None
    factor, *weights, of_sample = found[0].tolist()
    # Without the sample, a factor is that of a length which was set.
    if not abs(factor) > _NOTHING or abs(of_sample) * _rms(x) <= rounding:
        return None
    weights = [weight / factor for weight in weights]
    return Combination((1 - sum(weights), *weights), factor, of_sample)


def _fit_with_scales(guided: Tensor, predictions: Sequence[Tensor]) -> Combination | None:
    """Fit a guidance combination with a factor for each sample, or each row along a dimension; None if none fits."""
    tensors = (guided, *predictions)
    for dim in (None, -1, *range(1, guided.ndim - 1)):
        if dim is None:
            rows = _subsample(tensors, (len(guided), 1))
        else:
            turned = [x.movedim(dim, -1) for x in tensors]
            rows = _subsample(turned, (1, turned[0].shape[:-1].numel()))
        rows = rows.flatten(1, 2)
        parts, values = rows.shape[1:]
        if parts * (values - len(predictions)) < _EVIDENCE:
            continue
        columns = torch.cat([rows[1:2], rows[2:] - rows[1:2]]).permute(1, 2, 0)
        found, _ = _fit_within_rounding(
            columns, rows[0].unsqueeze(-1), _rounding_eps(guided, predictions[0]), _rms(rows[1])
        )
        if found is None:
            continue
        factors = found[:, 0]
        if bool((factors > 0).all()) or bool((factors < 0).all()):
            weights = (found[:, 1:] / factors[:, None]).median(dim=0).values.tolist()
            return Combination((1 - sum(weights), *weights), float(factors[0].sign()))
    return None


_EVIDENCE = 64
"""Minimum excess of values over fitted parameters for a fit to be significant."""


def _fit_within_rounding(matrix: Tensor, right: Tensor, eps: float, size: float) -> tuple[Tensor | None, float]:
    """Least-squares coefficients [parts, columns], None if the residual exceeds rounding; and the size of rounding.

    Differences of predictions, in the columns but the first, carry the rounding of what is as large as `size`.
    """
    sizes = matrix.square().mean(dim=(0, 1)).sqrt().clamp_min(torch.finfo(matrix.dtype).tiny)
    scaled = _least_squares(matrix / sizes, right, rcond=4 * eps)
    left = _rms(right - matrix / sizes @ scaled)
    found = scaled.squeeze(-1) / sizes
    terms = scaled.squeeze(-1).abs().sum(dim=1) + size * found[:, 1:].abs().sum(dim=1)
    rounding = eps * (_rms(right) + 2 * min(_rms(terms), _LARGEST * (size + _rms(right))))
    return found if left <= rounding else None, rounding


def _subsample(tensors: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """Every n-th entry of each tensor, stacked as float64 of shape [tensors, *shape, values]."""
    first = tensors[0].reshape(*shape, -1)
    every = [max(1, first.shape[1] // _ROWS), max(1, first.shape[2] // _VALUES)]
    return torch.stack([x.detach().reshape(*shape, -1)[:, :: every[0], :: every[1]] for x in tensors]).cpu().double()


def _rounding_eps(*tensors: Tensor) -> float:
    """Machine epsilon of the least precise of float32 and the tensors' dtypes."""
    # The fit itself has float64's rounding, so no tensor counts as more exact than float32.
    return max(torch.finfo(dtype).eps for dtype in (torch.float32, *(x.dtype for x in tensors)))


def guidance_weights(
    guided: Tensor, predictions: Sequence[Tensor], sample: Tensor | None = None
) -> tuple[list[float], bool] | None:
    """The weights with which a guided prediction was combined from others.

    Every guidance of the classifier-free kind is affine, `guided = sum_i w_i prediction_i` with `sum_i w_i = 1`:
    u + w (c - u), the three terms of InstructPix2Pix (Brooks et al. 2023, arXiv:2211.09800, eq. 3), perturbed
    attention guidance. The w_i are found by least squares: first as the same numbers everywhere, then for each sample
    and each entry of its first dimension, since some pipelines guide every frame of a video with a scale of its own.

    Args:
        guided: shape [B, ...].
        predictions: at least two tensors of that shape.
        sample: input of the predictions, same shape. If `guided` contains a multiple of it, predictions were converted
            before combining, and the fit is rejected.

    Returns:
        The mean of each weight, and whether they explain `guided` up to the rounding of the least precise dtype; None
        if the predictions are equal.
    """
    eps = _rounding_eps(guided, predictions[0])
    tensors = (guided, *predictions) if sample is None else (guided, *predictions, sample)
    rows = _subsample(tensors, (len(guided), guided.shape[1] if guided.ndim > 2 else 1))
    target, first, differences = rows[0] - rows[1], rows[1], rows[2 : len(predictions) + 1] - rows[1]
    spread = _rms(differences)
    scale = (_rms(first) ** 2 + spread**2) ** 0.5
    if not spread > 4 * eps * scale:
        return None
    columns = differences
    if sample is not None:  # as large as the others, whatever its units
        columns = torch.cat([differences, rows[-1:] * (spread / (_rms(rows[-1]) or 1.0))])
    for parts in (1, rows.shape[1] * rows.shape[2]):
        matrix = columns.reshape(len(columns), parts, -1).permute(1, 2, 0)
        right = target.reshape(parts, -1, 1)
        weights = _least_squares(matrix, right, rcond=4 * eps).squeeze(-1)
        left = _rms(right - matrix @ weights.unsqueeze(-1))
        of_predictions, of_sample = weights[:, : len(differences)], weights[:, len(differences) :]
        rounding = eps * scale * (1 + 2 * min(_LARGEST, float(of_predictions.abs().sum(dim=1).max())))
        means = of_predictions.mean(dim=0).tolist()
        if left <= rounding and (sample is None or float(of_sample.abs().max()) * spread <= rounding / 8):
            return [1 - sum(means), *means], True
    return [1 - sum(means), *means], False


def _least_squares(matrix: Tensor, right: Tensor, rcond: float) -> Tensor:
    """Solve matrix @ x = right in the least-squares sense for each part; x has shape [parts, columns, 1]."""
    if matrix.shape[-1] == 1:  # the most common case, and ten times as fast
        return ((matrix.mT @ right) / (matrix.mT @ matrix)).nan_to_num()
    # If two predictions are equal up to rounding, the weight of their difference is meaningless; `rcond` removes it.
    return torch.linalg.lstsq(matrix, right, rcond=rcond, driver="gelsd").solution


def _rms(x: Tensor) -> float:
    return float(x.square().mean()) ** 0.5
