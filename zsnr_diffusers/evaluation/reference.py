"""Reference statistics in files: our format, and the `mu` and `sigma` of other tools."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from .feature_statistics import FeatureOrigin, FeatureStatistics, Floats, check_same_origin
from .features import FeatureNetwork


@dataclass(frozen=True)
class Reference:
    """Statistics of real images' features, and their source.

    `name` is that of the folder or file; `count` is the number of images, None if not recorded.
    """

    name: str
    statistics: FeatureStatistics
    count: int | None

    @property
    def origin(self) -> FeatureOrigin | None:
        """The network, resize and weights that computed the features; None if not recorded."""
        return self.statistics.origin


def check_reference(reference: Reference, network: FeatureNetwork) -> None:
    """Refuse reference statistics of another feature network before images are measured, using a black test image.

    Raises:
        ValueError: another network, or a different number of features.
    """
    import torch

    try:
        check_same_origin(reference.origin, network.origin)
    except ValueError as error:
        raise ValueError(f"reference {reference.name!r}: {error}") from error
    features, _ = network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    if features.shape[1] != reference.statistics.dimension:
        raise ValueError(
            f"reference {reference.name!r} has {reference.statistics.dimension} features per image, but "
            f"{network.origin} has {features.shape[1]}; compute both with the same network"
        )


def load_reference(path: str | PathLike[str]) -> Reference:
    """Read reference statistics for the Fréchet distance: our format, or an `.npz` of other tools.

    Args:
        path: a file written by `FeatureStatistics.save`; or an `.npz` with `mu` [d] and `sigma` [d, d], as written by
            pytorch-fid, clean-fid and EDM. The latter records neither its number of images nor its network.

    Raises:
        ValueError: an unsupported file, or invalid mean and covariance.
        OSError: the file does not exist.
    """
    name = str(Path(path))
    if Path(path).suffix != ".npz":
        statistics = FeatureStatistics.load(path)
        return Reference(name, statistics, statistics.count)
    mean, covariance = _load_npz_moments(path)
    try:
        # One more than the number of features: the minimum for a covariance of any rank.
        statistics = FeatureStatistics.from_moments(mean, covariance, count=np.size(mean) + 1)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from error
    return Reference(name, statistics, None)


def _load_npz_moments(path: str | PathLike[str]) -> tuple[Floats, Floats]:
    """Read `mu` [d] and `sigma` [d, d] from an `.npz` of pytorch-fid, clean-fid or EDM."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = [key for key in ("mu", "sigma") if key not in arrays]
            if not missing:
                return arrays["mu"], arrays["sigma"]
            found = sorted(arrays)
    except (zipfile.BadZipFile, ValueError, EOFError, AttributeError) as error:  # depends on the damage
        raise ValueError(f"{str(path)!r} cannot be read as .npz ({error}); create it again") from error
    raise ValueError(
        f"{str(path)!r} has no {' and no '.join(missing)}, only {found}; pass an .npz with FID statistics"
    )
