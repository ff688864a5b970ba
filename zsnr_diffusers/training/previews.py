"""Previews of a run: what its pipeline will paint once it is saved."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..evaluation.plots import sample_grid
from .task import Task


def save_preview(accelerator: Accelerator, task: Task, unet: Any, step: int) -> Path | None:
    """Sample what the task shows with the scheduler and spacing that are shipped.

    Returns:
        The picture's path, None if the task shows nothing.
    """
    with accelerator.autocast():
        shown = task.preview(unet, step)
    if shown is None:
        return None
    path = Path(task.config.output_dir, "previews", f"step-{step:06d}.png")
    sample_grid(*shown, path)
    return path
