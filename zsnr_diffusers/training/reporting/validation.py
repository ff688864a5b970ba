"""Previews of a run: sample images, and their brightness compared with the data's."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from ...evaluation.luminance import Floats, LuminanceCoverage, mean_luminance
from ...evaluation.plots import luminance_picture, sample_grid
from ..config import OutputConfig
from ..output import Output
from ..task import Task
from .luminance import add_luminance, describe_coverage, luminance_rows, measure_data_luminance

_COLUMNS = 4


def first_and_last_preview(folder: Path) -> list[Path]:
    """Paths of a run's first and last preview: of its base, if there was one, and of the result."""
    paths = sorted(folder.glob("previews/step-*.png"))
    return paths if len(paths) < 2 else [*[path for path in paths[:1] if path.stem == "step-000000"], paths[-1]]


class ValidationLogger:
    """Previews of a run, each `previews/step-000500.png` in its folder, with the luminance files.

    Args:
        config: with the folder and the number of images whose luminance is measured.
        accelerator: of the run.
        task: of the run.
        output: of the task, which generates.
        usable_rows: indices of the rows that are trained on.
    """

    def __init__(
        self,
        config: OutputConfig,
        accelerator: Accelerator,
        task: Task,
        output: Output,
        usable_rows: Sequence[int],
    ) -> None:
        self.folder, self.images = Path(config.output_dir), config.luminance_images
        self.accelerator, self.task, self.output = accelerator, task, output
        self.usable_rows = usable_rows

    @functools.cached_property
    def _luminance_rows(self) -> list[int]:
        """Data rows for whose captions or classes images are generated at every validation."""
        return luminance_rows(self.task, self.usable_rows, self.images)

    @functools.cached_property
    def _data_luminance(self) -> Floats:
        """Mean luminance of the data's images, float64 [n]."""
        return measure_data_luminance(self.task, self.usable_rows)

    def save(self, unet: Any, step: int) -> Path | None:
        """Generate validation images, save them as a preview, and log their luminance.

        Args:
            unet: with the exported weights.
            step: of the weights.

        Returns:
            The image's path, None if nothing is to be shown.
        """
        output = self.output
        pipe = output.pipeline(unet) if step else output.initial_pipeline(unet)
        if pipe is None:
            return None
        pipe.set_progress_bar_config(desc=f"preview at step {step}", leave=False)
        with self.accelerator.autocast():
            shown = output.validation_images(pipe)
            generated = output.generate_for_rows(pipe, self._luminance_rows) if self._luminance_rows else []
        if not generated:
            return None if shown is None else self._save_preview(sample_grid(*shown), step)
        rows = [generated[first : first + _COLUMNS] for first in range(0, len(generated), _COLUMNS)]
        grid = sample_grid(rows[:_COLUMNS]) if shown is None else sample_grid(*shown)
        luminance = mean_luminance(generated)
        self._log_luminance(step, add_luminance(self.folder, step, luminance, self._data_luminance))
        histogram = luminance_picture({f"step {step}": luminance}, self._data_luminance, "Mean luminance per image")
        return self._save_preview(_side_by_side(grid, histogram), step)

    def _save_preview(self, image: Image.Image, step: int) -> Path:
        """Save a preview image of a step; returns its path."""
        path = self.folder / "previews" / f"step-{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        return path

    def _log_luminance(self, step: int, coverage: LuminanceCoverage) -> None:
        """Send a step's luminance to terminal and trackers."""
        tqdm.write(f"step {step}: {describe_coverage(coverage)}")
        figures = {"p5": coverage.generated.p5, "p95": coverage.generated.p95, "w1": coverage.w1}
        self.accelerator.log({f"luminance/{name}": value for name, value in figures.items()}, step=step)


def _side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two images side by side on white."""
    both = Image.new("RGB", (left.width + right.width, max(left.height, right.height)), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both
