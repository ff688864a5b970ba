"""The rows of a run's data, checked before training, and their images as tensors."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ...utils.images import ImageError, load_rgb, oriented_size
from ..config import DataConfig
from .folder_rows import read_folder_rows
from .notices import notify, report_unusable
from .shard_formats import create_shards
from .shards import ShardDataset
from .transforms import Size

Rows: TypeAlias = datasets.Dataset | ShardDataset
"""Rows by number, with `column_names` and `select_columns`; an image is a mapping of `bytes` and `path`, one of them
None. Rows of shards are read when a column of theirs is."""

Images: TypeAlias = Mapping[int, Size] | Sequence[int]
"""Rows whose images can be used, with the sizes of these where they are known."""


def open_rows(config: DataConfig) -> Rows:
    """Open a configuration's data as rows with undecoded images and only the columns it names.

    Captions, if it asks for any, may lie beside a folder's images.

    Raises:
        ValueError: no images, no captions, or columns of other names.
        OSError: no such folder or dataset.
    """
    if config.train_shards:
        shards = create_shards(config)
        shards.open()
        return ShardDataset(shards, [*config.columns.values()])
    if config.train_data_dir:
        where = f"--train_data_dir={config.train_data_dir}"
        rows = read_folder_rows(config)
    else:
        where = f"--dataset_name={config.dataset_name}"
        rows = _load_train_split(str(config.dataset_name))
    for option, column in config.columns.items():
        if column not in rows.column_names:
            raise ValueError(
                f"{where} has the columns {', '.join(rows.column_names)}; --{option}={column!r} is not one of them."
            )
    rows = rows.select_columns([*config.columns.values()])
    # We decode, since Pillow's RGB of 16-bit and transparent images is not what they show.
    return rows.cast_column(config.image_column, datasets.Image(decode=False))


def _load_train_split(name: str) -> datasets.Dataset:
    """The split `train` of a dataset of `datasets`, with a notice of the rows of other splits."""
    rows = datasets.load_dataset(name, split="train")
    others = {split: info.num_examples for split, info in (rows.info.splits or {}).items() if split != "train"}
    if others:
        shown = ", ".join(f"{count} of {split}" for split, count in others.items())
        notify(f"rows of the split train are used; left out: {shown}")
    return rows


def noise_rows(column: str, resolution: int, **others: object) -> datasets.Dataset:
    """Eight rows with images of uniform noise, for timing without data; `others` are columns of one value each."""
    draw = np.random.default_rng(0)
    noise = draw.integers(256, size=(8, resolution, resolution, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels) for pixels in noise]
    rows = datasets.Dataset.from_dict({column: images, **{name: [value] * 8 for name, value in others.items()}})
    return rows.cast_column(column, datasets.Image(decode=False))


def check_images(rows: Rows, config: DataConfig, progress: bool = True) -> Images:
    """Decode every image once before training; index and size of those that can be read.

    Of shards, samples are whole or left out, and no image is read: their rows alone are returned.

    Raises:
        ValueError: an image cannot be read and `--on_bad_image` is `fail`, or none can.
    """
    if isinstance(rows, ShardDataset):
        incomplete = rows.shards.incomplete
        what = f"{len(incomplete)} {rows.shards.unit} of {config.train_shards} are not whole"
        report_unusable(incomplete, what, config)
        if not rows:
            raise ValueError(f"--train_shards={config.train_shards} holds no image with what --help says of it.")
        return range(len(rows))

    def size_or_complaint(index: int) -> Size | str:
        try:
            width, height = read_image(rows, config.image_column, index).size
        except ImageError as error:
            return str(error)
        return height, width

    with ThreadPoolExecutor() as pool:
        found = list(
            tqdm(
                pool.map(size_or_complaint, range(len(rows))),
                "checking images",
                len(rows),
                disable=not progress,
                unit="image",
            )
        )
    bad = [complaint for complaint in found if isinstance(complaint, str)]
    report_unusable(bad, f"{len(bad)} of {len(rows)} images cannot be read", config)
    usable_rows = {index: size for index, size in enumerate(found) if not isinstance(size, str)}
    if not usable_rows:
        raise ValueError("No image is left to train on.")
    return usable_rows


def read_image(rows: Rows, column: str, index: int) -> Image.Image:
    """The image of a data row, as upright RGB.

    Raises:
        ImageError: it cannot be read.
    """
    source, path = _image_source(rows, column, index)
    return load_rgb(source, name=path or f"of row {index}")


def is_row_readable(rows: Rows, config: DataConfig, index: int) -> bool:
    """Whether a row of shards can be read; other rows were checked before the start.

    Raises:
        ImageError: it cannot, and `--on_bad_image` is `fail`.
    """
    if isinstance(rows, ShardDataset):
        try:
            read_image(rows, config.image_column, index)
            rows[[index]]
        except ImageError:
            if config.on_bad_image == "fail":
                raise
            return False
    return True


def rows_to_sample(rows: Rows, usable_rows: Sequence[int], seed: int) -> Sequence[int]:
    """The usable rows to draw a sample from: all, or those of some shards; see `Shards.rows_to_sample`."""
    if isinstance(rows, ShardDataset) and len(usable_rows) == len(rows):
        return rows.shards.rows_to_sample(random.Random(seed))
    return usable_rows


def image_size(rows: Rows, column: str, index: int) -> Size:
    """(height, width) of a data row's image, from its header.

    Raises:
        ImageError: it cannot be read.
    """
    source, path = _image_source(rows, column, index)
    return oriented_size(source, name=path or f"of row {index}")


def image_sha256(rows: Rows, column: str, index: int) -> bytes:
    """SHA-256 of a data row's image file.

    Raises:
        OSError: it cannot be read.
    """
    source, _ = _image_source(rows, column, index)
    return hashlib.sha256(source if isinstance(source, bytes) else Path(source).read_bytes()).digest()


def _image_source(rows: Rows, column: str, index: int) -> tuple[Any, str | None]:
    """Bytes of a data row's image, or the path of its file; and that path, if any."""
    image = rows[index][column] or {"bytes": b"", "path": None}
    return image["path"] if image["bytes"] is None else image["bytes"], image["path"]


def row_name(rows: Rows, column: str, index: int) -> str:
    """A data row's name for messages: its index, and its image's file name if it has one."""
    path = (rows[index][column] or {}).get("path")
    return f"{index} ({Path(path).name})" if path else str(index)


def to_model_range(pixels: Tensor, flip: bool) -> Tensor:
    """uint8 pixels as float32 in [-1, 1], mirrored left to right if `flip`."""
    scaled = pixels.float() / 127.5 - 1
    return scaled.flip(-1) if flip else scaled
