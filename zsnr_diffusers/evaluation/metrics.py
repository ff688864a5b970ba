"""Metrics as reported, each with the settings that make it comparable with others."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..utils.tables import KeyValues, Part, Report
from .distances import KernelDistance, frechet_distance, inception_score, kernel_distance, kernel_distance_of_subsets
from .extraction import ImageFeatures
from .feature_statistics import FeatureOrigin, check_same_origin
from .features import INCEPTION_2015
from .reference import Reference
from .subset_sizes import MAX_FULL_KID, NUM_SUBSETS, SUBSET_SIZE


@dataclass(frozen=True)
class Figure(Report):
    """A metric of generated images.

    `method` describes the computation if there are alternatives, including the meaning of `error`. `reference` names
    the real images; `reference_count` and `reference_origin` are None if unknown. `warnings` explain why the value may
    be misleading.
    """

    name: str
    value: float
    origin: FeatureOrigin
    generated: int
    error: float | None = None
    method: str = ""
    reference: str | None = None
    reference_count: int | None = None
    reference_origin: FeatureOrigin | None = None
    warnings: tuple[str, ...] = ()

    def parts(self) -> Iterator[Part]:
        """Parts of the printed report: a row with name, value, and settings."""
        return Figures((self,)).parts()

    @property
    def row(self) -> tuple[str, str, str]:
        """Name, value, and settings, for the printed table of metrics."""
        value = f"{self.value:.4g}" + ("" if self.error is None else f" ± {self.error:.2g}")
        network = f"{self.origin.network}, {self.origin.resize}, sha256 {self.origin.sha256[:12] or 'unknown'}"
        parts = [", ".join([f"{self.generated} generated", *self._reference_text()]), self.method, network]
        return self.name, value, "; ".join(part for part in parts if part)

    def _reference_text(self) -> list[str]:
        """Description of the reference images, for printing; empty for the Inception Score."""
        if self.reference is None:
            return []
        count = "unknown number" if self.reference_count is None else str(self.reference_count)
        network = "" if self.reference_origin else " by an unknown network"
        return [f"reference {self.reference}: {count}{network}"]


@dataclass(frozen=True)
class Figures(Report):
    """Several metrics."""

    figures: tuple[Figure, ...]

    def parts(self) -> Iterator[Part]:
        """Parts of the printed report: a table with a row for each metric."""
        yield KeyValues(
            ("figure", "value", "depends on"), tuple(figure.row for figure in self.figures), aside="  ({})"
        )


def frechet_figure(generated: ImageFeatures, reference: Reference) -> Figure:
    """Compute the Fréchet distance, called FID if network, weights and resize are those of published FIDs.

    Raises:
        ValueError: features of different networks, or fewer than two images.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = frechet_distance(generated.statistics(), reference.statistics)
    return Figure(
        name=_metric_names(generated.origin)[0],
        value=value,
        origin=generated.origin,
        generated=len(generated.features),
        reference=reference.name,
        reference_count=reference.count,
        reference_origin=reference.origin,
        warnings=tuple(str(warning.message) for warning in caught),
    )


def inception_score_figure(generated: ImageFeatures, splits: int = 10, seed: int = 0) -> Figure:
    """Compute the Inception Score of images shuffled with `seed`, since folders are often sorted by class.

    Raises:
        ValueError: a network without logits, or fewer images than splits.
    """
    if generated.logits is None:
        raise ValueError(f"{generated.origin.network} has no logits, which the Inception Score needs")
    order = np.random.default_rng(seed).permutation(len(generated.logits))
    score = inception_score(generated.logits[order], splits)
    return Figure(
        name=_metric_names(generated.origin)[1],
        value=score.mean,
        error=score.std,
        method=f"mean and standard deviation over {splits} splits",
        origin=generated.origin,
        generated=score.n,
    )


def kernel_figure(
    generated: ImageFeatures, real: ImageFeatures, name: str, num_subsets: int | None = None, seed: int = 0
) -> Figure:
    """Compute the kernel distance, called KID if network, weights and resize are those of published KIDs.

    Args:
        generated: features of generated images.
        real: features of real ones, by the same network.
        name: of the real images.
        num_subsets: number of random subsets of `SUBSET_SIZE`; 0 for all images at once; None for all at once unless
            there are more than `MAX_FULL_KID` images and subsets are possible.
        seed: of the subsets.

    Raises:
        ValueError: features of different networks; fewer than three images, or than `SUBSET_SIZE` with subsets.
    """
    check_same_origin(generated.origin, real.origin)
    n, m = len(generated.features), len(real.features)
    if num_subsets is None:
        num_subsets = NUM_SUBSETS if n + m > MAX_FULL_KID and min(n, m) >= SUBSET_SIZE else 0
    distance, method = _kernel_distance_and_method(generated, real, num_subsets, seed)
    return Figure(
        name=_metric_names(generated.origin)[2],
        value=distance.value,
        error=distance.error,
        method=method,
        origin=generated.origin,
        generated=n,
        reference=name,
        reference_count=m,
        reference_origin=real.origin,
    )


def _kernel_distance_and_method(
    generated: ImageFeatures, real: ImageFeatures, num_subsets: int, seed: int
) -> tuple[KernelDistance, str]:
    """Kernel distance over all images (0 subsets) or random subsets, and the method's description for a report."""
    if num_subsets == 0:
        return kernel_distance(generated.features, real.features), "unbiased over all images, jackknife standard error"
    distance = kernel_distance_of_subsets(generated.features, real.features, num_subsets, SUBSET_SIZE, seed)
    return distance, f"mean and standard deviation over {num_subsets} subsets of {SUBSET_SIZE}"


def _metric_names(origin: FeatureOrigin) -> tuple[str, str, str]:
    """Names of Fréchet distance, Inception Score and kernel distance in papers, for this feature network."""
    if origin == INCEPTION_2015:
        return "FID", "Inception Score", "KID"
    other = "Inception Score with another network"
    if origin.network.startswith("dinov2 "):
        return "FD-DINOv2", other, "KD-DINOv2"
    return "Fréchet distance", other, "Kernel distance"
