"""Chroma, Flux without CLIP and guided by a second prediction; and HiDream, which reads prompts four times."""

from functools import partial
from typing import Any

import diffusers
import transformers

from .flow_parts import NEGATIVE_PROMPT, flow, shifted_by_size, sixteen_channel_vae, unipc_scheduler
from .language import TEXT_WIDTH, byte_tokenizer, decoder_config, t5_encoder, t5_tokenizer
from .parts import LATENT_SIZE, WIDTH, Small, projecting_text_encoder, tokenizer


def _transformer() -> Any:
    network = diffusers.ChromaTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    network.register_to_config(guidance_embeds=False)  # of published configs; one of the pipelines asks for it
    return network


_COMPONENTS: dict[str, Any] = {
    "transformer": _transformer,
    "scheduler": shifted_by_size,
    "vae": sixteen_channel_vae,
    "text_encoder": t5_encoder,
    "tokenizer": t5_tokenizer,
}

# HiDream

# All texts are padded to the same length.
_clip = partial(projecting_text_encoder, max_position_embeddings=32)
_clip_tokenizer = partial(tokenizer, max_length=32)


def _llama_tokenizer() -> Any:
    marks = ("<|begin_of_text|>", "<|eot_id|>")
    return byte_tokenizer("PreTrainedTokenizerFast", marks, start=marks[0], eos_token=marks[1])


def _llama() -> Any:
    # The pipeline asks it for its attention, which other implementations do not keep.
    return transformers.LlamaForCausalLM(
        decoder_config("LlamaConfig", _llama_tokenizer(), attn_implementation="eager")
    )


def _hidream_transformer() -> Any:
    return diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[TEXT_WIDTH, TEXT_WIDTH],
        text_emb_dim=2 * WIDTH,
        axes_dims_rope=(8, 4, 4),
        llama_layers=[0, 1],
    )


_HIDREAM: dict[str, Any] = {
    "transformer": _hidream_transformer,
    "scheduler": partial(unipc_scheduler, 3.0),
    "vae": sixteen_channel_vae,
    "text_encoder": _clip,
    "tokenizer": _clip_tokenizer,
    "text_encoder_2": _clip,
    "tokenizer_2": _clip_tokenizer,
    "text_encoder_3": t5_encoder,
    "tokenizer_3": t5_tokenizer,
    "text_encoder_4": _llama,
    "tokenizer_4": _llama_tokenizer,
}

_NAMES = ("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline")

PIPELINES: dict[str, Small] = {
    **{name: flow(name, _COMPONENTS, {"negative_prompt": NEGATIVE_PROMPT}, guidance="separate") for name in _NAMES},
    "HiDreamImagePipeline": flow("HiDreamImagePipeline", _HIDREAM, attributes={"default_sample_size": LATENT_SIZE}),
}
"""By the name of the class."""
