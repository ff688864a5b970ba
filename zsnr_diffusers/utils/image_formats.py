"""Which files are images, and which package reads those that Pillow alone does not; none of them is a dependency."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

from PIL import Image


@dataclass(frozen=True)
class OptionalFormat:
    """A format that Pillow reads with a plugin, or in some of its builds.

    Attributes:
        name: of the format.
        suffixes: of its files, in lower case.
        package: that reads it, as pip calls it.
        module: of that package, the import of which makes Pillow read the format.
        register: a function of the module to call for that, if the import is not enough.
        signature: what its files begin with.
    """

    name: str
    suffixes: tuple[str, ...]
    package: str
    module: str
    register: str | None
    signature: re.Pattern[bytes]

    @property
    def is_readable(self) -> bool:
        """Whether Pillow reads the format now: by itself, or by a plugin that is registered."""
        return self.suffixes[0] in Image.registered_extensions()


OPTIONAL_FORMATS = (
    OptionalFormat(
        *("HEIC", (".heic", ".heif", ".hif"), "pillow-heif", "pillow_heif", "register_heif_opener"),
        re.compile(rb"....ftyp.*?(hei[cmsx]|hev[cmsx])", re.DOTALL),
    ),
    OptionalFormat(
        *("JPEG XL", (".jxl",), "pillow-jxl-plugin", "pillow_jxl", None),
        re.compile(rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"),
    ),
    OptionalFormat(
        *("AVIF", (".avif", ".avifs"), "pillow-avif-plugin", "pillow_avif", None),
        re.compile(rb"....ftyp.*?avi[fs]", re.DOTALL),
    ),
)

IMAGE_SUFFIXES = frozenset(
    {".apng", ".bmp", ".dds", ".dib", ".gif", ".ico", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg"}
    | {".jpf", ".jpg", ".jpx", ".pbm", ".pcx", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi", ".ras"}
    | {".sgi", ".tga", ".tif", ".tiff", ".webp"}
).union(*(one.suffixes for one in OPTIONAL_FORMATS))
"""Endings, in lower case, of the files that are taken for images."""


@cache
def register_plugins() -> None:
    """Let Pillow read the optional formats whose packages are installed; a format that it reads already is left so."""
    for one in OPTIONAL_FORMATS:
        if not one.is_readable:
            with suppress(ImportError):
                module = import_module(one.module)
                if one.register:
                    getattr(module, one.register)()


def missing_package(content: bytes) -> str | None:
    """What to install to read a file, by its first bytes; None for a format that Pillow reads, or none at all."""
    for one in OPTIONAL_FORMATS:
        if one.signature.match(content) and not one.is_readable:
            return f"{one.name} needs `pip install {one.package}`"
    return None


def missing_packages(paths: Iterable[Path | str]) -> list[str]:
    """For each format that cannot be read here: how many files have its ending, and what to install."""
    register_plugins()
    suffixes = [os.path.splitext(path)[1].lower() for path in paths]  # of a million, a Path each takes a minute
    missing = []
    for one in OPTIONAL_FORMATS:
        found = [suffix for suffix in suffixes if suffix in one.suffixes]
        if found and not one.is_readable:
            images = "1 image" if len(found) == 1 else f"{len(found)} images"
            need = "needs" if len(found) == 1 else "need"
            endings = ", ".join(sorted(set(found)))
            missing.append(f"{images} in {one.name} ({endings}) {need} `pip install {one.package}`")
    return missing
