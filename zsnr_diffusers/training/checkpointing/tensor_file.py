"""Write safetensors files tensor by tensor and hash them in the same pass."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...utils.files import fsync

_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The format's names for dtypes, in the order of the library: the widest first, so that each number is aligned to its
width.
"""

_ALIGNMENT = 8
"""Alignment of the first tensor, in bytes; the header is padded with spaces."""


class FileFacts(NamedTuple):
    """A manifest's entry for a file."""

    size: int
    sha256: str


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor]) -> FileFacts:
    """Write tensors, on any device, into a safetensors file, byte for byte as `safetensors.torch.save_file` does.

    The library function returns no hash, and needs all tensors of a file in host memory at once.

    Args:
        path: of the file.
        tensors: by name, in any layout; they may share memory.

    Raises:
        OSError: it cannot be written.
        ValueError: a tensor has an unsupported dtype.
    """
    order = list(_DTYPES)
    ordered = sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0]))
    digest, size = hashlib.sha256(), 0
    parts: Iterator[bytes | memoryview] = map(_bytes_of, (value for _, value in ordered))
    with path.open("wb") as file:
        for content in itertools.chain([_header(dict(ordered))], parts):
            file.write(content)
            digest.update(content)
            size += len(content)
    fsync(path)
    return FileFacts(size, digest.hexdigest())


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """The header of a file with the tensors in this order."""
    facts, end = {}, 0
    for name, value in tensors.items():
        start, end = end, end + value.numel() * value.element_size()
        facts[name] = {"dtype": _DTYPES[value.dtype], "shape": [*value.shape], "data_offsets": [start, end]}
    text = json.dumps(facts, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    """The values of a tensor in row-major order; without a copy if it is already so in host memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
