"""A small Stable Diffusion and a small world for it, both made from nothing.

The flaw of Lin et al. 2023 (arXiv:2305.08891) is easiest to see where brightness is all that varies, and a fix is
easiest to trust where everything can be trained again in minutes. So this module makes, without a download:

- captioned landscapes from night to noon whose mean luminance is spread evenly over [-0.95, 0.95], and
- a `StableDiffusionPipeline` of stock classes, about 1/1000 of the size of Stable Diffusion 1.x, with the same
  scheduler configuration: a schedule that never reaches pure noise, sampled from a timestep that is not the last.

`quickstart.py` uses it: it trains the network wrongly first, as Stable Diffusion was, and then rightly.
"""

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from zsnr_diffusers.evaluation.luminance import LUMA_WEIGHTS

BRIGHTNESS_WORDS = ("black", "dark", "dim", "grey", "bright", "white")
"""The words of the captions, from the darkest sixth of the landscapes to the brightest."""

BRIGHTEST = 0.95
"""The mean luminance of the brightest landscape, images in [-1, 1]; that of the darkest is its negative."""

Array = NDArray[np.float64]


# The landscapes


def caption(brightness: float) -> str:
    """What a landscape of this mean luminance, in [-1, 1], is called: "a dark landscape"."""
    word = int((brightness / BRIGHTEST + 1) / 2 * len(BRIGHTNESS_WORDS))
    return f"a {BRIGHTNESS_WORDS[min(max(word, 0), len(BRIGHTNESS_WORDS) - 1)]} landscape"


def captions() -> list[str]:
    """Every caption there is, from the darkest to the brightest."""
    return [f"a {word} landscape" for word in BRIGHTNESS_WORDS]


def landscape(brightness: float, rng: np.random.Generator, image_size: int = 64) -> Image.Image:
    """Draw sky, sun or moon, hills and, every other time, a lake.

    Args:
        brightness: The mean luminance of the picture, in (-1, 1).
        rng: Decides on everything else: colours, shapes, places.
        image_size: Height and width in pixels.
    """
    day = (brightness + 1) / 2
    y, x = (np.mgrid[:image_size, :image_size] + 0.5) / image_size
    scene = _sky(day, x, y, rng)
    scene = _hills(scene, day, x, y, rng)
    if rng.random() < 0.5:
        scene = _lake(scene, x, y, rng)
    return Image.fromarray(np.round(_expose(scene, day) * 255).astype(np.uint8))


