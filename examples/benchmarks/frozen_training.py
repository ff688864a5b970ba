"""What `frozen_models.py` trains: a first step, a ControlNet, and whatever the trainer makes with epsilon."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, DiffusionPipeline
from diffusers.optimization import get_cosine_schedule_with_warmup
from landscapes import read_landscapes
from peft import LoraConfig
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from zsnr_diffusers.core import NoiseLevel, add_noise, converted_prediction, noise_level, x_0_factors
from zsnr_diffusers.core.dct import dct
from zsnr_diffusers.core.low_frequency_law import LowFrequencyLaw
from zsnr_diffusers.evaluation.luminance import LUMA_WEIGHTS
from zsnr_diffusers.start.encoding import encode_images
from zsnr_diffusers.training import TrainingConfig, train
from zsnr_diffusers.training.stable_diffusion.config import LORA_TARGETS

BATCH = 24
PURE_NOISE = NoiseLevel(0.0, 1.0)


@dataclass(frozen=True)
class Data:
    """Captioned images.

    Attributes:
        pixels: shape [N, 3, H, W] in [-1, 1].
        captions: N of them.
    """

    pixels: Tensor
    captions: list[str]

    @classmethod
    def read(cls, folder: Path) -> Data:
        """A folder of `make_landscapes`."""
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        return cls(read_landscapes(folder), [row["text"] for row in rows])

    def images(self) -> list[Image.Image]:
        """As PIL images."""
        arrays = ((self.pixels + 1) * 127.5).round().permute(0, 2, 3, 1).byte().numpy()
        return [Image.fromarray(array) for array in arrays]

    def draw(self, prompts: Sequence[str], seed: int = 0) -> Data:
        """One image of each prompt, at random."""
        rng = np.random.default_rng(seed)
        places = {text: np.flatnonzero(np.array(self.captions) == text) for text in set(prompts)}
        return Data(self.pixels[[int(rng.choice(places[prompt])) for prompt in prompts]], list(prompts))


def load(folder: Path) -> Any:
    """A pipeline without progress bars."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def train_epsilon(base: Path, data: Path, output_dir: Path, steps: int, rate: float, **options: Any) -> None:
    """Train a base on with epsilon on its own schedule, as most fine-tunes and LoRAs were made."""
    print(f"\n== {output_dir}", flush=True)
    train(
        TrainingConfig(
            pretrained_model_name_or_path=str(base),
            train_data_dir=str(data),
            output_dir=str(output_dir),
            prediction_type="epsilon",
            rescale_betas_zero_snr=False,
            max_train_steps=steps,
            train_batch_size=16,
            learning_rate=rate,
            lr_warmup_steps=min(50, steps),
            ema_decay=0.999,
            luminance_images=0,
            guidance_rescale=0.0,
            resume=True,
            **options,
        )
    )


def train_first_step(pipe: Any, data: Data, steps: int, seed: int = 0) -> nn.Module:
    """The pipeline's UNet with a LoRA that says x_0 from pure noise and the prompt: v at zero SNR."""
    latents = torch.cat([encode_images(pipe.vae, part) for part in data.pixels.split(BATCH)])
    states = {text: states_of(pipe, [text])[0] for text in set(data.captions)}
    unet = copy.deepcopy(pipe.unet).requires_grad_(False)
    last = pipe.scheduler.config.num_train_timesteps - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=LORA_TARGETS))
        for batch in train_loop(unet, len(latents), steps, seed):
            x_0, prompts = latents[batch], torch.stack([states[data.captions[i]] for i in batch])
            output = unet(torch.randn(x_0.shape), last, prompts).sample
            functional.mse_loss(x_0_at_pure_noise(output), x_0).backward()
    return unet.eval()


def train_loop(network: nn.Module, count: int, steps: int, seed: int, rate: float = 1e-3) -> Iterator[list[int]]:
    """Batches of indices; the trainable weights are stepped by the gradients that the caller leaves after each."""
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(50, steps), steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randint(count, (16,), generator=generator).tolist()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def states_of(pipe: Any, prompts: list[str]) -> Tensor:
    """Text states of prompts, [B, tokens, width]."""
    with torch.no_grad():
        return pipe.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)[0]


