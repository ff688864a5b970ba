"""Hashes of files and networks."""

import hashlib
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any


def file_sha256(path: str | PathLike[str]) -> str:
    """The sha256 of a file, in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def state_sha256(module: Any) -> str:
    """The sha256 of names, dtypes, shapes and values in a module's `state_dict`; "" if it is not a module."""
    import torch

    return tensors_sha256(module.state_dict()) if isinstance(module, torch.nn.Module) else ""


def tensors_sha256(tensors: Mapping[str, Any]) -> str:
    """The sha256 of names, dtypes, shapes and values of tensors by name, in any order."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
