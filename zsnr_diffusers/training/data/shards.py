"""Base class of shards: samples in files on any fsspec file system, read on demand."""

import hashlib
import json
import random
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from ...utils.distributed import is_main_process
from ...utils.images import ImageError, oriented_size
from ..config import DataConfig
from .remote import FileState
from .shard_cache import ShardCache

THREADS = 32
"""Number of threads that read files; they mostly wait for a server."""


class CaptionError(ImageError):
    """A caption that cannot be read; treated like an unreadable image."""


@dataclass(frozen=True)
class Shard:
    """Rows that lie together, and are shuffled with those of a few other shards.

    Attributes:
        url: of the file, anything that fsspec opens.
        state: its size, and a hash that detects changes.
        rows: number of readable rows.
        incomplete: descriptions of unreadable ones.
        sha256: of the positions of the rows in the file.
    """

    url: str
    state: FileState
    rows: int
    incomplete: tuple[str, ...]
    sha256: str

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.url.rpartition("/")[2]


class Shards(ABC):
    """The shards that a configuration names; what a row is made of is found by its number alone.

    Args:
        config: of the run.
        urls: of the files, from `resolve_urls`.

    Attributes:
        all: the shards, once they are open.
        ends: for each shard, the number of rows in it and in those before.
        features: types of columns with classes, as `datasets` has them.
        cache: of shards, on a local disk.
    """

    progress: tuple[str, str]
    """What `scan` does and what it counts, for its progress bar."""
    unit: str
    """What `incomplete` lists."""

    def __init__(self, config: DataConfig, urls: Sequence[str]) -> None:
        self.image_column, self.folder, self.urls = config.image_column, config.shard_index_folder, list(urls)
        self.window, self.limit_gb = config.shuffle_shards, config.shard_cache_gb
        folder = config.shard_data_folder if self.folder is not None and config.shard_cache_gb else None
        self.cache = ShardCache(folder, round(config.shard_cache_gb * 1e9), config.shuffle_shards)
        self.all: Sequence[Shard] = []
        self.ends: list[int] = []
        self.features: dict[str, Any] = {}

    @property
    def incomplete(self) -> list[str]:
        """Samples without an image or a caption: what they lack, and their files."""
        return [f"{text} in {shard.name}" for shard in self.all for text in shard.incomplete]

    @property
    def sha256(self) -> str:
        """SHA-256 of the files' names and sizes and of where rows lie in them; no image is read."""
        facts = [(shard.name, shard.state.size, shard.sha256) for shard in self.all]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def scan(self, urls: Sequence[str]) -> list[Shard]:
        """Find the shards of files, and save where their rows lie where that is not saved yet."""
        description, unit = self.progress
        with ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(self._scan_file, urls)
            shards = tqdm(found, description, len(urls), disable=not is_main_process(), unit=unit)
            return list(chain.from_iterable(shards))

    def open(self) -> None:
        """Scan all files, so that rows can be read.

        Raises:
            ShardError: a file is missing, cut off, or cannot be read.
            ValueError: files lack a column, or options do not fit them.
            OSError: an index cannot be stored.
        """
        self.all = self.scan(self.urls)
        self.ends = list(accumulate(shard.rows for shard in self.all))

    def rows_to_sample(self, draw: random.Random) -> Sequence[int]:
        """Rows to draw a sample from; not all where one from each shard would cost as much as reading all shards."""
        return range(self.ends[-1])

    def values(self, column: str) -> list[Any]:
        """The values of all rows in a column other than the images', read before training."""
        return [self.value(row, column) for row in range(self.ends[-1])]

    def _locate_row(self, row: int) -> tuple[int, int]:
        """The number of a row's shard, and the row's number in it."""
        number = bisect_right(self.ends, row)
        return number, row - (self.ends[number] - self.all[number].rows)

    @abstractmethod
    def _scan_file(self, url: str) -> Sequence[Shard]:
        """The shards in a file."""

    @abstractmethod
    def image_sizes(self) -> NDArray[np.int32]:
        """(height, width) of the images of all rows, int32 [rows, 2]; zeros where an image cannot be read.

        Raises:
            ShardError: a file cannot be read.
        """

    @abstractmethod
    def name(self, row: int) -> str:
        """A row's name for messages, which says the file; no data is read."""

    @abstractmethod
    def image(self, row: int) -> bytes:
        """Bytes of the image file of a row.

        Raises:
            ImageError: the row has none.
            ShardError: it cannot be read.
        """

    @abstractmethod
    def value(self, row: int, column: str) -> Any:
        """The value of a row in a column other than the images': a caption, a list of captions, a class, or None.

        Raises:
            CaptionError: it is not a caption. ShardError: it cannot be read.
        """


def size_or_zero(image: bytes | None) -> tuple[int, int]:
    """(height, width) of an image's bytes, of which the header must be there; zeros if it cannot be read."""
    try:
        return oriented_size(image or b"")
    except ImageError:
        return 0, 0


class _Image(Mapping[str, Any]):
    """As `datasets` has images that are not decoded; the bytes are read when they are asked for."""

    def __init__(self, shards: Shards, row: int) -> None:
        self._shards, self._row = shards, row

    def __getitem__(self, key: str) -> Any:
        return {"path": self._shards.name, "bytes": self._shards.image}[key](self._row)

    def __iter__(self) -> Iterator[str]:
        return iter(("path", "bytes"))

    def __len__(self) -> int:
        return 2


class _Row(Mapping[str, Any]):
    """A row that has not been read yet."""

    def __init__(self, rows: "ShardDataset", row: int) -> None:
        self._rows, self._row = rows, row

    def __getitem__(self, column: str) -> Any:
        if column not in self._rows.column_names:
            raise KeyError(column)
        shards = self._rows.shards
        return _Image(shards, self._row) if column == shards.image_column else shards.value(self._row, column)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows.column_names)

    def __len__(self) -> int:
        return len(self._rows.column_names)


class ShardDataset:
    """What training asks of a `datasets.Dataset`, of shards.

    Args:
        shards: that are open.
        column_names: of the image and, if there are any, the captions or classes.
    """

    def __init__(self, shards: Shards, column_names: Sequence[str]) -> None:
        self.shards, self.column_names = shards, list(column_names)

    def __len__(self) -> int:
        return self.shards.ends[-1] if self.shards.ends else 0

    def __getitem__(self, index: int | list[int] | str) -> Any:
        """A row, columns of some rows, or all values of a column other than the images'."""
        if isinstance(index, str):
            return self.shards.values(index)
        if isinstance(index, list):
            rows = [_Row(self, one) for one in index]
            return {column: [row[column] for row in rows] for column in self.column_names}
        return _Row(self, index)

    @property
    def features(self) -> Mapping[str, Any]:
        """Types of the columns of classes, as `datasets` has them."""
        return self.shards.features

    def select_columns(self, names: Sequence[str]) -> "ShardDataset":
        """The same rows of shards with only these columns."""
        return ShardDataset(self.shards, names)
