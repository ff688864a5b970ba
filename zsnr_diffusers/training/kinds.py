"""What each kind of configuration trains, and what comes out of it."""

from pathlib import Path

from .config import RunConfig
from .output import Output
from .pixels import PixelTask, PixelTrainingConfig
from .reporting.model_card import TrainingRecord
from .stable_diffusion import StableDiffusionTask, TrainingConfig
from .task import Task


def open_task(config: RunConfig) -> tuple[Task, Output]:
    """Open the model and the data of a run.

    Raises:
        ValueError: model or data cannot be used.
        OSError: they are not there.
    """
    record = TrainingRecord(Path(config.output_dir), config.max_train_steps, config.describe_loss())
    if isinstance(config, TrainingConfig):
        task = StableDiffusionTask(config)
        return task, task.create_output(config.of_result(), record)
    if isinstance(config, PixelTrainingConfig):
        pixels = PixelTask(config)
        return pixels, pixels.create_output(config, record)
    raise TypeError(f"{type(config).__name__} is neither a TrainingConfig nor a PixelTrainingConfig.")
