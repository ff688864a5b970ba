"""Kandinsky 2.1, 2.2 and 3: latents of a VQ model, made for the features of an image or for a text."""

from functools import partial
from typing import Any

import torch
from diffusers import Kandinsky3UNet, VQModel
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

from .deepfloyd import variance_scheduler, variance_unet
from .parts import (
    LATENT_SIZE,
    WIDTH,
    Small,
    feature_extractor,
    image_encoder,
    normal,
    picture,
    projecting_text_encoder,
    small,
    tokenizer,
)
from .unclip import prior, prior_scheduler


def _movq() -> VQModel:
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        num_vq_embeddings=16,
        norm_num_groups=4,
    )


# Kandinsky 2

_FEATURES: dict[str, Any] = {
    "image_embeds": partial(normal, 1, WIDTH),
    "negative_image_embeds": partial(normal, 1, WIDTH, seed=3),
}

_PRIOR: dict[str, Any] = {
    "prior_prior": prior,
    "prior_image_encoder": image_encoder,
    "prior_image_processor": feature_extractor,
    "prior_text_encoder": projecting_text_encoder,
    "prior_tokenizer": tokenizer,
    "prior_scheduler": prior_scheduler,
}

_PRIOR_ARGUMENTS: dict[str, Any] = {
    "prior_num_inference_steps": 2,
    "prior_guidance_scale": 7.5,
    "callback_steps": None,  # the pipelines of 2.2 would warn of the number that they pass on by default
}


def _multilingual_text_encoder() -> MultilingualCLIP:
    # It reads the tokens of CLIP: in transformers 4, its own tokenizer needs a package more.
    vocabulary = tokenizer()
    return MultilingualCLIP(
        MCLIPConfig(
            transformerDimSize=WIDTH,
            imageDimSize=WIDTH,
            vocab_size=len(vocabulary),
            pad_token_id=vocabulary.pad_token_id,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            # They pad to 77 tokens, and positions are counted from the number of the padding token.
            max_position_embeddings=vocabulary.pad_token_id + 1 + 77,
        )
    )


def _version_2(name: str) -> Small:
    components: dict[str, Any] = {"movq": _movq}
    if "Combined" in name:
        components |= _PRIOR
        arguments = {**_PRIOR_ARGUMENTS}
    else:
        arguments = {**_FEATURES}
    if "V22" in name:
        components["scheduler"] = variance_scheduler
        unet = {"encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"}
    else:
        components["text_encoder"] = _multilingual_text_encoder
        unet = {"encoder_hid_dim_type": "text_image_proj", "addition_embed_type": "text_image"}
    if "Inpaint" in name:
        unet["in_channels"] = 9  # beside the latents, those of what is kept, and the mask
    if "Controlnet" in name:
        unet |= {"in_channels": 8, "addition_embed_type": "image_hint"}
        arguments["hint"] = partial(picture, 8 * LATENT_SIZE)
    if "V22" not in name or "Controlnet" in name:
        arguments["output_type"] = "pt"  # they have no "latent"
    return small(name, {**components, "unet": partial(variance_unet, 4, encoder_hid_dim=WIDTH, **unet)}, arguments)


# Kandinsky 3


def _unet_3() -> Kandinsky3UNet:
    return Kandinsky3UNet(
        time_embedding_dim=16,
        groups=4,
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(8, 8, 16, 16),
        cross_attention_dim=WIDTH,
        encoder_hid_dim=WIDTH,
    )


# Texts come as embeddings: in transformers 4, T5's tokenizer needs a package more.
_COMPONENTS_3: dict[str, Any] = {"unet": _unet_3, "movq": _movq, "text_encoder": None, "tokenizer": None}

_ARGUMENTS_3: dict[str, Any] = {
    "prompt": None,
    "prompt_embeds": partial(normal, 1, 4, WIDTH),
    "negative_prompt_embeds": partial(normal, 1, 4, WIDTH, seed=3),
    "attention_mask": partial(torch.ones, 1, 4),
    "negative_attention_mask": partial(torch.ones, 1, 4),
}


PIPELINES: dict[str, Small] = {
    **{
        name: _version_2(name)
        for name in (
            "KandinskyPipeline",
            "KandinskyImg2ImgPipeline",
            "KandinskyInpaintPipeline",
            "KandinskyCombinedPipeline",
            "KandinskyImg2ImgCombinedPipeline",
            "KandinskyInpaintCombinedPipeline",
            "KandinskyV22Pipeline",
            "KandinskyV22Img2ImgPipeline",
            "KandinskyV22InpaintPipeline",
            "KandinskyV22ControlnetPipeline",
            "KandinskyV22ControlnetImg2ImgPipeline",
            "KandinskyV22CombinedPipeline",
            "KandinskyV22Img2ImgCombinedPipeline",
            "KandinskyV22InpaintCombinedPipeline",
        )
    },
    **{name: small(name, _COMPONENTS_3, _ARGUMENTS_3) for name in ("Kandinsky3Pipeline", "Kandinsky3Img2ImgPipeline")},
}
"""By the name of the class."""
