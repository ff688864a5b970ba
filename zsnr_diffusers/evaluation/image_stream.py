"""Where images come from and what happens to them on their way: read, saved, laid out, one at a time."""

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
    """Paths of all images below a folder, sorted; refuses a folder without any that can be read.

    Raises:
        ValueError: there are none, or, with "fail", some that only a package which is not installed can read.
        OSError: the folder does not exist or is none.
    """
    paths = find_images(folder)
    if not paths:
        raise ValueError(f"folder {str(folder)!r} holds no images, at any depth; is it the right one?")
    missing = missing_packages(paths)
    if missing and on_bad_image == "fail":
        raise ValueError(f"folder {str(folder)!r}: {'; '.join(missing)}, or leave them out with --on_bad_image skip")
    return paths


class ImageReader:
    """Iterates over images as upright RGB, each read once, and notes on the way what must be told afterwards.

    Args:
        images: paths or PIL images.
        on_bad_image: "skip" leaves unreadable files out, naming each on stderr.
        one_size: refuse an image of another size than the first.

    Raises, on the way:
        ImageError: an unreadable file, with "fail".
        ValueError: another size.
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
    """Each image with what it shows or why it cannot be read, in order.

    Files are decoded by threads, some ahead of the one that is asked for: Pillow decodes without Python's lock. What
    is still being made, by a pipeline, is taken one by one.
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
        finally:  # whoever stops early does not wait for the rest
            for _, found in ahead:
                found.cancel()


def _decode(image: AnyImage) -> Image.Image | ImageError:
    """An image as upright RGB, or why it cannot be read."""
    try:
        return load_rgb(image)
    except ImageError as error:
        return error


def check_same_size(image: NamedSize, first: NamedSize) -> None:
    """Refuse images of different sizes, of which figures make no sense.

    Raises:
        ValueError: they differ; both are named.
    """
    (name, (width, height)), (other, (first_width, first_height)) = image, first
    if (width, height) != (first_width, first_height):
        raise ValueError(
            f"{name} is {width}x{height}, but {other} is {first_width}x{first_height}; figures are of images of one "
            "size: crop and resize all of them first"
        )


def check_save_folder(folder: str | PathLike[str] | None) -> None:
    """Refuse a folder that already holds images, with which new ones would mix.

    Raises:
        ValueError: it does.
    """
    if folder is not None and Path(folder).exists() and find_images(folder):
        raise ValueError(f"folder {str(folder)!r} already holds images, which would mix; name an empty or a new one")


def image_file_name(number: int) -> str:
    """File name under which a generated image is saved, such as 000042.png."""
    return f"{number:06d}.png"


def save_each_image(images: Iterable[Image.Image], folder: Path, numbers: Iterable[int]) -> Iterator[Image.Image]:
    """Save each image as PNG under its number, and pass it on."""
    folder.mkdir(parents=True, exist_ok=True)
    for image, number in zip(images, numbers, strict=True):
        image.save(folder / image_file_name(number))
        yield image


def record_thumbnails(
    images: Iterable[Image.Image], numbers: Iterable[int], side: int, wanted: set[int], kept: dict[int, Image.Image]
) -> Iterator[Image.Image]:
    """Pass images on, and put those whose number is wanted into `kept`, shrunk into a square of `side` pixels."""
    for image, number in zip(images, numbers, strict=True):
        if number in wanted:
            kept[number] = image.copy()
            kept[number].thumbnail((side, side))
        yield image
