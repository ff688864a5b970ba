"""What has been measured, as tables and figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arms import ARMS, FEW_STEPS, GUIDED, KEPT, MAIN_STEPS, RESCALE, SAMPLERS, STEPS, UNGUIDED, Cell
from effects import FIXES, INTERACTIONS, Interval, Rows, contrast, difference, main_effect, together
from fashion_mnist import CLASSES
from judge import Row
from matplotlib.figure import Figure
from PIL import Image

from zsnr_diffusers.evaluation import sample_grid

FIGURES = {
    "frechet_distance": ("FD", "{:.2f}"),
    "kernel_distance": ("KID", "{:.2f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "accuracy": ("class accuracy", "{:.3f}"),
    "w1": ("W1", "{:.3f}"),
    "luminance_mean": ("luminance", "{:.3f}"),
}
"""Name in tables and format of each figure of a row."""

EFFECTS_ON = ("frechet_distance", "w1", "accuracy", "recall")
COLORS = {"epsilon": "tab:gray", "v": "tab:orange", "v-zero-snr": "tab:blue"}
LINES = {"leading": ":", "trailing": "--", "ours": "-"}


@dataclass
class Results:
    """All rows by arm, cell and seed; terminal invariance by arm and seed; and real images as a floor."""

    rows: Rows
    invariance: dict[tuple[str, int], float]
    real: Row


def write_report(results: Results, output_dir: Path, dependencies: str) -> None:
    """Write `tables.md`, `effects.png` and `samples.png`, of all that is there."""
    rows = results.rows
    parts = [dependencies, effects_table(rows, UNGUIDED), effects_table(rows, GUIDED), interactions_table(rows)]
    parts += [corrections_table(rows), invariance_table(results), cells_table(results)]
    text = "\n\n".join(part for part in parts if part)
    (output_dir / "tables.md").write_text(text + "\n", encoding="utf-8")
    if results.rows:
        draw_steps(results, output_dir / "effects.png")
        draw_samples(output_dir)
    print(f"Tables: {output_dir / 'tables.md'}; figures: {output_dir / 'effects.png'}, {output_dir / 'samples.png'}")


def effects_table(rows: Rows, guidance_scale: float) -> str:
    """Each fix alone, on top of all others, and on average over contexts."""
    whole = contrast(rows, together(), "w1", guidance_scale)
    if whole is None:
        return ""
    guided = guidance_scale != UNGUIDED
    title = f"guidance {guidance_scale:g}" if guided else "no guidance"
    lines = [f"## Effects, {MAIN_STEPS} steps, {title}, {whole.seeds} seeds", ""]
    for figure in EFFECTS_ON:
        name, shape = FIGURES[figure]
        body = []
        for fix in FIXES if guided else FIXES[:-1]:
            ways = (fix.alone and difference(fix.alone), fix.last and difference(fix.last), main_effect(fix))
            found = [contrast(rows, terms, figure, guidance_scale) if terms else None for terms in ways]
            body.append([fix.name, *(show(one, shape, sign=True) if one else "refused" for one in found)])
        total = contrast(rows, together(), figure, guidance_scale)
        body.append(["all together", "", "", show(total, shape, sign=True)])
        lines += [markdown([f"effect on {name}", "alone", "on top of all others", "average"], body), ""]
    return "\n".join(lines).rstrip()


def interactions_table(rows: Rows) -> str:
    """How much more two fixes give together than their sum."""
    body = []
    for name, terms in INTERACTIONS.items():
        found = [contrast(rows, terms, figure) for figure in EFFECTS_ON]
        if found[0] is None:
            return ""
        shown = zip(found, EFFECTS_ON, strict=True)
        body.append([name, *(show(one, FIGURES[figure][1], sign=True) for one, figure in shown)])
    head = ["interaction", *(FIGURES[figure][0] for figure in EFFECTS_ON)]
    return f"## Interactions, guidance {GUIDED:g}\n\n" + markdown(head, body)


def corrections_table(rows: Rows) -> str:
    """What corrects guidance at few steps, by network."""
    ways = {"none": (0.0, 0), "rescale": (RESCALE, 0), f"{KEPT} x {KEPT} kept": (0.0, KEPT), "both": (RESCALE, KEPT)}
    body = []
    for figure in EFFECTS_ON:
        for arm in ARMS:
            cells = [Cell("trailing", FEW_STEPS, GUIDED, *way) for way in ways.values()]
            body.append([FIGURES[figure][0], arm.name, *(mean(rows, arm.name, cell, figure) for cell in cells)])
    title = f"## Guidance {GUIDED:g} corrected, trailing, {FEW_STEPS} steps\n\n"
    return title + markdown(["", "network", *ways], body)


def mean(rows: Rows, arm: str, cell: Cell, figure: str) -> str:
    """A figure of a cell over all seeds that have it, with its interval."""
    found = [getattr(row, figure) for (name, one, _), row in rows.items() if (name, one) == (arm, cell)]
    return show(Interval.of(found), FIGURES[figure][1]) if found else "-"


def cells_table(results: Results) -> str:
    """Every cell that has been measured, with the seeds that it has."""
    body = []
    cells = sorted({cell for _, cell, _ in results.rows}, key=_order)
    for cell in cells:
        for arm in ARMS:
            seeds = sum((name, one) == (arm.name, cell) for name, one, _ in results.rows)
            if seeds:
                values = [mean(results.rows, arm.name, cell, figure) for figure in FIGURES]
                body.append([arm.name, *describe_cell(cell), str(seeds), *values])
    real = [shape.format(getattr(results.real, figure)) for figure, (_, shape) in FIGURES.items()]
    body.append(["real images", "", "", "", "", "", *real])
    head = ["network", "sampler", "steps", "guidance", "rescale, kept", "seeds"]
    floor = f"W1 of a perfect generator with as many images: {results.real.floor:.3f}."
    return f"## All cells\n\n{floor}\n\n" + markdown([*head, *(name for name, _ in FIGURES.values())], body)


def _order(cell: Cell) -> tuple[float, ...]:
    place = SAMPLERS.index(cell.sampler)
    return cell.guidance_scale, cell.keep_low_frequencies, cell.guidance_rescale, cell.steps, place


def describe_cell(cell: Cell) -> list[str]:
    """Sampler, steps, guidance, and what corrects the guidance."""
    remedies = [f"{cell.guidance_rescale:g}"] if cell.guidance_rescale else []
    remedies += [f"{cell.keep_low_frequencies} x {cell.keep_low_frequencies}"] if cell.keep_low_frequencies else []
    return [cell.sampler, str(cell.steps), f"{cell.guidance_scale:g}", ", ".join(remedies) or "-"]


def invariance_table(results: Results) -> str:
    """Terminal invariance of each network."""
    body = []
    for arm in ARMS:
        found = [share for (name, _), share in results.invariance.items() if name == arm.name]
        if found:
            body.append([arm.name, str(len(found)), show(Interval.of(found), "{:.4f}")])
    return "## Terminal invariance\n\n" + markdown(["network", "seeds", "fraction that depends on the noise"], body)


def show(interval: Interval | None, shape: str, sign: bool = False) -> str:
    """A mean with its interval; an effect with its sign, in bold if 0 lies outside the interval."""
    if interval is None:
        return "-"
    mean = shape.format(interval.mean)
    mean = f"+{mean}" if sign and interval.mean >= 0 else mean
    text = mean if interval.half_width is None else f"{mean} ± {shape.format(interval.half_width)}"
    return f"**{text}**" if sign and interval.is_clear else text


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table."""
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw_steps(results: Results, path: Path) -> None:
    """Fréchet distance and W1 over steps: without guidance, with it, and with guidance rescale."""
    settings = ((UNGUIDED, 0.0, "no guidance"), (GUIDED, 0.0, f"guidance {GUIDED:g}"))
    settings += ((GUIDED, RESCALE, f"guidance {GUIDED:g}, rescale {RESCALE:g}"),)
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    grid = figure.subplots(2, 3, sharex=True, sharey="row")
    for axes_of_figure, name in zip(grid, ("frechet_distance", "w1"), strict=True):
        for axes, (w, phi, title) in zip(axes_of_figure, settings, strict=True):
            for arm in ARMS:
                for sampler in SAMPLERS:
                    _draw_line(axes, results.rows, arm.name, sampler, (w, phi), name)
            floor = results.real.floor if name == "w1" else results.real.frechet_distance
            axes.axhline(floor, color="black", linewidth=0.8, label="real images")
            axes.set(title=title if name == "frechet_distance" else "", xscale="log", yscale="log")
            axes.set_xticks(STEPS, [str(n) for n in STEPS])
            axes.minorticks_off()
    for axes, name in zip(grid[:, 0], ("Fréchet distance", "W1 of luminance"), strict=True):
        axes.set_ylabel(name)
    for axes in grid[1]:
        axes.set_xlabel("steps")
    grid[0, 2].legend(fontsize="x-small", frameon=False, ncols=2)
    figure.savefig(path, dpi=110)


