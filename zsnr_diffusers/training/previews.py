"""Previews of a run: what its pipeline will paint once it is saved."""

from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from PIL import Image

from ..evaluation.plots import sample_grid
from ..pipelines import ZeroSNRStableDiffusionPipeline
from .base import Base
from .config import TrainingConfig
from .output import shipped_scheduler

_SEEDS = range(4)


def save_preview(
    accelerator: Accelerator, base: Base, unet: UNet2DConditionModel, config: TrainingConfig, step: int
) -> Path:
    """Sample the validation prompts with the scheduler, spacing and guidance rescale that are shipped.

    Returns:
        The picture's path: a row per prompt, a column per seed.
    """
    pipe = ZeroSNRStableDiffusionPipeline(
        **{**base.pipeline.components, "unet": unet, "scheduler": shipped_scheduler(base)},
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(desc=f"preview at step {step}", leave=False)
    rows: list[list[Image.Image]] = []
    for prompt in config.validation_prompts:
        with accelerator.autocast():
            images = pipe(
                prompt,
                num_images_per_prompt=len(_SEEDS),
                generator=[torch.Generator().manual_seed(seed) for seed in _SEEDS],
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                guidance_rescale=config.guidance_rescale,
            ).images
        rows.append(images)
    path = Path(config.output_dir, "previews", f"step-{step:06d}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    sample_grid(rows, config.validation_prompts, path)
    return path
