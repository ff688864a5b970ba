"""Mean and covariance of features, accumulated batch by batch for any number of images.

Stores a factor R of the scatter matrix S = Σ (x − μ)(x − μ)ᵀ = Rᵀ R: small directions keep their precision, fewer
images than features need no special case, and the Fréchet distance uses R.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Floats: TypeAlias = npt.NDArray[np.float64]
Features: TypeAlias = "torch.Tensor | npt.ArrayLike"

FILE_FORMAT = "zsnr_diffusers feature statistics 1"


@dataclass(frozen=True)
class FeatureOrigin:
    """How features were computed; metrics are comparable only if all fields are equal.

    `network` is the network's name, `resize` describes how images were resized, `sha256` is the hash of its weights.
    """

    network: str
    resize: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.network} (resize: {self.resize}; sha256 {self.sha256[:12] or 'unknown'})"


class FeatureStatistics:
    """Count, mean [d] and covariance [d, d] of features, from batches in any order and any split, in float64.

    Args:
        origin: how the features are computed; None if irrelevant.
    """

    def __init__(self, origin: FeatureOrigin | None = None):
        self.origin = origin
        self._count = 0
        self._mean: Floats = np.zeros(0)
        self._factor: Floats = np.zeros((0, 0))
        self._pending: list[Floats] = []

    def __repr__(self) -> str:
        return f"FeatureStatistics of {self.count} images by {self.origin or 'an unknown network'}"

    @classmethod
    def of(cls, features: Features, origin: FeatureOrigin | None = None) -> FeatureStatistics:
        """Mean and covariance of features [n, d] of one network, all in memory."""
        statistics = cls(origin)
        statistics.update(features)
        return statistics

    @classmethod
    def from_moments(
        cls, mean: npt.ArrayLike, covariance: npt.ArrayLike, count: int, origin: FeatureOrigin | None = None
    ) -> FeatureStatistics:
        """Statistics from mean [d] and covariance [d, d], as published in files of `mu` and `sigma`.

        The covariance has the divisor `count` - 1.

        Eigenvalues that are zero up to rounding become zero, and at most `count` - 1 are kept.

        Raises:
            ValueError: shapes that do not match, values that are not finite, a matrix that is not symmetric or has
                negative eigenvalues, or `count` below 2.
        """
        mu, sigma = np.asarray(mean, dtype=np.float64), np.asarray(covariance, dtype=np.float64)
        _check_moments(mu, sigma, count)
        values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
        rounding = len(values) * np.finfo(np.float64).eps * abs(values[-1])
        # Published covariances were summed in float64, with somewhat more rounding than in eigh.
        if values[0] < -1e6 * rounding:
            raise ValueError(f"covariance has the negative eigenvalue {values[0]:g}, the largest is {values[-1]:g}")
        kept = np.arange(len(values)) >= len(values) - (count - 1)
        roots = np.sqrt(np.where(kept & (values > rounding), values, 0) * (count - 1))
        statistics = cls(origin)
        statistics._merge(count, mu, (vectors * roots).T[roots > 0])
        return statistics

    @property
    def count(self) -> int:
        """Number of feature vectors, one for each image."""
        return self._count + sum(len(batch) for batch in self._pending)

    @property
    def dimension(self) -> int:
        """Features per image, d; 0 before the first batch."""
        return self._pending[0].shape[1] if self._pending else len(self._mean)

    @property
    def mean(self) -> Floats:
        """Mean of the features, float64 [d].

        Raises:
            ValueError: no features were added.
        """
        self._flush_at_least(1)
        return self._mean

    @property
    def covariance(self) -> Floats:
        """Covariance of the features, float64 [d, d], divided by count - 1.

        Raises:
            ValueError: fewer than two feature vectors.
        """
        factor = self.factor
        return factor.T @ factor

    @property
    def factor(self) -> Floats:
        """Factor A of the covariance Aᵀ A, float64 [r, d]; r is at most d.

        Raises:
            ValueError: fewer than two feature vectors.
        """
        self._flush_at_least(2)
        return self._factor / math.sqrt(self._count - 1)

    def update(self, features: Features) -> None:
        """Add a batch of image features [n, d].

        Raises:
            ValueError: a different shape or d than before, or values that are not finite.
        """
        batch = as_feature_array(features)
        self._check_dimension(batch.shape[1])
        # A factorization costs about as much for 2 d rows as for a few, so batches are collected.
        enough = 2 * batch.shape[1]
        for start in range(0, len(batch), enough):
            self._pending.append(batch[start : start + enough].copy())
            if sum(len(waiting) for waiting in self._pending) >= enough:
                self._merge_pending()

    def merge(self, other: FeatureStatistics) -> None:
        """Add the statistics of another process, as if one process had added all batches.

        Raises:
            ValueError: a different number of features, or features of another network.
        """
        check_same_origin(self.origin, other.origin)
        other._merge_pending()
        if other._count:
            self._check_dimension(other.dimension)
            self._merge_pending()
            self._merge(other._count, other._mean, other._factor)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file: `mean`, `factor`, and the count and origin as its metadata.

        Raises:
            ValueError: no features were added.
        """
        from safetensors.numpy import save_file

        self._flush_at_least(1)
        origin = {} if self.origin is None else asdict(self.origin)
        metadata = {"format": FILE_FORMAT, "count": str(self._count), **origin}
        tensors = {"mean": self._mean, "factor": np.ascontiguousarray(self._factor)}
        save_file(tensors, path, metadata=metadata)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> FeatureStatistics:
        """Read a safetensors file of feature statistics that `save` wrote.

        Raises:
            ValueError: an unsupported or damaged file.
            FileNotFoundError: no such file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} cannot be read as safetensors ({error}); create it again") from error
        return cls._from_file(str(path), metadata, tensors)

    @classmethod
    def _from_file(cls, path: str, metadata: Mapping[str, str], tensors: Mapping[str, Any]) -> FeatureStatistics:
        """Validate and use the content of a safetensors file for `load`."""
        if metadata.get("format") != FILE_FORMAT:
            raise ValueError(
                f"{path!r} is not a file of feature statistics; pass one written by FeatureStatistics.save"
            )
        mean, factor = tensors.get("mean"), tensors.get("factor")
        if mean is None or factor is None or mean.shape != factor.shape[1:] or not np.isfinite(factor).all():
            raise ValueError(f"{path!r} is damaged: mean and factor do not match or are not finite; create it again")
        named = "network" in metadata
        origin = FeatureOrigin(**{key: metadata[key] for key in ("network", "resize", "sha256")}) if named else None
        statistics = cls(origin)
        statistics._merge(int(metadata["count"]), mean, factor)
        return statistics

    def _check_dimension(self, dimension: int) -> None:
        """Refuse a different number of features per image than before."""
        if self.count and dimension != self.dimension:
            raise ValueError(f"expected {self.dimension} features per image as before, got {dimension}")

    def _flush_at_least(self, at_least: int) -> None:
        """Merge pending batches, and refuse statistics of fewer than `at_least` images."""
        if self.count < at_least:
            raise ValueError(f"statistics of {self.count} images; at least {at_least} are needed")
        self._merge_pending()

    def _merge_pending(self) -> None:
        """Merge the collected batches into mean and factor."""
        if not self._pending:
            return
        rows = np.concatenate(self._pending)
        self._pending = []
        mean = rows.mean(axis=0)
        self._merge(len(rows), mean, rows - mean)

    def _merge(self, count: int, mean: Floats, factor: Floats) -> None:
        """S = S₁ + S₂ + (n₁ n₂ / n) δ δᵀ, δ = μ₂ − μ₁ (Chan, Golub & LeVeque 1983), in factors: rows are stacked."""
        if self._count:
            shift = mean - self._mean
            weight = self._count / (self._count + count) * count
            mean = self._mean + shift * (count / (self._count + count))
            factor = np.concatenate([self._factor, factor, math.sqrt(weight) * shift[None]])
        self._count += count
        self._mean = mean
        # Q of R's QR factors drops out of Rᵀ R.
        self._factor = np.asarray(np.linalg.qr(factor, mode="r")) if len(factor) > factor.shape[1] else factor


def as_feature_array(features: Features, name: str = "features") -> Floats:
    """Convert `features`, a tensor or array, to float64 [n, d], n and d > 0.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    if hasattr(features, "detach"):  # a tensor; torch is not imported to find that out
        features = cast("torch.Tensor", features).detach().cpu().double().numpy()
    array = np.asarray(features, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"{name}: expected shape [n, d], n and d > 0, got {list(array.shape)}")
    if not np.isfinite(array).all():
        bad = np.count_nonzero(~np.isfinite(array).all(axis=1))
        raise ValueError(f"{name}: {bad} of {len(array)} rows hold values that are not finite")
    return array


def check_same_origin(a: FeatureOrigin | None, b: FeatureOrigin | None) -> None:
    """Refuse to compare features of different networks; unknown ones (None) pass.

    Raises:
        ValueError: they differ.
    """
    if a is not None and b is not None and a != b:
        raise ValueError(f"features are of {a} and of {b}; compute both with the same network")


def _check_moments(mean: Floats, covariance: Floats, count: int) -> None:
    """Refuse mean and covariance of the wrong shape, not finite, or not symmetric, and counts below 2."""
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"expected mean [d], covariance [d, d]; got {list(mean.shape)}, {list(covariance.shape)}")
    if count < 2:
        raise ValueError(f"count must be at least 2, got {count}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError("mean or covariance hold values that are not finite")
    asymmetry = float(np.abs(covariance - covariance.T).max())
    if asymmetry > 1e-6 * float(np.abs(covariance).max()):
        raise ValueError(f"covariance is not symmetric: it differs from its transpose by up to {asymmetry:g}")
