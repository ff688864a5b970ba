"""HunyuanVideo, HunyuanVideo 1.5 and HunyuanImage 2.1; the later ones are guided by a guider of diffusers."""

from functools import partial
from typing import Any

import diffusers
import torch
import transformers

from .flow_parts import NEGATIVE_PROMPT, flow, flow_scheduler, siglip_encoder, siglip_processor
from .language import TEXT_WIDTH, byte_tokenizer, decoder_config, qwen2_5_vl, t5_config
from .parts import SIZE, WIDTH, Small, normal, text_encoder, tokenizer

# HunyuanVideo: its guidance is an input of the transformer, and a second prediction is an option


def _llama_tokenizer() -> Any:
    marks = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<pad>")
    return byte_tokenizer("PreTrainedTokenizerFast", marks, start=marks[0], pad_token="<pad>")


def _llama() -> Any:
    return transformers.LlamaModel(decoder_config("LlamaConfig", _llama_tokenizer(), num_hidden_layers=3))


_SHAPE: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": TEXT_WIDTH,
    "pooled_projection_dim": WIDTH,
    "rope_axes_dim": (4, 4, 4),
}


def _transformer(**changes: Any) -> Any:
    return diffusers.HunyuanVideoTransformer3DModel(**{**_SHAPE, **changes})


def _framepack_transformer() -> Any:
    return diffusers.HunyuanVideoFramepackTransformer3DModel(
        **_SHAPE, has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True
    )


def hunyuan_video_vae(**changes: Any) -> Any:
    """With latents of 16 channels; four pixels to a latent's side, four frames to one of latents beside the first."""
    config: dict[str, Any] = {
        "down_block_types": ("HunyuanVideoDownBlock3D",) * 3,
        "up_block_types": ("HunyuanVideoUpBlock3D",) * 3,
        "block_out_channels": (8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "spatial_compression_ratio": 4,
    }
    return diffusers.AutoencoderKLHunyuanVideo(**{**config, **changes})


_VIDEO: dict[str, Any] = {
    "transformer": _transformer,
    "scheduler": partial(flow_scheduler, shift=7.0),
    "vae": hunyuan_video_vae,
    "text_encoder": _llama,
    "tokenizer": _llama_tokenizer,
    "text_encoder_2": partial(text_encoder, max_position_embeddings=77),
    "tokenizer_2": partial(tokenizer, max_length=77),
    "image_encoder": siglip_encoder,
    "feature_extractor": siglip_processor,
    "image_processor": None,
}

# The pipelines' own template has more letters than a prompt may have tokens.
_VIDEO_CALL: dict[str, Any] = {
    "negative_prompt": NEGATIVE_PROMPT,
    "true_cfg_scale": 6.0,
    "prompt_template": {"template": "{}", "crop_start": 0},
}

_EMBEDDINGS: dict[str, Any] = {
    "prompt": None,
    "negative_prompt": None,
    "prompt_embeds": partial(normal, 1, 8, TEXT_WIDTH),
    "prompt_attention_mask": partial(torch.ones, 1, 8),
    "pooled_prompt_embeds": partial(normal, 1, WIDTH),
    "negative_prompt_embeds": partial(normal, 1, 8, TEXT_WIDTH, seed=3),
    "negative_prompt_attention_mask": partial(torch.ones, 1, 8),
    "negative_pooled_prompt_embeds": partial(normal, 1, WIDTH, seed=3),
}

# HunyuanVideo 1.5


def _by_t5() -> Any:
    return transformers.T5EncoderModel(t5_config(vocab_size=384))


def _video_15_transformer(task: str) -> Any:
    return diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=2 * 8 + 1,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=TEXT_WIDTH,
        text_embed_2_dim=TEXT_WIDTH,
        image_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
        target_size=SIZE,
        task_type=task,
    )


def _video_15_vae() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=8, block_out_channels=(16, 16, 16), layers_per_block=1, spatial_compression_ratio=4
    )


def _text_model() -> Any:
    return qwen2_5_vl().model.language_model


_BY_T5: dict[str, Any] = {"text_encoder_2": _by_t5, "tokenizer_2": lambda: transformers.ByT5Tokenizer()}

