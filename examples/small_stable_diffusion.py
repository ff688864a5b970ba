"""A small Stable Diffusion of stock classes, made from nothing.

A fix is easiest to trust where everything can be trained again in minutes. So here is a `StableDiffusionPipeline` of
about 1/1000 of the size of Stable Diffusion 1.x with the same scheduler configuration: a schedule that never reaches
pure noise, sampled from a timestep that is not the last. `quickstart.py` trains it, first wrongly, then correctly.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from landscapes import captions, read_landscapes
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def build_tokenizer(texts: Iterable[str], max_length: int = 16) -> CLIPTokenizer:
    """A CLIP tokenizer that knows every word of `texts` as one token, and spells other words.

    Args:
        texts: Captions in plain words of the letters a to z.
        max_length: How many tokens a prompt is padded or cut to; CLIP's own has 77, at a cost to every training step.
    """
    words = sorted({word for text in texts for word in text.lower().split()})
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    merges = _byte_pair_merges(words)
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    # transformers 4 builds this tokenizer from two files only, transformers 5 also from objects. Both read the files.
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        rows = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        Path(folder, "merges.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder)


def _byte_pair_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make one token of each word.

    A tokenizer applies merges to every word in order of rank. So each is applied here to every word as soon as it is
    made; a list that treated word after word would have the "la" of "landscape" break up "black".
    """
    merges = []
    spelled = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    while unfinished := [parts for parts in spelled if len(parts) > 1]:
        pair = (unfinished[0][0], unfinished[0][1])
        merges.append(pair)
        for parts in unfinished:
            for i in range(len(parts) - 2, -1, -1):
                if tuple(parts[i : i + 2]) == pair:
                    parts[i : i + 2] = ["".join(pair)]
    return merges


def build_stable_diffusion(
    seed: int = 0,
    image_size: int = 64,
    *,
    unet_channels: Sequence[int] = (16, 32, 64),
    unet_layers: int = 1,
    vae_channels: Sequence[int] = (16, 32),
    text_width: int = 64,
    texts: Iterable[str] = captions(),
) -> StableDiffusionPipeline:
    """An untrained Stable Diffusion of stock classes, with the scheduler configuration of Stable Diffusion 1.x.

    Args:
        seed: Decides on all weights; torch's global generator is left as it was.
        image_size: Height and width in pixels, a multiple of 8 at the default sizes.
        unet_channels: Width of the UNet's levels, multiples of 8; all but the last have cross-attention. The default
            makes about a million parameters.
        unet_layers: Residual blocks per level.
        vae_channels: Width of the autoencoder's levels, multiples of 8; each but the first halves the resolution.
        text_width: Width of the text encoder, a multiple of 4.
        texts: Captions, each word of which becomes one token.
    """
    tokenizer = build_tokenizer(texts)
    latent_size = image_size // 2 ** (len(vae_channels) - 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StableDiffusionPipeline(
            vae=_build_vae(vae_channels, image_size),
            text_encoder=_build_text_encoder(tokenizer, text_width).eval(),
            tokenizer=tokenizer,
            unet=_build_unet(unet_channels, unet_layers, text_width, latent_size),
            scheduler=flawed_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def flawed_scheduler() -> DDIMScheduler:
    """DDIM as published with Stable Diffusion 1.x: the signal never vanishes, sampling starts before the last step."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )


def _build_vae(channels: Sequence[int], image_size: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=tuple(channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=image_size,
    )


def _build_text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModel:
    # Never trained: random features tell a handful of words apart well enough.
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _build_unet(channels: Sequence[int], layers: int, text_width: int, sample_size: int) -> UNet2DConditionModel:
    # Attention at the lowest resolution alone is enough for captions about the whole image, and half as slow.
    plain = len(channels) - 1
    return UNet2DConditionModel(
        sample_size=sample_size,
        down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * plain,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        norm_num_groups=8,
        cross_attention_dim=text_width,
        attention_head_dim=4,  # the number of heads: a slip of the name that all of diffusers' UNets keep
    )


# The autoencoder's training


def train_vae(
    vae: AutoencoderKL,
    images: torch.Tensor,
    steps: int = 400,
    batch_size: int = 8,
    learning_rate: float = 2e-3,
    kl_weight: float = 1e-6,
    seed: int = 0,
    crop: int | None = None,
    on_step: Callable[[int], None] | None = None,
) -> float:
    """Train an autoencoder in place and set the scaling factor that gives its latents unit variance.

    Args:
        vae: The autoencoder; left in evaluation mode.
        images: `[count, 3, height, width]` in [-1, 1].
        steps: Optimizer steps; the learning rate falls to 0 over them.
        batch_size: Images per step.
        learning_rate: The highest, for Adam.
        kl_weight: Weight of the KL divergence per latent value, beside the mean squared error per pixel.
        seed: Decides on batches and noise.
        crop: Side in pixels of the square of each image that is trained on, placed at random for each batch; by
            default the whole image. The same weights serve every size, and a quarter of the pixels takes a quarter of
            the time.
        on_step: Called with the number of steps made after each.

    Returns:
        The mean squared error of the last steps.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(vae.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    vae.train()
    error = 0.0
    progress = tqdm(range(steps), desc="autoencoder")
    for step in progress:
        batch = images[torch.randint(len(images), (batch_size,), generator=generator)]
        if crop is not None:
            top, left = (int(torch.randint(side - crop + 1, (), generator=generator)) for side in batch.shape[2:])
            batch = batch[:, :, top : top + crop, left : left + crop]
        posterior = vae.encode(batch).latent_dist
        reconstruction = vae.decode(posterior.sample(generator)).sample
        loss = F.mse_loss(reconstruction, batch)
        kl = posterior.kl().sum() / posterior.mean.numel()
        optimizer.zero_grad()
        (loss + kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        error = 0.95 * error + 0.05 * loss.item() if error else loss.item()
        progress.set_postfix(mse=f"{error:.4f}")
        if on_step is not None:
            on_step(step + 1)
    vae.eval()
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in torch.split(images[:256], 32)])
    # `vae.config.scaling_factor = ...` would change the object alone: what is saved is what was registered.
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return error


def train_vae_on_landscapes(
    vae: AutoencoderKL, folder: Path, steps: int, seed: int, advance: Callable[[float], None]
) -> None:
    """Train an autoencoder on crops of a folder of landscapes; calls `advance` with the share that is done."""
    train_vae(
        vae,
        read_landscapes(folder),
        steps,
        learning_rate=3e-3,
        seed=seed,
        crop=32,
        on_step=lambda step: advance(step / steps),
    )
