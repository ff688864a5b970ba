"""The header of a safetensors file: metadata, and names, shapes and dtypes of tensors."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open


class Header(NamedTuple):
    """The header of a safetensors file."""

    metadata: dict[str, str]
    shapes: dict[str, list[int]]
    """Of each tensor, by its key."""
    dtypes: dict[str, str]
    """Likewise, by the names of the format: F32, F16, BF16."""


def read_header(path: Any) -> Header:
    """Read the header of a safetensors file, not the weights.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged or not a safetensors file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"No such file: {os.fspath(path)}. For a file on the Hub, pass huggingface_hub.hf_hub_download(repo, "
            "name)."
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # it is no dictionary
            return Header(
                file.metadata() or {},
                {key: tensor.get_shape() for key, tensor in tensors.items()},
                {key: tensor.get_dtype() for key, tensor in tensors.items()},
            )
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} is damaged or not a safetensors file: {error}.") from error


def is_single_file(source: Any) -> bool:
    """Whether a source of `load_pipeline` is a file: it exists, or has the name of one.

    Raises:
        ValueError: a file of an unsupported format.
    """
    path = Path(os.fspath(source))
    if path.suffix == ".safetensors" and not path.is_dir():
        return True
    if path.is_file():
        raise ValueError(
            f"{path} is not a .safetensors file. Reading a pickled checkpoint (.ckpt, .pt) executes any code in it; "
            "download or create a .safetensors version."
        )
    return False
