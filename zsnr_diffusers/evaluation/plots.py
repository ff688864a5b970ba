"""Plots: luminance of image sets or over training, terms of bits/dim, a schedule, a grid of samples."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..utils.extras import import_extra

if TYPE_CHECKING:
    from torch import Tensor

    from .likelihood import BitsPerDim
    from .luminance import LuminanceCoverage

BINS = np.linspace(-1, 1, 51)
"""Bin edges of the histograms: the full luminance range, so that plots are comparable."""

LINE = 14
"""Height of a line of text, in pixels."""


def plot_luminance(
    path: str | PathLike[str],
    generated: Mapping[str, npt.ArrayLike],
    real: npt.ArrayLike | None = None,
    title: str = "Mean luminance per image",
) -> Path:
    """Draw one histogram per name, on a shared axis from black to white, with the real images outlined behind each.

    Histograms are densities, so sets of different sizes are comparable. A thin line marks each mean.

    Args:
        path: of the plot; its extension determines the format (png, pdf, svg). Its folder is created if necessary.
        generated: luminance values [n] in [-1, 1] of each named set of images, drawn from the top.
        real: luminance values [m] of the real images.
        title: above the plot.

    Returns:
        `path`.

    Raises:
        ValueError: nothing to draw.
        ImportError: matplotlib is not installed.
    """
    return _save_figure(_luminance_figure(generated, real, title), path)


def luminance_picture(generated: Mapping[str, npt.ArrayLike], real: npt.ArrayLike | None, title: str) -> Image.Image:
    """Draw what `plot_luminance` does, with the same errors, as a PIL image."""
    file = io.BytesIO()
    _luminance_figure(generated, real, title).savefig(file, format="png", dpi=100)
    return Image.open(file).convert("RGB")


def _luminance_figure(generated: Mapping[str, npt.ArrayLike], real: npt.ArrayLike | None, title: str) -> Any:
    """The matplotlib figure of `plot_luminance`: a row of histograms for each set of images."""
    if not generated or any(np.size(values) == 0 for values in generated.values()):
        raise ValueError("plot_luminance needs at least one set of images, and at least one value in each")
    # Use Figure instead of pyplot: no window system is needed and no global state changes.
    figure = import_extra("matplotlib.figure").Figure(figsize=(7, 1 + 1.4 * len(generated)), layout="constrained")
    rows = figure.subplots(len(generated), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, values) in zip(rows, generated.items(), strict=True):
        _draw_histogram(axes, name, np.clip(values, -1, 1), None if real is None else np.clip(real, -1, 1))
    rows[0].set_title(title)
    rows[-1].set_xlim(-1, 1)
    rows[-1].set_xlabel("mean luminance (-1 black, 1 white)")
    return figure


def plot_luminance_over_steps(
    path: str | PathLike[str],
    coverages: Mapping[int, LuminanceCoverage],
    title: str = "Mean luminance per image over training",
) -> Path:
    """Draw the 5th, 50th and 95th percentile over training steps with those of the real images, and W1 below.

    Args:
        path: of the plot, as in `plot_luminance`.
        coverages: by step, in order; all with the same real images.
        title: above the plot.

    Returns:
        `path`.

    Raises:
        ValueError: nothing to draw.
        ImportError: matplotlib is not installed.
    """
    if not coverages:
        raise ValueError("plot_luminance_over_steps needs at least one step")
    figure = import_extra("matplotlib.figure").Figure(figsize=(7, 5), layout="constrained")
    band, distance = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    steps, found = list(coverages), list(coverages.values())
    low, middle, high = ([getattr(one.generated, name) for one in found] for name in ("p5", "p50", "p95"))
    band.fill_between(steps, low, high, color="tab:blue", alpha=0.3, label="generated, 5th to 95th percentile")
    band.plot(steps, middle, ".-", color="tab:blue", linewidth=1, label="median")
    ends = (found[0].real.p5, found[0].real.p95)
    band.hlines(
        ends,
        steps[0],
        steps[-1],
        color="black",
        linewidth=1,
        linestyle="--",
        label="real images, 5th to 95th percentile",
    )
    band.set(title=title, ylim=(-1, 1), ylabel="mean luminance")
    distance.plot(steps, [one.w1 for one in found], ".-", color="tab:blue", linewidth=1, label="W1 to the real images")
    distance.plot(steps, [one.floor for one in found], color="black", linewidth=1, linestyle="--", label="its floor")
    distance.set(xlabel="step", ylabel="W1")
    distance.set_ylim(bottom=0)
    for axes in (band, distance):
        axes.legend(loc="upper right", fontsize="small", frameon=False)
    return _save_figure(figure, path)


def plot_validation_loss(
    path: str | PathLike[str],
    losses: Mapping[int, Mapping[str, float]],
    title: str = "Loss on images that are kept aside",
) -> Path:
    """Draw the mean validation loss, that at the last timestep and the training loss over steps.

    Args:
        path: of the plot, as in `plot_luminance`.
        losses: `mean`, `last` and, where there is one, `training` by step, in order.
        title: above the plot.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = import_extra("matplotlib.figure").Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    kinds = {
        "mean": ("validation, mean over timesteps", "tab:blue"),
        "last": ("validation, last timestep", "tab:red"),
        "training": ("training, mean of the steps before", "black"),
    }
    for name, (label, color) in kinds.items():
        steps = [step for step, found in losses.items() if name in found]
        values = [losses[step][name] for step in steps]
        axes.plot(steps, values, ".-", color=color, linewidth=1, label=label)
    axes.set(title=title, xlabel="step", ylabel="loss")
    axes.legend(loc="upper right", fontsize="small", frameon=False)
    return _save_figure(figure, path)


