"""Outputs of a pixel-space run: previews, `DDPMPipeline` or `ClassConditionalPipeline` with its code, model card."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from diffusers import DDPMPipeline, SchedulerMixin
from PIL import Image

from ...class_conditional import ClassConditionalPipeline
from ...hub.custom_pipeline import write_custom_pipeline
from ...schedulers.flow import FlowMatchScheduler
from ...schedulers.stock import stock_flow_scheduler, stock_scheduler
from ..output import Output
from ..reporting.model_card import TrainingRecord, training_model_card
from ..schedule import Schedule, preview_scheduler
from .classes import Classes
from .config import PixelOutputConfig

_MOST_CLASSES_SHOWN, _AT_ONCE = 10, 8


@dataclass
class PixelOutput(Output):
    """A pipeline around the trained network, of classes or not."""

    config: PixelOutputConfig
    schedule: Schedule
    base: Any
    """The pipeline that the run starts from; None for a new network."""
    classes: Classes | None
    subject: str
    """What was trained, in words."""
    dataset_name: str | None
    record: TrainingRecord

    def export_scheduler(self) -> SchedulerMixin:
        """Stock's `DDPMScheduler`, the paper's sampler in its thousand steps; see `stock_scheduler` for fewer.

        Of a flow model DPM++ 2M over flow times, see `stock_flow_scheduler`.
        """
        if isinstance(self.schedule, FlowMatchScheduler):
            return stock_flow_scheduler(self.schedule, takes_generator=True)
        spacing = "trailing" if self.schedule.config["rescale_betas_zero_snr"] else "leading"
        return stock_scheduler(self.schedule, timestep_spacing=spacing)

    def pipeline(self, unet: Any) -> ClassConditionalPipeline:
        """The trained pixel pipeline with the exported scheduler; for a flow model with ours."""
        flow = isinstance(self.schedule, FlowMatchScheduler)
        return ClassConditionalPipeline(unet, self.schedule if flow else self.export_scheduler())

    def initial_pipeline(self, unet: Any) -> ClassConditionalPipeline | None:
        """The base's pipeline with its own scheduler; None for a new network."""
        return ClassConditionalPipeline(unet, preview_scheduler(self.base.scheduler)) if self.base else None

    def validation_images(self, pipe: Any) -> tuple[list[list[Image.Image]], list[str] | None] | None:
        """Images of a row per class and a column per seed."""
        seeds = range(self.config.validation_images)
        if not seeds:
            return None
        if self.classes is None:
            return [self._generate(pipe, [None] * len(seeds))], None
        shown = range(min(self.classes.count, _MOST_CLASSES_SHOWN))
        return [self._generate(pipe, [label] * len(seeds)) for label in shown], [self.classes.name(i) for i in shown]

    def generate_for_rows(self, pipe: Any, rows: Sequence[int]) -> list[Image.Image]:
        """An image of each data row's class, or an unconditional one."""
        return self._generate(pipe, [None if self.classes is None else self.classes.labels[row] for row in rows])

    def _generate(self, pipe: Any, labels: Sequence[int | None]) -> list[Image.Image]:
        """An image per label, from seeds 0, 1, ...; the labels are all None or none of them."""
        images: list[Image.Image] = []
        for first in range(0, len(labels), _AT_ONCE):
            seeds = range(first, min(first + _AT_ONCE, len(labels)))
            images += pipe(
                None if labels[first] is None else [labels[seed] for seed in seeds],
                batch_size=len(seeds),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                num_inference_steps=self.config.num_inference_steps,
            ).images
        return images

    def save(self, unet: Any) -> None:
        """Write the trained pipeline and its card into the run's folder."""
        folder, scheduler = self.record.folder, self.export_scheduler()
        (folder / "README.md").write_text(self._model_card(scheduler), encoding="utf-8")
        if self.classes is None:
            DDPMPipeline(unet, scheduler).save_pretrained(folder)
            return
        pipe = ClassConditionalPipeline(unet, scheduler)
        write_custom_pipeline(pipe, folder)
        pipe.save_pretrained(folder)

    def _model_card(self, scheduler: SchedulerMixin) -> str:
        """Text of the trained pixel model's card."""
        datasets = [self.dataset_name] if self.dataset_name and not Path(self.dataset_name).exists() else None
        data = huggingface_hub.ModelCardData(pipeline_tag="unconditional-image-generation", datasets=datasets)
        flow, classes = isinstance(self.schedule, FlowMatchScheduler), self.classes
        rows = {} if flow else {"variance": f"`{self.schedule.config['variance_type']}`"}
        if classes is not None:
            named = ", ".join(f"{label} {name}" for label, name in enumerate(classes.names or ()))
            rows["classes"] = named or f"0 to {classes.count - 1}"
        usage = (_UNCONDITIONAL if classes is None else _CONDITIONAL).format(
            name=self.record.folder.name,
            steps=30 if flow else 1000,
            sampler="FlowMatchMultistepScheduler" if flow else "ZeroSNRMultistepScheduler",
        )
        return training_model_card(self.record, self.schedule, scheduler, data, self.subject, rows, usage)


_UNCONDITIONAL = """\
```python
from diffusers import DDPMPipeline

pipe = DDPMPipeline.from_pretrained("{name}")
image = pipe(num_inference_steps={steps}).images[0]
```

For fewer steps: `pipe.scheduler = zsnr_diffusers.{sampler}.from_config(pipe.scheduler.config)`.
"""

_CONDITIONAL = """\
```python
from zsnr_diffusers import ClassConditionalPipeline, {sampler}

pipe = ClassConditionalPipeline.from_pretrained("{name}")
image = pipe(class_labels=0, num_inference_steps={steps}).images[0]
pipe.scheduler = {sampler}.from_config(pipe.scheduler.config)
image = pipe(class_labels=0, num_inference_steps=20, guidance_scale=1.5).images[0]
```

Without zsnr_diffusers: `DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)`.
"""
