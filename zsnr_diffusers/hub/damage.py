"""Errors of damaged files that name the file, whatever diffusers raises for them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .files import read_json
from .header import Header, read_header
from .layouts import check_not_quantized

_LOAD_ERRORS = (LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError)
"""What a wrong value in a network's config leads to."""


@contextlib.contextmanager
def explain_load_errors(source: Any) -> Iterator[None]:
    """Turn whatever diffusers raises for damaged files into an error that names the source, and the file if found.

    Raises:
        OSError, ValueError: with the name.
    """
    try:
        yield
    except (OSError, ValueError, SafetensorError, *_LOAD_ERRORS) as error:
        if isinstance(error, torch.OutOfMemoryError) or (
            isinstance(error, OSError | ValueError) and str(source) in str(error)
        ):
            raise
        for file in sorted(Path(source).glob("*/*.safetensors")):
            read_header(file)
        for file in sorted(Path(source).glob("*/config.json")):
            read_json(file)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{source} cannot be loaded: {reason}") from error


def check_folder_weights(name: Any, folder: Path) -> dict[Path, Header]:
    """Refuse quantized weights in a saved pipeline's parts, unless a part's config says how to read them.

    Returns:
        The headers of the parts' files of weights.

    Raises:
        ValueError: with the file.
    """
    headers = {}
    for file in sorted(folder.glob("*/*.safetensors")):
        config = file.with_name("config.json")
        # Other folders that hold weights, such as a run's checkpoints, are no parts of the pipeline.
        if config.is_file() and "quantization_config" not in read_json(config):
            headers[file] = read_header(file)
            check_not_quantized(f"{name}: {file.relative_to(folder)}", headers[file])
    return headers
