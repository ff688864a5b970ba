"""Samples in parquet files: each row group is a shard, which is read completely and cached on a local disk."""

import contextlib
import hashlib
import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import datasets
import numpy as np
import pyarrow
from numpy.typing import NDArray
from tqdm.auto import tqdm

from ...utils.distributed import is_main_process
from ...utils.files import atomic_write
from ...utils.images import ImageError
from ..config import DataConfig
from .notices import notify
from .parquet_file import (
    ParquetFooter,
    Source,
    changed_error,
    column_chunks,
    find_source,
    read_footer,
    read_row_group,
)
from .remote import FileState, file_state
from .shard_cache import map_table, write_table
from .shards import THREADS, Shard, Shards, size_or_zero

_FORMAT = 1
"""Raised whenever what is stored of the same row group would be another than before."""

_WHOLE_GROUPS = 4
"""Row groups that are in memory at a time where only sizes of images are asked for."""

_OPTIONS = ("image_column", "caption_column", "class_column")


@dataclass(frozen=True)
class RowGroup(Shard):
    """A row group of a parquet file.

    Attributes:
        number: of it in its file.
        size: of its columns in memory, in bytes; about what is stored of it.
        without_caption: its rows, as far as the footer counts them.
        footer: SHA-256 of the file's.
        key: that what is stored of it goes by.
    """

    number: int
    size: int
    without_caption: int
    footer: str
    key: str


class ParquetShards(Shards):
    """The row groups of the parquet files that a configuration names.

    Args:
        config: of the run.
        urls: of the files.
    """

    all: Sequence[RowGroup]
    progress, unit = ("reading footers", "file"), "row groups"

    def __init__(self, config: DataConfig, urls: Sequence[str]) -> None:
        super().__init__(config, urls)
        self.columns = {option: config.columns[option] for option in _OPTIONS if option in config.columns}
        self._footers: dict[str, ParquetFooter] = {}

    def open(self) -> None:
        """Read the footers of all files, so that rows can be read; see `Shards.open`."""
        super().open()
        self._check_cache_size()
        if count := sum(group.without_caption for group in self.all):
            column = self.columns["caption_column"]
            notify(f"rows of --train_shards without {column}, which get the empty caption: {count}")

    def _scan_file(self, url: str) -> Sequence[Shard]:
        """The row groups of a file that have rows, with its footer saved."""
        state = file_state(url)
        footer = self._load_or_read_footer(url, state)
        sources = self._sources(footer)
        if "class_column" in self.columns:
            self._check_classes(footer, sources["class_column"])
        numbers = range(footer.metadata.num_row_groups)
        return [
            _describe_row_group(footer, state, number, sources)
            for number in numbers
            if footer.metadata.row_group(number).num_rows
        ]

    def _load_or_read_footer(self, url: str, state: FileState) -> ParquetFooter:
        """The footer of a file, read from the index folder, or by range and saved there or kept."""
        if self.folder is None:
            if url not in self._footers:
                self._footers[url] = read_footer(url, state.size)
            return self._footers[url]
        file = self.folder / f"{_hash_facts('footer', url, state)}.footer"
        footer = ParquetFooter.load(file, url, state.size)
        if footer is None:
            footer = read_footer(url, state.size)
            footer.save(file)
        return footer

    def _sources(self, footer: ParquetFooter) -> dict[str, Source]:
        """Where the columns that are read lie in a file, by option."""
        return {option: find_source(footer, option, column) for option, column in self.columns.items()}

    def _check_classes(self, footer: ParquetFooter, source: Source) -> None:
        """Note the type of the classes, and refuse a file in which it is another."""
        field = pyarrow.field(self.columns["class_column"], source.type)
        found = datasets.Features.from_arrow_schema(pyarrow.schema([field], footer.schema.metadata))
        known = self.features.setdefault(field.name, found[field.name])
        if known != found[field.name]:
            raise ValueError(
                f"{footer.url}: --class_column={field.name!r} is {found[field.name]}, in another file {known}; the "
                "classes of all files must have the same type."
            )

    def _check_cache_size(self) -> None:
        """Refuse a cache on disk that cannot hold what is shuffled together, or that the disk has no room for."""
        if self.cache.folder is None or not self.all:
            return
        largest = max(self.all, key=lambda group: group.size)
        needed = sum(sorted((group.size for group in self.all), reverse=True)[: self.window])
        if needed > self.cache.limit:
            raise ValueError(
                f"--shard_cache_gb={self.limit_gb:g} is less than the {_gb(needed):g} GB that "
                f"--shuffle_shards={self.window} row groups need: each would be read again for every few samples. "
                "Increase it, lower --shuffle_shards, or create files with smaller row groups; the largest, row "
                f"group {largest.number} of {largest.name}, takes {_gb(largest.size):g} GB."
            )
        missing = self.cache.missing_space(sum(group.size for group in self.all))
        if missing > 0:
            raise ValueError(
                f"--shard_cache_gb={self.limit_gb:g}: {self.cache.folder} has {_gb(missing):g} GB too little space "
                f"for the row groups of --train_shards. Lower it, but to at least {_gb(needed):g}, or use a "
                "--cache_dir on another disk."
            )

    def rows_to_sample(self, draw: random.Random) -> Sequence[int]:
        """The rows of as many random row groups as are shuffled together."""
        numbers = draw.sample(range(len(self.all)), min(self.window, len(self.all)))
        return [row for one in numbers for row in range(self.ends[one] - self.all[one].rows, self.ends[one])]

    def name(self, row: int) -> str:
        """A row's name for messages, `row R of row group G in FILE`; no data is read."""
        number, place = self._locate_row(row)
        return f"row {place} of row group {self.all[number].number} in {self.all[number].name}"

    def image(self, row: int) -> bytes:
        """Bytes of the image file of a row, from its row group.

        Raises:
            ImageError: the row has none, perhaps the path of one.
            ShardError: the row group cannot be read.
        """
        image: bytes | None = self._read(row, "image_column")
        if image is None:
            raise ImageError(f"cannot read image {self.name(row)}: it is null, or a path without bytes")
        return image

    def value(self, row: int, column: str) -> Any:
        """The caption of a row, a list of captions, or its class, from its row group; None where it is null.

        Raises:
            ShardError: the row group cannot be read.
        """
        option = next(option for option, name in self.columns.items() if name == column)
        value = self._read(row, option)
        return [one for one in value if one is not None] if isinstance(value, list) else value

    def values(self, column: str) -> list[Any]:
        """The values of all rows in a column, of which no other column is read; stored in the index folder.

        Raises:
            ShardError: a row group cannot be read.
        """
        option = next(option for option, name in self.columns.items() if name == column)
        if self.folder is None or not self.all:
            return [value for batch in self._read_column(option) for value in batch.column(option).to_pylist()]
        file = self.folder / f"{_hash_facts('values', option, [group.key for group in self.all])}.arrow"
        if (table := map_table(file)) is None:
            table = pyarrow.Table.from_batches(self._read_column(option))
            write_table(file, table.to_batches())
        values: list[Any] = table.column(option).to_pylist()
        return values

    def image_sizes(self) -> NDArray[np.int32]:
        """Sizes of all images, from their headers; for that all row groups are read once, and their sizes stored."""
        file = self.folder and self.folder / f"{_hash_facts('sizes', [group.key for group in self.all])}.npy"
        with contextlib.suppress(OSError, ValueError, EOFError):
            if file is not None:
                stored: NDArray[np.int32] = np.load(file, allow_pickle=False)
                return stored

        def sizes(group: RowGroup) -> list[tuple[int, int]]:
            footer = self._footer_of(group)
            source = {"image_column": self._sources(footer)["image_column"]}
            batches = read_row_group(footer, group.number, source)
            return [size_or_zero(value) for batch in batches for value in batch.column("image_column").to_pylist()]

        with ThreadPoolExecutor(_WHOLE_GROUPS) as pool:
            found = tqdm(pool.map(sizes, self.all), "reading sizes", len(self.all), disable=not is_main_process())
            read = np.array([*chain.from_iterable(found)], np.int32).reshape(-1, 2)
        if file is not None:
            with atomic_write(file, shared=True) as partial, partial.open("xb") as opened:
                np.save(opened, read)
        return read

    def _read_column(self, option: str) -> Iterable[Any]:
        """Record batches of one column of all row groups."""

        def batches(group: RowGroup) -> list[Any]:
            footer = self._footer_of(group)
            return list(read_row_group(footer, group.number, {option: self._sources(footer)[option]}))

        with ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(batches, self.all)
            hidden = not is_main_process()
            yield from chain.from_iterable(tqdm(found, f"reading {option}", len(self.all), disable=hidden))

    def _read(self, row: int, option: str) -> Any:
        """The value of a row in the column that an option names."""
        number, place = self._locate_row(row)
        group = self.all[number]

        def batches() -> Iterable[Any]:
            footer = self._footer_of(group)
            return read_row_group(footer, group.number, self._sources(footer))

        return self.cache.get(group.key, group.size, batches).column(option)[place].as_py()

    def _footer_of(self, group: RowGroup) -> ParquetFooter:
        """The footer of a row group's file, which must be the one that it was found by."""
        footer = self._load_or_read_footer(group.url, group.state)
        if footer.sha256 != group.footer:
            raise changed_error(group.url)
        return footer