def _draw_line(axes: Any, rows: Rows, arm: str, sampler: str, guidance: tuple[float, float], figure: str) -> None:
    """Mean over seeds by steps, with the range of them."""
    points = []
    for n in STEPS:
        cell = Cell(sampler, n, *guidance)
        found = [getattr(row, figure) for (name, one, _), row in rows.items() if (name, one) == (arm, cell)]
        if found:
            points.append((n, min(found), sum(found) / len(found), max(found)))
    if points:
        steps, low, middle, high = zip(*points, strict=True)
        style = {"color": COLORS[arm], "linestyle": LINES[sampler]}
        axes.plot(steps, middle, marker=".", linewidth=1, label=f"{arm}, {sampler}", **style)
        axes.vlines(steps, low, high, color=COLORS[arm], linewidth=0.7)


def draw_samples(output_dir: Path) -> None:
    """An image of each class by every network: without guidance, with it, and corrected; of the first seed."""
    ways = {
        "no guidance": Cell("trailing", MAIN_STEPS, UNGUIDED),
        f"guidance {GUIDED:g}": Cell("trailing", MAIN_STEPS, GUIDED),
        f"guidance {GUIDED:g}, rescale": Cell("trailing", MAIN_STEPS, GUIDED, RESCALE),
        f"rescale, {KEPT} x {KEPT} kept": Cell("trailing", FEW_STEPS, GUIDED, RESCALE, KEPT),
    }
    rows, labels = [], []
    for arm in ARMS:
        for way, cell in ways.items():
            strips = sorted((output_dir / "results").glob(f"{arm.name}-[0-9]*/{cell.name}.png"))
            if strips:
                rows.append(_images_of(strips[0]))
                labels.append(f"{arm.name}: {way}")
    if rows:
        sample_grid(rows, labels, output_dir / "samples.png", cell=48)


def _images_of(strip: Path) -> list[Image.Image]:
    """The images side by side in a file, enlarged."""
    with Image.open(strip) as row:
        side = row.height
        images = [row.crop((i * side, 0, (i + 1) * side, side)) for i in range(len(CLASSES))]
    return [image.resize((48, 48), Image.Resampling.NEAREST) for image in images]
