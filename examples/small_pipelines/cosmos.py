"""Cosmos 1 to 3, and Mochi: videos."""

from functools import partial
from typing import Any

import diffusers

from .flow_parts import NEGATIVE_PROMPT, flow, flow_scheduler, unipc_scheduler
from .language import TEXT_WIDTH, byte_tokenizer, qwen2_5_vl, t5_encoder, t5_tokenizer
from .parts import Small
from .wan import wan_vae


class NothingUnsafe:
    """In place of Cosmos' own checker, which is a package of its own with networks that are large."""

    def to(self, device: Any) -> "NothingUnsafe":
        """Nothing to move."""
        return self

    def check_text_safety(self, prompt: str) -> bool:
        """Any text is let through."""
        return True

    def check_video_safety(self, frames: Any) -> Any:
        """Any video is left as it is."""
        return frames


_SHAPE: dict[str, Any] = {
    "out_channels": 16,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "mlp_ratio": 2,
    "text_embed_dim": TEXT_WIDTH,
    "adaln_lora_dim": 4,
    "max_size": (4, 8, 8),
    "extra_pos_embed_type": None,
    "concat_padding_mask": False,  # it would be resized by torchvision, which need not be there
}


def _transformer(channels: int) -> Any:
    return diffusers.CosmosTransformer3DModel(**_SHAPE, in_channels=channels)


def _vae() -> Any:
    return diffusers.AutoencoderKLCosmos(
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=32,
        num_layers=1,
        patch_size=2,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )


_SECOND: dict[str, Any] = {
    "transformer": partial(_transformer, 16),
    "scheduler": partial(flow_scheduler, use_karras_sigmas=True),
    "vae": wan_vae,
    "text_encoder": t5_encoder,
    "tokenizer": t5_tokenizer,
    "safety_checker": NothingUnsafe,
}

_FIRST: dict[str, Any] = {
    **_SECOND,
    "vae": _vae,
    "scheduler": lambda: diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min"
    ),
}

# One more channel says which frames are given.
_FROM_VIDEO: dict[str, Any] = {"transformer": partial(_transformer, 17)}

_UNIPC = partial(unipc_scheduler, 1.0, use_karras_sigmas=True, sigma_max=200.0, sigma_min=0.01)

# Cosmos 2.5: always with that channel, and it reads all layers of Qwen


def _predicting_transformer() -> Any:
    return diffusers.CosmosTransformer3DModel(
        **_SHAPE,
        in_channels=17,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=2 * TEXT_WIDTH,
        encoder_hidden_states_channels=TEXT_WIDTH,
    )


_THIRD: dict[str, Any] = {
    **_SECOND,
    "transformer": _predicting_transformer,
    "scheduler": _UNIPC,
    "text_encoder": qwen2_5_vl,
    "tokenizer": byte_tokenizer,
}

# Cosmos 3: a language model that denoises


def _omni_transformer() -> Any:
    return diffusers.Cosmos3OmniTransformer(
        head_dim=16,
        hidden_size=32,
        intermediate_size=64,
        latent_channel=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        patch_latent_dim=64,
        vocab_size=512,
        rope_axes_dim=(4, 2, 2),
    )


_FOURTH: dict[str, Any] = {
    "transformer": _omni_transformer,
    "vae": wan_vae,
    "text_tokenizer": byte_tokenizer,
    "scheduler": _UNIPC,
    "safety_checker": None,
    "enable_safety_checker": False,
}

# Mochi


def _mochi_transformer() -> Any:
    return diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=16,
        max_sequence_length=32,
    )


def _mochi_vae() -> Any:
    return diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )


_MOCHI: dict[str, Any] = {
    "transformer": _mochi_transformer,
    "scheduler": partial(flow_scheduler, invert_sigmas=True),
    "vae": _mochi_vae,
    "text_encoder": t5_encoder,
    "tokenizer": t5_tokenizer,
}

_NEGATIVE: dict[str, Any] = {"negative_prompt": NEGATIVE_PROMPT}  # in place of a text that is hundreds of tokens long

_world = partial(flow, output="frames", guidance="separate")

# Each of two predictions goes through a step of its own, of which only the denoised sample is used.
_first = partial(_world, updates=2)

PIPELINES: dict[str, Small] = {
    "Cosmos2TextToImagePipeline": flow("Cosmos2TextToImagePipeline", _SECOND, _NEGATIVE, guidance="separate"),
    "Cosmos2VideoToWorldPipeline": _world("Cosmos2VideoToWorldPipeline", {**_SECOND, **_FROM_VIDEO}, _NEGATIVE),
    "CosmosTextToWorldPipeline": _first("CosmosTextToWorldPipeline", _FIRST, _NEGATIVE),
    "CosmosVideoToWorldPipeline": _first("CosmosVideoToWorldPipeline", {**_FIRST, **_FROM_VIDEO}, _NEGATIVE),
    "Cosmos2_5_PredictBasePipeline": _world("Cosmos2_5_PredictBasePipeline", _THIRD, {**_NEGATIVE, "image": None}),
    "Cosmos3OmniPipeline": flow(
        "Cosmos3OmniPipeline",
        _FOURTH,
        {**_NEGATIVE, "image": None},
        output="video",
        guidance="separate",
    ),
    "MochiPipeline": flow("MochiPipeline", _MOCHI, output="frames"),
}
"""By the name of the class."""