def _describe_row_group(
    footer: ParquetFooter, state: FileState, number: int, sources: Mapping[str, Source]
) -> RowGroup:
    """Facts about a row group from its file's footer."""
    rows = footer.metadata.row_group(number).num_rows
    chunks = {option: column_chunks(footer, number, source) for option, source in sources.items()}
    facts = [
        (chunk.path_in_schema, chunk.data_page_offset, chunk.total_compressed_size, chunk.total_uncompressed_size)
        for found in chunks.values()
        for chunk in found
    ]
    missing = _null_count(chunks["image_column"])
    captions = chunks.get("caption_column", [])
    flat = bool(captions) and captions[0].path_in_schema == sources["caption_column"].path  # else nulls are in lists
    columns = {option: (source.path, str(source.type)) for option, source in sources.items()}
    return RowGroup(
        url=footer.url,
        state=state,
        rows=rows,
        incomplete=(f"row group {number} ({missing} of {rows} rows have no image)",) if missing else (),
        sha256=_hash_facts(rows, facts),
        number=number,
        size=sum(size for _, _, _, size in facts) + 8 * rows * len(sources),  # where each value begins
        without_caption=_null_count(captions) if flat else 0,
        footer=footer.sha256,
        key=_hash_facts("row group", footer.url, footer.size, footer.sha256, number, columns),
    )


def _null_count(chunks: Sequence[Any]) -> int:
    """Nulls in parts of columns, as far as the footer counts them."""
    statistics = [chunk.statistics for chunk in chunks if chunk.is_stats_set]
    return sum(one.null_count for one in statistics if one.has_null_count)


def _gb(size: int) -> float:
    """Bytes in GB, rounded up so that as many are enough."""
    return math.ceil(size / 1e7) / 100


def _hash_facts(*facts: Any) -> str:
    """32 hexadecimal digits of facts that JSON can express."""
    return hashlib.sha256(json.dumps([_FORMAT, *facts]).encode()).hexdigest()[:32]
