"""What small pipelines of transformers and flow matching are made of, beside `parts`."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import diffusers
import numpy as np
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image

from .parts import ARGUMENTS, SIZE, Small, given, pil_picture, right_half, small, vae

_NOTHING: Mapping[str, Any] = MappingProxyType({})

NEGATIVE_PROMPT = "snow"
"""What is guided away from, where a pipeline guides only if it is given one."""

FRAMES = 5
"""Of a video: one, and as many as make one more of latents."""


def flow(
    name: str,
    components: Mapping[str, Any] = _NOTHING,
    arguments: Mapping[str, Any] = _NOTHING,
    /,
    *,
    output: str = "images",
    denoisers: tuple[str, ...] = ("transformer",),
    guidance: str = "stacked",
    calls: int | None = None,
    updates: int = 1,
    steps: Callable[[int], int] | None = None,
    ask: Callable[[int], dict[str, Any]] | None = None,
    attributes: Mapping[str, Any] = _NOTHING,
) -> Small:
    """A pipeline whose denoiser is a transformer; see `small` for the first three.

    Args:
        name: The class, of diffusers.
        components: What `__init__` is given of them, by what it takes.
        arguments: What `__call__` is given beside what it takes of `FLOW_ARGUMENTS`.
        output: As in `Small`.
        denoisers: As in `Small`.
        guidance: As in `Small`.
        calls: As in `Small`; what follows from `guidance` if not given.
        updates: As in `Small`.
        steps: As in `Small`; what follows from the strength of a call if not given.
        ask: As in `Small`.
        attributes: Of the pipeline, in place of what its `__init__` sets: lengths that are right for full size only.
    """

    def make_arguments() -> dict[str, Any]:
        return given(getattr(diffusers, name).__call__, FLOW_ARGUMENTS, arguments)

    def build() -> Any:
        takes = inspect.signature(getattr(diffusers, name).__init__).parameters
        pipe = small(name, {key: value for key, value in components.items() if key in takes}).build()
        for key, value in attributes.items():
            if not hasattr(pipe, key):
                raise AttributeError(f"{name} has no {key}")
            setattr(pipe, key, value)
        return pipe

    def steps_of_strength(number: int) -> int:
        return int(number * make_arguments().get("strength", 1))

    calls = calls or (2 if guidance == "separate" else 1)
    made = Small(build, make_arguments, output, denoisers, calls, updates, guidance, steps or steps_of_strength)
    return made if ask is None else made._replace(ask=ask)


# Schedulers

flow_scheduler = FlowMatchEulerDiscreteScheduler
"""The plain one; families differ in its arguments."""

shifted_by_size = partial(
    FlowMatchEulerDiscreteScheduler,
    shift=3.0,
    use_dynamic_shifting=True,
    base_shift=0.5,
    max_shift=1.15,
    base_image_seq_len=256,
    max_image_seq_len=4096,
)
"""Flux's, of which the shift depends on how many tokens an image has. Many have taken it over."""


def unipc_scheduler(flow_shift: float, **changes: Any) -> diffusers.UniPCMultistepScheduler:
    """UniPC on the sigmas of flow matching."""
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift, **changes
    )


# Networks


def sixteen_channel_vae(**changes: Any) -> AutoencoderKL:
    """That of Stable Diffusion 3 and Flux."""
    config: dict[str, Any] = {
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return vae(**{**config, **changes})


def siglip_encoder() -> Any:
    """SigLIP's vision model, 16 features for each of four patches."""
    return transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=SIZE // 2,
        )
    )


def siglip_processor() -> Any:
    """What `siglip_encoder` reads images through."""
    return transformers.SiglipImageProcessor(size={"height": SIZE, "width": SIZE})


def video() -> list[Image.Image]:
    """`FRAMES` pictures."""
    return [pil_picture().rotate(90 * i) for i in range(FRAMES)]


def pil_mask(size: int = SIZE) -> Image.Image:
    """The right half, for whoever wants a PIL image."""
    return Image.fromarray((right_half(size)[0, 0].numpy() * 255).astype(np.uint8))


FLOW_ARGUMENTS: dict[str, Any] = {
    **ARGUMENTS,
    "image": pil_picture,
    "strength": 0.5,
    "num_inference_steps": 4,
    "max_sequence_length": 32,
    "num_frames": FRAMES,
}
"""What `flow` gives to a call that takes an argument by this name."""
