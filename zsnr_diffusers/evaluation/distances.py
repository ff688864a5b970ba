"""Distances between generated and real images in the features of a network: Fréchet distance, Inception Score, KID.

All are computed in float64, and documented with their bias for a finite number of images.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..utils.tables import Part, Report, Text
from .feature_statistics import Features, FeatureStatistics, Floats, as_feature_array, check_same_origin

KERNEL_BLOCK = 1024
"""Rows and columns of the kernel matrix that are in memory at a time."""


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½): the FID of Heusel et al. 2017 (arXiv:1706.08500, equation 6).

    With Σ = Aᵀ A the last trace is the sum of the singular values of A₁ A₂ᵀ. No matrix square root is needed: the
    usual one, of the non-symmetric product Σ₁ Σ₂, is inaccurate if a covariance is singular. Symmetric in `a` and `b`.

    The distance is biased upward for few images, by about a constant over their number; compare only values for equal
    numbers of images (50,000 in most papers). Warns if there are fewer images than features.

    Returns:
        The squared distance, which is called FID; never negative, in the scale of the features.

    Raises:
        ValueError: features of different networks or dimensions; fewer than two images.
    """
    check_same_origin(a.origin, b.origin)
    if a.dimension != b.dimension:
        raise ValueError(f"{a.dimension} and {b.dimension} features per image; compute both with the same network")
    first, second = a.factor, b.factor
    _warn_of_few_images(min(a, b, key=lambda statistics: statistics.count))
    shift = a.mean - b.mean
    root = np.linalg.svd(first @ second.T, compute_uv=False).sum()
    distance = shift @ shift + np.square(first).sum() + np.square(second).sum() - 2 * root
    return max(float(distance), 0.0)  # for equal sets, only rounding remains


def _warn_of_few_images(statistics: FeatureStatistics) -> None:
    """Warn that the Fréchet distance is far too large with fewer images than features."""
    if statistics.count <= statistics.dimension:
        warnings.warn(
            f"{statistics.count} images for {statistics.dimension} features: the covariance is singular and the "
            "Fréchet distance far too large (its bias decreases as 1 / images). Use more images or the unbiased "
            "kernel distance, or compare only with values for the same number of images",
            stacklevel=3,
        )


@dataclass(frozen=True)
class InceptionScore(Report):
    """Mean and standard deviation (population's, divided by `splits`) of the score over the splits of n images."""

    mean: float
    std: float
    n: int
    splits: int

    def parts(self) -> Iterator[Part]:
        """One line."""
        yield Text(f"Inception Score {self.mean:.4g} ± {self.std:.2g} ({self.splits} splits of {self.n} images)")


