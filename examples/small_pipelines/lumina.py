"""Lumina-Next and Lumina 2, and AuraFlow: image models of few parts."""

from functools import partial
from typing import Any

import diffusers
import torch
import transformers

from .flow_parts import flow, flow_scheduler, sixteen_channel_vae
from .language import (
    TEXT_WIDTH,
    decoder_config,
    gemma2,
    gemma_tokenizer,
    t5_tokenizer,
    umt5_encoder,
)
from .parts import LATENT_SIZE, Small


def _next_transformer() -> Any:
    network = diffusers.LuminaNextDiT2DModel(
        sample_size=LATENT_SIZE,
        hidden_size=24,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        cross_attention_dim=TEXT_WIDTH,
    )
    torch.nn.init.normal_(network.pad_token)  # it is left as the memory was, since files will have it
    return network


def _transformer() -> Any:
    return diffusers.Lumina2Transformer2DModel(
        sample_size=LATENT_SIZE,
        in_channels=16,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        cap_feat_dim=TEXT_WIDTH,
    )


def _aura_transformer() -> Any:
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=LATENT_SIZE,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )


PIPELINES: dict[str, Small] = {
    "LuminaPipeline": flow(
        "LuminaPipeline",
        {
            "transformer": _next_transformer,
            "scheduler": flow_scheduler,
            "text_encoder": lambda: transformers.GemmaModel(decoder_config("GemmaConfig", gemma_tokenizer())),
            "tokenizer": gemma_tokenizer,
        },
        {"clean_caption": False},  # it would take packages that need not be there
    ),
    "Lumina2Pipeline": flow(
        "Lumina2Pipeline",
        {
            "transformer": _transformer,
            "scheduler": partial(flow_scheduler, shift=6.0),
            "vae": sixteen_channel_vae,
            "text_encoder": gemma2,
            "tokenizer": gemma_tokenizer,
        },
        {"max_sequence_length": 256},  # the prompt stands behind a text of the pipeline's own
        guidance="separate",
    ),
    "AuraFlowPipeline": flow(
        "AuraFlowPipeline",
        {
            "transformer": _aura_transformer,
            "scheduler": partial(flow_scheduler, shift=1.73),
            "text_encoder": umt5_encoder,
            "tokenizer": t5_tokenizer,
        },
    ),
}
"""By the name of the class."""
