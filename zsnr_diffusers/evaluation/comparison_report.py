"""A comparison of schedulers as a table, an image, an HTML page and JSON."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..utils.files import atomic_path, write_text
from ..utils.tables import Part, Report, Table, Text
from .plots import sample_grid

REFERENCE = "reference"
CELL = 256
"""Maximum side of an image in the grid and on the page, in pixels."""

_STYLE = (
    "body{font:14px system-ui,sans-serif;margin:2em}table{border-collapse:collapse}"
    "td,th{padding:4px;text-align:center;vertical-align:top}th.row{text-align:right;vertical-align:middle}small{color:#555}td.failed{color:#a00;"
    f"max-width:{CELL}px}}img{{display:block;max-width:{CELL}px}}"
)


@dataclass(frozen=True)
class ComparedSamples:
    """Result of one scheduler at one step count, or the reason for its failure.

    Attributes:
        scheduler: its name.
        steps: step count.
        images: one per prompt; empty if it failed.
        latent: per image, the RMS distance of the final latents (or pixels of a pixel-space model) to the reference,
            divided by the reference's standard deviation.
        pixel: per image, the RMS difference of pixels, from 0 to 1.
        seconds: per image, including text encoders and autoencoder.
        network_calls: per image; Heun's method needs two in most steps.
        error: why it failed, or None.
    """

    scheduler: str
    steps: int
    images: list[Image.Image] = field(default_factory=list, repr=False)
    latent: list[float] = field(default_factory=list)
    pixel: list[float] = field(default_factory=list)
    seconds: float = math.nan
    network_calls: int = 0
    error: str | None = None

    @property
    def distance(self) -> float:
        """Geometric mean of `latent` over the images; NaN if the scheduler failed.

        With guidance, some images lie between two outcomes; by chance, they would dominate an arithmetic mean.
        """
        return _geometric_mean(self.latent)

    def to_dict(self) -> dict[str, Any]:
        """Everything except the images, as JSON-serializable values."""
        if self.error:
            return {"error": self.error}
        return {
            "distance": self.distance,
            "latent_rms": self.latent,
            "pixel_rms": self.pixel,
            "seconds_per_image": self.seconds,
            "network_calls": self.network_calls,
        }


def _geometric_mean(values: list[float]) -> float:
    """NaN of no values, 0 if one is."""
    if not values:
        return math.nan
    return math.exp(sum(map(math.log, values)) / len(values)) if min(values) > 0 else 0.0


@dataclass(frozen=True)
class SchedulerComparison(Report):
    """Schedulers side by side, one row each, by step count; see `compare_schedulers`.

    Attributes:
        pipeline: name of its class.
        prompts: texts, class labels, or None for an unconditional pipeline.
        seed: of the first prompt.
        call_kwargs: of the pipeline's call.
        reference: many-step run; its distance to itself is 0.
        cells: by scheduler and step count.
    """

    pipeline: str
    prompts: tuple[Any, ...]
    seed: int
    call_kwargs: Mapping[str, Any]
    reference: ComparedSamples
    cells: list[ComparedSamples]

    def __repr__(self) -> str:
        return f"SchedulerComparison of {', '.join(self.by_scheduler())} at {', '.join(map(str, self.steps()))} steps"

    def by_scheduler(self) -> dict[str, dict[int, ComparedSamples]]:
        """Cells by scheduler and steps."""
        rows: dict[str, dict[int, ComparedSamples]] = {}
        for cell in self.cells:
            rows.setdefault(cell.scheduler, {})[cell.steps] = cell
        return rows

    def steps(self) -> list[int]:
        """The step counts in increasing order."""
        return sorted({cell.steps for cell in self.cells})

    def parts(self) -> Iterator[Part]:
        """Distances and seconds by scheduler and step count, and reasons for failures."""
        steps = self.steps()
        rows = tuple(
            (name, *(_distance_and_seconds(row[n]) if n in row else "" for n in steps))
            for name, row in self.by_scheduler().items()
        )
        yield Table(("distance (s per image)", *(f"{n} steps" for n in steps)), rows, "<" + ">" * len(steps))
        for cell in self.cells:
            if cell.error:
                yield Text(f"{cell.scheduler} at {cell.steps} steps failed: {cell.error}", "bad")
            elif cell.network_calls > cell.steps:
                calls = f"called the network {cell.network_calls} times"
                yield Text(f"{cell.scheduler} at {cell.steps} steps {calls}", "quiet")
        yield Text(
            f"distance: RMS to {self.reference.steps} steps, over the standard deviation of these; geometric mean of "
            f"{len(self.prompts)} image{'s' * (len(self.prompts) != 1)}. Samplers that add noise do not converge to "
            "the reference.",
            "quiet",
        )

    def grid(self) -> Image.Image:
        """The images, a row per prompt and scheduler, a column per step count, the reference to the right."""
        steps, rows, labels = self.steps(), [], []
        for i, prompt in enumerate(self.prompts):
            for name, row in self.by_scheduler().items():
                cells = [row.get(n) or ComparedSamples(name, n, error="not run") for n in steps]
                rows.append([_captioned(cell, i) for cell in (*cells, self.reference)])
                labels.append(name if prompt is None else f"{name}: {prompt}")
        columns = [*(f"{n} steps" for n in steps), f"{self.reference.steps} steps"]
        return sample_grid(rows, labels, column_labels=columns)

    def to_dict(self) -> dict[str, Any]:
        """Everything except the images, as JSON-serializable values."""
        return {
            "pipeline": self.pipeline,
            "prompts": [*self.prompts],
            "seed": self.seed,
            "call": {name: value for name, value in self.call_kwargs.items() if _is_plain(value)},
            "reference": {"steps": self.reference.steps, "seconds_per_image": self.reference.seconds},
            "schedulers": {
                name: {str(n): cell.to_dict() for n, cell in row.items()} for name, row in self.by_scheduler().items()
            },
        }

    def _repr_html_(self) -> str:
        return super()._repr_html_() + "".join(self._html_table(i) for i in range(len(self.prompts)))

    def to_html(self) -> str:
        """One page with embedded images, a table per prompt; all user input is escaped."""
        title = f"Schedulers compared: {html.escape(self.pipeline)}"
        tables = "".join(self._html_table(i) for i in range(len(self.prompts)))
        summary = html.escape(str(self))
        return (
            f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
            f"</head><body><h1>{title}</h1><pre>{summary}</pre>{tables}</body></html>\n"
        )

    def _html_table(self, i: int) -> str:
        """The table of one prompt."""
        steps, prompt = self.steps(), self.prompts[i]
        head = "".join(f"<th>{n} steps</th>" for n in steps) + f"<th>{self.reference.steps} steps</th>"
        lines: list[str] = []
        for name, row in self.by_scheduler().items():
            cells = "".join(_html_cell(row[n], i) if n in row else "<td></td>" for n in steps)
            many = "" if lines else _html_cell(self.reference, i)  # once, since it is the same in every row
            lines.append(f'<tr><th class="row">{html.escape(name)}</th>{cells}{many}</tr>')
        caption = "" if prompt is None else f"<h2>{html.escape(str(prompt))}, seed {self.seed + i}</h2>"
        return f"{caption}<table><tr><th></th>{head}</tr>{''.join(lines)}</table>"

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write comparison.png, comparison.html and comparison.json; returns the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / "comparison.png") as path:
            self.grid().save(path, format="png")
        write_text(folder / "comparison.html", self.to_html())
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)
        write_text(folder / "comparison.json", text + "\n")
        return folder


def _distance_and_seconds(cell: ComparedSamples) -> str:
    return "failed" if cell.error else f"{cell.distance:.4f} ({cell.seconds:.2f})"


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _caption(cell: ComparedSamples, i: int) -> str:
    """The caption of an image."""
    if cell.scheduler == REFERENCE:
        return f"reference, {cell.seconds:.2f} s"
    return f"{cell.latent[i]:.3f}, pixels {cell.pixel[i]:.3f}, {cell.seconds:.2f} s"


def _captioned(cell: ComparedSamples, i: int) -> Image.Image:
    """An image of the grid with its distances, or the reason for a failure."""
    font = ImageFont.load_default(size=12)
    if cell.error:
        picture = Image.new("RGB", (CELL, CELL), "#eee")
        text = "\n".join(cell.error[j : j + 36] for j in range(0, min(len(cell.error), 36 * 14), 36))
        ImageDraw.Draw(picture).multiline_text((8, 8), text, fill="#a00", font=font)
        return picture
    image = cell.images[i].convert("RGB")
    method = Image.Resampling.NEAREST if image.width < CELL else Image.Resampling.LANCZOS
    image = image.resize((CELL, max(1, round(CELL * image.height / image.width))), method)
    picture = Image.new("RGB", (CELL, image.height + 18), "white")
    picture.paste(image)
    ImageDraw.Draw(picture).text((0, image.height + 2), _caption(cell, i), fill="black", font=font)
    return picture


def _html_cell(cell: ComparedSamples, i: int) -> str:
    """A cell of the page."""
    if cell.error:
        return f'<td class="failed">{html.escape(cell.error)}</td>'
    file = io.BytesIO()
    cell.images[i].convert("RGB").save(file, format="png")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<td><img alt="" src="data:image/png;base64,{data}"><small>{_caption(cell, i)}</small></td>'
