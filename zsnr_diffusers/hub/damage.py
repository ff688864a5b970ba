"""Error messages for damaged files that name the file."""

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
"""Exceptions that a wrong value in a network's config can cause."""


@contextlib.contextmanager
def explain_load_errors(source: Any) -> Iterator[None]:
    """Convert any exception that diffusers raises for damaged files into an error that names the source and, if known,
    the file.

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
    """Refuse quantized weights in a saved pipeline's components, unless a component's config describes the
    quantization.

    Returns:
        The headers of the components' weights files.

    Raises:
        ValueError: the message names the file.
    """
    headers = {}
    for file in sorted(folder.glob("*/*.safetensors")):
        config = file.with_name("config.json")
        # Other folders with weights, such as a run's checkpoints, are not components of the pipeline.
        if config.is_file() and "quantization_config" not in read_json(config):
            headers[file] = read_header(file)
            check_not_quantized(f"{name}: {file.relative_to(folder)}", headers[file])
    return headers
