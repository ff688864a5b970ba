"""Stable Diffusion as it lies on the Hub: the published configs and files, random weights, widths and depths divided.

What breaks a tool on real models is what a small model made from nothing lacks: attention in the autoencoder, a
tokenizer of 49,408 tokens, weights in half precision, a text encoder whose config asks for another dtype than its
file has, names of weights that are years old. So nothing but sizes is simplified, and `full_size=True` keeps those.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from zsnr_diffusers.hub.ldm_format import original_checkpoint
from zsnr_diffusers.hub.weight_files import with_single_dtype

from .clip_vocabulary import END, write_clip_tokenizer

Config = dict[str, Any]


class Published(NamedTuple):
    """A model of the Hub: its `model_index.json`, and the config of each part."""

    index: Config
    scheduler: Config
    unet: Config
    vae: Config
    texts: dict[str, Config]
    """Of each text encoder, by its name in the pipeline."""
    pads: dict[str, str]
    """What each tokenizer pads with."""
    small: dict[str, Config]
    """The sizes of parts that differ when divided."""
    old_names: bool = False
    """Whether its autoencoder's attention has the names of the first release of diffusers."""


_SD_BETAS: Config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_SD_BETAS |= {"num_train_timesteps": 1000, "trained_betas": None, "clip_sample": False, "steps_offset": 1}
_SD_BETAS |= {"set_alpha_to_one": False, "skip_prk_steps": True}