def _save_figure(figure: Any, path: str | PathLike[str]) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return Path(path)


def _draw_histogram(axes: Any, name: str, values: npt.NDArray[Any], real: npt.NDArray[Any] | None) -> None:
    """Draw the histogram of one set of luminance values, with that of the real images outlined behind it."""
    axes.hist(values, BINS, density=True, color="tab:blue", alpha=0.7, label=f"{name} (n = {values.size})")
    axes.axvline(values.mean(), color="tab:blue", linewidth=1)
    if real is not None:
        axes.hist(real, BINS, density=True, histtype="step", color="black", zorder=0, label=f"real (n = {real.size})")
        axes.axvline(real.mean(), color="black", linewidth=1, zorder=0)
    axes.set_yticks([])
    axes.legend(loc="upper right", fontsize="small", frameon=False)


def plot_bits_per_dim(
    path: str | PathLike[str], results: Mapping[str, BitsPerDim], title: str = "Bits/dim by timestep"
) -> Path:
    """Draw the contribution of each timestep to bits/dim, one line per name, on two logarithmic axes.

    Timesteps count from 1 here, as in the papers. Unvisited timesteps and terms of 0 are omitted.

    Args:
        path: of the plot, as in `plot_luminance`.
        results: results of `bits_per_dim`, by name.
        title: above the plot.

    Returns:
        `path`.

    Raises:
        ValueError: nothing to draw.
        ImportError: matplotlib is not installed.
    """
    if not results:
        raise ValueError("plot_bits_per_dim needs at least one result")
    figure = import_extra("matplotlib.figure").Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, result in results.items():
        (drawn,) = np.nonzero(result.terms > 0)
        axes.loglog(drawn + 1, result.terms[drawn], linewidth=1, label=f"{name} ({result.total:.3f} bits/dim)")
    axes.set(title=title, xlabel="timestep (1: the decoder)", ylabel="bits/dim")
    axes.legend(fontsize="small", frameon=False)
    return _save_figure(figure, path)