def x_0_at_pure_noise(output: Tensor) -> Tensor:
    """x_0 of a v output at a signal-to-noise ratio of 0, where x_t says nothing of it."""
    return x_0_factors("v_prediction", PURE_NOISE)[1] * output


@contextmanager
def first_step_by(pipe: Any, unet: nn.Module) -> Iterator[None]:
    """Have another UNet say x_0 at the first step of the pipeline's calls, as epsilon at the scheduler's level."""
    alpha_bar = pipe.scheduler.alphas_cumprod.double()
    last = len(alpha_bar) - 1

    def replace(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        x_t, timestep = args
        if int(timestep) != int(pipe.scheduler.timesteps[0]):
            return output
        level = noise_level(alpha_bar, int(timestep))
        x_0 = x_0_at_pure_noise(unet(torch.randn_like(x_t), last, kwargs["encoder_hidden_states"]).sample)
        return (converted_prediction(x_0, x_t, level, "sample", "epsilon", level).to(x_t.dtype),)

    hook = pipe.unet.register_forward_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def started_by(pipe: Any, law: LowFrequencyLaw, unet: nn.Module, prompts: list[str], steps: int) -> Tensor:
    """Latents with a start of which another UNet says the mean, from pure noise of seeds 0, 1, ..."""
    pipe.scheduler.set_timesteps(steps)
    alpha_bar = pipe.scheduler.alphas_cumprod.double()
    level, last = noise_level(alpha_bar, int(pipe.scheduler.timesteps[0])), len(alpha_bar) - 1
    shape = (1, unet.config.in_channels, *(unet.config.sample_size,) * 2)
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(len(prompts))])
    parts = []
    for at in range(0, len(prompts), BATCH):
        part = slice(at, at + BATCH)
        x_0 = x_0_at_pure_noise(unet(noise[part], last, states_of(pipe, prompts[part])).sample)
        mean = dct(x_0, (law.frequencies,) * 2) / unet.config.sample_size
        parts.append(law.noisy(noise[part], mean, level))
    return torch.cat(parts)


def edges(pixels: Tensor) -> Tensor:
    """Where images [N, 3, H, W] change, whatever their brightness: what a ControlNet is shown, in [0, 1]."""
    luma = torch.einsum("nchw,c->nhw", pixels, torch.as_tensor(LUMA_WEIGHTS, dtype=pixels.dtype))[:, None]
    padded = functional.pad(luma, (0, 1, 0, 1), mode="replicate")
    size = (padded[..., 1:, :-1] - luma).abs() + (padded[..., :-1, 1:] - luma).abs()
    largest = size.flatten(1).amax(dim=1).clamp(min=1e-3)[:, None, None, None]
    return (size / largest).expand(-1, 3, -1, -1)


def train_controlnet(pipe: Any, data: Data, steps: int, seed: int = 0) -> ControlNetModel:
    """A ControlNet for `edges`, trained with epsilon on the pipeline's own schedule."""
    latents = torch.cat([encode_images(pipe.vae, part) for part in data.pixels.split(BATCH)])
    states = {text: states_of(pipe, [text])[0] for text in set(data.captions)}
    alpha_bar, shown = pipe.scheduler.alphas_cumprod.double(), edges(data.pixels)
    pipe.unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # As many levels as the autoencoder halves the image by.
        halvings = len(pipe.vae.config.block_out_channels) - 1
        controlnet = ControlNetModel.from_unet(
            pipe.unet, conditioning_embedding_out_channels=tuple(16 * 2**i for i in range(halvings + 1))
        )
        for batch in train_loop(controlnet, len(latents), steps, seed):
            x_0, prompts = latents[batch], torch.stack([states[data.captions[i]] for i in batch])
            noise, timesteps = torch.randn(x_0.shape), torch.randint(len(alpha_bar), (len(x_0),))
            level = NoiseLevel(*(part.float().reshape(-1, 1, 1, 1) for part in noise_level(alpha_bar, timesteps)))
            x_t = add_noise(x_0, noise, level)
            down, middle = controlnet(x_t, timesteps, prompts, shown[batch], return_dict=False)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            loss = functional.mse_loss(pipe.unet(x_t, timesteps, prompts, **residuals).sample, noise)
            loss.backward()
    return controlnet.eval()
