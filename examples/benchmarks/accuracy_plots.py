"""The images of the studies of accuracy."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

OURS = ("ZeroSNR", "FlowMatchMultistep")
"""What the names of ours begin with, which are drawn thick."""
ZERO_SNR_TITLE = "Distance to the exact probability-flow ODE at zero terminal SNR"


def plot_errors(
    path: Path, curves: Mapping[str, Sequence[float]], steps: Sequence[int], title: str = ZERO_SNR_TITLE
) -> None:
    """Error against the step count, both logarithmic."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    _draw(axes, curves, steps)
    axes.set(
        xlabel="network calls (lines end where a sampler fails)",
        ylabel="error to the exact ODE, in units of the data's spread (geometric mean)",
    )
    axes.set_title(title)
    axes.legend(fontsize="small", loc="lower left")
    figure.savefig(path, dpi=150)


def plot_guided(path: Path, curves: Mapping[str, Mapping[str, Sequence[float]]], steps: Sequence[int]) -> None:
    """The same side by side for each guidance scale, which `curves` has by its name."""
    figure = Figure(figsize=(1.5 + 4.5 * len(curves), 5.5), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (scale, by_name) in zip(panels, curves.items(), strict=True):
        _draw(axes, by_name, steps)
        axes.set(title=f"guidance {scale}", xlabel="steps")
    panels[0].set_ylabel("error to the exact guided ODE, in units of the data's spread")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=150)


def _draw(axes: Axes, curves: Mapping[str, Sequence[float]], steps: Sequence[int]) -> None:
    for name, values in curves.items():
        ours = name.startswith(OURS)
        axes.loglog(steps, values, "o-" if ours else "s--", linewidth=3 if ours else 1.2, markersize=4, label=name)
    axes.set_xticks(steps, map(str, steps))
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def plot_recovered(path: Path, recovered: Mapping[str, Any], n: int) -> None:
    """Recovered over true standard deviation by scale; ours are thick."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for name, by_n in recovered["ratios"].items():
        ours = name.startswith("ours")
        axes.semilogx(recovered["scales"], by_n[n], "-" if ours else "--", linewidth=3 if ours else 1.2, label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(
        xlabel="standard deviation of the mode: detail to brightness", ylabel="recovered over true", ylim=(0.3, 1.2)
    )
    axes.set_title(f"Standard deviation of Gaussian data after {n} steps")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