def plot_schedule(
    path: str | PathLike[str],
    alphas_cumprod: Tensor,
    visited: Mapping[int, Sequence[float]],
    title: str = "Signal-to-noise ratio",
) -> Path:
    """Draw the signal-to-noise ratio over timesteps on a logarithmic axis, and the timesteps that sampling visits.

    A ratio of zero cannot be shown on this axis: it is drawn on a labeled line below all others.

    Args:
        path: of the plot, as in `plot_luminance`.
        alphas_cumprod: alpha_bar, shape [T], below 1.
        visited: timesteps in [0, T-1] for each step count; the nearest ones are marked.
        title: above the plot.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import torch

    from ..core import noise_level, snr

    timesteps = np.arange(len(alphas_cumprod))
    ratios = torch.as_tensor(snr(noise_level(alphas_cumprod, torch.from_numpy(timesteps)))).numpy()
    floor = ratios[ratios > 0].min() / 100
    drawn = np.where(ratios > 0, ratios, floor)
    figure = import_extra("matplotlib.figure").Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(timesteps, drawn, color="black", linewidth=1, label=f"T = {len(timesteps)}")
    if (ratios == 0).any():
        axes.axhline(floor, color="tab:red", linewidth=1, linestyle="--", label="zero")
    for row, (n, steps) in enumerate(visited.items()):
        nearest = np.clip(np.rint(steps), 0, len(timesteps) - 1).astype(int)
        # Concentric rings, where several step counts visit the same timestep.
        size = 4 + 5 * (len(visited) - 1 - row)
        axes.plot(nearest, drawn[nearest], "o", fillstyle="none", markersize=size, label=f"{n} steps")
    axes.set(title=title, xlabel="timestep", ylabel="signal-to-noise ratio")
    axes.legend(fontsize="small", frameon=False)
    return _save_figure(figure, path)


def sample_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str] | None = None,
    path: str | PathLike[str] | None = None,
    cell: int | None = None,
    gap: int = 4,
    column_labels: Sequence[str] | None = None,
) -> Image.Image:
    """Lay out images on white: a row per prompt, a column per seed, and the prompt to the left.

    Args:
        rows: the images of each row; rows may differ in length.
        row_labels: one text per row, wrapped to the width of one cell.
        path: also save the grid here.
        cell: side of the square that each image is fitted into, in pixels; by default the largest image's side.
        gap: pixels between the cells and around the grid.
        column_labels: one short text per column, on a line above it.

    Raises:
        ValueError: no images, or the number of labels differs from rows or columns.
    """
    images = [image for row in rows for image in row]
    if not images:
        raise ValueError("sample_grid needs at least one image")
    if row_labels is not None and len(row_labels) != len(rows):
        raise ValueError(f"expected one label per row, got {len(row_labels)} for {len(rows)} rows")
    columns = max(len(row) for row in rows)
    if column_labels is not None and len(column_labels) != columns:
        raise ValueError(f"expected one label per column, got {len(column_labels)} for {columns} columns")
    side = cell or max(max(image.size) for image in images)
    step = side + gap
    left = gap + (0 if row_labels is None else max(side, 96) + gap)
    top = gap + (0 if column_labels is None else LINE + gap)
    grid = Image.new("RGB", (left + columns * step, top + len(rows) * step), "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            fitted = (
                image
                if image.size == (side, side)
                else ImageOps.pad(image.convert("RGB"), (side, side), color="white")
            )
            grid.paste(fitted, (left + j * step, top + i * step))
    for i, label in enumerate(row_labels or ()):
        _draw_text(grid, label, (gap, top + i * step), left - 2 * gap)
    for j, label in enumerate(column_labels or ()):
        _draw_text(grid, label, (left + j * step, gap), grid.width)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        grid.save(path)
    return grid


def _draw_text(grid: Image.Image, text: str, corner: tuple[int, int], width: int) -> None:
    """Write a label onto a grid of samples, wrapped to `width` pixels."""
    font = ImageFont.load_default(size=12)
    wrapped = textwrap.fill(text, max(width // 7, 1))  # 7 pixels: a wide letter of the default font at this size
    ImageDraw.Draw(grid).multiline_text(corner, wrapped, fill="black", font=font)
