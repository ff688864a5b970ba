"""Read any image file as an upright 8-bit RGB image, or raise an error that names the file; uses only Pillow and
numpy.

Pillow's own `convert("RGB")` is wrong for three common kinds of files: it clips 16-bit gray at 255 (99.6 % of a ramp
becomes white), it shows the hidden color of transparent pixels, and it ignores the EXIF orientation. Training and
evaluation read all images with this module.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from .image_formats import IMAGE_SUFFIXES, missing_package, register_plugins

ImageSource: TypeAlias = str | PathLike[str] | bytes | Image.Image

MAX_PIXELS = 2**29
"""Largest image that is read, in pixels: 537 Mpx, 1.6 GB as RGB. Camera files reach 200 Mpx, so Pillow's own limit
(a warning from 89 Mpx, a refusal from 179 Mpx) is lifted up to here."""

_EXIF_TRANSPOSE = {  # EXIF 2.32, tag 0x0112: operation that corrects each stored orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ROTATED = (5, 6, 7, 8)
"""The operations that exchange width and height."""
_PILLOW_LIMIT = threading.Lock()


class ImageError(ValueError):
    """An image that cannot be read; the message names the file and the reason."""


def find_files(folder: str | PathLike[str]) -> list[Path]:
    """All files below `folder`, at any depth, including links to files and folders, sorted by path.

    Folders whose names begin with a dot are skipped: they contain thumbnails and checkpoints of other programs. A
    broken link counts as an unreadable file.

    Raises:
        FileNotFoundError: `folder` does not exist.
        NotADirectoryError: `folder` is a file.
        PermissionError: a folder cannot be listed.
    """
    root = Path(folder)
    if not root.exists():
        raise FileNotFoundError(f"image folder {str(root)!r} does not exist")
    if not root.is_dir():
        raise NotADirectoryError(f"image folder {str(root)!r} is a file; pass the folder that contains the images")
    return sorted(_walk_files(root, frozenset()))


def _walk_files(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    """All files below a folder; links to one of its parent folders, `above`, are not followed."""
    real = os.path.realpath(folder)
    if real in above:  # a link to a parent folder
        return
    for entry in os.scandir(folder):
        path = folder / entry.name
        if path.is_dir() if entry.is_symlink() else entry.is_dir():
            if not entry.name.startswith("."):
                yield from _walk_files(path, above | {real})
        elif entry.is_symlink() or entry.is_file():  # not a pipe, which would block
            yield path


def is_image(path: Path) -> bool:
    """Whether a file is an image by its name: one of `IMAGE_SUFFIXES` in either case, and no dot in front."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def find_images(folder: str | PathLike[str]) -> list[Path]:
    """All images below `folder`, at any depth, sorted by path; an empty list if there are none.

    Files and folders whose names begin with a dot are skipped: they are thumbnails, resource forks and checkpoints of
    other programs.

    Raises:
        OSError: as `find_files`.
    """
    return [path for path in find_files(folder) if is_image(path)]


def load_rgb(source: ImageSource, name: str | None = None, at_least: tuple[int, int] | None = None) -> Image.Image:
    """Decode an image completely and return it upright, as 8-bit RGB.

    - The EXIF orientation is applied. Of an animation, the first frame is taken. Color profiles are not applied.
    - Transparency (an alpha channel, or a transparent palette entry or color) is composited over white.
    - Gray deeper than 8 bits is scaled by its full range, never clipped: 16-bit modes by 65535. Modes whose depth is
      not written down take the smallest range that holds the brightest pixel: "I" from a file 65535 or 2^31 - 1
      (255 too if it was made in memory), and "F" 1, 255 or 65535.
    - CMYK, YCbCr, HSV, palette and 1-bit images go through Pillow's conversion.

    Args:
        source: a path, the bytes of a file, or a PIL image (returned itself if there is nothing to change).
        name: name of the image in error messages; by default its path.
        at_least: (height, width) of an upright image that is sufficient, if it will be downscaled anyway. JPEGs are
            then decoded at a half, a quarter or an eighth of their size if that is large enough, which is faster in
            proportion: the decoder uses only the lowest frequencies of each block. Sides are rounded up: what is
            decoded at a half is (height / 2, width / 2) large, from the top left, and the rest is filled up.

    Raises:
        ImageError: the file does not exist, is not an image, is truncated, exceeds `MAX_PIXELS`, or has invalid values
            (negative, not finite).
    """
    label = name or _describe_source(source)
    try:
        if isinstance(source, Image.Image):
            return _decode_rgb(source)
        with _open_image(source) as image:
            if at_least is not None:
                _decode_smaller(image, at_least)
            return _decode_rgb(image)
    except (
        Exception
    ) as error:  # Pillow's decoders can raise almost any exception for damaged data, from struct.error to SyntaxError
        raise ImageError(f"cannot read image {label}: {_explain_error(error, source)}") from error


