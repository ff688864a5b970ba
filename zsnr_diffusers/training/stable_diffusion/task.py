"""Retraining Stable Diffusion: captioned images, their latents, the network that is told the caption."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from ...pipelines import ZeroSNRStableDiffusionPipeline
from ..card import terminal_snr
from ..data import noise_rows, open_rows
from ..samples import Batch
from ..task import Task
from .base import load_base
from .config import TrainingConfig
from .output import save_pipeline_folder, shipped_scheduler
from .samples import CaptionedSamples

_SEEDS = range(4)


class StableDiffusionTask(Task):
    """Stable Diffusion 1.x or 2.x on captioned images."""

    config: TrainingConfig
    unet: UNet2DConditionModel

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.base = load_base(config)
        self.unet, self.schedule = self.base.pipeline.unet, self.base.schedule
        config.check_schedule(terminal_snr(self.schedule) == 0)
        self.resolution = self.base.resolution(config)
        if config.has_data:
            self.rows = open_rows(config, ["caption_column"], needs_captions=True)
        else:
            self.rows = noise_rows(config.image_column, self.resolution, **{config.caption_column: ""})

    def base_networks(self) -> Mapping[str, torch.nn.Module]:
        """UNet, autoencoder and text encoder."""
        return {name: getattr(self.base.pipeline, name) for name in ("unet", "vae", "text_encoder")}

    def plan(self, images: int) -> dict[str, str]:
        """Base, prediction type, schedule and data."""
        before = self.base.pipeline.scheduler
        parameters = sum(p.numel() for p in self.unet.parameters())
        return {
            "base": f"{self.config.pretrained_model_name_or_path}, UNet of {parameters / 1e6:.1f} M parameters",
            "prediction": f"{before.config.prediction_type} -> {self.config.prediction_type}",
            "SNR at the last timestep": f"{terminal_snr(before):.4g} -> {terminal_snr(self.schedule):.4g}",
            "data": f"{images:,} images at {self.resolution} x {self.resolution}",
        }

    def samples(self, good: Sequence[int]) -> CaptionedSamples:
        """Images, tokens, and noise for latents."""
        side = self.resolution // self.base.vae_scale_factor
        latent_shape = (int(self.base.pipeline.vae.config.latent_channels), side, side)
        tokenizer, steps = self.base.pipeline.tokenizer, len(self.schedule)
        return CaptionedSamples(self.rows, good, self.config, tokenizer, self.resolution, latent_shape, steps)

    def freeze(self, device: torch.device, dtype: torch.dtype | None) -> None:
        """Autoencoder and text encoder, which are not trained."""
        for frozen in (self.base.pipeline.vae, self.base.pipeline.text_encoder):
            frozen.requires_grad_(False).eval().to(device)
            if dtype:
                frozen.to(dtype)

    @torch.no_grad()
    def x_0(self, batch: Batch, device: torch.device) -> Tensor:
        """A sample of the autoencoder's posterior, scaled."""
        vae = self.base.pipeline.vae
        moments = vae.encode(batch["pixel_values"].to(device, vae.dtype)).latent_dist
        latents = moments.mean.float() + moments.std.float() * batch["posterior_noise"].to(device)
        return latents * vae.config.scaling_factor

    def predict(self, unet: Any, x_t: Tensor, batch: Batch) -> Tensor:
        """The network's output under the captions."""
        with torch.no_grad():
            text = self.base.pipeline.text_encoder(batch["input_ids"].to(x_t.device))[0]
        output: Tensor = unet(x_t, batch["timestep"], text, return_dict=False)[0]
        return output

    def shipped_scheduler(self) -> SchedulerMixin:
        """See `output.shipped_scheduler`."""
        return shipped_scheduler(self.base)

    def preview(self, unet: Any, step: int) -> tuple[list[list[Image.Image]], list[str] | None] | None:
        """A row per validation prompt, a column per seed, with the guidance rescale that is recommended."""
        config, prompts = self.config, self.config.validation_prompts
        if not prompts:
            return None
        pipe = ZeroSNRStableDiffusionPipeline(
            **{**self.base.pipeline.components, "unet": unet, "scheduler": self.shipped_scheduler()},
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(desc=f"preview at step {step}", leave=False)
        rows = [
            pipe(
                prompt,
                num_images_per_prompt=len(_SEEDS),
                generator=[torch.Generator().manual_seed(seed) for seed in _SEEDS],
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                guidance_rescale=config.guidance_rescale,
            ).images
            for prompt in prompts
        ]
        return rows, prompts

    def save(self, unet: Any) -> None:
        """See `output.save_pipeline_folder`."""
        save_pipeline_folder(self.base, unet, self.config)