_UNET: Config = {
    "act_fn": "silu",
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
_UNET_1: Config = {**_UNET, "attention_head_dim": 8, "cross_attention_dim": 768}
_UNET_2: Config = {**_UNET, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024}
_UNET_2 |= {"dual_cross_attention": False, "only_cross_attention": False, "use_linear_projection": True}
_UNET_XL: Config = {
    **_UNET_2,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "class_embed_type": None,
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
}
_UNET_REFINER: Config = {
    **_UNET_XL,
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}

_VAE: Config = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_VAE_XL: Config = {**_VAE, "force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025}

_TEXT_1: Config = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "vocab_size": 49408,
}
_TEXT_2: Config = {**_TEXT_1, "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096}
_TEXT_2 |= {"num_attention_heads": 16, "num_hidden_layers": 23, "projection_dim": 512}
# SDXL's configs ask for half precision, whatever its files hold.
_TEXT_XL: Config = {**_TEXT_1, "torch_dtype": "float16"}
_TEXT_XL_2: Config = {**_TEXT_2, "architectures": ["CLIPTextModelWithProjection"], "torch_dtype": "float16"}
_TEXT_XL_2 |= {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
_TEXT_XL_2 |= {"projection_dim": 1280}

_FEATURE_EXTRACTOR: Config = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}


def _index(cls: str, scheduler: str, **parts: Any) -> Config:
    entries = {
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    return {"_class_name": cls, "_diffusers_version": "0.19.0.dev0", **entries, **parts}


_SAFE: Config = {
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
}
_NOT_SAFE: Config = {**_SAFE, "safety_checker": [None, None], "requires_safety_checker": False}
_PAIR: Config = {
    "force_zeros_for_empty_prompt": True,
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}

_SMALL_VAE: Config = {"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4}
_SMALL_TEXT: Config = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "projection_dim": 32}
_SMALL_1: Config = {"block_out_channels": [16, 32, 64, 64], "norm_num_groups": 4, "cross_attention_dim": 32}
_SMALL_2: Config = {"block_out_channels": [20, 40, 80, 80], "norm_num_groups": 4, "cross_attention_dim": 32}
_SMALL_XL: Config = {
    "block_out_channels": [20, 40, 80],
    "norm_num_groups": 4,
    "cross_attention_dim": 32 + 48,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 48 + 6 * 8,
    "transformer_layers_per_block": [1, 2, 3],
}
_SMALL_REFINER: Config = {**_SMALL_XL, "block_out_channels": [24, 48, 96, 96], "transformer_layers_per_block": 2}
_SMALL_REFINER |= {"cross_attention_dim": 48, "projection_class_embeddings_input_dim": 48 + 5 * 8}
# diffusers tells SDXL's two encoders apart by their width. One-digit and two-digit layers are both there.
_SMALL_TEXT_1: Config = {**_SMALL_TEXT, "num_hidden_layers": 3}
_SMALL_TEXT_2: Config = {**_SMALL_TEXT, "num_hidden_layers": 11, "projection_dim": 16}
_SMALL_TEXT_XL_2: Config = {**_SMALL_TEXT_2, "hidden_size": 48, "projection_dim": 48}

_2_SMALL: dict[str, Config] = {"unet": _SMALL_2, "vae": _SMALL_VAE, "text_encoder": _SMALL_TEXT_2}

PUBLISHED: dict[str, Published] = {
    "1.5": Published(
        _index("StableDiffusionPipeline", "PNDMScheduler", **_SAFE),
        {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **_SD_BETAS},
        _UNET_1,
        _VAE,
        {"text_encoder": _TEXT_1},
        {"tokenizer": END},
        {"unet": _SMALL_1, "vae": _SMALL_VAE, "text_encoder": _SMALL_TEXT_1},
        old_names=True,
    ),
    "2.1-base": Published(
        _index("StableDiffusionPipeline", "PNDMScheduler", **_NOT_SAFE),
        {"_class_name": "PNDMScheduler", "_diffusers_version": "0.10.0.dev0", **_SD_BETAS}
        | {"prediction_type": "epsilon"},
        _UNET_2,
        {**_VAE, "sample_size": 768, "scaling_factor": 0.18215},
        {"text_encoder": _TEXT_2},
        {"tokenizer": "!"},
        _2_SMALL,
    ),
    "2.1": Published(
        _index("StableDiffusionPipeline", "DDIMScheduler", **_NOT_SAFE),
        {"_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", **_SD_BETAS}
        | {"prediction_type": "v_prediction"},
        {**_UNET_2, "sample_size": 96, "upcast_attention": True},
        {**_VAE, "sample_size": 768},
        {"text_encoder": _TEXT_2},
        {"tokenizer": "!"},
        _2_SMALL,
    ),
    "xl": Published(
        _index("StableDiffusionXLPipeline", "EulerDiscreteScheduler", **_PAIR),
        {"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", **_SD_BETAS}
        | {"interpolation_type": "linear", "prediction_type": "epsilon", "sample_max_value": 1.0}
        | {"timestep_spacing": "leading", "use_karras_sigmas": False},
        _UNET_XL,
        _VAE_XL,
        {"text_encoder": _TEXT_XL, "text_encoder_2": _TEXT_XL_2},
        {"tokenizer": END, "tokenizer_2": "!"},
        {"unet": _SMALL_XL, "vae": _SMALL_VAE, "text_encoder": _SMALL_TEXT_1, "text_encoder_2": _SMALL_TEXT_XL_2},
    ),
    "xl-refiner": Published(
        _index("StableDiffusionXLImg2ImgPipeline", "EulerDiscreteScheduler", **_PAIR)
        | {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True}
        | {"text_encoder": [None, None], "tokenizer": [None, None]},
        {"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", **_SD_BETAS}
        | {"interpolation_type": "linear", "prediction_type": "epsilon", "sample_max_value": 1.0}
        | {"timestep_spacing": "leading", "use_karras_sigmas": False},
        _UNET_REFINER,
        _VAE_XL,
        {"text_encoder_2": _TEXT_XL_2},
        {"tokenizer_2": "!"},
        {"unet": _SMALL_REFINER, "vae": _SMALL_VAE, "text_encoder_2": _SMALL_TEXT_XL_2},
    ),
}
"""By name: Stable Diffusion 1.5, 2.1-base (epsilon, 512 pixels), 2.1 (v, 768 pixels), SDXL base and refiner."""

BASES = ("1.5", "2.1-base", "2.1", "xl")
"""Those that text-to-image training can start from."""


def write_published(
    name: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    full_size: bool = False,
    sample_size: int | None = None,
    seed: int = 0,
) -> Path:
    """Write a model's folder as its repo on the Hub has it.

    Args:
        name: One of `PUBLISHED`.
        folder: Made if need be; written into twice, it holds two variants.
        dtype: Of the weights' files.
        variant: In the names of the weights' files, such as `fp16`.
        full_size: Keep the published widths and depths.
        sample_size: Of latents, in place of the published one: the size of images that nobody asks for.
        seed: Of the weights; torch's global generator is left as it was.
    """
    published = PUBLISHED[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part, published_config in _configs(published, full_size).items():
            config = dict(published_config)
            if part == "unet" and sample_size is not None:
                # From a config of the published version, diffusers warns of any size below 64.
                config |= {"sample_size": sample_size, "_diffusers_version": diffusers.__version__}
            if dtype != torch.float32 and variant is None and "torch_dtype" in config:
                config["torch_dtype"] = str(dtype).removeprefix("torch.")  # as it is saved by transformers
            make, file, rename = _MAKERS[part](published)
            network = make(config)
            weights = {key: _in_half(value, dtype) for key, value in rename(network.state_dict()).items()}
            path = folder / part / (f"{file}.{variant}.safetensors" if variant else f"{file}.safetensors")
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(weights, path, {"format": "pt"})
            _write_json(path.with_name("config.json"), config)
            del network, weights  # at full size there is no room for the next one beside it
    for part, pad in published.pads.items():
        write_clip_tokenizer(folder / part, pad)
    if published.index.get("feature_extractor"):
        _write_json(folder / "feature_extractor" / "preprocessor_config.json", _FEATURE_EXTRACTOR)
    _write_json(folder / "scheduler" / "scheduler_config.json", published.scheduler)
    _write_json(folder / "model_index.json", published.index)
    return folder


def _configs(published: Published, full_size: bool) -> dict[str, Config]:
    """Of each network, by its name in the pipeline."""
    networks = {
        "unet": {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", **published.unet},
        "vae": {"_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", **published.vae},
        **published.texts,
    }
    if not full_size:
        networks = {name: config | published.small[name] for name, config in networks.items()}
    if published.index.get("safety_checker", [None])[0]:
        networks["safety_checker"] = _safety_checker_config(full_size)
    return networks


def _safety_checker_config(full_size: bool) -> Config:
    vision: Config = {"image_size": 224, "patch_size": 14, "hidden_size": 1024, "intermediate_size": 4096}
    vision |= {"num_attention_heads": 16, "num_hidden_layers": 24, "hidden_act": "quick_gelu"}
    if not full_size:
        vision |= {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    config: Config = {"architectures": ["StableDiffusionSafetyChecker"], "model_type": "clip", "projection_dim": 768}
    config |= {"initializer_factor": 1.0, "logit_scale_init_value": 2.6592, "torch_dtype": "float32"}
    return {**config, "vision_config": vision}


# How each part is made, what its file is called, and the names that its weights have there

_Rename = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
_Maker = tuple[Callable[[Config], nn.Module], str, _Rename]

_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def _old_attention(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder's attention by the names of the first release, which diffusers still reads."""

    def old(key: str) -> str:
        for new, name in _OLD_ATTENTION.items():
            key = key.replace(f".attentions.0.{new}.", f".attentions.0.{name}.")
        return key

    return {old(key): value for key, value in weights.items()}


def _text_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's weights in the wrapper that all published files have and newer transformers leave out."""
    bare = not any(key.startswith("text_model.") for key in weights)
    named = {
        f"text_model.{key}" if bare and not key.startswith("text_projection") else key: value
        for key, value in weights.items()
    }
    positions = named["text_model.embeddings.position_embedding.weight"].shape[0]
    return {**named, "text_model.embeddings.position_ids": torch.arange(positions)[None]}


def _safety_checker(config: Config) -> nn.Module:
    network: nn.Module = StableDiffusionSafetyChecker(CLIPConfig(**config))
    with torch.no_grad():
        for thresholds in (network.concept_embeds_weights, network.special_care_embeds_weights):
            thresholds.fill_(2.0)  # a cosine never exceeds: nothing is found unsafe
    return network


def _text_maker(published: Published, name: str) -> _Maker:
    classes = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
    cls = classes[published.texts[name]["architectures"][0]]
    # Made in the dtype of its config, it would have no weight that float16 has not.
    return lambda config: cls(CLIPTextConfig(**{**config, "torch_dtype": "float32"})), "model", _text_names


_MAKERS: dict[str, Callable[[Published], _Maker]] = {
    "unet": lambda published: (UNet2DConditionModel.from_config, "diffusion_pytorch_model", dict),
    "vae": lambda published: (
        AutoencoderKL.from_config,
        "diffusion_pytorch_model",
        _old_attention if published.old_names else dict,
    ),
    "text_encoder": lambda published: _text_maker(published, "text_encoder"),
    "text_encoder_2": lambda published: _text_maker(published, "text_encoder_2"),
    "safety_checker": lambda published: (_safety_checker, "model", dict),
}


def _in_half(value: Tensor, dtype: torch.dtype) -> Tensor:
    value = value.detach().contiguous()
    return value.to(dtype) if value.is_floating_point() else value


def _write_json(path: Path, content: Config) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_published(name: str, folder: Path) -> DiffusionPipeline:
    """A model that was written, by diffusers, in float32 and without its safety checker."""
    has_checker = "safety_checker" in PUBLISHED[name].index
    unchecked = {"safety_checker": None, "requires_safety_checker": False} if has_checker else {}
    return DiffusionPipeline.from_pretrained(folder, **unchecked, **with_single_dtype({}))


# The same weights as one file in the original layout


def write_published_file(name: str, path: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model's weights as its original checkpoint has them, with all that lies beside them there.

    The first checkpoints have the tables of their noise schedule, a count of the moving average and the positions of
    tokens among the weights; OpenCLIP's have a last layer that nobody uses. None says what it predicts.

    Args:
        name: One of `BASES`.
        path: Ends in `.safetensors`.
        folder: From `write_published`, in float32.
        dtype: Of the weights.
    """
    pipe = load_published(name, folder)
    weights = original_checkpoint(pipe)
    if name == "xl":
        weights["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
        weights["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
        weights["denoiser.sigmas"] = torch.linspace(14.6, 0.03, 1000)
    else:
        weights |= _schedule_tables(pipe.scheduler)
    if name == "1.5":
        weights["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
        weights |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(0)}
    if name.startswith("2"):
        weights |= _unused_layer(weights)
        weights["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: _in_half(value, dtype) for key, value in weights.items()}, path, {"format": "pt"})
    return path


def _schedule_tables(scheduler: Any) -> dict[str, Tensor]:
    alpha_bar = scheduler.alphas_cumprod.float()
    return {
        "betas": scheduler.betas.float(),
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": torch.cat([torch.ones(1), alpha_bar[:-1]]),
        "sqrt_alphas_cumprod": alpha_bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt(),
    }


def _unused_layer(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The last of OpenCLIP's 24 layers, which diffusers leaves out by its number."""
    first = "cond_stage_model.model.transformer.resblocks.0."
    last = first.replace("resblocks.0.", "resblocks.23.")
    return {key.replace(first, last): value.clone() for key, value in weights.items() if key.startswith(first)}
