"""Rows that lie in tar shards, each read when it is asked for: more data than any disk holds, at random access."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from tqdm.auto import tqdm

from ...utils.distributed import Processes, is_main_process
from ...utils.images import ImageError
from ..config import DataConfig
from .remote import FileState, file_state, read_range, resolve_urls
from .tar_index import TarIndex, index_path, read_index

_THREADS = 32
"""That find samples in shards at a time; they mostly wait for a server."""

_NEAR = 2**20
"""Bytes between an image and its caption up to which both are read at once."""


class CaptionError(ImageError):
    """A caption that cannot be read; the image beside it is as useless as one that cannot."""


@dataclass(frozen=True)
class Shard:
    """A tar of samples.

    Attributes:
        url: anything that fsspec opens.
        state: its size, and what tells whether it has changed.
        rows: samples that are whole.
        incomplete: others, in words.
        sha256: of its index.
    """

    url: str
    state: FileState
    rows: int
    incomplete: tuple[str, ...]
    sha256: str

    @property
    def name(self) -> str:
        """File name of the shard."""
        return self.url.rpartition("/")[2]


class TarShards:
    """The shards that a configuration names; what a row is made of is found by its number alone.

    Args:
        config: of the run.

    Raises:
        ShardError: a shard is missing, cut off, or cannot be read.
        OSError: an index cannot be stored.
    """

    def __init__(self, config: DataConfig) -> None:
        self.caption_column = None if config.captions is None else config.captions.column
        # `text` is what WebDataset calls `txt`; another name can only be that of a field.
        choices = {None: [], "text": ["txt", "json"]}
        self._captions = choices.get(self.caption_column, ["json"])
        self.folder = config.shard_index_folder
        self._most_indices = 2 * config.shuffle_shards
        self._indices: dict[int, TarIndex] = {}
        self._span: tuple[int, int, bytes] = (-1, 0, b"")
        self.urls = resolve_urls(str(config.train_shards))
        self.all: list[Shard] = []
        self.ends: list[int] = []

    @property
    def incomplete(self) -> list[str]:
        """Names of samples without image or caption, with what they lack."""
        return [f"{text} in {shard.name}" for shard in self.all for text in shard.incomplete]

    @property
    def sha256(self) -> str:
        """SHA-256 of the shards' names, sizes and indices; no image is read."""
        facts = [(shard.name, shard.state.size, shard.sha256) for shard in self.all]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def scan(self, urls: Sequence[str]) -> list[Shard]:
        """Count the samples of tar shards, and save their indices where they are not saved yet."""

        def shard(url: str) -> Shard:
            state = file_state(url)
            index = self._load_or_build_index(url, state)
            return Shard(url, state, len(index), tuple(index.incomplete), index.sha256)

        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(shard, urls)
            return list(tqdm(found, "finding samples", len(urls), disable=not is_main_process(), unit="shard"))

    def open(self) -> "TarShards":
        """Scan all shards, so that rows can be read; returns itself."""
        self.all = self.scan(self.urls)
        self.ends = list(accumulate(shard.rows for shard in self.all))
        return self

    def _load_or_build_index(self, url: str, state: FileState) -> TarIndex:
        """The index of a tar shard, read from the cache or built and saved there."""
        if self.folder is None:
            return read_index(url, state.size, self._captions)
        file = index_path(self.folder, url, state, self._captions)
        index = TarIndex.load(file)
        if index is None:
            index = read_index(url, state.size, self._captions)
            index.save(file)
        return index

    def _locate_row(self, row: int) -> tuple[Shard, TarIndex, int]:
        """The shard of a row, that shard's index, and the row's number in it."""
        number = bisect_right(self.ends, row)
        shard = self.all[number]
        index = self._indices.get(number)
        if index is None:
            self._indices[number] = index = self._load_or_build_index(shard.url, shard.state)
            for old in list(self._indices)[: -self._most_indices]:
                self._indices.pop(old, None)  # another thread may have been here first
        return shard, index, row - (self.ends[number] - shard.rows)

    def name(self, row: int) -> str:
        """A row's name for messages, `IMAGE in SHARD`; no data is read."""
        shard, index, number = self._locate_row(row)
        return f"{index.names[number][0]} in {shard.name}"

    def image(self, row: int) -> bytes:
        """Bytes of the image file of a row of tar shards.

        Raises:
            ShardError: it cannot be read.
        """
        return self._read_member(row, 0)

    def caption(self, row: int) -> Any:
        """The caption of a row of tar shards, a list of captions, or None.

        Raises:
            CaptionError: the member that it is in is no text or no JSON.
            ShardError: it cannot be read.
        """
        _, index, number = self._locate_row(row)
        content = self._read_member(row, 1)
        try:
            text = content.decode("utf-8-sig")
            return json.loads(text)[self.caption_column] if index.names[number][1].endswith("json") else text.strip()
        except KeyError:
            return None
        except (ValueError, TypeError) as error:
            raise CaptionError(f"cannot read the caption of {self.name(row)}: {error}") from error

    def _read_member(self, row: int, which: int) -> bytes:
        """Bytes of a row's image (`which` 0) or caption (1); both are read at once if they lie side by side."""
        shard, index, number = self._locate_row(row)
        places = index.places[number].reshape(2, 2)
        start, size = places[which].tolist()
        span = self._span
        if span[0] != row or not span[1] <= start <= start + size <= span[1] + len(span[2]):
            # Image and caption lie side by side, and what a server takes most of the time for is to begin.
            first, last = int(places[:, 0].min()), int(places.sum(axis=1).max())
            if first < 0 or last - first > places[:, 1].sum() + _NEAR:
                first, last = start, start + size
            self._span = span = (row, first, read_range(shard.url, first, last))
        return span[2][start - span[1] : start - span[1] + size]


