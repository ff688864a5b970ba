"""Stable Diffusion 1 and 2, and what was made of them; with latent diffusion, which was there before."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMParallelScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    PriorTransformer,
    UNet2DConditionModel,
)

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
    picture,
    pil_picture,
    projecting_text_encoder,
    right_half,
    small,
    text_encoder,
    tokenizer,
    unet,
    vae,
    vision_config,
    zero_snr_scheduler,
)


def _prior() -> PriorTransformer:
    return PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        num_layers=1,
        embedding_dim=WIDTH,
        num_embeddings=TOKENS,
    )


def _image_normalizer() -> Any:
    return class_of("image_normalizer", "StableUnCLIPPipeline")(WIDTH)


def _image_projection() -> Any:
    return class_of("image_project", "StableDiffusionGLIGENTextImagePipeline")(WIDTH)


def _gated_unet(kind: str) -> UNet2DConditionModel:
    network = unet(attention_type=kind)
    for name, gate in network.named_parameters():
        if name.endswith(("alpha_attn", "alpha_dense")):
            torch.nn.init.ones_(gate)  # they start at 0, where boxes change nothing
    return network


def _example_encoder() -> Any:
    return class_of("image_encoder", "PaintByExamplePipeline")(vision_config())


_UNCLIP: dict[str, Any] = {
    "image_normalizer": _image_normalizer,
    "image_noising_scheduler": DDPMScheduler,
    "unet": partial(unet, class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH),
}

_UNCLIP_FROM_TEXT: dict[str, Any] = {
    **_UNCLIP,
    "prior_tokenizer": tokenizer,
    "prior_text_encoder": projecting_text_encoder,
    "prior": _prior,
    "prior_scheduler": partial(DDPMScheduler, prediction_type="sample", variance_type="fixed_small_log"),
}

_BOXES: dict[str, Any] = {
    "gligen_phrases": ["a cat"],
    "gligen_boxes": [[0.1, 0.2, 0.6, 0.8]],
    "gligen_scheduled_sampling_beta": 1.0,  # boxes at every step
}

_BOXES_WITH_PICTURES: dict[str, Any] = {
    "unet": partial(_gated_unet, "gated-text-image"),
    "processor": feature_extractor,
    "image_encoder": image_encoder,
    "image_project": _image_projection,
}

_INVERTED: dict[str, Any] = {
    "mask_image": partial(right_half, LATENT_SIZE),
    "image_latents": partial(normal, 1, 2, 4, LATENT_SIZE, LATENT_SIZE),
    "inpaint_strength": 0.7,  # two steps, as many as there are latents
}

_EDIT_DIRECTION: dict[str, Any] = {
    f"{end}_embeds": partial(normal, 1, TOKENS, WIDTH, seed=seed) for seed, end in enumerate(("source", "target"))
}

# What is divided by the noise that a step adds must not end in a step that adds none.
_NOISY_SCHEDULER = partial(zero_snr_scheduler, set_alpha_to_one=False)

_ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "StableDiffusionPipeline": ({}, {}),
    "StableDiffusionImg2ImgPipeline": ({}, {}),
    "StableDiffusionInpaintPipeline": ({}, {}),
    "StableDiffusionInpaintPipelineLegacy": ({}, {}),
    "StableDiffusionPAGPipeline": ({}, {}),
    "StableDiffusionPAGImg2ImgPipeline": ({}, {}),
    "StableDiffusionPAGInpaintPipeline": ({}, {}),
    "StableDiffusionInstructPix2PixPipeline": ({"unet": partial(unet, in_channels=8)}, {}),
    "StableDiffusionDepth2ImgPipeline": (
        {"unet": partial(unet, in_channels=5), "depth_estimator": None},
        {"depth_map": lambda: picture(channels=1)[0]},
    ),
    "StableDiffusionUpscalePipeline": (
        {
            "unet": partial(unet, in_channels=7, num_class_embeds=1000),
            "vae": partial(vae, scaling_factor=0.08333),  # another is warned of
            "low_res_scheduler": DDPMScheduler,
        },
        {"image": partial(picture, LATENT_SIZE)},
    ),
    "StableDiffusionLatentUpscalePipeline": (
        {
            # its condition is a noise level of 128 features and the text as a whole
            "unet": partial(unet, in_channels=8, out_channels=5, time_cond_proj_dim=128 + WIDTH),
            "scheduler": partial(EulerDiscreteScheduler, prediction_type="sample"),
        },
        {"image": partial(picture, SIZE // 2)},
    ),
    "StableDiffusionImageVariationPipeline": ({"image_encoder": image_encoder}, {}),
    "StableUnCLIPPipeline": (_UNCLIP_FROM_TEXT, {"prior_num_inference_steps": 2}),
    "StableUnCLIPImg2ImgPipeline": (
        {**_UNCLIP, "image_encoder": image_encoder, "feature_extractor": feature_extractor},
        {},
    ),
    "StableDiffusionGLIGENPipeline": ({"unet": partial(_gated_unet, "gated")}, _BOXES),
    "StableDiffusionGLIGENTextImagePipeline": (
        _BOXES_WITH_PICTURES,
        {**_BOXES, "gligen_images": lambda: [pil_picture()]},
    ),
    # 72 latents, so that there are two views of 64
    "StableDiffusionPanoramaPipeline": ({"vae": partial(vae, levels=4)}, {"width": 8 * 72}),
    "StableDiffusionSAGPipeline": ({}, {}),
    "StableDiffusionAttendAndExcitePipeline": (
        {},
        {"token_indices": [2], "attn_res": (LATENT_SIZE, LATENT_SIZE), "thresholds": {}},
    ),
    "StableDiffusionDiffEditPipeline": ({"inverse_scheduler": DDIMInverseScheduler}, _INVERTED),
    "StableDiffusionLDM3DPipeline": (
        {"image_encoder": None, "vae": partial(vae, in_channels=6, out_channels=6)},
        {"output_type": "np"},
    ),
    "StableDiffusionModelEditingPipeline": ({}, {}),
    "StableDiffusionParadigmsPipeline": ({"scheduler": partial(zero_snr_scheduler, DDIMParallelScheduler)}, {}),
    "StableDiffusionPix2PixZeroPipeline": (
        dict.fromkeys(("inverse_scheduler", "caption_generator", "caption_processor")),
        _EDIT_DIRECTION,
    ),
    "StableDiffusionPipelineSafe": ({}, {}),
    "SemanticStableDiffusionPipeline": ({}, {"editing_prompt": "a cat", "edit_warmup_steps": 1}),
    "CycleDiffusionPipeline": ({"scheduler": _NOISY_SCHEDULER}, {"source_prompt": "a cat"}),
    "PaintByExamplePipeline": (
        {"unet": partial(unet, in_channels=9), "image_encoder": _example_encoder},
        {"example_image": picture},
    ),
    # These two have encoders of their own; any that returns features for each token will do.
    "AltDiffusionPipeline": ({}, {}),
    "AltDiffusionImg2ImgPipeline": ({}, {}),
    "LDMTextToImagePipeline": (
        {"vqvae": vae, "bert": partial(text_encoder, max_position_embeddings=77)},
        {"output_type": "np"},
    ),
}

PIPELINES: dict[str, Small] = {name: small(name, *row) for name, row in _ROWS.items()}
"""By the name of the class."""
