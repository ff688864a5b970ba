"""Measure whether a model covers the brightness of real images, by the distribution of mean luminance per image.

Without zero terminal SNR, the mean of an image never reaches black or white (Lin et al. 2023, arXiv:2305.08891, figure
1). FID is almost insensitive to this; the distribution of one number per image shows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..utils.extras import import_extra
from ..utils.images import load_rgb
from ..utils.tables import Part, Report, Table, Text
from .image_stream import list_images

if TYPE_CHECKING:
    import torch

Floats: TypeAlias = npt.NDArray[np.float64]

LUMA_WEIGHTS = np.array([0.2126, 0.7152, 0.0722])
"""Luma Y' = 0.2126 R' + 0.7152 G' + 0.0722 B' of gamma-encoded values (ITU-R BT.709-6, item 3.2)."""


def mean_luminance(
    images: torch.Tensor
    | npt.NDArray[np.floating]
    | Iterable[Image.Image | str | PathLike[str]]
    | Image.Image
    | str
    | PathLike[str],
) -> Floats:
    """Mean Rec. 709 luma of each image, from -1 (black) to 1 (white).

    The weights apply to the stored, gamma-encoded pixel values, on which the model is trained.

    Args:
        images: an iterable of PIL images of any mode, or of paths, read one at a time by `zsnr_diffusers.utils.images`
            (orientation applied, transparency over white); a single one of these; a folder, for all images at any
            depth in the order of their paths; or a floating-point tensor or array [n, 3, h, w] with values in [-1, 1],
            as models produce them.

    Returns:
        float64 [n].

    Raises:
        ValueError: an unsupported layout or dtype, values outside [-1, 1], or a folder without images. Values in [0,
            1] cannot be detected: for a pipeline's `output_type="np"` pass `array.transpose(0, 3, 1, 2) * 2 - 1`.
        ImageError: a file that cannot be read.
    """
    if isinstance(images, (str, PathLike)) and Path(images).is_dir():
        images = list_images(images)
    elif isinstance(images, (str, PathLike, Image.Image)):
        images = [images]
    if isinstance(images, np.ndarray):
        return _mean_luminance_of_array(images)
    if hasattr(images, "detach"):  # a tensor; torch is not imported to find that out
        return _mean_luminance_of_array(_to_numpy(cast("torch.Tensor", images)))
    return np.array([_mean_luminance_of_file(image) for image in images], dtype=np.float64)


def _mean_luminance_of_file(image: Image.Image | str | PathLike[str]) -> float:
    """Mean luma of one PIL image or file, -1 to 1, from its histograms."""
    if not isinstance(image, (Image.Image, str, PathLike)):
        raise ValueError(
            f"expected PIL images or paths, got {type(image).__name__}; stack arrays into one [n, 3, h, w] array"
        )
    rgb = load_rgb(image)
    mean = _histogram(rgb) @ np.arange(256) / (rgb.width * rgb.height)
    return float(mean @ LUMA_WEIGHTS / 127.5 - 1)


def clipped_share(image: Image.Image) -> float:
    """Fraction of an image's RGB values that are 0 or 255."""
    counts = _histogram(load_rgb(image))
    return float(counts[:, [0, -1]].sum() / counts.sum())


def _histogram(rgb: Image.Image) -> npt.NDArray[np.int64]:
    """Histogram of each channel, [3, 256]; exact, and needs no copy of the pixels."""
    return np.array(rgb.histogram(), dtype=np.int64).reshape(3, 256)


def _mean_luminance_of_array(array: npt.NDArray[np.floating]) -> Floats:
    """Mean luma of each image in [n, 3, h, w] with values in [-1, 1], float64 [n]."""
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"expected floating-point values in [-1, 1], got dtype {array.dtype}; use x / 127.5 - 1")
    if array.ndim != 4 or array.shape[1] != 3:
        raise ValueError(f"expected images of shape [n, 3, h, w], got {list(array.shape)}")
    if array.size and not (np.isfinite(array).all() and np.abs(array).max() <= 1 + 1e-3):
        raise ValueError(
            f"expected values in [-1, 1], got {array.min():g} to {array.max():g}; clamp the decoder's output"
        )
    means: Floats = array.mean(axis=(2, 3), dtype=np.float64)
    luminance: Floats = means @ LUMA_WEIGHTS
    return luminance


