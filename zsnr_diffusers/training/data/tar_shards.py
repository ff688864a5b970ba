"""Samples in tar shards, read on demand with random access, for more data than fits on a disk."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import DataConfig
from .notices import notify
from .remote import FileState, file_state, is_local, read_range
from .shards import CaptionError, Shard, Shards
from .tar_index import TarIndex, index_path, read_index

_PART = 2**25
"""Bytes that are copied at a time."""

_NEAR = 2**20
"""Bytes between an image and its caption up to which both are read at once."""


class TarShards(Shards):
    """The tars that a configuration names, each a shard.

    Args:
        config: of the run.
        urls: of the tars.

    Raises:
        ValueError: classes are asked for, which tars do not have.
    """

    progress, unit = ("finding samples", "shard"), "samples"

    def __init__(self, config: DataConfig, urls: Sequence[str]) -> None:
        super().__init__(config, urls)
        if "class_column" in config.columns:
            raise ValueError(
                "--class_column needs --dataset_name, --train_data_dir, or parquet files in --train_shards; tars "
                "have no classes."
            )
        self.caption_column = None if config.captions is None else config.captions.column
        # `text` is what WebDataset calls `txt`; another name can only be that of a field.
        choices = {None: [], "text": ["txt", "json"]}
        self._captions = choices.get(self.caption_column, ["json"])
        self.measure = config.needs_image_sizes
        self._most_indices = 2 * config.shuffle_shards
        self._indices: dict[int, TarIndex] = {}
        self._span: tuple[int, int, bytes] = (-1, 0, b"")

    def open(self) -> None:
        """Find the samples of all tars, so that rows can be read; see `Shards.open`."""
        super().open()
        if self.cache.folder is not None and (reason := self._no_copies_reason()):
            notify(f"rows of --train_shards are read by range, and tars are not cached on this disk: {reason}")
            self.cache.folder = None

    def _no_copies_reason(self) -> str:
        """Why copies of tars on the local disk would not help; empty if they do."""
        sizes = sorted((shard.state.size for shard in self.all if not is_local(shard.url)), reverse=True)
        needed = sum(sizes[: self.window])
        if needed > self.cache.limit:
            return (
                f"--shard_cache_gb={self.limit_gb:g} is less than the {needed / 1e9:.2f} GB that "
                f"--shuffle_shards={self.window} of them need"
            )
        if self.cache.missing_space(sum(sizes)) > 0:
            return f"{self.cache.folder} has too little space for --shard_cache_gb={self.limit_gb:g}"
        return ""

    def image_sizes(self) -> NDArray[np.int32]:
        """Sizes of all images, from the indices of the tars."""
        parts = [self._load_or_build_index(shard.url, shard.state).sizes for shard in self.all]
        return np.concatenate([*parts, np.empty((0, 2), np.int32)])

    def _scan_file(self, url: str) -> Sequence[Shard]:
        """A tar as a shard, with its index saved."""
        state = file_state(url)
        index = self._load_or_build_index(url, state)
        return [Shard(url, state, len(index), tuple(index.incomplete), index.sha256)]

    def _load_or_build_index(self, url: str, state: FileState) -> TarIndex:
        """The index of a tar shard, read from the cache or built and saved there."""
        if self.folder is None:
            return read_index(url, state.size, self._captions, self.measure)
        file = index_path(self.folder, url, state, self._captions, self.measure)
        index = TarIndex.load(file)
        if index is None:
            index = read_index(url, state.size, self._captions, self.measure)
            index.save(file)
        return index

    def _locate_sample(self, row: int) -> tuple[Shard, TarIndex, int]:
        """The shard of a row, that shard's index, and the row's number in it."""
        number, place = self._locate_row(row)
        shard = self.all[number]
        index = self._indices.get(number)
        if index is None:
            self._indices[number] = index = self._load_or_build_index(shard.url, shard.state)
            for old in list(self._indices)[: -self._most_indices]:
                self._indices.pop(old, None)  # another thread may have been here first
        return shard, index, place

    def name(self, row: int) -> str:
        """A row's name for messages, `IMAGE in SHARD`; no data is read."""
        shard, index, number = self._locate_sample(row)
        return f"{index.names[number][0]} in {shard.name}"

    def image(self, row: int) -> bytes:
        """Bytes of the image file of a row of tar shards.

        Raises:
            ShardError: it cannot be read.
        """
        return self._read_member(row, 0)

    def value(self, row: int, column: str) -> Any:
        """The caption of a row of tar shards, a list of captions, or None.

        Raises:
            CaptionError: its member is not text or not JSON.
            ShardError: it cannot be read.
        """
        _, index, number = self._locate_sample(row)
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
        shard, index, number = self._locate_sample(row)
        places = index.places[number].reshape(2, 2)
        start, size = places[which].tolist()
        if (copy := self._copy_of(shard)) is not None:
            data: bytes = copy[start : start + size]
            return data
        span = self._span
        if span[0] != row or not span[1] <= start <= start + size <= span[1] + len(span[2]):
            # Image and caption are adjacent, and most of the time of a request is latency.
            first, last = int(places[:, 0].min()), int(places.sum(axis=1).max())
            if first < 0 or last - first > places[:, 1].sum() + _NEAR:
                first, last = start, start + size
            self._span = span = (row, first, read_range(shard.url, first, last))
        return span[2][start - span[1] : start - span[1] + size]

    def _copy_of(self, shard: Shard) -> Any:
        """The copy of a tar on the local disk; None if there is none yet, or the tar itself is there."""
        if is_local(shard.url):
            return None

        def parts() -> Iterator[bytes]:
            for start in range(0, shard.state.size, _PART):
                yield read_range(shard.url, start, min(start + _PART, shard.state.size))

        key = hashlib.sha256(json.dumps([shard.url, *shard.state]).encode()).hexdigest()[:32]
        return self.cache.get_copy(key, shard.state.size, parts)
