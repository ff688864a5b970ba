"""unCLIP and Stable Cascade: a prior makes what a decoder makes an image of."""

from functools import partial
from typing import Any

import torch
from diffusers import DDPMWuerstchenScheduler, PriorTransformer, StableCascadeUNet, UnCLIPScheduler, UNet2DModel

from .deepfloyd import variance_unet
from .parts import (
    LATENT_SIZE,
    SIZE,
    TOKENS,
    WIDTH,
    Small,
    class_of,
    feature_extractor,
    image_encoder,
    normal,
    projecting_text_encoder,
    small,
    tokenizer,
)


def prior() -> PriorTransformer:
    """From a text to the features of an image."""
    network = PriorTransformer(
        num_attention_heads=2, attention_head_dim=WIDTH // 2, num_layers=1, embedding_dim=WIDTH, num_embeddings=TOKENS
    )
    with torch.no_grad():
        network.clip_std.fill_(1)  # it is 0 where nothing was loaded, and would leave nothing of what was made
    return network


prior_scheduler = partial(UnCLIPScheduler, prediction_type="sample", clip_sample_range=5.0)
"""For `prior`."""

_PRIOR_CALL: dict[str, Any] = {"prior_num_inference_steps": 2, "prior_guidance_scale": 7.5}


# unCLIP


def _enlarging_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=6,
        out_channels=3,
        down_block_types=("ResnetDownsampleBlock2D",) * 2,
        up_block_types=("ResnetUpsampleBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
    )


_UNCLIP: dict[str, Any] = {
    "decoder": partial(variance_unet, 3, class_embed_type="identity"),
    "text_proj": lambda: class_of("text_proj", "UnCLIPPipeline")(
        clip_embeddings_dim=WIDTH, time_embed_dim=4 * WIDTH, cross_attention_dim=WIDTH
    ),
    "text_encoder": projecting_text_encoder,
    "super_res_first": _enlarging_unet,
    "super_res_last": _enlarging_unet,
    "decoder_scheduler": partial(UnCLIPScheduler, variance_type="learned_range"),
    "super_res_scheduler": UnCLIPScheduler,
}

_EYES: dict[str, Any] = {"feature_extractor": feature_extractor, "image_encoder": image_encoder}

_UNCLIP_CALL: dict[str, Any] = {
    "decoder_num_inference_steps": 3,
    "super_res_num_inference_steps": 2,
    "decoder_guidance_scale": 7.5,
    "output_type": "np",
}

# Stable Cascade


def _cascade_unet(**changes: Any) -> StableCascadeUNet:
    blocks = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    config: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "timestep_ratio_embedding_dim": 8,
        "conditioning_dim": WIDTH,
        "block_out_channels": (8, 16),
        "num_attention_heads": (2, 2),
        "down_num_layers_per_block": (1, 1),
        "up_num_layers_per_block": (1, 1),
        "block_types_per_layer": (blocks, blocks),
        "clip_text_pooled_in_channels": WIDTH,
        "self_attn": False,  # so that a text matters in a network of so few layers
    }
    return StableCascadeUNet(**{**config, **changes})


_cascade_prior = partial(_cascade_unet, clip_text_in_channels=WIDTH, clip_image_in_channels=WIDTH)

_DECODER: dict[str, Any] = {
    "decoder": partial(_cascade_unet, patch_size=2, effnet_in_channels=4, timestep_conditioning_type=("sca",)),
    "text_encoder": projecting_text_encoder,
    "scheduler": DDPMWuerstchenScheduler,
    "vqgan": None,  # for pixels only
}

PIPELINES: dict[str, Small] = {
    "UnCLIPPipeline": small(
        "UnCLIPPipeline",
        {**_UNCLIP, "prior": prior, "prior_scheduler": prior_scheduler},
        {**_UNCLIP_CALL, **_PRIOR_CALL},
    ),
    "UnCLIPImageVariationPipeline": small("UnCLIPImageVariationPipeline", {**_UNCLIP, **_EYES}, _UNCLIP_CALL),
    "StableCascadePriorPipeline": small(
        "StableCascadePriorPipeline",
        {
            "prior": _cascade_prior,
            "text_encoder": projecting_text_encoder,
            "scheduler": DDPMWuerstchenScheduler,
            "resolution_multiple": SIZE / LATENT_SIZE,
        },
        output_type="pt",
    ),
    "StableCascadeDecoderPipeline": small(
        "StableCascadeDecoderPipeline",
        {**_DECODER, "latent_dim_scale": 2},
        image_embeddings=partial(normal, 1, 4, LATENT_SIZE // 2, LATENT_SIZE // 2),
    ),
    "StableCascadeCombinedPipeline": small(
        "StableCascadeCombinedPipeline",
        {
            **_DECODER,
            "prior_prior": _cascade_prior,
            "prior_text_encoder": projecting_text_encoder,
            "prior_tokenizer": tokenizer,
            "prior_scheduler": DDPMWuerstchenScheduler,
        },
        _PRIOR_CALL,
        decoder_guidance_scale=7.5,
        height=128,  # 3 of the prior's latents: it counts as if the networks were of full size
        width=128,
    ),
}
"""By the name of the class."""
