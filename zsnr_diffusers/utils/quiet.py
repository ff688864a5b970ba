"""Suppress progress bars and library messages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_VERBOSITY = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "DATASETS_VERBOSITY")
"""Read by each library when it is imported."""


@contextmanager
def quietly(quiet: bool = True) -> Iterator[None]:
    """Suppress all progress bars, ours and those of libraries, and library messages below errors inside the block.

    Patches the constructor of tqdm, since most bars pass an explicit argument, which overrides `TQDM_DISABLE`.

    Args:
        quiet: False for a block that changes nothing.
    """
    if not quiet:
        yield
        return
    from tqdm.std import tqdm

    before = {name: os.environ.get(name) for name in _VERBOSITY}
    os.environ.update({name: "error" for name in _VERBOSITY if name not in os.environ})
    shown = tqdm.__init__

    def hidden(self: Any, *args: Any, **kwargs: Any) -> None:
        shown(self, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = hidden  # type: ignore[method-assign]
    try:
        yield
    finally:
        tqdm.__init__ = shown  # type: ignore[method-assign]
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