class _Image(Mapping[str, Any]):
    """As `datasets` has images that are not decoded; the bytes are read when they are asked for."""

    def __init__(self, shards: TarShards, row: int) -> None:
        self._shards, self._row = shards, row

    def __getitem__(self, key: str) -> Any:
        return {"path": self._shards.name, "bytes": self._shards.image}[key](self._row)

    def __iter__(self) -> Iterator[str]:
        return iter(("path", "bytes"))

    def __len__(self) -> int:
        return 2


class _Row(Mapping[str, Any]):
    """A row, of which nothing has been read yet."""

    def __init__(self, rows: "TarDataset", row: int) -> None:
        self._rows, self._row = rows, row

    def __getitem__(self, column: str) -> Any:
        if column not in self._rows.column_names:
            raise KeyError(column)
        shards = self._rows.shards
        return shards.caption(self._row) if column == shards.caption_column else _Image(shards, self._row)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows.column_names)

    def __len__(self) -> int:
        return len(self._rows.column_names)


class TarDataset:
    """What training asks of a `datasets.Dataset`, of shards.

    Args:
        shards: that are open.
        column_names: of the image and, if there are any, the captions.
    """

    def __init__(self, shards: TarShards, column_names: Sequence[str]) -> None:
        self.shards, self.column_names = shards, list(column_names)

    def __len__(self) -> int:
        return self.shards.ends[-1] if self.shards.ends else 0

    def __getitem__(self, index: int | list[int]) -> Mapping[str, Any]:
        if isinstance(index, list):
            rows = [_Row(self, one) for one in index]
            return {column: [row[column] for row in rows] for column in self.column_names}
        return _Row(self, index)

    def select_columns(self, names: Sequence[str]) -> "TarDataset":
        """The same rows of tar shards with only these columns."""
        return TarDataset(self.shards, names)


def index_shards(config: DataConfig, processes: Processes) -> None:
    """Build and save the indices of all tar shards, each process for a share of them.

    Raises:
        ShardError, OSError: as `TarShards`.
        ProcessError: another process failed.
    """
    if not config.train_shards:
        return
    with processes.sync_errors():
        shards = TarShards(config)
        if shards.folder is not None:
            shards.scan(processes.split(shards.urls))
