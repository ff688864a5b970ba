"""What comes out of a run: images on the way, and the result."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image


class Output(ABC):
    """What a run shows of its network and ships of it, for one kind of model."""

    @abstractmethod
    def export_scheduler(self) -> SchedulerMixin:
        """The scheduler of diffusers that the result is saved with."""

    @abstractmethod
    def pipeline(self, unet: Any) -> DiffusionPipeline:
        """The pipeline that the result will be, if these are its weights."""

    @abstractmethod
    def initial_pipeline(self, unet: Any) -> DiffusionPipeline | None:
        """The pipeline that the run starts from, around its network while nothing is trained; None for a new one."""

    @abstractmethod
    def validation_images(self, pipe: Any) -> tuple[list[list[Image.Image]], list[str] | None] | None:
        """Rows of images that one of these makes, and their labels; None where none are wanted."""

    @abstractmethod
    def generate_for_rows(self, pipe: Any, rows: Sequence[int]) -> list[Image.Image]:
        """An image, without guidance, under the conditions of each of some rows of the data.

        Guidance moves even a perfect model away from the data.
        """

    @abstractmethod
    def save(self, unet: Any) -> None:
        """Write the result, a pipeline, into the run's folder."""
