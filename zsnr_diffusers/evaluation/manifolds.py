"""Precision and recall of generated images: how many look real, and how much of the real distribution they cover."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .distances import as_feature_arrays
from .feature_statistics import Features, Floats

BLOCK = 1024
"""Rows of the distance matrix that are in memory at a time."""


@dataclass(frozen=True)
class PrecisionRecall:
    """`precision` of n generated images and `recall` of m real ones, using balls up to each one's k-th neighbor."""

    precision: float
    recall: float
    n: int
    m: int
    k: int


def precision_recall(generated: Features, real: Features, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991, equations 1 and 2).

    Precision is the fraction of generated images inside a ball around a real one that reaches to its k-th nearest real
    neighbor; recall is the same with the roles exchanged. Both depend on n and m, so compare values only for equal n
    and m; the paper uses 50,000 of each and k = 3.

    Args:
        generated: features [n, d], n > k.
        real: features [m, d], m > k.
        k: index of the neighbor.

    Raises:
        ValueError: different numbers of features, k below 1, or not more than k images.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    x, y = as_feature_arrays(generated, real, k + 1)
    return PrecisionRecall(
        precision=float(_inside(x, y, _neighbor_distances(y, k)).mean()),
        recall=float(_inside(y, x, _neighbor_distances(x, k)).mean()),
        n=len(x),
        m=len(y),
        k=k,
    )


def _neighbor_distances(points: Floats, k: int) -> Floats:
    """Squared distance of each point [n, d] to its k-th nearest other one, [n]."""
    found = []
    for start in range(0, len(points), BLOCK):
        distances = _squared_distances(points[start : start + BLOCK], points)
        # The point itself is not its neighbor, even with rounding errors in its distance.
        distances[np.arange(len(distances)), start + np.arange(len(distances))] = -1
        found.append(np.partition(distances, k, axis=1)[:, k])
    return np.concatenate(found)


def _inside(points: Floats, centers: Floats, radii: Floats) -> Floats:
    """Whether each point [n, d] lies in a ball around any of the centers [m, d], bool [n]."""
    blocks = (points[start : start + BLOCK] for start in range(0, len(points), BLOCK))
    return np.concatenate([(_squared_distances(block, centers) <= radii).any(axis=1) for block in blocks])


def _squared_distances(x: Floats, y: Floats) -> Floats:
    """|x_i − y_j|² [n, m], at least 0."""
    products = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * (x @ y.T)
    return np.asarray(np.maximum(products, 0))
