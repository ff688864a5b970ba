"""What small pipelines are made of, and how they are put together."""

import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from types import MappingProxyType
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, SchedulerMixin, UNet2DConditionModel
from landscapes import captions
from PIL import Image
from small_stable_diffusion import build_tokenizer
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

WIDTH = 8
"""Of the text and image encoders, hence of what the UNets attend to."""

SIZE = 32
"""Height and width of images."""

LATENT_SIZE = SIZE // 4

TOKENS = 16
"""What prompts are padded to."""

PROMPT = "a dark landscape"

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Small(NamedTuple):
    """A pipeline to be built, and what to call it with."""

    build: Callable[[], Any]
    """A new pipeline of the stock class, with weights from seed 0; torch's global generator is left as it was."""
    arguments: Callable[[], dict[str, Any]]
    """New arguments of a call that guides, of a few steps, with a generator of seed 0; latents where it can."""

    # The rest is filled in for pipelines of transformers; those of UNets have the defaults, right or not.
    output: str = "images"
    """The attribute of what the call returns that holds the result."""
    denoisers: tuple[str, ...] = ("unet",)
    """The components that denoise."""
    calls: int = 1
    """How often they are called in each step, all of them together."""
    updates: int = 1
    """How often `step` of the scheduler, or of copies of it, is called in each step."""
    guidance: str = "stacked"
    """`stacked`, the predictions of one call; `separate`, of calls of their own; `none`, a call does not guide."""
    steps: Callable[[int], int] = int
    """How many steps are taken where so many are asked for."""
    ask: Callable[[int], dict[str, Any]] = lambda number: {"num_inference_steps": number}
    """The arguments that ask for so many steps."""


def small(
    name: str, components: Mapping[str, Any] = _NOTHING, arguments: Mapping[str, Any] = _NOTHING, /, **changes: Any
) -> Small:
    """A pipeline that is given what its class asks for, each by its name.

    Args:
        name: The class, of diffusers.
        components: What `__init__` is given beside what it takes of `COMPONENTS`. Here and below a function stands for
            what it returns, new each time.
        arguments: What `__call__` is given beside what it takes of `ARGUMENTS`.
        changes: More arguments.
    """

    def build() -> Any:
        pipeline = getattr(diffusers, name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe = pipeline(**given(pipeline.__init__, COMPONENTS, components))
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def make_arguments() -> dict[str, Any]:
        return given(getattr(diffusers, name).__call__, ARGUMENTS, {**arguments, **changes})

    return Small(build, make_arguments)


def given(
    function: Callable[..., Any], offers: Mapping[str, Any], asked: Mapping[str, Any] = _NOTHING
) -> dict[str, Any]:
    """Arguments of a function: what is asked for, and of the offers what it takes, functions called."""
    taken = {name: offers[name] for name in inspect.signature(function).parameters if name in offers}
    return {name: value() if callable(value) else deepcopy(value) for name, value in {**taken, **asked}.items()}


def class_of(component: str, pipeline: str) -> Callable[..., Any]:
    """What a pipeline, given by its name, wants a component to be; for classes whose module moves between versions."""
    return inspect.signature(getattr(diffusers, pipeline)).parameters[component].annotation


def certain(network: Any) -> Any:
    """An autoencoder without chance, for pipelines that draw from what it encodes, but not by their generator."""
    encode = network.encode

    def encode_for_certain(pictures: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        encoded = encode(pictures, *args, **kwargs)
        distribution = encoded[0] if isinstance(encoded, tuple) else encoded.latent_dist
        distribution.sample = lambda generator=None: distribution.mode()
        return encoded

    network.encode = encode_for_certain
    return network


# What is random in them comes from torch's global generator, which `small` seeds.


def unet(**changes: Any) -> UNet2DConditionModel:
    """For latents of `LATENT_SIZE`, conditioned on `WIDTH` features per token."""
    config: dict[str, Any] = {
        "sample_size": LATENT_SIZE,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
    }
    return UNet2DConditionModel(**{**config, **changes})


def vae(levels: int = 3, **changes: Any) -> AutoencoderKL:
    """With latents of 4 channels, and 4 pixels to a latent's side unless there are other than 3 levels."""
    config: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": (8,) * levels,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": SIZE,
        "force_upcast": False,
    }
    return AutoencoderKL(**{**config, **changes})


def tokenizer(max_length: int = TOKENS) -> CLIPTokenizer:
    """CLIP's, for a few words."""
    return build_tokenizer([*captions(), "a cat", "snow"], max_length)


def text_config(**changes: Any) -> CLIPTextConfig:
    """For `tokenizer`."""
    vocabulary = tokenizer()
    config: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "projection_dim": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": vocabulary.model_max_length,
        "bos_token_id": vocabulary.bos_token_id,
        "eos_token_id": vocabulary.eos_token_id,
        "pad_token_id": vocabulary.pad_token_id,
    }
    return CLIPTextConfig(**{**config, **changes})


