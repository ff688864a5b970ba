"""Names of a package that are imported on first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, str], subpackages: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Create a package's `__getattr__` and `__dir__` (PEP 562), for names that take seconds to import.

    `dir`, and so tab completion, lists only the package's public names, not its imports.

    Args:
        package: `__name__` of the package, whose `__all__` holds the public names.
        modules: modules of the package, each with its names, separated by spaces.
        subpackages: public packages in the package, which are attributes of it without an import.
    """
    places = {name: module for module, names in modules.items() for name in names.split()}
    subpackages = frozenset(subpackages)

    def get(name: str) -> Any:
        if name in places:
            return getattr(importlib.import_module(f".{places[name]}", package), name)
        if name in subpackages:
            return importlib.import_module(f".{name}", package)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        module = vars(sys.modules[package])
        return sorted({*module["__all__"], *subpackages, *(name for name in module if name.startswith("__"))})

    return get, names