def inception_score(logits: Features, splits: int = 10, *, probabilities: bool = False) -> InceptionScore:
    """exp E KL(p(y|x) ‖ p(y)), Salimans et al. 2016 (arXiv:1606.03498, section 4), mean and std over splits.

    Split i holds images i n // splits to (i + 1) n // splits - 1 in the order given, as in the paper's code: images
    that are sorted by class must be shuffled first. The score is biased downward for few images, and at most the
    number of images in a split.

    Args:
        logits: of a classifier, [n, classes]; to compare with the paper, those of the 2015 Inception network without
            the bias of its last layer, for 50,000 images.
        splits: number of splits.
        probabilities: the values are p(y|x), not logits.

    Raises:
        ValueError: fewer images than splits, or rows that are not probabilities.
    """
    values = as_feature_array(logits, "probabilities" if probabilities else "logits")
    n = len(values)
    if not 1 <= splits <= n:
        raise ValueError(f"splits must be from 1 to the number of images, {n}; got {splits}")
    if probabilities:
        _check_probabilities(values)
    bounds = [i * n // splits for i in range(splits + 1)]
    parts = (values[start:stop] for start, stop in pairwise(bounds))
    scores = [_split_score(part if probabilities else _softmax(part)) for part in parts]
    return InceptionScore(mean=float(np.mean(scores)), std=float(np.std(scores)), n=n, splits=splits)


def _split_score(p: Floats) -> float:
    """Inception Score of one split, from p(y|x) [n, classes]."""
    return float(np.exp(_negative_entropy(p).mean() - _negative_entropy(p.mean(axis=0))))


def _negative_entropy(p: Floats) -> Floats:
    """Σ p log p over the last axis; 0 log 0 = 0, which softmax reaches by underflow."""
    terms: Floats = p * np.log(np.where(p > 0, p, 1))
    return np.asarray(terms.sum(axis=-1))


def _softmax(logits: Floats) -> Floats:
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(p / p.sum(axis=1, keepdims=True))


def _check_probabilities(values: Floats) -> None:
    """Refuse rows that are not p(y|x): negative values, or sums other than 1."""
    sums = values.sum(axis=1)
    if values.min() < 0 or np.abs(sums - 1).max() > 1e-3:
        raise ValueError(
            f"rows are not probabilities: values from {values.min():g}, sums from {sums.min():g} to {sums.max():g}; "
            "for logits use probabilities=False"
        )


@dataclass(frozen=True)
class KernelDistance(Report):
    """A kernel distance `value` between n and m images, with its `error`, defined by the function that computed it."""

    value: float
    error: float
    n: int
    m: int

    def parts(self) -> Iterator[Part]:
        """One line."""
        yield Text(f"kernel distance {self.value:.4g} ± {self.error:.2g} ({self.n} and {self.m} images)")


def kernel_distance(x: Features, y: Features) -> KernelDistance:
    """KID: the unbiased MMD² of all images with k(x, y) = (xᵀ y / d + 1)³ (Bińkowski et al. 2018, arXiv:1801.01401).

    The expectation is the same for any number of images, and 0 for equal distributions; single values may be negative.
    `error` is the jackknife standard error, leaving out each image of both sets in turn (Efron & Stein 1981). It is
    accurate for clearly different distributions, and up to √2 too large for equal ones, where the statistic is
    degenerate.

    The work grows as (n + m)² d; `kernel_distance_of_subsets` bounds it.

    Args:
        x: features [n, d], n >= 3.
        y: features [m, d], m >= 3.

    Raises:
        ValueError: different numbers of features, or fewer than three images.
    """
    x, y = as_feature_arrays(x, y, 3)
    n, m = len(x), len(y)
    within_x, within_y = _off_diagonal_row_sums(x), _off_diagonal_row_sums(y)
    across_x, across_y = _kernel_row_sums(x, y), _kernel_row_sums(y, x)
    value = _mmd2(within_x.sum(), within_y.sum(), across_x.sum(), n, m)
    # Leaving an image out takes its row and its column from the sums.
    without_x = _mmd2(within_x.sum() - 2 * within_x, within_y.sum(), across_x.sum() - across_x, n - 1, m)
    without_y = _mmd2(within_x.sum(), within_y.sum() - 2 * within_y, across_y.sum() - across_y, n, m - 1)
    variance = (n - 1) * np.var(without_x) + (m - 1) * np.var(without_y)
    return KernelDistance(value=float(value), error=float(np.sqrt(variance)), n=n, m=m)


def kernel_distance_of_subsets(
    x: Features, y: Features, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """KID as most papers report it: mean and standard deviation of the unbiased MMD² over random subsets.

    Each subset is drawn without replacement from both sets, independently of the others. `error` is the (population)
    standard deviation over the subsets, as in the paper's tables: it describes subsets of this size, not the accuracy
    of the mean.

    Raises:
        ValueError: different numbers of features, or fewer images than `subset_size`.
    """
    x, y = as_feature_arrays(x, y, 2)
    n, m = len(x), len(y)
    if num_subsets < 1:
        raise ValueError(f"num_subsets must be at least 1, got {num_subsets}")
    if not 2 <= subset_size <= min(n, m):
        raise ValueError(
            f"subset_size must be from 2 to the number of images in the smaller set, {min(n, m)}; got {subset_size}; "
            "kernel_distance supports sets of any size"
        )
    rng = np.random.default_rng(seed)
    subsets = (
        (x[rng.choice(n, subset_size, replace=False)], y[rng.choice(m, subset_size, replace=False)])
        for _ in range(num_subsets)
    )
    values = [
        _mmd2(
            _off_diagonal_row_sums(a).sum(),
            _off_diagonal_row_sums(b).sum(),
            _kernel_row_sums(a, b).sum(),
            subset_size,
            subset_size,
        )
        for a, b in subsets
    ]
    return KernelDistance(value=float(np.mean(values)), error=float(np.std(values)), n=n, m=m)


def _mmd2(within_x: Floats, within_y: Floats, across: Floats, n: int, m: int) -> Floats:
    """Unbiased MMD² (Gretton et al. 2012, equation 3) from sums of the kernel, without the diagonal within a set."""
    return np.asarray(within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * across / (n * m))


def _kernel_row_sums(x: Floats, y: Floats) -> Floats:
    """Σ_j k(x_i, y_j) [n], in blocks of the kernel matrix."""
    sums = np.zeros(len(x))
    for i in range(0, len(x), KERNEL_BLOCK):
        rows = slice(i, i + KERNEL_BLOCK)
        for j in range(0, len(y), KERNEL_BLOCK):
            sums[rows] += _polynomial_kernel(x[rows] @ y[j : j + KERNEL_BLOCK].T, x.shape[1]).sum(axis=1)
    return sums


def _off_diagonal_row_sums(x: Floats) -> Floats:
    """Σ_{j ≠ i} k(x_i, x_j) [n]."""
    return _kernel_row_sums(x, x) - _polynomial_kernel(np.square(x).sum(axis=1), x.shape[1])


def _polynomial_kernel(products: Floats, dimension: int) -> Floats:
    """KID's kernel (xᵀ y / d + 1)³ from products xᵀ y."""
    return np.asarray((products / dimension + 1) ** 3)


def as_feature_arrays(x: Features, y: Features, at_least: int) -> tuple[Floats, Floats]:
    """Convert two sets of features to float64 [n, d] and [m, d], each of `at_least` images."""
    first, second = as_feature_array(x, "x"), as_feature_array(y, "y")
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"{first.shape[1]} and {second.shape[1]} features per image; use the same network for both")
    if min(len(first), len(second)) < at_least:
        raise ValueError(f"at least {at_least} images per set are needed, got {len(first)} and {len(second)}")
    return first, second