def _to_numpy(images: torch.Tensor) -> npt.NDArray[np.floating]:
    """Images as a NumPy array on the CPU, half precision widened to float32."""
    tensor = images.detach().cpu()
    half = tensor.is_floating_point() and tensor.element_size() == 2
    # numpy has no bfloat16; widening is exact
    array: npt.NDArray[np.floating] = (tensor.float() if half else tensor).numpy()
    return array


@dataclass(frozen=True)
class LuminanceSummary(Report):
    """The distribution of mean luminance over `n` images: moments, percentiles 5, 50 and 95, and range."""

    n: int
    mean: float
    std: float
    p5: float
    p50: float
    p95: float
    min: float
    max: float

    def parts(self) -> Iterator[Part]:
        """A table of one row."""
        yield Table(("luminance", "n", *_COLUMNS), (("", *self.cells()),), align="<" + ">" * (1 + len(_COLUMNS)))

    def cells(self) -> tuple[str, ...]:
        """Number of images, moments, percentiles and range as a table shows them."""
        values = (round(getattr(self, name), 4) + 0.0 for name in _COLUMNS)  # without a sign if it is 0.0000
        return (str(self.n), *(f"{value:.4f}" for value in values))

    @classmethod
    def of(cls, luminance: npt.ArrayLike) -> LuminanceSummary:
        """Summarize the mean luminance of images, shape [n]; `std` is the population's (divided by n)."""
        values = _as_luminance_array(luminance, "luminance")
        p5, p50, p95 = (float(p) for p in np.percentile(values, (5, 50, 95)))
        mean, std, low, high = (float(f(values)) for f in (np.mean, np.std, np.min, np.max))
        return cls(n=len(values), mean=mean, std=std, p5=p5, p50=p50, p95=p95, min=low, max=high)


@dataclass(frozen=True)
class LuminanceCoverage(Report):
    """Distance between the luminance of generated and real images.

    `w1` is the 1-D Wasserstein distance, in units of luminance (the range from black to white is 2). It is never 0 for
    finite samples: `floor` is the mean value of a perfect generator with the same number of images, which exceeds
    `floor_p95` in 5 % of cases. Compare `w1` with these before interpreting it as a difference.
    """

    w1: float
    floor: float
    floor_p95: float
    generated: LuminanceSummary
    real: LuminanceSummary

    def parts(self) -> Iterator[Part]:
        """Parts of the printed report: a table of both summaries, and the distance with its expected value."""
        summaries = (("generated", self.generated), ("real", self.real))
        rows = [(name, *summary.cells()) for name, summary in summaries]
        yield Table(("luminance", "n", *_COLUMNS), tuple(rows), align="<" + ">" * (1 + len(_COLUMNS)))
        yield Text(
            f"Wasserstein-1 {self.w1:.4f}; expected from finite sampling: {self.floor:.4f} on average, below "
            f"{self.floor_p95:.4f} in 95 %",
            "warning" if self.w1 > self.floor_p95 else "good",
        )


_COLUMNS = ("mean", "std", "p5", "p50", "p95", "min", "max")


