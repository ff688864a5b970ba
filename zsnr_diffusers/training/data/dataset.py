"""The samples of a run's data, checked before training, and their images as tensors."""

import hashlib
import random
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ...utils.images import ImageError, load_rgb, oriented_size
from ..config import DataConfig
from ..config.data import is_encoded
from .encoded import EncodedRows
from .file_index import FILE_NAME, FileIndex, Records, file_records, is_known, row_records
from .folder_rows import read_folder_rows
from .notices import notify, report_unusable
from .row_values import ImageHashes, ImageSizes
from .shard_formats import create_shards
from .shards import ShardDataset
from .transforms import Size

_BATCH = 100_000
"""Rows whose paths are in memory at a time."""

SOURCE_COLUMN = "mix_source"
"""Column with the dataset's number, for rows of a mix."""

Rows: TypeAlias = datasets.Dataset | ShardDataset
"""Rows by number, with `column_names` and `select_columns`; an image is a mapping of `bytes` and `path`, one of them
None. Rows of shards are read when a column of theirs is."""

Images: TypeAlias = ImageSizes | Sequence[int]
"""Rows with usable images, with the image sizes if known."""


def open_rows(config: DataConfig) -> Rows:
    """Open a configuration's data as rows with undecoded images and only the columns it names.

    Captions may be in files next to a folder's images.

    Raises:
        ValueError: no images, no captions, or missing columns.
        OSError: the folder or dataset does not exist.
    """
    if config.train_shards:
        shards = create_shards(config)
        shards.open()
        return ShardDataset(shards, [*config.columns.values()])
    if config.data_mix:
        return _open_mix(config)
    if is_encoded(config.train_data_dir):
        captions = config.columns.get("caption_column")
        if captions is None:
            raise ValueError(f"--train_data_dir={config.train_data_dir} has no images: it contains encoded data.")
        return EncodedRows.open(Path(str(config.train_data_dir))).dataset(config.image_column, captions)
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
    # We decode images ourselves, since Pillow's RGB conversion is wrong for 16-bit and transparent images.
    return rows.cast_column(config.image_column, datasets.Image(decode=False))


def _open_mix(config: DataConfig) -> datasets.Dataset:
    """The rows of all sources of `--data_mix`, one after the other, with their number in `SOURCE_COLUMN`."""
    if "class_column" in config.columns:
        raise ValueError("--data_mix does not support classes, whose numbers differ between datasets.")
    caption, parts = config.columns.get("caption_column"), []
    for number, (name, _) in enumerate(config.mix_sources):
        if is_encoded(name):
            raise ValueError(f"--data_mix: {name} contains encoded data; pass folders of images.")
        folder, other = (name, None) if Path(name).is_dir() else (None, name)
        rows = open_rows(replace(config, data_mix=[], train_data_dir=folder, dataset_name=other))
        assert isinstance(rows, datasets.Dataset)
        columns = {config.image_column: rows.data.column(config.image_column)}
        if caption:
            texts = rows.data.column(caption).to_pylist()
            columns[caption] = pyarrow.array(
                [captions_as_list(text) for text in texts], pyarrow.list_(pyarrow.string())
            )
        columns[SOURCE_COLUMN] = pyarrow.array([number] * len(rows), pyarrow.int16())
        part = datasets.Dataset(pyarrow.table(columns))
        parts.append(part.cast_column(config.image_column, datasets.Image(decode=False)))
    return datasets.concatenate_datasets(parts)


def captions_as_list(caption: str | Sequence[str] | None) -> list[str]:
    """A data row's captions as a list; [""] if it has none."""
    if not caption:
        return [""]
    return [caption] if isinstance(caption, str) else [str(one) for one in caption]


def _load_train_split(name: str) -> datasets.Dataset:
    """The split `train` of a dataset of `datasets`, with a notice of the rows of other splits."""
    rows = datasets.load_dataset(name, split="train")
    others = {split: info.num_examples for split, info in (rows.info.splits or {}).items() if split != "train"}
    if others:
        shown = ", ".join(f"{count} of {split}" for split, count in others.items())
        notify(f"rows of the split train are used; skipped: {shown}")
    return rows


def noise_rows(column: str, resolution: int, **others: object) -> datasets.Dataset:
    """Eight rows with images of uniform noise, for timing without data; `others` are columns of one value each."""
    draw = np.random.default_rng(0)
    noise = draw.integers(256, size=(8, resolution, resolution, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels) for pixels in noise]
    rows = datasets.Dataset.from_dict({column: images, **{name: [value] * 8 for name, value in others.items()}})
    return rows.cast_column(column, datasets.Image(decode=False))


def open_file_index(config: DataConfig) -> FileIndex:
    """The index of a configuration's data files; `--rehash` reads all of them again."""
    return FileIndex(config.cache_folder / FILE_NAME, read_only=config.dry_run, rehash=config.rehash)


