"""Find LoRA files in a folder or Hub repo, and read their headers."""

import itertools
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, SafetensorsParsingError

from ..utils.text import abbreviate
from .errors import explain_hub_errors
from .header import Header, is_single_file, read_header
from .layouts import SD_1, SD_2, SDXL

LORA_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors"

_DAMAGE = (SafetensorsParsingError, struct.error, RecursionError, LookupError, TypeError, AttributeError)
"""Exceptions of the Hub client for a file without such a header."""

_HALVES = (
    ("lora_A.weight", "lora_down.weight", "lora.down.weight"),
    ("lora_B.weight", "lora_up.weight", "lora.up.weight"),
)
"""Suffixes of the names of a layer's two weights."""

_BESIDE = (".alpha", "lora_magnitude_vector", "lora_magnitude_vector.weight")
"""Other tensors of a layer that diffusers reads: its strength, and the magnitude of a DoRA."""

_LAYOUTS = {768: SD_1, 1024: SD_2, 2048: SDXL}
"""Base models by the width of the text encoders' output."""

_TEXTS = re.compile(r"attn2[._](?:processor\.)?to[._][kv](?:_lora)?\.(?:lora_A|lora_down|down|lora\.down)\.weight$")


def holds_lora(header: Header) -> bool:
    """Whether a weights file's header has LoRA keys, in any of the formats in use."""
    return any("lora" in key for key in header.shapes)


def count_lora_layers(file: Path, header: Header) -> int:
    """The number of layers that a LoRA file changes, from its header; errors name the file.

    Raises:
        ValueError: there is no layer, an incomplete layer, or a part that diffusers would ignore.
    """
    keys = header.shapes.keys()
    down, up = ({key.removesuffix(end) for key in keys for end in ends if key.endswith(end)} for ends in _HALVES)
    others = sorted(key for key in keys if not key.endswith((*itertools.chain(*_HALVES), *_BESIDE)))
    if not down | up:
        raise ValueError(
            f"{file} has no layers of a LoRA or DoRA; other adapters, such as LoHa and LoKr, are not supported. It "
            f"contains {abbreviate([*map(repr, others)], 3)}."
        )
    if others:
        kinds = ", ".join(dict.fromkeys(key.rpartition(".")[2] for key in others if not key.endswith(".weight")))
        raise ValueError(
            f"{file} contains more than diffusers applies of a LoRA, and what diffusers "
            f"ignores{f' ({kinds})' if kinds else ''} is part of the result: {abbreviate([*map(repr, others)], 3)}. "
            "Merge it into its base with the program that created it, or save it there as a plain LoRA."
        )
    if alone := sorted(down ^ up):
        raise ValueError(f"{file} has only one of the two weights of {alone[0].rstrip('._')}.")
    return len(down)


def load_header(source: Any, name: str, places: Mapping[str, Any]) -> Header | None:
    """Header of a safetensors file in a folder or Hub repo, without its weights; None if there is no such file.

    Raises:
        OSError: the repo does not exist or cannot be read.
        ValueError: the file is damaged.
    """
    if (folder := Path(os.fspath(source))).is_dir():
        return read_header(folder / name) if (folder / name).is_file() else None
    asked = {key: places.get(key) for key in ("cache_dir", "revision", "token")}
    if places.get("local_files_only") or huggingface_hub.constants.HF_HUB_OFFLINE:
        cached = huggingface_hub.try_to_load_from_cache(str(source), name, asked["cache_dir"], asked["revision"])
        return read_header(cached) if isinstance(cached, str) else None
    api = huggingface_hub.HfApi(token=asked["token"])
    with explain_hub_errors(source):
        try:
            return _header_from_hub(api.parse_safetensors_file_metadata(str(source), name, revision=asked["revision"]))
        except EntryNotFoundError:
            return None
        except _DAMAGE as error:
            raise ValueError(f"{name} is damaged or not a safetensors file: {error}") from error


def _header_from_hub(found: Any) -> Header:
    """A `Header` from the metadata that the Hub client returns for a file."""
    tensors = found.tensors
    return Header(
        {str(key): str(value) for key, value in found.metadata.items()},
        {key: [int(side) for side in tensor.shape] for key, tensor in tensors.items()},
        {key: str(tensor.dtype) for key, tensor in tensors.items()},
    )


def find_lora_file(source: Any, weight_name: str = LORA_FILE, **places: Any) -> Path:
    """Path of a LoRA's file, downloaded from the Hub if necessary.

    Args:
        source: a file, a folder, or a Hub id.
        weight_name: of the file in a folder or repo.
        places: where to look: `subfolder`, `revision`, `token`, ...

    Raises:
        OSError: the file or repo does not exist.
        ValueError: an unsupported file.
    """
    if is_single_file(source):
        return Path(source)
    if (folder := Path(source)).is_dir():
        file = folder / (places.get("subfolder") or "") / weight_name
        if not file.is_file():
            found = sorted(path.name for path in file.parent.glob("*.safetensors"))
            raise FileNotFoundError(
                f"No such file: {file}; pass weight_name=, one of {', '.join(found) or 'nothing'}."
            )
        return file
    try:
        with explain_hub_errors(source):
            return Path(hf_hub_download(os.fspath(source), weight_name, **places))
    except OSError as error:
        cause = error.__cause__
        if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
            raise FileNotFoundError(f"{error} Pass weight_name=.") from error
        raise


def find_lora_base(file: Any, header: Header) -> str:
    """Hub id of a base model for a LoRA, by the width of its cross-attention; errors name the file.

    Raises:
        ValueError: it has no cross-attention, or that of another model.
    """
    shapes = {key: shape for key, shape in header.shapes.items() if _TEXTS.search(key)}
    layouts = {layout.name: layout for shape in shapes.values() if (layout := _LAYOUTS.get(shape[1]))}
    if len(layouts) != 1 or len(shapes) != sum(shape[1] in _LAYOUTS for shape in shapes.values()):
        raise ValueError(f"{file} does not show which base it is for: pass a pipeline of the base as config.")
    return next(iter(layouts.values())).configs[4]
