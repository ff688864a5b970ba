"""Names of a package that are imported once they are asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, str], subpackages: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make a package's `__getattr__` and `__dir__` (PEP 562), for names that take seconds to import.

    `dir` lists the package's public names and nothing that it merely imported, which is what tab completion shows.

    Args:
        package: `__name__` of the package, whose `__all__` holds the public names.
        modules: modules in the package, each with the names that it has, separated by spaces.
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