def check_images(rows: Rows, config: DataConfig, progress: bool = True, index: FileIndex | None = None) -> Images:
    """Decode every image once before training; returns index and size of readable ones.

    Files that were decoded at an earlier start and have not changed are not opened again. In shards, incomplete
    samples are skipped and no image is read: only rows are returned.

    Args:
        rows: from `open_rows`.
        config: of the run.
        progress: whether to show it.
        index: of what is known of files, to which what is found is added; None for nothing.

    Raises:
        ValueError: an image cannot be read and `--on_bad_image` is `fail`, or none can.
    """
    if isinstance(rows, ShardDataset):
        incomplete = rows.shards.incomplete
        what = f"{len(incomplete)} {rows.shards.unit} of {config.train_shards} are incomplete"
        report_unusable(incomplete, what, config)
        if not rows:
            raise ValueError(
                f"--train_shards={config.train_shards} contains no sample in the format that --help describes."
            )
        return _measure_shards(rows, config) if config.needs_image_sizes else range(len(rows))

    if is_encoded(config.train_data_dir):
        return EncodedRows.open(Path(str(config.train_data_dir))).sizes
    index = index or FileIndex()
    records = index.fill(image_records(rows, config.image_column))

    def complaint_of(row: int) -> str | None:
        try:
            records["width"][row], records["height"][row] = read_image(rows, config.image_column, row).size
        except ImageError as error:
            return str(error)
        return None

    unread = np.flatnonzero(~is_known(records, "height")).tolist()
    with ThreadPoolExecutor() as pool:
        found = pool.map(complaint_of, unread)
        bar = tqdm(found, "checking images", len(unread), disable=not progress, unit="image")
        bad = [complaint for complaint in bar if complaint]
    if unread:
        index.store(records)
    report_unusable(bad, f"{len(bad)} of {len(rows)} images cannot be read", config)
    usable = np.flatnonzero(is_known(records, "height"))
    if not len(usable):
        raise ValueError("There are no images left to train on.")
    return ImageSizes(usable, np.stack([records["height"], records["width"]], axis=1)[usable])


def _measure_shards(rows: ShardDataset, config: DataConfig) -> ImageSizes:
    """Sizes of the images of shards, by their headers."""
    sizes = rows.shards.image_sizes()
    bad = np.flatnonzero(~sizes.any(axis=1)).tolist()
    names = [rows.shards.name(row) for row in bad]
    report_unusable(names, f"{len(bad)} of {len(rows)} images have no readable header", config)
    usable = np.flatnonzero(sizes.any(axis=1))
    if not len(usable):
        raise ValueError("There are no images left to train on.")
    return ImageSizes(usable, sizes[usable])


def hash_images(rows: Rows, column: str, indices: Sequence[int], index: FileIndex | None = None) -> ImageHashes:
    """SHA-256 of the image files of data rows; those that were hashed before and have not changed are not read.

    Args:
        rows: from `open_rows`.
        column: of the images.
        indices: of the rows.
        index: as in `check_images`.

    Raises:
        OSError: one cannot be read.
    """
    wanted, index = np.unique(np.asarray(indices, np.int64)), index or FileIndex()
    if isinstance(rows, ShardDataset):
        hashes, places = np.zeros((len(wanted), 32), np.uint8), np.arange(len(wanted))
    else:
        records = index.fill(image_records(rows, column)[wanted])
        hashes, places = records["sha256"], np.flatnonzero(~is_known(records, "sha256"))

    def hash_one(place: int) -> None:
        hashes[place] = np.frombuffer(image_sha256(rows, column, int(wanted[place])), np.uint8)

    with ThreadPoolExecutor() as pool:
        found = pool.map(hash_one, places.tolist())
        deque(tqdm(found, "hashing images", len(places), disable=not len(places), unit="image"), maxlen=0)
    if len(places) and not isinstance(rows, ShardDataset):
        index.store(records)
    return ImageHashes(wanted, hashes)


def image_records(rows: datasets.Dataset, column: str) -> Records:
    """New records for the images of all rows, with only their current sizes and modification times.

    Images without a file of their own go by the dataset's fingerprint.
    """
    records = row_records(rows._fingerprint, np.arange(len(rows)))
    first = 0
    for batch in rows.select_columns([column]).with_format("arrow").iter(batch_size=_BATCH):
        images = batch.column(column).combine_chunks()
        paths = images.field("path").to_pylist()
        alone = np.asarray(images.field("bytes").is_null()) & np.array([path is not None for path in paths])
        places = np.flatnonzero(alone)
        records[first + places] = file_records([paths[place] for place in places.tolist()])
        first += len(paths)
    return records


def read_image(rows: Rows, column: str, index: int, at_least: Size | None = None) -> Image.Image:
    """The image of a data row, as upright RGB, at least as large as a given size, or its original size.

    Raises:
        ImageError: it cannot be read.
    """
    source, path = _image_source(rows, column, index)
    return load_rgb(source, path or f"of row {index}", at_least)


def is_row_readable(rows: Rows, config: DataConfig, index: int) -> bool:
    """Whether a row of shards is readable; other rows were checked before the start.

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


def to_model_range(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1
