"""Load a pipeline from a single file with diffusers' loader: its class, config, and missing components."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors import safe_open

from .damage import explain_load_errors
from .files import INDEX, load_json
from .header import Header, is_single_file, read_header
from .layouts import (
    SD_2,
    SDXL,
    OriginalFormat,
    check_not_quantized,
    describe_unknown_file,
    detect_layout,
    missing_parts,
    unet_in_channels,
    weight_prefixes,
)
from .saved_model import SavedModel
from .weight_files import DTYPE_ARGUMENT, suppress_empty_float32_warnings, weight_variants, with_single_dtype


def from_single_file(saved: SavedModel, kwargs: Mapping[str, Any]) -> Any:
    """Load a Stable Diffusion 1.x, 2.x or XL pipeline from a single file.

    Args:
        saved: a single file.
        kwargs: of `load_pipeline`.

    Raises:
        OSError: its config is not available.
        ValueError: the file is damaged, of another model, or incomplete; an SD 2.x file without a recorded prediction
            type.
    """
    source, header = saved.name, saved.header
    if saved.is_lora:
        raise ValueError(f"{source} is a LoRA; load it into a pipeline of its base: load_lora(pipe, {source!r}).")
    layout, pipeline_class, default = _detect_pipeline(source, header)
    check_not_quantized(source, header, weight_prefixes(layout))
    if layout is SD_2 and saved.prediction_type is None:
        raise ValueError(
            f"{source} does not record its prediction type, and {layout.name} exists with both: pass "
            "prediction_type='v_prediction' (2.0 and 2.1 at 768 pixels) or 'epsilon' (2-base and 2.1-base), or "
            "'flow_prediction' if it was fine-tuned to flow matching."
        )
    config, options = kwargs.get("config"), {key: value for key, value in kwargs.items() if key != "original_config"}
    with explain_load_errors(source):
        absent = missing_parts(header.shapes, layout)
        dtype = with_single_dtype(kwargs)[DTYPE_ARGUMENT]
        if isinstance(options.get("vae"), str | os.PathLike):
            options["vae"] = _load_autoencoder(options["vae"], config or default, dtype)
        options |= _load_parts(config, [part for part in absent if part not in options], dtype)
        if layout is SDXL and "text_encoder_2" in absent and not {"text_encoder"} & {*absent, *options}:
            options["text_encoder"] = _load_first_text_encoder(source, config or default, dtype)
    if missing := [part for part in absent if part not in options]:
        raise ValueError(_missing_parts_message(source, layout, missing))
    try:
        with explain_load_errors(source), suppress_empty_float32_warnings():
            options["config"] = default if config is None else os.fspath(config)
            return pipeline_class.from_single_file(source, **with_single_dtype(options))
    except OSError as error:
        if config is not None:
            raise
        raise OSError(
            f"{source} contains only weights, and the rest of the pipeline is not available from {default}. Pass "
            f"config=, a folder or Hub id of a {layout.name} pipeline. {str(error).splitlines()[0]}"
        ) from error


def _detect_pipeline(source: Any, header: Header) -> tuple[OriginalFormat, Any, str]:
    """A single file's layout, its pipeline's class, and the Hub id of its default config."""
    layout, channels = detect_layout(header.shapes), unet_in_channels(header.shapes)
    if layout is None or channels is None or channels not in layout.pipelines:
        raise ValueError(
            f"{source} is not a Stable Diffusion 1.x, 2.x or SDXL checkpoint with original names, for text-to-image "
            f"or inpainting.{describe_unknown_file(header.shapes)} If diffusers supports it, use from_single_file of "
            "its pipeline class."
        )
    return layout, getattr(diffusers, layout.pipelines[channels]), layout.configs[channels]


def _load_autoencoder(source: Any, config: Any, dtype: torch.dtype) -> Any:
    """Load an autoencoder from a folder, repo or file, alone or in a pipeline.

    Raises:
        OSError: it is not available.
        ValueError: the file contains none, or is damaged.
    """
    options = with_single_dtype({"dtype": dtype})
    if is_single_file(source):
        if not any(key.endswith("encoder.conv_in.weight") for key in read_header(source).shapes):
            raise ValueError(f"vae: {source} contains no Stable Diffusion autoencoder.")
        place = {"config": os.fspath(config), "subfolder": "vae"}
        with explain_load_errors(source), suppress_empty_float32_warnings():
            return diffusers.AutoencoderKL.from_single_file(os.fspath(source), **place, **options)
    place = {} if load_json(source, INDEX, {}) is None else {"subfolder": "vae"}
    return diffusers.AutoencoderKL.from_pretrained(source, **place, **options)


def _load_first_text_encoder(source: Any, config: Any, dtype: torch.dtype) -> Any:
    """Load SDXL's first text encoder from a single file; diffusers overlooks it if the second is missing."""
    with safe_open(source, framework="pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys() if key.startswith(str(SDXL.clip))}  # noqa: SIM118
    return create_diffusers_clip_model_from_ldm(
        transformers.CLIPTextModel, weights, subfolder="text_encoder", config=os.fspath(config), torch_dtype=dtype
    )


def _load_parts(config: Any, parts: Iterable[str], dtype: torch.dtype) -> dict[str, Any]:
    """Load the missing components whose weights are in the local pipeline folder `config`."""
    folder = None if config is None else Path(os.fspath(config))
    if folder is None or not folder.is_dir():
        return {}
    index, found = load_json(folder, INDEX, {}) or {}, {}
    for part in parts:
        there = weight_variants(file.name for file in (folder / part).glob("*"))
        if there and isinstance(entry := index.get(part), list):
            library, argument = (diffusers, DTYPE_ARGUMENT) if entry[0] == "diffusers" else (transformers, "dtype")
            options = {"variant": None if None in there else min(filter(None, there)), argument: dtype}
            found[part] = getattr(library, entry[1]).from_pretrained(folder, subfolder=part, **options)
    return found


_CALLED = {
    "vae": ("autoencoder", "diffusers.AutoencoderKL"),
    "text_encoder": ("text encoder", "transformers.CLIPTextModel"),
    "text_encoder_2": ("second text encoder", "transformers.CLIPTextModelWithProjection"),
}


def _missing_parts_message(source: Any, layout: OriginalFormat, missing: list[str]) -> str:
    """Error text for a single file without some of the pipeline's components, with what to pass."""
    names = " and ".join(f"no {_CALLED[part][0]}" for part in missing)
    passed = ", ".join(f"{part}={_CALLED[part][1]}.from_pretrained(...)" for part in missing)
    return (
        f"{source} contains {names} with the names of {layout.name}: pass config=, a folder of a {layout.name} "
        f"pipeline with its weights, or {passed}."
    )
