"""Import a library of an extra when it is needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def import_extra(module: str, extra: str = "eval") -> Any:
    """Import `module`, which belongs to an extra of this package.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # the library is installed but lacks a dependency
        raise ImportError(
            f"{error.name.split('.')[0]} is needed here and not installed: pip install 'zsnr_diffusers[{extra}]'"
        ) from error
