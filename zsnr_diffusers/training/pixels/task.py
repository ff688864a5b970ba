"""Training a network of pixels, with classes or without."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor

from ...class_conditional import ClassConditionalPipeline
from ...hub.model_card import terminal_snr
from ...schedulers import ZeroSNRDDPMScheduler
from ..data.dataset import Images, noise_rows, open_rows
from ..data.loader import Batch
from ..task import Task
from .base import load_base, new_unet
from .classes import read_classes
from .config import PixelTrainingConfig
from .output import save_pipeline_folder, shipped_scheduler
from .samples import LabelledSamples

_MOST_CLASSES_SHOWN, _AT_ONCE = 10, 8


class PixelTask(Task):
    """A new network of pixels, or one to go on from."""

    config: PixelTrainingConfig
    unet: UNet2DModel

    def __init__(self, config: PixelTrainingConfig) -> None:
        self.config = config
        base, column = load_base(config), config.class_column
        self.base = base
        if config.has_data:
            self.rows = open_rows(config, [] if column is None else ["class_column"])
        else:
            self.rows = noise_rows(config.image_column, config.resolution or 32, **({column: 0} if column else {}))
        count = base.unet.config.num_class_embeds - 1 if base and column else None
        self.classes = None if column is None else read_classes(self.rows, column, count)
        self.unet = base.unet if base else new_unet(config, None if self.classes is None else self.classes.count)
        self.schedule = self._schedule(base)
        config.check_schedule(terminal_snr(self.schedule) == 0)

    def _schedule(self, base: Any) -> ZeroSNRDDPMScheduler:
        config = self.config
        facts = {name: getattr(config, name) for name in ("beta_schedule", "beta_start", "beta_end")}
        return ZeroSNRDDPMScheduler.from_config(
            facts if base is None else base.scheduler.config,
            prediction_type=config.prediction_type,
            rescale_betas_zero_snr=config.rescale_betas_zero_snr,
            variance_type=config.variance_type,
            clip_sample=True,
        )

    def base_networks(self) -> Mapping[str, torch.nn.Module]:
        """The network to go on from, if one is named."""
        return {} if self.config.pretrained_model_name_or_path is None else {"unet": self.unet}

    def plan(self, samples: LabelledSamples) -> dict[str, str]:
        """Network, prediction type, schedule and data."""
        config, unet = self.config, self.unet.config
        parameters = sum(p.numel() for p in self.unet.parameters())
        name = config.pretrained_model_name_or_path or f"{config.unet}, new"
        classes = "" if self.classes is None else f" of {self.classes.count} classes"
        side = unet.sample_size
        return {
            "network": f"{name}, {parameters:,} parameters, {unet.in_channels} channels",
            "prediction": config.prediction_type,
            "SNR at the last timestep": f"{terminal_snr(self.schedule):.4g}",
            "data": f"{len(samples.good):,} images{classes} at {side} x {side}",
        }

    def samples(self, images: Images, global_batch: int = 1) -> LabelledSamples:
        """Images in the network's size, their classes, and noise."""
        side, channels = self.unet.config.sample_size, self.unet.config.in_channels
        labels, no_class = (None, 0) if self.classes is None else (self.classes.labels, self.classes.count)
        shape, steps = (channels, side, side), len(self.schedule)
        return LabelledSamples(self.rows, images, self.config, labels, shape, steps, no_class)

    def x_0(self, batch: Batch, device: torch.device) -> Tensor:
        """The images themselves."""
        return batch["pixel_values"].to(device)

    def predict(self, unet: Any, x_t: Tensor, batch: Batch) -> Tensor:
        """The network's output under the classes, if it has any."""
        labels = batch.get("class_labels")
        timestep = batch["timestep"].to(x_t.device)
        output: Tensor = unet(x_t, timestep, None if labels is None else labels.to(x_t.device), return_dict=False)[0]
        return output

    def shipped_scheduler(self) -> DDPMScheduler:
        """See `output.shipped_scheduler`."""
        return shipped_scheduler(self.schedule)

    def pipeline(self, unet: Any) -> ClassConditionalPipeline:
        """With the scheduler that is shipped."""
        return ClassConditionalPipeline(unet, self.shipped_scheduler())

    def base_pipeline(self, unet: Any) -> ClassConditionalPipeline | None:
        """With its own scheduler."""
        return ClassConditionalPipeline(unet, self.base.scheduler) if self.base else None

    def preview(self, pipe: Any) -> tuple[list[list[Image.Image]], list[str] | None] | None:
        """A row per class, a column per seed."""
        seeds = range(self.config.validation_images)
        if not seeds:
            return None
        if self.classes is None:
            return [self._generate(pipe, [None] * len(seeds))], None
        shown = range(min(self.classes.count, _MOST_CLASSES_SHOWN))
        return [self._generate(pipe, [label] * len(seeds)) for label in shown], [self.classes.name(i) for i in shown]

    def generate_for_rows(self, pipe: Any, rows: Sequence[int]) -> list[Image.Image]:
        """The class of each row, if there are classes."""
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
        """See `output.save_pipeline_folder`."""
        save_pipeline_folder(unet, self.schedule, self.classes, self.config)
