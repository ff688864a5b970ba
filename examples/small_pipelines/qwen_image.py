"""Qwen-Image: a text encoder that sees, and a second prediction, scaled back to the spread of the first."""

from functools import partial
from typing import Any

import diffusers

from .flow_parts import NEGATIVE_PROMPT, flow, shifted_by_size
from .language import TEXT_WIDTH, SeeingProcessor, byte_tokenizer, qwen2_5_vl
from .parts import Small, pil_picture, right_half

_SHAPE: dict[str, Any] = {
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": (4, 6, 6),
}


def _transformer(**changes: Any) -> Any:
    return diffusers.QwenImageTransformer2DModel(**{**_SHAPE, **changes})


def _controlnet(**changes: Any) -> Any:
    return diffusers.QwenImageControlNetModel(**{**_SHAPE, "num_layers": 1, **changes})


def qwen_vae(levels: int = 3, **changes: Any) -> Any:
    """With latents of 16 channels, and 4 pixels to a latent's side unless there are other than 3 levels."""
    config: dict[str, Any] = {
        "base_dim": 4,
        "dim_mult": [1] * levels,
        "num_res_blocks": 1,
        "temperal_downsample": [False] + [True] * (levels - 2),
    }
    return diffusers.AutoencoderKLQwenImage(**{**config, **changes})


QWEN_SCHEDULER = partial(shifted_by_size, shift=1.0, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
"""Shifted by the number of tokens, up to a last step before the end at 0.02."""

_COMPONENTS: dict[str, Any] = {
    "transformer": _transformer,
    "scheduler": QWEN_SCHEDULER,
    "vae": qwen_vae,
    "text_encoder": qwen2_5_vl,
    "tokenizer": byte_tokenizer,
    "processor": SeeingProcessor,
    "controlnet": _controlnet,
}

# What is edited is enlarged to a million pixels, whatever its size, so there must be few latents of so many.
_EDITING: dict[str, Any] = {**_COMPONENTS, "vae": partial(qwen_vae, levels=6, base_dim=2, num_res_blocks=0)}

_LAYERED: dict[str, Any] = {
    **_EDITING,
    "transformer": partial(_transformer, use_additional_t_cond=True, use_layer3d_rope=True),
    # The fourth channel says what shows through.
    "vae": partial(qwen_vae, levels=6, base_dim=2, num_res_blocks=0, input_channels=4),
}

_ARGUMENTS: dict[str, Any] = {
    "negative_prompt": NEGATIVE_PROMPT,
    "true_cfg_scale": 4.0,
    "guidance_scale": None,
    "max_sequence_length": 512,  # the prompt stands within a text of the pipeline's own
}


def _qwen(name: str, components: dict[str, Any] = _COMPONENTS, /, **arguments: Any) -> Small:
    return flow(name, components, {**_ARGUMENTS, **arguments}, guidance="separate")


_edit = partial(_qwen, height=1024, width=1024)

PIPELINES: dict[str, Small] = {
    **{name: _qwen(name) for name in ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline")},
    "QwenImageControlNetPipeline": _qwen("QwenImageControlNetPipeline", control_image=pil_picture),
    "QwenImageControlNetInpaintPipeline": _qwen(
        "QwenImageControlNetInpaintPipeline",
        {**_COMPONENTS, "controlnet": partial(_controlnet, extra_condition_channels=4)},
        control_image=pil_picture,
        control_mask=right_half,
    ),
    "QwenImageEditPipeline": _edit("QwenImageEditPipeline", _EDITING),
    "QwenImageEditPlusPipeline": _edit("QwenImageEditPlusPipeline", _EDITING),
    "QwenImageEditInpaintPipeline": _edit("QwenImageEditInpaintPipeline", _EDITING),
    "QwenImageLayeredPipeline": _qwen(
        "QwenImageLayeredPipeline", _LAYERED, image=lambda: pil_picture().convert("RGBA"), layers=1, output_type="np"
    ),
}
"""By the name of the class."""
