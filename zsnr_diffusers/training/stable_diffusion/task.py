"""Retraining Stable Diffusion: captioned images, their latents, the network that is told the caption."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import SchedulerMixin, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from ...evaluation.generation import generate_images
from ...hub.model_card import terminal_snr
from ..data.buckets import filled_up
from ..data.dataset import Images, noise_rows, open_rows
from ..data.loader import Batch
from ..parameters import base_state_dict
from ..task import Task
from .base import load_base
from .config import TrainingConfig
from .embedding_cache import Caches
from .encoders import Autoencoder
from .lora import described, give_adapter, save_lora_folder
from .output import save_pipeline_folder, shipped_scheduler
from .samples import CaptionedSamples, captions_of

_SEEDS = range(4)
_MEASURED_IMAGES = 64


class StableDiffusionTask(Task):
    """Stable Diffusion 1.x, 2.x or XL on captioned images."""

    config: TrainingConfig
    unet: UNet2DConditionModel

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.base = load_base(config)
        self.unet, self.schedule = self.base.pipeline.unet, self.base.schedule
        if config.trains_adapter:
            give_adapter(self.base.pipeline, config)
        config.check_schedule(terminal_snr(self.schedule) == 0)
        self.resolution = self.base.resolution(config)
        self.buckets = self.base.buckets(config)
        self.autoencoder = Autoencoder(self.base.pipeline.vae, self.base.kind.uses_force_upcast)
        self.text_encoder = self.base.kind.text_encoder()
        self.caches = Caches(config, (self.autoencoder, self.text_encoder))
        self.device = torch.device("cpu")
        if config.has_data:
            self.rows = open_rows(config, ["caption_column"], needs_captions=True)
        else:
            self.rows = noise_rows(config.image_column, self.resolution, **{config.caption_column: ""})

    def base_networks(self) -> Mapping[str, torch.nn.Module]:
        """UNet, autoencoder and text encoders."""
        return {name: getattr(self.base.pipeline, name) for name in self.base.kind.networks}

    def plan(self, samples: CaptionedSamples) -> dict[str, str]:
        """Base, prediction type, schedule and data."""
        before = self.base.pipeline.scheduler
        parameters = sum(value.numel() for value in base_state_dict(self.unet).values())
        return {
            "base": f"{self.config.pretrained_model_name_or_path}, UNet of {parameters / 1e6:.1f} M parameters",
            **({"adapter": described(self.unet, self.config)} if self.config.trains_adapter else {}),
            "prediction": f"{before.config.prediction_type} -> {self.config.prediction_type}",
            "SNR at the last timestep": f"{terminal_snr(before):.4g} -> {terminal_snr(self.schedule):.4g}",
            **self._data(samples),
            **{f"cached {name}": str(stock) for name, stock in self.caches.stocks.items()},
        }

    def _data(self, samples: CaptionedSamples) -> dict[str, str]:
        count, side = len(samples.good), self.resolution
        if not self.config.aspect_ratio_buckets:
            return {"data": f"{count:,} images at {side} x {side}"}
        batch, lines = samples.batch, {}
        for (height, width), rows in samples.buckets.items():
            shown = filled_up(len(rows), batch)
            lines[f"{width} x {height}"] = (
                f"{len(rows):,} images, {shown // batch:,} global batches, {shown - len(rows):,} repeats"
            )
        repeats = samples.epoch_length - count
        data = f"{count:,} images in {len(lines)} buckets (width x height), and {repeats:,} repeats in an epoch"
        return {"data": data, **lines}

    def samples(self, images: Images, global_batch: int = 1) -> CaptionedSamples:
        """Images, tokens, and noise for latents."""
        base = self.base
        latents = (int(base.pipeline.vae.config.latent_channels), base.vae_scale_factor)
        return CaptionedSamples(
            self.rows,
            images,
            self.config,
            base.kind.conditions,
            self.buckets,
            latents,
            len(self.schedule),
            global_batch,
        )

    def look_up(self, accelerator: Accelerator, samples: CaptionedSamples) -> None:
        """What is stored of latents and text states."""
        self.caches.look_up(accelerator, samples, self.config.cache_folder)

    def prepare(self, accelerator: Accelerator, samples: CaptionedSamples) -> CaptionedSamples:
        """Store latents and text states, as far as they are to be, and leave the device to the UNet."""
        self.device = accelerator.device
        if self.config.measure and self.caches.stored:
            few = self.samples(samples.some_images(_MEASURED_IMAGES), samples.batch)
            hours = self.caches.rehearse(accelerator, few)
            accelerator.print(f"measured: storing what is missing would take {hours:,.1f} hours, before training")
            return few
        self.caches.fill(accelerator, samples)
        return samples

    @contextlib.contextmanager
    def _ready_to_generate(self) -> Iterator[None]:
        """Autoencoder and text encoder on the device, also where their results are stored.

        What would overflow in float16 is kept out of an autocast to it; the UNet brings its own autocast along.
        """
        place, precision = self.device.type, contextlib.ExitStack()
        if self.autoencoder.overflows and torch.get_autocast_dtype(place) == torch.float16:
            precision.enter_context(torch.autocast(place, enabled=False))
        for part in self.caches.parts:
            part.network.to(self.device)
        try:
            with precision:
                yield
        finally:
            for part in self.caches.parts:
                if part.name in self.caches.stored:
                    part.network.to("cpu")

    def x_0(self, batch: Batch, device: torch.device) -> Tensor:
        """A sample of the autoencoder's posterior, scaled."""
        moments = batch if "mean" in batch else self.autoencoder(batch["pixel_values"])
        mean, std = (moments[name].to(device).float() for name in ("mean", "std"))
        latents = mean + std * batch["posterior_noise"].to(device)
        scaled: Tensor = latents * self.base.pipeline.vae.config.scaling_factor
        return scaled

    def predict(self, unet: Any, x_t: Tensor, batch: Batch) -> Tensor:
        """The network's output under the captions, and whatever else it is told of the images."""
        text = batch if "text" in batch else self.text_encoder(batch["input_ids"])
        return self.base.kind.predict(unet, x_t, batch["timestep"].to(x_t.device), text, batch)

    def shipped_scheduler(self) -> SchedulerMixin:
        """See `output.shipped_scheduler`."""
        return shipped_scheduler(self.base)

    def pipeline(self, unet: Any) -> Any:
        """With the scheduler that is shipped and the guidance rescale that is recommended."""
        pipe = self._made(self.base.kind.preview, unet=unet, scheduler=self.shipped_scheduler())
        pipe.default_guidance_rescale = self.config.guidance_rescale
        return pipe

    def base_pipeline(self, unet: Any) -> Any:
        """With its own scheduler, without guidance rescale."""
        return self._made(self.base.kind.stock, unet=unet)

    def _made(self, cls: Any, **components: Any) -> Any:
        return cls(**{**self.base.pipeline.components, **components}, **self.base.kind.settings())

    def preview(self, pipe: Any) -> tuple[list[list[Image.Image]], list[str] | None] | None:
        """A row per validation prompt, a column per seed."""
        config, prompts = self.config, self.config.validation_prompts
        if not prompts:
            return None
        with self._ready_to_generate():
            rows = [
                pipe(
                    prompt,
                    num_images_per_prompt=len(_SEEDS),
                    generator=[torch.Generator().manual_seed(seed) for seed in _SEEDS],
                    num_inference_steps=config.num_inference_steps,
                    guidance_scale=config.guidance_scale,
                    height=self.resolution,
                    width=self.resolution,
                ).images
                for prompt in prompts
            ]
        return rows, prompts

    def generate_for_rows(self, pipe: Any, rows: Sequence[int]) -> list[Image.Image]:
        """The first caption of each row."""
        captions = [captions_of(caption)[0] for caption in self.rows[list(rows)][self.config.caption_column]]
        with self._ready_to_generate():
            return generate_images(
                pipe,
                captions,
                range(len(rows)),
                progress=False,
                num_inference_steps=self.config.num_inference_steps,
                guidance_scale=1.0,
                guidance_rescale=0.0,
                height=self.resolution,
                width=self.resolution,
            )

    def save(self, unet: Any) -> None:
        """See `output.save_pipeline_folder` and `lora.save_lora_folder`."""
        if self.config.trains_adapter:
            save_lora_folder(self.base, self.pipeline(unet), self.config)
        else:
            save_pipeline_folder(self.base, unet, self.config)