def make_landscapes(folder: str | Path, count: int = 1000, image_size: int = 64, seed: int = 0) -> Path:
    """Write captioned landscapes as an image folder that `datasets` reads.

    Args:
        folder: Where `00000.png`, `00001.png`, ... and `metadata.jsonl` with `file_name` and `text` go; may be new.
        count: How many. Their mean luminances are stratified, so that few of them are already evenly spread.
        image_size: Height and width in pixels.
        seed: The same seed gives the same files.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    strata = (rng.permutation(count) + rng.random(count)) / count
    lines = []
    for index, brightness in enumerate(BRIGHTEST * (2 * strata - 1)):
        name = f"{index:05d}.png"
        landscape(float(brightness), rng, image_size).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption(float(brightness))}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def read_landscapes(folder: str | Path) -> torch.Tensor:
    """The pictures of a folder of `make_landscapes`, in order: `[count, 3, image_size, image_size]` in [-1, 1]."""
    pictures = np.stack([np.asarray(Image.open(path)) for path in sorted(Path(folder).glob("*.png"))])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def _mix(a: Array, b: Array, share: Array | float) -> Array:
    """From `a` to `b`; a map `[h, w]` of shares is applied to all three colours."""
    mixed: Array = a + (b - a) * np.asarray(share)[..., None]
    return mixed


def _between(day: float, colours: Sequence[tuple[float, float, float]]) -> Array:
    """The colour at `day` in [0, 1] on the way through `colours`."""
    stops = np.linspace(0, 1, len(colours))
    return np.array([np.interp(day, stops, channel) for channel in zip(*colours, strict=True)])


def _sky(day: float, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """A gradient from night blue over sunset to noon, and a disc with a halo."""
    hour = np.clip(day + rng.normal(0, 0.08), 0, 1)
    zenith = _between(hour, [(0.10, 0.14, 0.34), (0.24, 0.22, 0.46), (0.25, 0.42, 0.70), (0.42, 0.66, 0.90)])
    horizon = _between(hour, [(0.22, 0.30, 0.48), (0.85, 0.45, 0.32), (0.90, 0.74, 0.56), (0.80, 0.88, 0.92)])
    sky = _mix(zenith, horizon, np.clip(y / 0.65, 0, 1) ** 1.3)
    light = _between(hour, [(0.93, 0.95, 0.99), (0.99, 0.80, 0.50), (0.99, 0.95, 0.75), (0.99, 0.99, 0.92)])
    distance = np.hypot(x - rng.uniform(0.12, 0.88), y - rng.uniform(0.10, 0.36))
    radius = rng.uniform(0.05, 0.10)
    sky = _mix(sky, light, 0.45 * np.exp(-((distance / (3 * radius)) ** 2)))
    return _mix(sky, light, _edge(radius - distance, x))


def _hills(scene: Array, day: float, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Three ranges, each nearer one lower, darker and less hazy than the one behind it."""
    far = _between(day, [(0.16, 0.22, 0.34), (0.46, 0.34, 0.44), (0.46, 0.55, 0.62)])
    near = np.array([0.12, 0.26, 0.10]) + rng.uniform(-0.04, 0.08, 3)
    for depth in (0.0, 0.5, 1.0):
        ridge: Array | float = 0.50 + 0.17 * depth + rng.uniform(-0.05, 0.05)
        for waves in (1, 2, 4):
            ridge = ridge + 0.07 / waves * np.sin(2 * np.pi * (waves * x * rng.uniform(0.6, 1.2) + rng.random()))
        scene = _mix(scene, _mix(far, near, depth), _edge(y - ridge, x))
    return scene


def _lake(scene: Array, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Below its shore, water mirrors what is above it."""
    shore = rng.uniform(0.74, 0.84)
    size = len(scene)
    mirrored = np.clip(((2 * shore - y[:, 0]) * size).astype(int) - int(0.35 * size), 0, size - 1)
    water = _mix(scene[mirrored], np.array([0.20, 0.35, 0.50]), 0.35)
    return _mix(scene, water, _edge(y - shore - 0.01 * np.sin(2 * np.pi * (x + rng.random())), x))


def _edge(signed_distance: Array, x: Array) -> Array:
    """1 inside, 0 outside, a soft pixel in between."""
    inside: Array = np.clip(signed_distance * x.shape[1] + 0.5, 0, 1)
    return inside


def _expose(scene: Array, day: float) -> Array:
    """Shift the logits of a scene in (0, 1) until its mean luminance is `day`.

    A shift of logits is what exposure does to film: contrast fades towards black and white, nothing is cut off.
    """
    logits = np.log(scene / (1 - scene))
    exposed = scene
    low, high = -20.0, 20.0
    for _ in range(40):  # by bisection: the mean is monotone in the shift
        shift = (low + high) / 2
        exposed = 1 / (1 + np.exp(-(logits + shift)))
        low, high = (shift, high) if (exposed @ LUMA_WEIGHTS).mean() < day else (low, shift)
    return exposed


# The pipeline


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
    texts: Iterable[str] | None = None,
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
        texts: What the tokenizer's vocabulary is made from; the landscapes' captions by default.
    """
    tokenizer = build_tokenizer(captions() if texts is None else texts)
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
        mid_block_add_attention=False,
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
    # Attention at the lowest resolution alone is enough for captions about the whole picture, and half as slow.
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

    Returns:
        The mean squared error of the last steps.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(vae.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    vae.train()
    error = 0.0
    progress = tqdm(range(steps), desc="autoencoder")
    for _ in progress:
        batch = images[torch.randint(len(images), (batch_size,), generator=generator)]
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
    vae.eval()
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in torch.split(images[:256], 32)])
    # `vae.config.scaling_factor = ...` would change the object alone: what is saved is what was registered.
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return error
