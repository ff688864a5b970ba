"""Sounds by flow matching: Stable Audio 3, ACE-Step and LongCat's."""

from functools import partial
from typing import Any

import diffusers
import transformers

from .flow_parts import NEGATIVE_PROMPT, flow, flow_scheduler
from .language import TEXT_WIDTH, byte_tokenizer, gemma_tokenizer, qwen3, t5_gemma_config, t5_tokenizer, umt5_encoder
from .parts import Small, class_of, normal

_CHANNELS = 8
"""Of latents."""

_RATE = 64
"""Samples of a second, few enough for seconds to be short."""

# Stable Audio 3: times from 0 to 1, and steps that forget what noise there was


def _t5_gemma() -> Any:
    kind = class_of("text_encoder", "StableAudio3Pipeline")
    text = t5_gemma_config().to_dict()
    return kind(transformers.T5GemmaConfig(encoder=text, decoder=text, is_encoder_decoder=False))


def _stable_transformer() -> Any:
    return diffusers.StableAudio3DiTModel(
        io_channels=_CHANNELS,
        embed_dim=32,
        depth=2,
        num_heads=2,
        cond_token_dim=TEXT_WIDTH,
        global_cond_dim=TEXT_WIDTH,
        local_add_cond_dim=_CHANNELS + 1,
        timestep_features_dim=16,
        ff_mult=2.0,
        num_memory_tokens=4,
    )


def _stable_vae() -> Any:
    return diffusers.AutoencoderSAME(
        patch_size=4,
        encoder_channels=16,
        encoder_c_mults=[1],
        encoder_strides=[2],
        encoder_transformer_depths=[1],
        latent_dim=_CHANNELS,
        dim_heads=8,
        ff_mult=2,
        sampling_rate=_RATE,
    )


_STABLE: dict[str, Any] = {
    "transformer": _stable_transformer,
    "scheduler": partial(flow_scheduler, num_train_timesteps=1, stochastic_sampling=True),
    "vae": _stable_vae,
    "text_encoder": _t5_gemma,
    "tokenizer": gemma_tokenizer,
    "duration_embedder": lambda: class_of("duration_embedder", "StableAudio3Pipeline")(
        output_dim=TEXT_WIDTH, fourier_dim=16
    ),
}

_SECONDS: dict[str, Any] = {"duration": 2.0}

_SOUND: dict[str, Any] = {**_SECONDS, "audio": partial(normal, 1, 2, 2 * _RATE)}

_CUT: dict[str, Any] = {**_SOUND, "mask_start_seconds": 0.5, "mask_end_seconds": 1.5}

# ACE-Step: music, to lyrics

_HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


def _ace_transformer() -> Any:
    return diffusers.AceStepTransformer1DModel(
        **_HEADS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        in_channels=3 * _CHANNELS,
        audio_acoustic_hidden_dim=_CHANNELS,
        sliding_window=8,
    )


def _condition_encoder() -> Any:
    return class_of("condition_encoder", "AceStepPipeline")(
        **_HEADS,
        hidden_size=16,
        intermediate_size=32,
        text_hidden_dim=TEXT_WIDTH,
        timbre_hidden_dim=_CHANNELS,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
        sliding_window=8,
    )


def oobleck() -> Any:
    """With latents of 8 channels, 8 samples of two channels to each."""
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=2 * _CHANNELS,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=_CHANNELS,
        sampling_rate=_RATE,
    )


_ACE: dict[str, Any] = {
    "transformer": _ace_transformer,
    "condition_encoder": _condition_encoder,
    "scheduler": partial(flow_scheduler, num_train_timesteps=1),
    "vae": oobleck,
    "text_encoder": qwen3,
    "tokenizer": byte_tokenizer,
}

# LongCat's


def _cat_transformer() -> Any:
    return diffusers.LongCatAudioDiTTransformer(
        dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=TEXT_WIDTH, latent_dim=_CHANNELS, ff_mult=2.0
    )


def _cat_vae() -> Any:
    return diffusers.LongCatAudioDiTVae(
        channels=8,
        c_mults=[1, 2],
        strides=[2, 4],
        latent_dim=_CHANNELS,
        encoder_latent_dim=2 * _CHANNELS,
        downsampling_ratio=8,
        sample_rate=_RATE,
    )


_CAT: dict[str, Any] = {
    "transformer": _cat_transformer,
    "scheduler": partial(flow_scheduler, invert_sigmas=True),
    "vae": _cat_vae,
    "text_encoder": umt5_encoder,
    "tokenizer": t5_tokenizer,
}

_sound = partial(flow, output="audios")

PIPELINES: dict[str, Small] = {
    "StableAudio3Pipeline": _sound("StableAudio3Pipeline", _STABLE, _SECONDS),
    "StableAudio3AudioToAudioPipeline": _sound("StableAudio3AudioToAudioPipeline", _STABLE, _SOUND, guidance="none"),
    "StableAudio3InpaintPipeline": _sound("StableAudio3InpaintPipeline", _STABLE, _CUT, guidance="none"),
    "AceStepPipeline": _sound("AceStepPipeline", _ACE, {"audio_duration": 2.0}),
    "LongCatAudioDiTPipeline": _sound(
        "LongCatAudioDiTPipeline",
        _CAT,
        {"audio_duration_s": 2.0, "negative_prompt": NEGATIVE_PROMPT},
        guidance="separate",
    ),
}
"""By the name of the class."""
