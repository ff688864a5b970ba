"""Iterate over images one at a time: read, check, save, and collect for a grid."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike, fspath
from pathlib import Path
from typing import Literal, TypeAlias

from PIL import Image

from ..utils.image_formats import missing_packages
from ..utils.images import ImageError, find_images, load_rgb

AnyImage: TypeAlias = "Image.Image | str | PathLike[str]"
NamedSize: TypeAlias = tuple[str, tuple[int, int]]
OnBadImage: TypeAlias = Literal["fail", "skip"]


def list_images(folder: str | PathLike[str], on_bad_image: OnBadImage = "fail") -> list[Path]:
    """Paths of all images below a folder, sorted; refuses a folder without readable images.

    Raises:
        ValueError: there are none, or, with "fail", some that need a package that is not installed.
        OSError: the folder does not exist or is a file.
    """
    paths = find_images(folder)
    if not paths:
        raise ValueError(f"folder {str(folder)!r} contains no images, at any depth; check the path")
    missing = missing_packages(paths)
    if missing and on_bad_image == "fail":
        raise ValueError(f"folder {str(folder)!r}: {'; '.join(missing)}, or skip them with --on_bad_image skip")
    return paths


class ImageReader:
    """Iterates over images as upright RGB, each read once, and records skipped files and the first image's size.

    Args:
        images: paths or PIL images.
        on_bad_image: "skip" skips unreadable files and names each on stderr.
        one_size: refuse an image with a different size than the first.

    Raises, during iteration:
        ImageError: an unreadable file, with "fail".
        ValueError: a different size.
    """

    def __init__(
        self,
        images: Iterable[AnyImage],
        on_bad_image: OnBadImage = "fail",
        one_size: bool = False,
    ):
        self._images, self._on_bad_image, self._one_size = images, on_bad_image, one_size
        self.skipped: list[str] = []
        self.first: NamedSize | None = None

    def __iter__(self) -> Iterator[Image.Image]:
        for i, (image, rgb) in enumerate(_decode_ahead(self._images)):
            name = f"image {i}" if isinstance(image, Image.Image) else fspath(image)
            if isinstance(rgb, ImageError):
                error = rgb
                if self._on_bad_image == "fail":
                    raise error
                print(f"skipped: {error}", file=sys.stderr)
                self.skipped.append(name)
                continue
            self.first = self.first or (name, rgb.size)
            if self._one_size:
                check_same_size((name, rgb.size), self.first)
            yield rgb


def _decode_ahead(
    images: Iterable[AnyImage],
) -> Iterator[tuple[AnyImage, Image.Image | ImageError]]:
    """Each source with its image or the reason why it cannot be read, in order.

    Files are decoded ahead by threads, since Pillow releases the GIL. Images that a pipeline generates are taken one
    by one.
    """
    if not isinstance(images, list | tuple):
        yield from ((image, _decode(image)) for image in images)
        return
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[tuple[AnyImage, Future[Image.Image | ImageError]]] = deque()
        try:
            for image in images:
                ahead.append((image, pool.submit(_decode, image)))
                if len(ahead) > 2 * threads:
                    first, found = ahead.popleft()
                    yield first, found.result()
            while ahead:
                first, found = ahead.popleft()
                yield first, found.result()
        finally:  # do not wait for the rest when iteration stops early
            for _, found in ahead:
                found.cancel()


def _decode(image: AnyImage) -> Image.Image | ImageError:
    """An image as upright RGB, or why it cannot be read."""
    try:
        return load_rgb(image)
    except ImageError as error:
        return error


def check_same_size(image: NamedSize, first: NamedSize) -> None:
    """Refuse images of different sizes, for which metrics are not meaningful.

    Raises:
        ValueError: they differ; the message names both.
    """
    (name, (width, height)), (other, (first_width, first_height)) = image, first
    if (width, height) != (first_width, first_height):
        raise ValueError(
            f"{name} is {width}x{height}, but {other} is {first_width}x{first_height}; metrics need images of equal "
            "size: crop and resize them first"
        )


def check_save_folder(folder: str | PathLike[str] | None) -> None:
    """Refuse a folder that already contains images, to avoid mixing them with new ones.

    Raises:
        ValueError: it does.
    """
    if folder is not None and Path(folder).exists() and find_images(folder):
        raise ValueError(f"folder {str(folder)!r} already contains images; use an empty or new folder")


def image_file_name(number: int) -> str:
    """File name under which a generated image is saved, such as 000042.png."""
    return f"{number:06d}.png"


def save_each_image(images: Iterable[Image.Image], folder: Path, numbers: Iterable[int]) -> Iterator[Image.Image]:
    """Save each image as PNG with its number, and yield it."""
    folder.mkdir(parents=True, exist_ok=True)
    for image, number in zip(images, numbers, strict=True):
        image.save(folder / image_file_name(number))
        yield image


def record_thumbnails(
    images: Iterable[Image.Image], numbers: Iterable[int], side: int, wanted: set[int], kept: dict[int, Image.Image]
) -> Iterator[Image.Image]:
    """Yield images, and store those with requested numbers in `kept`, downscaled to fit a square of `side` pixels."""
    for image, number in zip(images, numbers, strict=True):
        if number in wanted:
            kept[number] = image.copy()
            kept[number].thumbnail((side, side))
        yield image
