"""Precomputed data: its samples as a table, without images; see `stable_diffusion/encode.py`.

The folder contains `rows.parquet`, `encoded.json` and the caches of latents and text embeddings. `encoded.json` is
written last, so a folder without it is incomplete.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from ...utils.files import atomic_write, write_json
from ...utils.hashing import file_sha256
from ..config.data import ENCODED_FILE
from .row_values import ImageHashes, ImageSizes

ROWS_FILE = "rows.parquet"
_FORMAT = 1
"""Format version; increase it when older versions cannot read the data."""


@dataclass(frozen=True)
class EncodedRows:
    """The rows of a folder of encoded data.

    Attributes:
        folder: that holds them.
        facts: how they were encoded, as JSON.
        table: `image`, the name; `text`; (`height`, `width`) of the image and the `sha256` of its file.
    """

    folder: Path
    facts: dict[str, Any]
    table: Any

    @classmethod
    def open(cls, folder: Path) -> "EncodedRows":
        """Read a folder that `is_encoded`.

        Raises:
            ValueError: it is of another version, or damaged.
        """
        try:
            facts = json.loads((folder / ENCODED_FILE).read_text(encoding="utf-8"))
            if facts["format"] != _FORMAT:
                raise ValueError(
                    f"{folder} was encoded by another version of zsnr_diffusers: encode it again, or use that version."
                )
            digest = file_sha256(folder / ROWS_FILE)
            if digest != facts["rows_sha256"]:
                raise ValueError(f"{folder / ROWS_FILE} has changed since it was written: encode the data again.")
            return cls(folder, facts, pyarrow.parquet.read_table(folder / ROWS_FILE))
        except (KeyError, TypeError, json.JSONDecodeError, FileNotFoundError) as error:
            raise ValueError(f"{folder} is damaged, encode the data again: {error!r}") from error

    @cached_property
    def sizes(self) -> ImageSizes:
        """(height, width) of each row's image."""
        columns = [self.table.column(name).to_numpy() for name in ("height", "width")]
        return ImageSizes(np.arange(len(self.table)), np.stack(columns, axis=1).astype(np.int32))

    @cached_property
    def hashes(self) -> ImageHashes:
        """SHA-256 of each row's image file."""
        data = b"".join(self.table.column("sha256").to_pylist())
        return ImageHashes(np.arange(len(self.table)), np.frombuffer(data, np.uint8).reshape(-1, 32))

    @cached_property
    def luminance(self) -> NDArray[np.float64]:
        """Mean luminance of some of the images, which was measured when they were there."""
        return np.array(self.facts["luminance"], np.float64)

    def dataset(self, image_column: str, caption_column: str) -> datasets.Dataset:
        """The rows as `open_rows` gives them; an image has a name and no bytes."""
        names = self.table.column("image").to_pylist()
        columns = {image_column: names, caption_column: self.table.column("text").to_pylist()}
        return datasets.Dataset.from_dict(columns).cast_column(image_column, datasets.Image(decode=False))


def write_encoded_rows(
    folder: Path, facts: dict[str, Any], names: list[str], captions: list[Any], sizes: ImageSizes, hashes: ImageHashes
) -> None:
    """Write the rows of encoded data, and that they are whole.

    Args:
        folder: to write to.
        facts: how they were encoded, as JSON.
        names: of the images.
        captions: one, a list of them, or None for each.
        sizes: of the images, a row each.
        hashes: of their files.

    Raises:
        OSError: the disk is full or the folder read-only.
    """
    lists = any(isinstance(one, list) for one in captions)
    texts = [one if not lists or isinstance(one, list) or one is None else [one] for one in captions]
    table = pyarrow.table(
        {
            "image": pyarrow.array(names, pyarrow.string()),
            "text": pyarrow.array(texts, pyarrow.list_(pyarrow.string()) if lists else pyarrow.string()),
            **{name: pyarrow.array(sizes.values_array[:, place]) for place, name in enumerate(("height", "width"))},
            "sha256": pyarrow.array([row.tobytes() for row in hashes.values_array], pyarrow.binary(32)),
        }
    )
    with atomic_write(folder / ROWS_FILE) as partial:
        pyarrow.parquet.write_table(table, partial)
    write_json(folder / ENCODED_FILE, {"format": _FORMAT, "rows_sha256": file_sha256(folder / ROWS_FILE), **facts})
