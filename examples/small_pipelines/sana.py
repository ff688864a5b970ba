"""Sana: attention of linear cost, and one latent for many pixels; and Sprint, its version for few steps."""

from functools import partial
from typing import Any

import diffusers
from diffusers import DPMSolverMultistepScheduler

from .flow_parts import flow, flow_scheduler
from .language import TEXT_WIDTH, gemma2, gemma_tokenizer
from .parts import LATENT_SIZE, Small, picture

_SHAPE: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": TEXT_WIDTH,
    "sample_size": LATENT_SIZE,
}


def _transformer(**changes: Any) -> Any:
    return diffusers.SanaTransformer2DModel(**{**_SHAPE, **changes})


def _controlnet() -> Any:
    return diffusers.SanaControlNetModel(**{**_SHAPE, "num_layers": 1})


def _vae() -> Any:
    ends: dict[str, Any] = {}
    for end in ("encoder", "decoder"):
        ends[f"{end}_block_types"] = ("ResBlock", "ResBlock", "EfficientViTBlock")
        ends[f"{end}_block_out_channels"] = (8, 8, 8)
        ends[f"{end}_layers_per_block"] = (1, 1, 1)
        ends[f"{end}_qkv_multiscales"] = ((), (), (5,))
    return diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=4, scaling_factor=0.41407, **ends)


SANA_SCHEDULER = partial(
    DPMSolverMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
)
"""DPM-Solver++ on the sigmas of flow matching."""

SANA_TEXT: dict[str, Any] = {"text_encoder": gemma2, "tokenizer": gemma_tokenizer}

_COMPONENTS: dict[str, Any] = {
    **SANA_TEXT,
    "transformer": _transformer,
    "scheduler": SANA_SCHEDULER,
    "vae": _vae,
    "controlnet": _controlnet,
}

SANA_CALL: dict[str, Any] = {"use_resolution_binning": False, "complex_human_instruction": None}

# Of trigonometric flow, and guided by what the transformer is told
_SPRINT: dict[str, Any] = {
    **_COMPONENTS,
    "transformer": partial(_transformer, guidance_embeds=True, qk_norm="rms_norm_across_heads"),
    "scheduler": lambda: diffusers.SCMScheduler(prediction_type="trigflow", sigma_data=0.5),
}

_SPRINT_CALL: dict[str, Any] = {**SANA_CALL, "intermediate_timesteps": None}  # that in between is for two steps only

PIPELINES: dict[str, Small] = {
    "SanaPipeline": flow("SanaPipeline", _COMPONENTS, SANA_CALL),
    "SanaPAGPipeline": flow(
        "SanaPAGPipeline", {**_COMPONENTS, "scheduler": partial(flow_scheduler, shift=3.0)}, SANA_CALL
    ),
    "SanaControlNetPipeline": flow("SanaControlNetPipeline", _COMPONENTS, {**SANA_CALL, "control_image": picture}),
    "SanaSprintPipeline": flow("SanaSprintPipeline", _SPRINT, _SPRINT_CALL, guidance="none"),
    "SanaSprintImg2ImgPipeline": flow("SanaSprintImg2ImgPipeline", _SPRINT, _SPRINT_CALL, guidance="none"),
}
"""By the name of the class."""