def oriented_size(source: str | PathLike[str] | bytes, name: str | None = None) -> tuple[int, int]:
    """Height and width of what `load_rgb` returns of a file, by its header alone.

    Args:
        source: a path, or the bytes of a file.
        name: name of the image in error messages; by default its path.

    Raises:
        ImageError: no such file, or not an image.
    """
    try:
        with _open_image(source) as image:
            width, height = image.size
            if isinstance(image, TiffImageFile):  # whose size may already be rotated, depending on the version
                width, height = image.tag_v2[ExifTags.Base.ImageWidth], image.tag_v2[ExifTags.Base.ImageLength]
            return (width, height) if _exif_orientation(image) in _ROTATED else (height, width)
    except Exception as error:
        raise ImageError(
            f"cannot read image {name or _describe_source(source)}: {_explain_error(error, source)}"
        ) from error


def _describe_source(source: ImageSource) -> str:
    """Name of an image in error messages: its path, or else a description."""
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "") or f"<PIL image {source.mode} {source.width}x{source.height}>")
    return str(source)


def _explain_error(error: Exception, source: ImageSource) -> str:
    """Why an image cannot be read, for the error message: what to install, or Pillow's message."""
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    content = _read_signature(source)
    if missing := missing_package(content):
        return missing
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a format that this Pillow can read" if content else "the file is empty"
    return str(error) or type(error).__name__


def _read_signature(source: ImageSource) -> bytes:
    """The first bytes of a file, which identify its format; empty if it is not a file."""
    if isinstance(source, bytes):
        return source[:64]
    with suppress(OSError), Path(str(source)).open("rb") as file:
        return file.read(64)
    return b""


@contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """Raise Pillow's limit on pixels inside the block."""
    # Pillow's limit is global. The lock prevents two threads from restoring each other's value; it is held only
    # briefly, since opening reads only the header.
    with _PILLOW_LIMIT:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _open_image(source: str | PathLike[str] | bytes) -> Image.Image:
    """Open an image file or its bytes, reading only the header, with plugins registered."""
    register_plugins()
    with _without_pillow_limit():
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _decode_smaller(image: Image.Image, at_least: tuple[int, int]) -> None:
    """Let a JPEG's decoder downscale the image to at least a given size, if possible."""
    _check_pixels(image)
    if _exif_orientation(image) == 1:  # else a part of a row or column might come to lie at the top or left
        image.draft(None, at_least[::-1])  # does nothing to other formats


def _check_pixels(image: Image.Image) -> None:
    """Refuse an image that is too large to decode."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"{image.width}x{image.height} is {image.width * image.height / 1e6:.0f} Mpx, above the limit of "
            f"{MAX_PIXELS / 1e6:.0f} Mpx; downscale it or increase zsnr_diffusers.utils.images.MAX_PIXELS"
        )


def _decode_rgb(image: Image.Image) -> Image.Image:
    """Decode a PIL image to upright 8-bit RGB over white."""
    _check_pixels(image)
    from_file = image.format is not None
    image.load()  # before reading the orientation: Pillow itself rotates TIFF files when loading
    return _composite_on_white(_to_eight_bit_gray(_apply_exif_orientation(image), from_file))


def _exif_orientation(image: Image.Image) -> int:
    """EXIF orientation of an image, 1 to 8; 1 is upright."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block does not make the image invalid
        return 1


def _apply_exif_orientation(image: Image.Image) -> Image.Image:
    """Rotate an image upright, and drop the EXIF block so that it is not rotated again."""
    turn = _EXIF_TRANSPOSE.get(_exif_orientation(image))
    if turn is None:
        return image
    upright = image.transpose(turn)
    # `transpose` also copies the EXIF block: a second reader would rotate the image again.
    upright.info = {key: value for key, value in image.info.items() if key == "transparency"}
    return upright


def _to_eight_bit_gray(image: Image.Image, from_file: bool) -> Image.Image:
    """Modes "I;16*", "I" and "F" as "L", or "LA" if one gray value is declared transparent."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    full = _gray_full_range(image.mode, float(values.min()), float(values.max()), from_file)
    grey = Image.fromarray(np.rint(np.multiply(values, 255 / full, dtype=np.float32)).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _gray_full_range(mode: str, low: float, high: float, from_file: bool) -> float:
    """Value of white for gray deeper than 8 bits, by mode and by the values `low` to `high` that occur."""
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0:
        raise ValueError(
            f"pixel values from {low:g} to {high:g} in mode {mode!r} are not valid brightness values; rescale the file"
        )
    if mode.startswith("I;16"):
        return 65535
    if mode == "F":
        ranges: tuple[float, ...] = (1, 255, 65535)
    else:  # "I" in a file is 16-bit gray (PNG and PPM under older Pillow) or truly 32-bit
        ranges = (65535, 2**31 - 1) if from_file else (255, 65535, 2**31 - 1)
    for full in ranges:
        if high <= full:
            return full
    raise ValueError(f"pixel values up to {high:g} in mode {mode!r} have no known full range; rescale the file")


def _composite_on_white(image: Image.Image) -> Image.Image:
    """RGB of an image of any mode, transparent pixels composited over white."""
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    coloured = image.convert("RGBA")
    flat = Image.new("RGB", image.size, "white")
    flat.paste(coloured, mask=coloured.getchannel("A"))
    return flat
