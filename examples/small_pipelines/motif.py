"""Motif-Video: guided by a guider of diffusers, in calls of its own."""

from functools import partial
from typing import Any

import diffusers
import transformers

from .flow_parts import NEGATIVE_PROMPT, flow, shifted_by_size, siglip_processor
from .language import TEXT_WIDTH, decoder_config, gemma_tokenizer
from .parts import Small, class_of
from .wan import wan_vae


def _transformer(**changes: Any) -> Any:
    return diffusers.MotifVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        text_embed_dim=TEXT_WIDTH,
        rope_axes_dim=(4, 6, 6),
        **changes,
    )


def _text_encoder() -> Any:
    text = decoder_config("T5Gemma2TextConfig", gemma_tokenizer(), dropout_rate=0.0).to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.T5Gemma2EncoderConfig(
        text_config=text, vision_config={**vision, "image_size": 32, "patch_size": 16}
    )
    return class_of("text_encoder", "MotifVideoPipeline")(config)


_COMPONENTS: dict[str, Any] = {
    "transformer": _transformer,
    "scheduler": shifted_by_size,
    "vae": wan_vae,
    "text_encoder": _text_encoder,
    "tokenizer": gemma_tokenizer,
    "guider": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=8.0),
    "feature_extractor": siglip_processor,
}

_motif = partial(flow, output="frames", guidance="separate")

PIPELINES: dict[str, Small] = {
    "MotifVideoPipeline": _motif("MotifVideoPipeline", _COMPONENTS, {"negative_prompt": NEGATIVE_PROMPT}),
    "MotifVideoImage2VideoPipeline": _motif(
        "MotifVideoImage2VideoPipeline",
        {**_COMPONENTS, "transformer": partial(_transformer, image_embed_dim=16)},
        {"negative_prompt": NEGATIVE_PROMPT},
    ),
}
"""By the name of the class."""
