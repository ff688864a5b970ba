"""Image file types, and optional packages for those that Pillow alone cannot read."""

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
    """A format that Pillow reads with a plugin, or only in some builds.

    Attributes:
        name: of the format.
        suffixes: of its files, in lower case.
        package: that reads it, as pip calls it.
        module: of that package; importing it enables the format in Pillow.
        register: a function of the module to call if importing is not enough.
        signature: first bytes of its files.
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
"""Extensions of image files, in lower case."""


@cache
def register_plugins() -> None:
    """Enable optional formats in Pillow whose packages are installed; formats it already supports are unchanged."""
    for one in OPTIONAL_FORMATS:
        if not one.is_readable:
            with suppress(ImportError):
                module = import_module(one.module)
                if one.register:
                    getattr(module, one.register)()


def missing_package(content: bytes) -> str | None:
    """What to install to read a file, by its first bytes; None for a supported or unknown format."""
    for one in OPTIONAL_FORMATS:
        if one.signature.match(content) and not one.is_readable:
            return f"{one.name} needs `pip install {one.package}`"
    return None


def missing_packages(paths: Iterable[Path | str]) -> list[str]:
    """For each unsupported format: the number of files with its extension, and what to install."""
    register_plugins()
    suffixes = [os.path.splitext(path)[1].lower() for path in paths]  # a Path for each of a million takes a minute
    missing = []
    for one in OPTIONAL_FORMATS:
        found = [suffix for suffix in suffixes if suffix in one.suffixes]
        if found and not one.is_readable:
            images = "1 image" if len(found) == 1 else f"{len(found)} images"
            need = "needs" if len(found) == 1 else "need"
            endings = ", ".join(sorted(set(found)))
            missing.append(f"{images} in {one.name} ({endings}) {need} `pip install {one.package}`")
    return missing
