"""Reference statistics in files: ours, and the `mu` and `sigma` that other tools write."""

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
    """Statistics of real images' features, and where they come from.

    `name` is that of the folder or file; `count` is how many images there were, None where the file does not say.
    """

    name: str
    statistics: FeatureStatistics
    count: int | None

    @property
    def origin(self) -> FeatureOrigin | None:
        """The network, resize and weights that computed the features; None where the file does not say."""
        return self.statistics.origin


def check_reference(reference: Reference, network: FeatureNetwork) -> None:
    """Refuse reference statistics of another feature network before images are measured; tries it on a black one.

    Raises:
        ValueError: it is of another one, or of another number of features.
    """
    import torch

    try:
        check_same_origin(reference.origin, network.origin)
    except ValueError as error:
        raise ValueError(f"reference {reference.name!r}: {error}") from error
    features, _ = network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    if features.shape[1] != reference.statistics.dimension:
        raise ValueError(
            f"reference {reference.name!r} is of {reference.statistics.dimension} features per image, "
            f"{network.origin} gives {features.shape[1]}; compute both with the same network"
        )


def load_reference(path: str | PathLike[str]) -> Reference:
    """Read reference statistics for the Fréchet distance: ours, or an `.npz` of other tools.

    Args:
        path: what `FeatureStatistics.save` wrote; or, by its ending, an `.npz` with `mu` [d] and `sigma` [d, d] as
            pytorch-fid, clean-fid and EDM write it. The latter names neither its number of images nor its network.

    Raises:
        ValueError: a file of a different kind, or values that are no mean and covariance.
        OSError: no such file.
    """
    name = str(Path(path))
    if Path(path).suffix != ".npz":
        statistics = FeatureStatistics.load(path)
        return Reference(name, statistics, statistics.count)
    mean, covariance = _load_npz_moments(path)
    try:
        # One image more than features: as few as may have this covariance, whatever its rank.
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
    except (zipfile.BadZipFile, ValueError, EOFError, AttributeError) as error:  # by the kind of damage
        raise ValueError(f"{str(path)!r} cannot be read as .npz ({error}); make it again") from error
    raise ValueError(f"{str(path)!r} has no {' and no '.join(missing)}, only {found}; name an .npz of FID statistics")