_VIDEO_15: dict[str, Any] = {
    "scheduler": partial(flow_scheduler, shift=5.0),
    "vae": _video_15_vae,
    "text_encoder": _text_model,
    "tokenizer": byte_tokenizer,
    **_BY_T5,
    "guider": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=6.0),
    "image_encoder": siglip_encoder,
    "feature_extractor": siglip_processor,
}


def _image_transformer(channels: int, results: int, axes: tuple[int, ...], **changes: Any) -> Any:
    return diffusers.HunyuanImageTransformer2DModel(
        in_channels=channels,
        out_channels=results,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=TEXT_WIDTH,
        rope_axes_dim=axes,
        **changes,
    )


def _image_vae() -> Any:
    return diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=4,
        sample_size=SIZE,
        scaling_factor=0.75289,
    )


def _refiner_vae() -> Any:
    return diffusers.AutoencoderKLHunyuanImageRefiner(
        latent_channels=8, block_out_channels=(16, 16, 16), layers_per_block=1, spatial_compression_ratio=4
    )


def _guider() -> Any:
    return diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=1)


_IMAGE: dict[str, Any] = {
    "transformer": partial(_image_transformer, 8, 8, (8, 8), text_embed_2_dim=TEXT_WIDTH),
    "scheduler": partial(flow_scheduler, shift=5.0),
    "vae": _image_vae,
    "text_encoder": partial(qwen2_5_vl, num_hidden_layers=3),
    "tokenizer": byte_tokenizer,
    **_BY_T5,
    "guider": _guider,
    "ocr_guider": _guider,
}

_REFINER: dict[str, Any] = {
    **_IMAGE,
    "transformer": partial(_image_transformer, 32, 16, (4, 6, 6), patch_size=(1, 1, 1), guidance_embeds=True),
    "vae": _refiner_vae,
    "scheduler": partial(flow_scheduler, shift=4.0),
}

_NEGATIVE: dict[str, Any] = {"negative_prompt": NEGATIVE_PROMPT}

_video = partial(flow, output="frames", guidance="separate")

_video_15 = partial(
    _video,
    attributes={
        "system_message": "Describe the video.",
        "prompt_template_encode_start_idx": 0,
        "tokenizer_max_length": 128,
        "tokenizer_2_max_length": 16,
        "vision_num_semantic_tokens": 4,
    },
)

PIPELINES: dict[str, Small] = {
    "HunyuanVideoPipeline": _video("HunyuanVideoPipeline", _VIDEO, _VIDEO_CALL),
    "HunyuanVideoImageToVideoPipeline": _video(
        "HunyuanVideoImageToVideoPipeline",
        {**_VIDEO, "transformer": partial(_transformer, in_channels=33, image_condition_type="latent_concat")},
        {**_EMBEDDINGS, "true_cfg_scale": 6.0},
    ),
    "HunyuanSkyreelsImageToVideoPipeline": _video(
        "HunyuanSkyreelsImageToVideoPipeline",
        {**_VIDEO, "transformer": partial(_transformer, in_channels=32)},
        _VIDEO_CALL,
    ),
    "HunyuanVideoFramepackPipeline": _video(
        "HunyuanVideoFramepackPipeline",
        {**_VIDEO, "transformer": _framepack_transformer},
        {**_VIDEO_CALL, "latent_window_size": 2},
    ),
    "HunyuanVideo15Pipeline": _video_15(
        "HunyuanVideo15Pipeline", {**_VIDEO_15, "transformer": partial(_video_15_transformer, "t2v")}, _NEGATIVE
    ),
    "HunyuanVideo15ImageToVideoPipeline": _video_15(
        "HunyuanVideo15ImageToVideoPipeline",
        {**_VIDEO_15, "transformer": partial(_video_15_transformer, "i2v")},
        _NEGATIVE,
    ),
    "HunyuanImagePipeline": flow("HunyuanImagePipeline", _IMAGE, _NEGATIVE, guidance="separate"),
    "HunyuanImageRefinerPipeline": flow("HunyuanImageRefinerPipeline", _REFINER, _NEGATIVE, guidance="separate"),
}
"""By the name of the class."""
