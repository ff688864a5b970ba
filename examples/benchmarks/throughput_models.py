"""The models that `train_throughput.py` trains, from tiny to Stable Diffusion 2.1, and what their steps compute."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from landscapes import captions
from small_stable_diffusion import build_stable_diffusion, build_tokenizer, flawed_scheduler
from torch.utils.flop_counter import FlopCounterMode


def build_sd21() -> StableDiffusionPipeline:
    """The shape of Stable Diffusion 2.1, with random weights."""
    levels, tokenizer = 4, build_tokenizer(captions(), max_length=77)
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),  # the numbers of heads
            use_linear_projection=True,
        ),
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=2,
            latent_channels=4,
            sample_size=768,
        ),
        text_encoder=transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=49408,
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=23,
                num_attention_heads=16,
                hidden_act="gelu",
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        ).eval(),
        tokenizer=tokenizer,
        scheduler=flawed_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def small(resolution: int, **sizes: Any) -> Callable[[], StableDiffusionPipeline]:
    """A builder of a small Stable Diffusion."""
    return functools.partial(build_stable_diffusion, image_size=resolution, **sizes)


MODELS: dict[str, tuple[int, Callable[[], StableDiffusionPipeline]]] = {
    "tiny": (16, small(16, unet_channels=(8, 16), vae_channels=(8, 8, 8), text_width=8)),
    "0.8M": (64, small(64, unet_channels=(16, 32, 56))),
    "23.6M": (
        128,
        small(128, unet_channels=(64, 128, 264), unet_layers=2, vae_channels=(64, 128, 128), text_width=128),
    ),
    "sd21": (512, build_sd21),
}
"""Resolution and builder by size; the sizes but `sd21` are parameters of the UNet."""


def gigaflops(pipe: StableDiffusionPipeline, resolution: int) -> dict[str, float]:
    """What a training image costs each network, in 1e9 operations, a multiply-add being two."""

    def count(run: Callable[[], Any]) -> float:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() / 1e9

    with torch.device("meta"):  # shapes are all that matters
        unet, vae = UNet2DConditionModel.from_config(pipe.unet.config), AutoencoderKL.from_config(pipe.vae.config)
        text_encoder = type(pipe.text_encoder)(pipe.text_encoder.config).requires_grad_(False)
        vae.requires_grad_(False)
        pixels = torch.empty(1, 3, resolution, resolution)
        ids = torch.zeros(1, pipe.tokenizer.model_max_length, dtype=torch.long)
        latents, states = vae.encode(pixels).latent_dist.mean, text_encoder(ids)[0]
        timestep = torch.zeros(1)
        return {
            "UNet forward + backward": count(lambda: unet(latents, timestep, states).sample.sum().backward()),
            "VAE encoder": count(lambda: vae.encode(pixels)),
            "text encoder": count(lambda: text_encoder(ids)),
        }
