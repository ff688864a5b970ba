"""Fit of a `LowFrequencyLaw` to the amplitudes of images and the features of their captions.

The mean is a ridge regression (Hoerl & Kennard 1970, doi:10.1080/00401706.1970.10488634), with a ridge for each
amplitude, chosen by cross-validation. Amplitudes that captions do not explain significantly are not predicted from
them. The covariance is that of held-out residuals, so it includes the uncertainty of the mean. Its shrinkage towards
the diagonal, and the number of modeled frequencies, maximize the likelihood of held-out images at the noise level at
which sampling starts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .low_frequency_law import LowFrequencyLaw
from .noise import NoiseLevel

FOLDS = 5
RIDGES = tuple(10 ** (exponent / 2) for exponent in range(-12, 3))
"""Times the number of images: the features have a total variance of 1."""
SHRINKAGES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
MAX_DIRECTIONS = 512
"""Number of principal directions of the features; the ridge suppresses further ones."""
SIGNIFICANCE = 3.0
"""Minimum reduction of the held-out error by captions, in standard errors."""
NEGLIGIBLE = 0.05
"""Minimum gain for more frequencies, in nats per image."""


@dataclass(frozen=True)
class LawFit:
    """A fitted law, and its quality on held-out images.

    Attributes:
        law: what was fitted.
        power: mean square of the amplitudes about their mean, shape [K, K], summed over channels, K as in the data.
        explained: share of it that captions explain on images held out, shape [K, K], 0 where they are not used.
        gains: by number of frequencies, how much more likely images held out are at the start than under pure noise,
            in nats per image.
    """

    law: LowFrequencyLaw
    power: Tensor
    explained: Tensor
    gains: dict[int, float]


class _Ridge:
    """Ridge regression of x [n, D] on scores [n, R], for any ridge; one ridge for each column of x."""

    def __init__(self, x: Tensor, scores: Tensor) -> None:
        self.mean, self.center = x.mean(dim=0), scores.mean(dim=0)
        centered = scores - self.center
        self._values, self._vectors = torch.linalg.eigh(centered.mT @ centered)
        self._products = self._vectors.mT @ (centered.mT @ (x - self.mean))
        self._count = len(x)

    def slopes(self, ridges: Tensor) -> Tensor:
        """Weights of the scores [R, D] at ridges [D], relative to the number of samples; infinite: 0."""
        penalized = self._values.clamp(min=0)[:, None] + self._count * ridges
        return self._vectors @ (self._products / penalized)

    def residuals(self, x: Tensor, scores: Tensor, ridges: Tensor) -> Tensor:
        """What the regression at these ridges leaves of other samples."""
        return x - self.mean - (scores - self.center) @ self.slopes(ridges)


def fit_law(
    amplitudes: Tensor,
    features: Tensor,
    folds: Tensor,
    level: NoiseLevel,
    num_latents: int,
    frequencies: Sequence[int],
) -> LawFit:
    """Fit the law of the low frequencies of images given their captions.

    Args:
        amplitudes: of the images, shape [N, C, K, K], finite.
        features: of their captions, shape [N, F], finite; F is 0 to fit a law that is the same for every prompt.
        folds: for each image the part of the data in which it is held out, integers [N] from `split_into_folds`.
        level: at which sampling starts, alpha above 0.
        num_latents: of a channel of a generated image, height times width.
        frequencies: numbers k of frequencies to choose from, each at most K.

    Returns:
        The law in float32, and its quality.
    """
    x = amplitudes.double()
    data, shape = x.flatten(1), x.shape[1:]
    weight, bias, residuals, without = _fit_mean(data, features.double(), folds)
    signal, sigma = float(level.alpha) * math.sqrt(num_latents), float(level.sigma)
    gains, shares = {}, {}
    for k in frequencies:
        kept = _lowest(shape, k)
        tried = {share: _gains(residuals[:, kept], data[:, kept], folds, signal, sigma, share) for share in SHRINKAGES}
        shares[k] = max(tried, key=lambda share: float(tried[share].mean()))
        gains[k] = tried[shares[k]]
    k = _fewest_as_good(gains)
    kept, block = _lowest(shape, k), x[..., :k, :k]
    law = LowFrequencyLaw(
        bias.reshape(shape)[..., :k, :k].float(),
        weight[kept].float(),
        _shrunk_covariance(residuals[:, kept], shares[k]).float(),
        torch.stack([block.amin(dim=0), block.amax(dim=0)]).float(),
    )
    error, power = (r.square().mean(dim=0).reshape(shape).sum(dim=0) for r in (residuals, without))
    explained = (power - error) / power.clamp(min=torch.finfo(power.dtype).tiny)
    return LawFit(law, power, explained, {number: float(gain.mean()) for number, gain in gains.items()})


def split_into_folds(groups: Sequence[int], seed: int = 0) -> Tensor:
    """Divide images into `FOLDS` parts for cross-validation, int64 [N]; images of a group fall into one part.

    A group is a caption: that of an image held out is then new to the law. Where there are too few captions for that,
    images are divided whatever their captions.

    Args:
        groups: of each image, from 0 on.
        seed: of the division.
    """
    generator = torch.Generator().manual_seed(seed)
    number = max(groups, default=-1) + 1
    if number < 2 * FOLDS:
        return torch.randperm(len(groups), generator=generator) % FOLDS
    return (torch.randperm(number, generator=generator) % FOLDS)[torch.tensor(groups)]


def _lowest(shape: Sequence[int], k: int) -> Tensor:
    """Which of the flattened values of shape [C, K, K] are of the lowest k x k frequencies."""
    kept = torch.zeros(tuple(shape), dtype=torch.bool)
    kept[:, :k, :k] = True
    return kept.flatten()


def _fewest_as_good(gains: Mapping[int, Tensor]) -> int:
    """The fewest frequencies with a gain within a standard error of the best (Breiman et al. 1984, section 3.4.3)."""
    best = max(gains.values(), key=lambda gain: float(gain.mean()))
    losses = {k: best - gain for k, gain in gains.items()}
    allowed = {k: max(NEGLIGIBLE, float(loss.std()) / math.sqrt(len(loss))) for k, loss in losses.items()}
    return min(k for k, loss in losses.items() if float(loss.mean()) <= allowed[k])


def _fit_mean(x: Tensor, features: Tensor, folds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Regress amplitudes [N, D] on features [N, F].

    Returns:
        Weight [D, F], bias [D], and the residuals [N, D] of images held out, with captions and by the mean alone.
    """
    center = features.mean(dim=0)
    directions = _principal_directions(features - center)
    scores = (features - center) @ directions
    parts = [(folds == fold, _Ridge(x[folds != fold], scores[folds != fold])) for fold in range(FOLDS)]

    def held_out(ridges: Tensor) -> Tensor:
        residuals = torch.empty_like(x)
        for out, regression in parts:
            residuals[out] = regression.residuals(x[out], scores[out], ridges)
        return residuals

    ridges = torch.full((x.shape[1],), torch.inf, dtype=x.dtype)
    without = held_out(ridges)
    residuals = without.clone()
    for ridge in RIDGES if scores.shape[1] else ():
        found = held_out(torch.full_like(ridges, ridge))
        better = found.square().sum(dim=0) < residuals.square().sum(dim=0)
        residuals[:, better], ridges[better] = found[:, better], ridge
    # Amplitudes of which captions say nothing beyond chance keep the mean alone.
    gain = without.square() - residuals.square()
    doubtful = gain.mean(dim=0) <= SIGNIFICANCE * gain.std(dim=0) / math.sqrt(len(x))
    residuals[:, doubtful], ridges[doubtful] = without[:, doubtful], torch.inf
    weight = (directions @ _Ridge(x, scores).slopes(ridges)).mT
    return weight, x.mean(dim=0) - weight @ center, residuals, without


