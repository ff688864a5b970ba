"""Commands without progress bars and chatter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_VERBOSITY = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "DATASETS_VERBOSITY")
"""Read by each library when it is imported."""


@contextmanager
def quietly(quiet: bool = True) -> Iterator[None]:
    """Inside the block no progress bar is shown, ours or another library's, and of libraries' notices only errors.

    Bars are told at their one constructor: most ask for being shown by an argument, which `TQDM_DISABLE` does not
    change.

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