def text_encoder(**changes: Any) -> CLIPTextModel:
    """CLIP's, `WIDTH` features for each token."""
    return CLIPTextModel(text_config(**changes))


def projecting_text_encoder(**changes: Any) -> CLIPTextModelWithProjection:
    """CLIP's, `WIDTH` features for each token and for the text."""
    return CLIPTextModelWithProjection(text_config(**changes))


def vision_config(**changes: Any) -> CLIPVisionConfig:
    """For images of `SIZE`, in four patches."""
    config: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "projection_dim": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": SIZE // 2,
    }
    return CLIPVisionConfig(**{**config, **changes})


def image_encoder(**changes: Any) -> CLIPVisionModelWithProjection:
    """CLIP's, `WIDTH` features for an image."""
    return CLIPVisionModelWithProjection(vision_config(**changes))


def feature_extractor() -> CLIPImageProcessor:
    """What `image_encoder` reads images through."""
    return CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def zero_snr_scheduler(kind: type[SchedulerMixin] = DDIMScheduler, **changes: Any) -> SchedulerMixin:
    """A schedule that ends in pure noise and is run from there, as far as `kind` has settings for it."""
    config = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "steps_offset": 1,  # without it, Stable Diffusion pipelines warn
        "set_alpha_to_one": True,
    }
    return kind(**given(kind.__init__, config, changes))


# What pipelines are called with


def seeded(seed: int = 0) -> torch.Generator:
    """A new generator."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 2) -> torch.Tensor:
    """Fixed values, normally distributed."""
    return torch.randn(shape, generator=seeded(seed))


def picture(size: int = SIZE, channels: int = 3) -> torch.Tensor:
    """`[1, channels, size, size]` in [0, 1], a fixed one."""
    return torch.rand(1, channels, size, size, generator=seeded(1))


def pil_picture(size: int = SIZE) -> Image.Image:
    """The same for whoever wants a PIL image."""
    return Image.fromarray((picture(size)[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def right_half(size: int = SIZE) -> torch.Tensor:
    """A mask, `[1, 1, size, size]`."""
    return (torch.arange(size) >= size // 2).float().repeat(1, 1, size, 1)


COMPONENTS: dict[str, Any] = {
    "vae": vae,
    "text_encoder": text_encoder,
    "tokenizer": tokenizer,
    "text_encoder_2": projecting_text_encoder,
    "tokenizer_2": tokenizer,
    "unet": unet,
    "scheduler": zero_snr_scheduler,
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
    "add_watermarker": False,
}
"""What `small` gives to a class that asks for a part by this name."""

ARGUMENTS: dict[str, Any] = {
    "prompt": PROMPT,
    "image": picture,
    "mask_image": right_half,
    "control_image": picture,
    "strength": 0.7,  # two of the three steps
    "height": SIZE,
    "width": SIZE,
    "num_inference_steps": 3,
    "guidance_scale": 7.5,
    "generator": seeded,
    "output_type": "latent",
}
"""What `small` gives to a call that takes an argument by this name."""
