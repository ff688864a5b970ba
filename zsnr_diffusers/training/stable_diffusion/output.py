"""Outputs of training Stable Diffusion: previews for prompts and captions, a pipeline or a LoRA."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin
from PIL import Image

from ...evaluation.generation import generate_images
from ...guidance.mixin import GuidanceRescaleMixin
from ...schedulers.flow import FlowMatchScheduler
from ..data.dataset import Rows, captions_as_list
from ..output import Output
from ..reporting.model_card import TrainingRecord
from ..schedule import preview_scheduler
from .base import Base
from .config import AdapterConfig, GuidedOutputConfig
from .embedding_cache import EmbeddingCache
from .export import export_scheduler, kept_low_frequencies, save_pipeline_folder
from .lora import describe_adapter, save_lora_folder
from .previews import Preview


@dataclass
class StableDiffusionOutput(Output):
    """A pipeline around the trained UNet, or a LoRA of the base."""

    config: GuidedOutputConfig
    adapter: AdapterConfig
    base: Base
    embedding_cache: EmbeddingCache
    resolution: int
    """Of images, pixels per side."""
    rows: Rows
    """Of the data, with their captions."""
    caption_column: str
    clip_skip: int | None
    record: TrainingRecord

    def export_scheduler(self) -> SchedulerMixin:
        """See `export.export_scheduler`."""
        return export_scheduler(self.base)

    def pipeline(self, unet: Any) -> Any:
        """The trained pipeline with the recommended guidance and the exported scheduler, or our flow one."""
        flow = isinstance(self.base.schedule, FlowMatchScheduler)
        scheduler = self.base.schedule if flow else self.export_scheduler()
        pipe = self._build_pipeline(self.base.architecture.rescaled_class, unet=unet, scheduler=scheduler)
        pipe.default_guidance_rescale = self.config.guidance_rescale
        pipe.default_keep_low_frequencies = kept_low_frequencies(self.base, self.config)
        return pipe

    def initial_pipeline(self, unet: Any) -> Any:
        """The base's pipeline with its own scheduler, without guidance rescale."""
        own = preview_scheduler(self.base.pipeline.scheduler)
        return self._build_pipeline(self.base.architecture.pipeline_class, unet=unet, scheduler=own)

    def _build_pipeline(self, cls: Any, **components: Any) -> Any:
        """A pipeline of class `cls` from the base's components, replaced by the given ones."""
        return cls(**{**self.base.pipeline.components, **components}, **self.base.architecture.pipeline_kwargs())

    def validation_images(self, pipe: Any) -> tuple[list[list[Image.Image]], list[str] | None] | None:
        """Images of a row per preview and a column per seed."""
        previews = self.config.previews
        if not previews:
            return None
        with self.embedding_cache.ready_to_generate():
            return [self._preview_images(pipe, preview) for preview in previews], [one.prompt for one in previews]

    def _preview_images(self, pipe: Any, preview: Preview) -> list[Image.Image]:
        """An image for each seed of a preview."""
        settings = {
            "num_inference_steps": self.config.num_inference_steps,
            "guidance_scale": self.config.guidance_scale,
            "height": self.resolution,
            "width": self.resolution,
            **dict(preview.settings),
        }
        images: list[Image.Image] = pipe(
            preview.prompt,
            num_images_per_prompt=len(preview.seeds),
            generator=[torch.Generator().manual_seed(seed) for seed in preview.seeds],
            clip_skip=self.clip_skip,
            **settings,
        ).images
        return images

    def generate_for_rows(self, pipe: Any, rows: Sequence[int]) -> list[Image.Image]:
        """An image for the first caption of each data row."""
        captions = [captions_as_list(caption)[0] for caption in self.rows[list(rows)][self.caption_column]]
        unguided: dict[str, Any] = {"guidance_scale": 1.0, "guidance_rescale": 0.0}
        if isinstance(pipe, GuidanceRescaleMixin):  # not the base's own, which has a diffusers class
            unguided["keep_low_frequencies"] = 0
        with self.embedding_cache.ready_to_generate():
            return generate_images(
                pipe,
                captions,
                range(len(rows)),
                progress=False,
                num_inference_steps=self.config.num_inference_steps,
                **unguided,
                clip_skip=self.clip_skip,
                height=self.resolution,
                width=self.resolution,
            )

    def save(self, unet: Any) -> None:
        """Write the trained LoRA or pipeline; see `save_lora_folder` and `save_pipeline_folder`."""
        if self.adapter.trains_adapter:
            adapter = describe_adapter(unet, self.adapter)
            save_lora_folder(self.base, self.pipeline(unet), self.config, adapter, self.record)
        else:
            save_pipeline_folder(self.base, unet, self.config, self.record)
