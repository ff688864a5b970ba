"""Bria 3 and FIBO, of which the latter reads all layers of its language model; and PRX."""

from functools import partial
from typing import Any

import diffusers
import transformers

from .flow_parts import NEGATIVE_PROMPT, flow, flow_scheduler, shifted_by_size, sixteen_channel_vae
from .language import (
    TEXT_WIDTH,
    byte_tokenizer,
    decoder_config,
    gemma_tokenizer,
    t5_encoder,
    t5_gemma_encoder,
    t5_tokenizer,
)
from .parts import Small, normal, pil_picture
from .wan import wan_vae

_SHAPE: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": [4, 6, 6],
}


def _transformer() -> Any:
    return diffusers.BriaTransformer2DModel(**_SHAPE, joint_attention_dim=TEXT_WIDTH)


def _fibo_transformer() -> Any:
    return diffusers.BriaFiboTransformer2DModel(
        **_SHAPE, joint_attention_dim=2 * TEXT_WIDTH, text_encoder_dim=TEXT_WIDTH
    )


_BRIA: dict[str, Any] = {
    "transformer": _transformer,
    "scheduler": shifted_by_size,
    "text_encoder": t5_encoder,
    "tokenizer": t5_tokenizer,
    "image_encoder": None,
}

_FIBO: dict[str, Any] = {
    "transformer": _fibo_transformer,
    "scheduler": shifted_by_size,
    # 16 pixels to a latent's side, of which the first halving is by patches
    "vae": partial(
        wan_vae,
        dim_mult=[1, 1, 1, 1],
        temperal_downsample=[False, True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        is_residual=True,
        scale_factor_spatial=16,
    ),
    "text_encoder": lambda: transformers.SmolLM3ForCausalLM(decoder_config("SmolLM3Config")),
    "tokenizer": byte_tokenizer,
}

_SIDE = 64
_FIBO_CALL: dict[str, Any] = {"height": _SIDE, "width": _SIDE, "negative_prompt": NEGATIVE_PROMPT}


# PRX


def _prx_transformer(**changes: Any) -> Any:
    config: dict[str, Any] = {
        "in_channels": 16,
        "patch_size": 2,
        "context_in_dim": TEXT_WIDTH,
        "hidden_size": 32,
        "mlp_ratio": 2,
        "num_heads": 2,
        "depth": 2,
        "axes_dim": [8, 8],
    }
    return diffusers.PRXTransformer2DModel(**{**config, **changes})


_PRX: dict[str, Any] = {
    "transformer": _prx_transformer,
    "scheduler": partial(flow_scheduler, shift=3.0),
    "vae": sixteen_channel_vae,
    "text_encoder": t5_gemma_encoder,
    "tokenizer": gemma_tokenizer,
}

_PRX_CALL: dict[str, Any] = {"use_resolution_binning": False}

# Texts come as embeddings: the pipelines clean them by a package that need not be there.
_EMBEDDINGS: dict[str, Any] = {
    "prompt": None,
    "prompt_embeds": partial(normal, 1, 8, TEXT_WIDTH),
    "negative_prompt_embeds": partial(normal, 1, 8, TEXT_WIDTH, seed=3),
}

PIPELINES: dict[str, Small] = {
    "BriaPipeline": flow("BriaPipeline", _BRIA, {"negative_prompt": NEGATIVE_PROMPT}),
    "BriaFiboPipeline": flow("BriaFiboPipeline", _FIBO, _FIBO_CALL),
    "BriaFiboEditPipeline": flow(
        "BriaFiboEditPipeline",
        _FIBO,
        {
            **_FIBO_CALL,
            "prompt": '{"edit_instruction": "make it dark"}',
            "image": partial(pil_picture, _SIDE),
            "_auto_resize": False,
        },
    ),
    "PRXPipeline": flow("PRXPipeline", _PRX, {**_PRX_CALL, **_EMBEDDINGS}),
    "PRXPixelPipeline": flow(
        "PRXPixelPipeline",
        {**_PRX, "transformer": partial(_prx_transformer, in_channels=3, patch_size=4, bottleneck_size=8)},
        {**_PRX_CALL, **_EMBEDDINGS, "output_type": "np"},
    ),
}
"""By the name of the class."""
