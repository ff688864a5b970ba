"""Weights files: tensors for safetensors, the dtype for loading, and variants."""

import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..utils.files import atomic_path
from .header import read_header

if TYPE_CHECKING:
    from .saved_model import SavedModel

DTYPE_ARGUMENT = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"
"""Name of the dtype argument of the installed diffusers' `from_pretrained`."""


def prepare_for_safetensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors requires them: detached, contiguous, and without shared memory.

    An autoencoder's attention returns channels-last tensors, and bitsandbytes shares one quantization map between the
    states of all parameters; safetensors refuses both.
    """
    seen: set[tuple[torch.device, int]] = set()
    packed = {}
    for name, value in tensors.items():
        packed[name] = value = value.detach().contiguous()
        memory = value.device, value.untyped_storage().data_ptr()
        if value.numel() and memory in seen:
            packed[name] = value.clone()
        seen.add(memory)
    return packed


def with_single_dtype(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` or `from_single_file` that load all networks in one dtype, float32 by default.

    Otherwise, diffusers loads its networks in float32, but transformers loads text encoders in the dtype of their
    config or file: half precision in many repos, which a float32 UNet does not accept.
    """
    others = {key: value for key, value in arguments.items() if key not in ("dtype", "torch_dtype")}
    given = (arguments.get("dtype"), arguments.get("torch_dtype"))
    return {**others, DTYPE_ARGUMENT: next((dtype for dtype in given if dtype is not None), torch.float32)}


def stored_dtype(saved: "SavedModel") -> torch.dtype:
    """The dtype of a saved model's weights; float32 if they have several, or are on the Hub."""
    files = [] if saved.folder is None else saved.folder.glob("*/*.safetensors")
    headers = [saved.header] if saved.header.shapes else [read_header(file) for file in files]
    names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    found = {dtype for header in headers for key, dtype in header.dtypes.items() if 0 not in header.shapes[key]}
    floats = found & set(names)
    return names[floats.pop()] if len(floats) == 1 else torch.float32


@contextmanager
def suppress_empty_float32_warnings() -> Iterator[None]:
    """Hide diffusers' warning, when it casts networks, about an empty list of modules to keep in float32."""

    def names_a_module(record: logging.LogRecord) -> bool:
        return "should be kept in float32: []" not in record.getMessage()

    logger = logging.getLogger("diffusers.models.modeling_utils")
    logger.addFilter(names_a_module)
    try:
        yield
    finally:
        logger.removeFilter(names_a_module)


_WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)(?P<shard>-\d{5}-of-\d{5})?(?:\.(?P<variant>[\w-]+?))?"
    r"(?P<late_shard>-\d{5}-of-\d{5})?\.(?P<format>safetensors|bin)"
)
_FORMATS = {".safetensors", ".bin", ".msgpack", ".h5", ".onnx", ".onnx_data", ".ckpt", ".pt"}
"""Extensions of files that may contain weights."""
_INDEX = re.compile(r"(?P<file>.+\.(?:safetensors|bin))\.index(?:\.(?P<variant>[\w-]+))?\.json")


def weight_variants(names: Iterable[str]) -> set[str | None]:
    """Weight variants among file names, such as `fp16`; None for names without one."""
    return {match["variant"] for name in names if (match := _WEIGHTS.fullmatch(name.rpartition("/")[2]))}


def copy_in_float32(source: Path, target: Path, variant: str | None) -> None:
    """Copy a network's folder, with weights in float32 and file names without a variant.

    Matching files are copied byte for byte; other variants and formats are skipped.

    Args:
        source: A network's folder in a pipeline's.
        target: Created if necessary.
        variant: Of the weights to copy.
    """
    target.mkdir(parents=True, exist_ok=True)
    weights = {file: match for file in source.iterdir() if (match := _WEIGHTS.fullmatch(file.name))}
    weights = {file: match for file, match in weights.items() if match["variant"] == variant}
    safe = {file: match for file, match in weights.items() if match["format"] == "safetensors"}
    for file, match in (safe or weights).items():
        _copy_weights_in_float32(file, target / _name_without_variant(match))
    for file in source.iterdir():
        index = _INDEX.fullmatch(file.name)
        if index is None:
            if file.is_file() and file.suffix not in _FORMATS:
                shutil.copy2(file, target)
        elif index["variant"] == variant and bool(safe) == index["file"].endswith(".safetensors"):
            _copy_weight_index(file, target)
    set_config_dtype_to_float32(target / "config.json")


def set_config_dtype_to_float32(config_file: Path) -> None:
    """Change the dtype in a saved network's config to float32, if it names one.

    Without a dtype argument, transformers loads a text encoder in this dtype, or else in its file's; diffusers loads
    all other networks in float32.
    """
    if not config_file.is_file():
        return
    config = json.loads(config_file.read_text(encoding="utf-8"))
    asked = {key: "float32" for key in ("dtype", "torch_dtype") if config.get(key) not in (None, "float32")}
    if asked:
        config_file.write_text(json.dumps(config | asked, indent=2) + "\n", encoding="utf-8")


def restore_text_model_prefix(file: Path) -> None:
    """Add the usual `text_model.` prefix to the weights in a CLIP text encoder's file.

    transformers 5 omits the wrapper when it saves an encoder that it has not loaded; transformers 4 then finds none of
    the weights and continues with random ones.
    """
    if not file.is_file():
        return
    with safe_open(file, "pt") as opened:
        wrapped = any(key.startswith("text_model.") for key in opened.keys())  # noqa: SIM118  # it is no dictionary
        metadata = opened.metadata()
    if not wrapped:
        weights = load_file(file)
        outside = ("text_projection.",)
        named = {key if key.startswith(outside) else f"text_model.{key}": value for key, value in weights.items()}
        with atomic_path(file) as new:  # the loaded tensors are views of the old file
            save_file(named, new, metadata)


def _name_without_variant(match: re.Match[str]) -> str:
    """File name of a weights file in safetensors and without variant, its shard number kept."""
    stem = "model" if match["stem"] == "pytorch_model" else match["stem"]
    return f"{stem}{match['shard'] or match['late_shard'] or ''}.safetensors"


def _copy_weights_in_float32(file: Path, target: Path) -> None:
    """Copy a weights file as float32 safetensors; byte for byte if it is that already."""
    if file.suffix == ".bin":
        weights, metadata = torch.load(file, map_location="cpu", weights_only=True), {"format": "pt"}
    else:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {"format": "pt"}
            dtypes = {opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118  # no dictionary
        if not {dtype for dtype in dtypes if dtype.startswith(("F", "BF"))} - {"F32"}:
            shutil.copy2(file, target)
            return
        weights = load_file(file)
    wide = {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
    save_file(prepare_for_safetensors(wide), target, metadata)


def _copy_weight_index(file: Path, target: Path) -> None:
    """Copy the index of sharded weights, with file names in safetensors and without variant."""
    index = json.loads(file.read_text(encoding="utf-8"))
    places = {key: _WEIGHTS.fullmatch(name) for key, name in index["weight_map"].items()}
    index["weight_map"] = {key: _name_without_variant(match) for key, match in places.items() if match}
    stem = "diffusion_pytorch_model" if file.name.startswith("diffusion") else "model"
    (target / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
