"""Import a library of an extra at the moment that needs it."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def import_extra(module: str, extra: str = "eval") -> Any:
    """The module called `module`, which comes with an extra of this package.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # the library is there and lacks something of its own
        raise ImportError(
            f"{error.name.split('.')[0]} is needed here and not installed: pip install 'zsnr_diffusers[{extra}]'"
        ) from error