def luminance_coverage(
    generated: npt.ArrayLike,
    real: npt.ArrayLike,
    seed: int = 0,
    num_bootstraps: int = 400,
    groups: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None,
) -> LuminanceCoverage:
    """Compare two sets of mean luminance, from `mean_luminance`.

    Args:
        generated: values [n].
        real: values [m].
        seed: of the bootstrap; the same seed gives the same floor.
        num_bootstraps: pairs of resamples for the floor, which add about 0.5 / sqrt(num_bootstraps) to its relative
            error.
        groups: the prompt of each generated and of each real image, n and m labels, if a fixed number of images was
            generated per prompt: this reduces random variation, so the floor is lower.

    Raises:
        ValueError: an empty set, a wrong shape, values that are not finite, or a group without real images.
        ImportError: scipy is not installed.
    """
    generated, real = _as_luminance_array(generated, "generated"), _as_luminance_array(real, "real")
    strata = [(real, len(generated))] if groups is None else _group_real_values(real, *groups)
    floors = _bootstrap_distances(strata, seed, num_bootstraps)
    return LuminanceCoverage(
        w1=_wasserstein_1(generated, real),
        floor=float(floors.mean()),
        floor_p95=float(np.percentile(floors, 95)),
        generated=LuminanceSummary.of(generated),
        real=LuminanceSummary.of(real),
    )


def _group_real_values(
    real: Floats, generated_groups: Sequence[Hashable], real_groups: Sequence[Hashable]
) -> list[tuple[Floats, int]]:
    """Real luminance values of each group (prompt), and the number of its generated images."""
    members: dict[Hashable, list[float]] = {}
    for value, group in zip(real, real_groups, strict=True):
        members.setdefault(group, []).append(value)
    counts = Counter(generated_groups)
    if missing := [group for group in counts if group not in members]:
        raise ValueError(f"there is no real image for {missing[0]!r} to compare with")
    return [(np.array(values), counts[group]) for group, values in members.items()]


def _bootstrap_distances(strata: list[tuple[Floats, int]], seed: int, num_bootstraps: int) -> Floats:
    """W1 between independent samples of n and m values, both from the distribution of the m real ones.

    A stratum contains the m real values of one group and the number n of its generated images.

    Both sides are resampled (with replacement; Efron 1979, doi:10.1214/aos/1176344552), since the real values are also
    a sample. With few real values, the result is biased downward: by up to 20 % for m = 8, 10 % for 32, and a few %
    for 100.
    """
    rng = np.random.default_rng(seed)
    draw = rng.choice
    distances = []
    for _ in range(num_bootstraps):
        generated = np.concatenate([draw(real, n) for real, n in strata])
        distances.append(_wasserstein_1(generated, np.concatenate([draw(real, len(real)) for real, _ in strata])))
    return np.array(distances)


def prompt_share(luminance: npt.ArrayLike, groups: Sequence[Hashable]) -> float:
    """Fraction of the variance of luminance that is between groups: eta squared, from 0 to 1.

    With one group per prompt: 1 if only the prompt determines brightness, 0 if only the noise does. It is biased
    upward: random brightness of n images in k groups gives (k - 1) / (n - 1) on average. Constant luminance gives 0.

    Args:
        luminance: values [n].
        groups: the group of each value, n labels.

    Raises:
        ValueError: no values, or a different number of labels.
    """
    values = _as_luminance_array(luminance, "luminance")
    if len(groups) != len(values):
        raise ValueError(f"expected one group per value, got {len(groups)} groups for {len(values)} values")
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    index = np.array([numbers[group] for group in groups])
    centred = values - values.mean()
    total = float(centred @ centred)
    sizes = np.bincount(index)
    between = float((np.bincount(index, weights=centred) ** 2 / sizes).sum())
    # The mean of equal values is rounded, so residuals are not variance; and tiny squares underflow.
    return 0.0 if np.ptp(values) == 0 or total == 0 else min(between / total, 1.0)


def _as_luminance_array(values: npt.ArrayLike, name: str) -> Floats:
    """Convert luminance values to float64 [n], and refuse wrong shapes and values that are not finite."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name}: expected luminance values of shape [n], n > 0, got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: {np.count_nonzero(~np.isfinite(array))} of {len(array)} values are not finite")
    return array


def _wasserstein_1(a: Floats, b: Floats) -> float:
    """1-D Wasserstein distance between two sets of luminance values."""
    return float(import_extra("scipy.stats").wasserstein_distance(a, b))
