"""Rows that lie in tar shards, each read when it is asked for: more data than any disk holds, at random access."""

import json
from collections.abc import Sequence
from typing import Any

from ..config import DataConfig
from .remote import FileState, file_state, read_range
from .shards import CaptionError, Shard, Shards
from .tar_index import TarIndex, index_path, read_index

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
                "--class_column needs --dataset_name, --train_data_dir, or parquet files in --train_shards; tars have "
                "no classes."
            )
        self.caption_column = None if config.captions is None else config.captions.column
        # `text` is what WebDataset calls `txt`; another name can only be that of a field.
        choices = {None: [], "text": ["txt", "json"]}
        self._captions = choices.get(self.caption_column, ["json"])
        self._most_indices = 2 * config.shuffle_shards
        self._indices: dict[int, TarIndex] = {}
        self._span: tuple[int, int, bytes] = (-1, 0, b"")

    def _scan_file(self, url: str) -> Sequence[Shard]:
        """The one shard that a tar is, with its index saved."""
        state = file_state(url)
        index = self._load_or_build_index(url, state)
        return [Shard(url, state, len(index), tuple(index.incomplete), index.sha256)]

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
            CaptionError: the member that it is in is no text or no JSON.
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
        span = self._span
        if span[0] != row or not span[1] <= start <= start + size <= span[1] + len(span[2]):
            # Image and caption lie side by side, and what a server takes most of the time for is to begin.
            first, last = int(places[:, 0].min()), int(places.sum(axis=1).max())
            if first < 0 or last - first > places[:, 1].sum() + _NEAR:
                first, last = start, start + size
            self._span = span = (row, first, read_range(shard.url, first, last))
        return span[2][start - span[1] : start - span[1] + size]
