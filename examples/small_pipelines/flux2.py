"""Flux.2, and what has its autoencoder: ERNIE-Image, Ideogram 4 and FIBO 2."""

from functools import partial
from typing import Any

import diffusers
import transformers

from .flow_parts import NEGATIVE_PROMPT, flow, flow_scheduler, shifted_by_size
from .language import TEXT_WIDTH, SeeingProcessor, byte_tokenizer, decoder_config, mistral3, qwen3_vl
from .parts import Small, pil_picture

_CHANNELS = 16
"""Of latents in patches of 2 x 2."""


def flux2_vae() -> Any:
    """With latents of 4 channels in patches of 2 x 2, 4 pixels to a latent's side."""
    return diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=_CHANNELS // 4,
        norm_num_groups=4,
    )


def _transformer(**changes: Any) -> Any:
    config: dict[str, Any] = {
        "in_channels": _CHANNELS,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 3 * TEXT_WIDTH,
        "timestep_guidance_channels": 16,
        "axes_dims_rope": (4, 4, 4, 4),
    }
    return diffusers.Flux2Transformer2DModel(**{**config, **changes})


def _qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(decoder_config("Qwen3Config"))


_DEV: dict[str, Any] = {
    "transformer": _transformer,
    "scheduler": shifted_by_size,
    "vae": flux2_vae,
    "text_encoder": mistral3,
    "tokenizer": byte_tokenizer,
}

_KLEIN: dict[str, Any] = {
    **_DEV,
    "transformer": partial(_transformer, guidance_embeds=False),
    "text_encoder": _qwen3,
}

_CALL: dict[str, Any] = {"image": None, "text_encoder_out_layers": (0, 1, 2), "max_sequence_length": 128}
_LARGE: dict[str, Any] = {**_CALL, "image": partial(pil_picture, 64), "height": 64, "width": 64}  # at least so many

# ERNIE-Image


def _ernie_transformer() -> Any:
    return diffusers.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=64,
        in_channels=_CHANNELS,
        out_channels=_CHANNELS,
        text_in_dim=TEXT_WIDTH,
        rope_axes_dim=(4, 6, 6),
    )


_ERNIE: dict[str, Any] = {
    **_DEV,
    "transformer": _ernie_transformer,
    "scheduler": partial(flow_scheduler, shift=3.0),
    "text_encoder": lambda: mistral3().model,
    "pe": None,
    "pe_tokenizer": None,
}

# Ideogram 4


def _ideogram_transformer() -> Any:
    return diffusers.Ideogram4Transformer2DModel(
        in_channels=_CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=32,
        adaln_dim=16,
        llm_features_dim=13 * TEXT_WIDTH,
        mrope_section=(4, 2, 2),
    )


_IDEOGRAM: dict[str, Any] = {
    **_DEV,
    "transformer": _ideogram_transformer,
    "unconditional_transformer": _ideogram_transformer,
    "scheduler": flow_scheduler,
    "text_encoder": lambda: qwen3_vl(num_hidden_layers=36).model,  # thirteen layers of it are read
}

# FIBO 2


def _fibo_transformer() -> Any:
    return diffusers.BriaFibo2Transformer2DModel(
        in_channels=_CHANNELS // 4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=3 * TEXT_WIDTH,
        injection_layer_ids=(0,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=4,
        gist_min_text_len=16,
        gist_max_text_len=64,
        axes_dims=(4, 6, 6),
        axes_lens=(512, 64, 64),
    )


_FIBO: dict[str, Any] = {
    **_DEV,
    "transformer": _fibo_transformer,
    "text_encoder": partial(qwen3_vl, num_hidden_layers=36),
    "processor": partial(SeeingProcessor, 16),
}

PIPELINES: dict[str, Small] = {
    "Flux2Pipeline": flow("Flux2Pipeline", _DEV, {**_CALL, "max_sequence_length": 512}, guidance="none"),
    "Flux2KleinPipeline": flow("Flux2KleinPipeline", _KLEIN, _CALL, guidance="separate"),
    "Flux2KleinInpaintPipeline": flow("Flux2KleinInpaintPipeline", _KLEIN, _LARGE, guidance="separate"),
    "Flux2KleinKVPipeline": flow("Flux2KleinKVPipeline", _KLEIN, _LARGE, guidance="none"),
    "ErnieImagePipeline": flow("ErnieImagePipeline", _ERNIE, {"use_pe": False, "negative_prompt": NEGATIVE_PROMPT}),
    "Ideogram4Pipeline": flow(
        "Ideogram4Pipeline",
        _IDEOGRAM,
        {"max_sequence_length": 64, "guidance_schedule": None},
        guidance="separate",
        denoisers=("transformer", "unconditional_transformer"),
    ),
    "BriaFibo2Pipeline": flow(
        "BriaFibo2Pipeline", _FIBO, {"image": None, "negative_prompt": NEGATIVE_PROMPT}, guidance="separate"
    ),
}
"""By the name of the class."""
