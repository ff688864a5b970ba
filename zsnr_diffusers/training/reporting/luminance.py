"""Brightness of a run's images by step, compared with its data, which shows when the conversion is complete."""

import dataclasses
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ...evaluation.luminance import Floats, LuminanceCoverage, LuminanceSummary, luminance_coverage, mean_luminance
from ...evaluation.plots import plot_luminance_over_steps
from ...utils.files import write_json
from ..config.data import is_encoded
from ..data.dataset import read_image
from ..data.encoded import EncodedRows
from ..data.held_out import draw_readable_rows
from ..task import Task

LUMINANCE_FILE, LUMINANCE_PLOT = "luminance.json", "luminance.png"
_STREAM = 5
"""Of randomness; see `draw_rows`."""
_DATA_IMAGES = 512
"""Maximum number of measured images of the data; more would change W1 less than the random variation of a few dozen
generated ones.
"""


def luminance_rows(task: Task, usable_rows: Sequence[int], count: int) -> list[int]:
    """Random data rows whose luminance is measured, the same at every step; all if there are no more than `count`."""
    return draw_readable_rows(task.rows, task.data, usable_rows, count, _STREAM)


def measure_data_luminance(task: Task, usable_rows: Sequence[int]) -> Floats:
    """Mean luminance of random images of a run's data, uncropped, float64 [n]."""
    if is_encoded(task.data.train_data_dir):
        return EncodedRows.open(Path(str(task.data.train_data_dir))).luminance
    rows, column = luminance_rows(task, usable_rows, _DATA_IMAGES), task.data.image_column
    with ThreadPoolExecutor() as pool:
        return mean_luminance(pool.map(lambda row: read_image(task.rows, column, row), rows))


def read_luminance_file(folder: Path) -> dict[int, LuminanceCoverage]:
    """Luminance by step from a run's folder; empty if there is no such file or it is damaged."""
    file = folder / LUMINANCE_FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return {int(step): _coverage_from_json(**values) for step, values in found.items()}
    except (ValueError, TypeError, AttributeError):
        return {}  # no reason to end a run


def add_luminance(folder: Path, step: int, generated: Floats, data: Floats) -> LuminanceCoverage:
    """Measure the luminance of images generated at a step, and add it to the run's file and plot.

    Values of later steps are dropped, since a run resumed from an earlier checkpoint repeats them.
    """
    before = {other: coverage for other, coverage in read_luminance_file(folder).items() if other < step}
    coverages = {**before, step: luminance_coverage(generated, data)}
    write_json(folder / LUMINANCE_FILE, {other: dataclasses.asdict(one) for other, one in coverages.items()})
    plot_luminance_over_steps(folder / LUMINANCE_PLOT, coverages)
    return coverages[step]


def describe_coverage(coverage: LuminanceCoverage) -> str:
    """Luminance coverage as one line of log."""
    ours, real = coverage.generated, coverage.real
    return (
        f"luminance p5..p95 {ours.p5:.2f}..{ours.p95:.2f}, data {real.p5:.2f}..{real.p95:.2f}; W1 {coverage.w1:.2f} "
        f"(floor {coverage.floor:.2f})"
    )


def _coverage_from_json(generated: dict[str, Any], real: dict[str, Any], **distances: float) -> LuminanceCoverage:
    """A `LuminanceCoverage` from its values in the run's JSON file."""
    return LuminanceCoverage(**distances, generated=LuminanceSummary(**generated), real=LuminanceSummary(**real))
