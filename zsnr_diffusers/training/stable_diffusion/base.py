"""The Stable Diffusion pipeline that training starts from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel

from ...schedulers import ZeroSNRDDIMScheduler
from ...single_file import read_header
from .config import TrainingConfig


@dataclass
class Base:
    """A pipeline, the folder that it was read from, and the noise schedule that it is to be trained on."""

    pipeline: StableDiffusionPipeline
    folder: Path
    schedule: ZeroSNRDDIMScheduler

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent."""
        return int(self.pipeline.vae_scale_factor)

    def resolution(self, config: TrainingConfig) -> int:
        """Pixels per side in training.

        Raises:
            ValueError: not a multiple of what the autoencoder and the UNet halve.
        """
        unet = self.pipeline.unet.config
        pixels = config.resolution or unet.sample_size * self.vae_scale_factor
        multiple = self.vae_scale_factor * 2 ** (len(unet.block_out_channels) - 1)
        if pixels % multiple:
            raise ValueError(f"--resolution={pixels} must be a multiple of {multiple} for this model.")
        return int(pixels)


def load_base(config: TrainingConfig) -> Base:
    """Load the pipeline that a configuration names, from a folder or the Hub, and check that it can be trained here.

    Raises:
        ValueError: it is no Stable Diffusion 1.x or 2.x.
        OSError: there is no such folder or repo.
    """
    name = config.pretrained_model_name_or_path
    folder = Path(name) if Path(name).is_dir() else Path(DiffusionPipeline.download(name))
    _check_stable_diffusion(name, folder)
    _check_no_adapter(name, folder)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    _check_components(name, pipeline)
    schedule = ZeroSNRDDIMScheduler.from_config(
        pipeline.scheduler.config,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        clip_sample=False,  # latents have no range
    )
    return Base(pipeline, folder, schedule)


def model_index(folder: Path) -> dict[str, Any]:
    """What `model_index.json` of a pipeline folder says.

    Raises:
        ValueError: there is none.
    """
    file = folder / "model_index.json"
    if not file.is_file():
        raise ValueError(
            f"{folder} has no model_index.json, so it is not a diffusers pipeline. A single-file checkpoint is made "
            "into one by: zsnr convert FILE FOLDER."
        )
    index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return index


def _check_stable_diffusion(name: str, folder: Path) -> None:
    index = model_index(folder)
    needed = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
    found = {part: (index.get(part) or [None, None])[1] for part in (*needed, "text_encoder_2")}
    if any(found[part] != cls for part, cls in needed.items()) or found["text_encoder_2"]:
        parts = ", ".join(f"{part}: {cls}" for part, cls in found.items() if cls)
        raise ValueError(
            f"{name} is a {index.get('_class_name')} ({parts}), not a Stable Diffusion 1.x or 2.x pipeline, which has "
            f"{', '.join(f'{part}: {cls}' for part, cls in needed.items())}."
        )


def _check_no_adapter(name: str, folder: Path) -> None:
    """Loaded, such a UNet would have new, random weights where an adapter had renamed its own."""
    for file in (folder / "unet").glob("*.safetensors"):
        if adapter := next((key for key in read_header(file).shapes if ".lora_" in key), None):
            raise ValueError(
                f"The UNet of {name} was saved with an adapter in it ({adapter} in {file.name}). Where it was made, "
                "call pipe.fuse_lora() and pipe.unload_lora_weights(), and save the pipeline then."
            )


def _check_components(name: str, pipeline: StableDiffusionPipeline) -> None:
    unet: UNet2DConditionModel = pipeline.unet
    vae: AutoencoderKL = pipeline.vae
    if unet.config.in_channels != vae.config.latent_channels or unet.config.class_embed_type is not None:
        raise ValueError(
            f"The UNet of {name} takes {unet.config.in_channels} channels for {vae.config.latent_channels} of latents "
            "(inpainting, depth or upscaling?); only text-to-image models can be trained here."
        )
