"""What a run trains, and on what: all that depends on the kind of model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from PIL import Image
from torch import Tensor

from ..schedulers.base import ZeroSNRScheduler
from .config import RunConfig
from .data.dataset import Images, Rows
from .data.loader import Batch, Samples


class Task(ABC):
    """Opens model and data as a configuration says, and knows what a training step is of them.

    `unet` is the network that is trained, `schedule` what it is trained on, and `rows` are the data.

    Raises:
        ValueError: model or data cannot be used.
        OSError: they are not there.
    """

    config: RunConfig
    unet: ModelMixin
    schedule: ZeroSNRScheduler
    rows: Rows

    @abstractmethod
    def __init__(self, config: Any) -> None: ...

    @abstractmethod
    def base_networks(self) -> Mapping[str, torch.nn.Module]:
        """The networks that the run starts from, by name; none of them new."""

    @abstractmethod
    def plan(self, samples: Any) -> dict[str, str]:
        """What is done to which model, on which samples, line by line."""

    @abstractmethod
    def samples(self, images: Images, global_batch: int = 1) -> Samples:
        """The training samples of the rows that can be used, from `check_images`."""

    def look_up(self, accelerator: Accelerator, samples: Any) -> None:  # noqa: B027
        """Before the plan: find out what is stored of the work of parts that are not trained; nothing is written."""

    def prepare(self, accelerator: Accelerator, samples: Any) -> Samples:
        """Bring parts that are not trained to where they work, or store what they give.

        Returns:
            The samples to train on.
        """
        return samples

    @abstractmethod
    def x_0(self, batch: Batch, device: torch.device) -> Tensor:
        """What noise is added to, float32 [B, C, H, W], without gradients."""

    @abstractmethod
    def predict(self, unet: Any, x_t: Tensor, batch: Batch) -> Tensor:
        """The network's output for x_t under the conditions of a batch."""

    @abstractmethod
    def shipped_scheduler(self) -> SchedulerMixin:
        """The scheduler of diffusers that the result is saved with."""

    @abstractmethod
    def pipeline(self, unet: Any) -> DiffusionPipeline:
        """What the result will be, if these are its weights."""

    @abstractmethod
    def base_pipeline(self, unet: Any) -> DiffusionPipeline | None:
        """What the run starts from, around its network while nothing is trained; None for a new network."""

    @abstractmethod
    def preview(self, pipe: Any) -> tuple[list[list[Image.Image]], list[str] | None] | None:
        """Rows of images that one of these makes, and their labels; None where none are wanted."""

    @abstractmethod
    def generate_for_rows(self, pipe: Any, rows: Sequence[int]) -> list[Image.Image]:
        """An image, without guidance, under the conditions of each of some rows of the data.

        Guidance moves even a perfect model away from the data.
        """

    @abstractmethod
    def save(self, unet: Any) -> None:
        """Write the result, a pipeline, into the run's folder."""
