"""Sounds: AudioLDM, MusicLDM and AudioLDM 2, up to the latents of a spectrogram where they can stop there."""

from functools import partial
from typing import Any

from diffusers import AudioLDM2UNet2DConditionModel
from transformers import (
    ClapTextConfig,
    ClapTextModelWithProjection,
    GPT2Config,
    GPT2LMHeadModel,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
)

from .parts import LATENT_SIZE, SIZE, WIDTH, Small, normal, small, unet, vae


def _vocoder() -> SpeechT5HifiGan:
    return SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=SIZE,
            upsample_initial_channel=8,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1]],
            initializer_range=0.3,  # that of large ones would make a small one all but silent
        )
    )


def _text_encoder() -> ClapTextModelWithProjection:
    return ClapTextModelWithProjection(
        ClapTextConfig(
            vocab_size=16,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    )


def _second_text_encoder() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=16, d_model=WIDTH, d_kv=4, d_ff=2 * WIDTH, num_layers=1, num_heads=2))


def _language_model() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=16, n_embd=WIDTH, n_layer=1, n_head=2))


def _two_texts_unet() -> AudioLDM2UNet2DConditionModel:
    # Of the three attentions in a row, one is to the spectrogram itself, and one to each of the two texts.
    return AudioLDM2UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=((None, WIDTH, WIDTH),) * 2,
    )


# Texts come as embeddings, which spares the tokenizers. The text encoders are there to tell their dtype.
_COMPONENTS: dict[str, Any] = {
    "vae": partial(vae, in_channels=1, out_channels=1),
    "text_encoder": _text_encoder,
    "tokenizer": None,
    "vocoder": _vocoder,
}

_ONE_TEXT: dict[str, Any] = {
    **_COMPONENTS,
    "unet": partial(
        unet,
        # The text comes as a class. What would attend to it attends to the spectrogram.
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=WIDTH,
        class_embeddings_concat=True,
        cross_attention_dim=(8, 16),
    ),
}

_TWO_TEXTS: dict[str, Any] = {
    **_COMPONENTS,
    "unet": _two_texts_unet,
    "text_encoder_2": _second_text_encoder,
    "tokenizer_2": None,
    "language_model": _language_model,
    "projection_model": None,
}

_EMBEDDINGS: dict[str, Any] = {
    "prompt": None,
    "prompt_embeds": partial(normal, 1, WIDTH),
    "negative_prompt_embeds": partial(normal, 1, WIDTH, seed=3),
}

_TWO_EMBEDDINGS: dict[str, Any] = {
    "prompt": None,
    "prompt_embeds": partial(normal, 1, 4, WIDTH),
    "negative_prompt_embeds": partial(normal, 1, 4, WIDTH, seed=3),
    "generated_prompt_embeds": partial(normal, 1, 8, WIDTH, seed=4),
    "negative_generated_prompt_embeds": partial(normal, 1, 8, WIDTH, seed=5),
}

PIPELINES: dict[str, Small] = {
    "AudioLDMPipeline": small("AudioLDMPipeline", _ONE_TEXT, _EMBEDDINGS, output_type="np"),
    "MusicLDMPipeline": small("MusicLDMPipeline", _ONE_TEXT, _EMBEDDINGS),
    "AudioLDM2Pipeline": small("AudioLDM2Pipeline", _TWO_TEXTS, _TWO_EMBEDDINGS),
}
"""By the name of the class."""