def _principal_directions(centered: Tensor) -> Tensor:
    """Directions [F, R] of the most variance in features [N, F], scaled so that the total variance of scores is 1."""
    count, size = centered.shape
    if not size or not bool(centered.any()):
        return centered.new_zeros(size, 0)
    small = size <= count
    values, vectors = torch.linalg.eigh(centered.mT @ centered if small else centered @ centered.mT)
    # Rounding leaves some variance in directions that have none.
    kept = (values > values[-1] * 1e-10).nonzero().flatten()[-MAX_DIRECTIONS:]
    total = (values[kept].sum() / count).sqrt()
    directions = vectors[:, kept] if small else (centered.mT @ vectors[:, kept]) / values[kept].sqrt()
    return directions / total


def _shrunk_covariance(residuals: Tensor, share: float) -> Tensor:
    """Covariance [D, D] of residuals [n, D], its off-diagonal entries lowered by a share (Ledoit & Wolf 2004)."""
    covariance = residuals.mT @ residuals / len(residuals)
    return (1 - share) * covariance + share * covariance.diagonal().diag()


def _gains(residuals: Tensor, data: Tensor, folds: Tensor, signal: float, sigma: float, share: float) -> Tensor:
    """How much more likely amplitudes held out are than under pure noise, both at the start, in nats, shape [N].

    The mean over the noise n of log N(signal x + sigma n; signal m, signal^2 S + sigma^2 I), less that of
    log N(signal x + sigma n; 0, sigma^2 I).

    Args:
        residuals: of means m that were predicted without the image, x - m, shape [N, D].
        data: x, same shape.
        folds: as in `fit_law`; the covariance S is that of the residuals of other folds.
        signal: factor of amplitudes in the coefficients of x_T.
        sigma: of x_T.
        share: by which S is shrunk.
    """
    gains = (signal / sigma * data).square().sum(dim=1)
    identity = torch.eye(data.shape[1], dtype=data.dtype)
    for fold in range(FOLDS):
        out = folds == fold
        factor = torch.linalg.cholesky(signal**2 * _shrunk_covariance(residuals[~out], share) + sigma**2 * identity)
        errors = torch.linalg.solve_triangular(factor, signal * residuals[out].mT, upper=False)
        noise = torch.linalg.solve_triangular(factor, sigma * identity, upper=False)
        log_determinant = 2 * (factor.diagonal().log() - math.log(sigma)).sum()
        gains[out] -= errors.square().sum(dim=0) + log_determinant + noise.square().sum() - len(identity)
    return gains / 2
