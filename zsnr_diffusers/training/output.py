"""Outputs of a run: previews and the result."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image


class Output(ABC):
    """Previews and export of a run, for one kind of model."""

    @abstractmethod
    def export_scheduler(self) -> SchedulerMixin:
        """The diffusers scheduler that the trained pipeline is saved with."""

    @abstractmethod
    def pipeline(self, unet: Any) -> DiffusionPipeline:
        """The trained pipeline around a UNet, as it would be exported."""

    @abstractmethod
    def initial_pipeline(self, unet: Any) -> DiffusionPipeline | None:
        """The pipeline that training starts from, around the run's still untrained UNet; None for a new network."""

    @abstractmethod
    def validation_images(self, pipe: Any) -> tuple[list[list[Image.Image]], list[str] | None] | None:
        """Rows of validation images from a pipeline, and their labels; None if none are wanted."""

    @abstractmethod
    def generate_for_rows(self, pipe: Any, rows: Sequence[int]) -> list[Image.Image]:
        """Generate an image without guidance for the caption or class of each of these data rows.

        Guidance shifts even a perfect model's distribution away from the data.
        """

    @abstractmethod
    def save(self, unet: Any) -> None:
        """Write the trained pipeline or adapter into the run's folder."""
