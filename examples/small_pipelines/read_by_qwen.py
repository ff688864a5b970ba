"""Image models whose texts are read by Qwen: LongCat, Ovis, Krea 2, Nucleus, Qwen-Image 2.1 and JoyImage."""

from functools import partial
from typing import Any

import diffusers
import torch

from .flow_parts import NEGATIVE_PROMPT, flow, flow_scheduler, shifted_by_size, sixteen_channel_vae
from .language import TEXT_WIDTH, SeeingProcessor, byte_tokenizer, qwen2_5_vl, qwen3, qwen3_vl
from .parts import Small, certain, pil_picture
from .qwen_image import QWEN_SCHEDULER, qwen_vae
from .wan import wan_vae

_HEADS: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}


def _long_cat_transformer() -> Any:
    return diffusers.LongCatImageTransformer2DModel(
        **_HEADS, num_layers=1, num_single_layers=1, joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=TEXT_WIDTH
    )


_LONG_CAT: dict[str, Any] = {
    "transformer": _long_cat_transformer,
    "scheduler": shifted_by_size,
    "vae": sixteen_channel_vae,
    "text_encoder": qwen2_5_vl,
    "tokenizer": byte_tokenizer,
    "text_processor": SeeingProcessor,
}


# What is edited is enlarged to a million pixels, whatever its size, so there must be few latents of so many.
_LONG_CAT_EDIT: dict[str, Any] = {
    **_LONG_CAT,
    "vae": partial(sixteen_channel_vae, levels=7, block_out_channels=(4,) * 7, norm_num_groups=2),
}


def _ovis_transformer() -> Any:
    return diffusers.OvisImageTransformer2DModel(
        **_HEADS, num_layers=1, num_single_layers=1, joint_attention_dim=TEXT_WIDTH
    )


_OVIS: dict[str, Any] = {**_LONG_CAT, "transformer": _ovis_transformer, "text_encoder": qwen3}


def _krea_transformer() -> Any:
    return diffusers.Krea2Transformer2DModel(
        **_HEADS,
        num_layers=2,
        num_key_value_heads=1,
        intermediate_size=64,
        timestep_embed_dim=16,
        text_hidden_dim=TEXT_WIDTH,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
    )


_KREA: dict[str, Any] = {
    "transformer": _krea_transformer,
    "scheduler": partial(shifted_by_size, max_image_seq_len=6400),
    "vae": qwen_vae,
    "text_encoder": lambda: qwen3_vl().model,
    "tokenizer": byte_tokenizer,
    "text_encoder_select_layers": (1, 2),
}


def _nucleus_transformer() -> Any:
    network = diffusers.NucleusMoEImageTransformer2DModel(
        **_HEADS,
        out_channels=16,
        num_layers=2,
        num_key_value_heads=1,
        joint_attention_dim=TEXT_WIDTH,
        mlp_ratio=8,  # a width below 128 is rounded down to none
        dense_moe_strategy="leave_first_block_dense",
        num_experts=4,
        moe_intermediate_dim=16,
        capacity_factors=2.0,
    )
    for name, weights in network.named_parameters():
        if "experts" in name:
            torch.nn.init.normal_(weights, std=0.2)  # they are left as the memory was, since files will have them
    return network


_NUCLEUS: dict[str, Any] = {
    "transformer": _nucleus_transformer,
    "scheduler": shifted_by_size,
    "vae": qwen_vae,
    "text_encoder": qwen3_vl,
    "processor": partial(SeeingProcessor, 16),
}


def _second_qwen_vae() -> Any:
    # 16 pixels to a latent's side
    return diffusers.AutoencoderKLQwenImage21(
        base_dim=4, decoder_base_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1
    )


def _second_qwen_transformer() -> Any:
    return diffusers.QwenImage21Transformer2DModel(**_HEADS, num_layers=2, context_in_dim=TEXT_WIDTH, mlp_ratio=2)


_SECOND_QWEN: dict[str, Any] = {
    **_NUCLEUS,
    "transformer": _second_qwen_transformer,
    "scheduler": QWEN_SCHEDULER,
    "vae": _second_qwen_vae,
}


def _joy_transformer(plus: bool = False) -> Any:
    kind = diffusers.JoyImageEditPlusTransformer3DModel if plus else diffusers.JoyImageEditTransformer3DModel
    return kind(
        hidden_size=32,
        num_attention_heads=2,
        text_dim=TEXT_WIDTH,
        mlp_width_ratio=2.0,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )


def _joy_vae() -> Any:
    # What is edited is enlarged to a million pixels, as it is for LongCat.
    return wan_vae(
        base_dim=2,
        dim_mult=[1] * 7,
        num_res_blocks=0,
        temperal_downsample=[False] * 4 + [True] * 2,
        scale_factor_spatial=64,
    )


_JOY: dict[str, Any] = {
    "transformer": _joy_transformer,
    "scheduler": partial(flow_scheduler, shift=1.5),
    "vae": lambda: certain(_joy_vae()),
    "text_encoder": qwen3_vl,
    "tokenizer": byte_tokenizer,
    "processor": partial(SeeingProcessor, 16),
}

_NEGATIVE: dict[str, Any] = {"negative_prompt": NEGATIVE_PROMPT}

PIPELINES: dict[str, Small] = {
    "LongCatImagePipeline": flow(
        "LongCatImagePipeline", _LONG_CAT, {**_NEGATIVE, "enable_prompt_rewrite": False}, guidance="separate"
    ),
    "LongCatImageEditPipeline": flow("LongCatImageEditPipeline", _LONG_CAT_EDIT, _NEGATIVE, guidance="separate"),
    "OvisImagePipeline": flow("OvisImagePipeline", _OVIS, _NEGATIVE, guidance="separate"),
    "Krea2Pipeline": flow("Krea2Pipeline", _KREA, _NEGATIVE, guidance="separate"),
    "NucleusMoEImagePipeline": flow(
        "NucleusMoEImagePipeline",
        _NUCLEUS,
        {**_NEGATIVE, "max_sequence_length": 256, "return_index": -1},
        guidance="separate",
    ),
    "QwenImage21Pipeline": flow(
        "QwenImage21Pipeline", _SECOND_QWEN, {**_NEGATIVE, "true_cfg_scale": 4.0, "image": None}, guidance="separate"
    ),
    "JoyImageEditPipeline": flow("JoyImageEditPipeline", _JOY, _NEGATIVE, guidance="separate"),
    "JoyImageEditPlusPipeline": flow(
        "JoyImageEditPlusPipeline",
        {**_JOY, "transformer": partial(_joy_transformer, plus=True)},
        {**_NEGATIVE, "images": lambda: [pil_picture()], "height": 128, "width": 128},
    ),
}
"""By the name of the class."""
