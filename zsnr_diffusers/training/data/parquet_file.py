"""A parquet file on any fsspec file system: its footer and its row groups, both read by range.

The footer lists row groups and the location of their columns. A row group is the smallest unit to read: its columns
are compressed as a whole, so one row costs as much as all of them.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from ...utils.files import atomic_write
from .remote import RangeReader, ShardError, read_range

_MAGIC = b"PAR1"

_TAIL = 2**16
"""Bytes of the end of a file that are read first; most footers lie in them whole."""

_PIECE = 2**25
"""Bytes of a column that are read at a time: enough to use a fast connection, and no row group is held whole."""

_BATCH = 2**24
"""Bytes that are decoded at a time, roughly."""


@dataclass(frozen=True)
class ParquetFooter:
    """The footer of a parquet file.

    Attributes:
        url: of the file.
        size: of it, in bytes.
        data: the last bytes of the file, from the first of the footer on.
    """

    url: str
    size: int
    data: bytes

    @property
    def sha256(self) -> str:
        """SHA-256 of the footer."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def metadata(self) -> Any:
        """Row groups and columns, a `pyarrow.parquet.FileMetaData`.

        Raises:
            ShardError: the footer is damaged.
        """
        try:
            return pyarrow.parquet.read_metadata(pyarrow.BufferReader(_MAGIC + self.data))
        except (pyarrow.ArrowException, OSError) as error:
            raise ShardError(f"{self.url} is not a complete parquet file: {_one_line(error)}") from error

    @cached_property
    def schema(self) -> Any:
        """Names and types of the columns, a `pyarrow.Schema`.

        Raises:
            ShardError: the footer is damaged.
        """
        try:
            return self.metadata.schema.to_arrow_schema()
        except pyarrow.ArrowException as error:
            raise ShardError(f"{self.url} has columns that pyarrow cannot read: {_one_line(error)}") from error

    def save(self, file: Path) -> None:
        """Write the footer atomically, in a folder that is created if necessary.

        Raises:
            OSError: the disk is full or the folder read-only.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file, shared=True) as partial:
            partial.write_bytes(hashlib.sha256(self.data).digest() + self.data)

    @classmethod
    def load(cls, file: Path, url: str, size: int) -> "ParquetFooter | None":
        """Read a saved footer; None if there is none or it is damaged."""
        try:
            content = file.read_bytes()
        except OSError:
            return None
        digest, data = content[:32], content[32:]
        return cls(url, size, data) if hashlib.sha256(data).digest() == digest else None

    def check_unchanged(self) -> None:
        """Refuse a file whose footer has changed.

        Raises:
            ShardError: it is not, or cannot be read.
        """
        end = self.data[-_TAIL:]
        if read_range(self.url, self.size - len(end), self.size) != end:
            raise changed_error(self.url)


def changed_error(url: str) -> ShardError:
    """The error for a parquet file that has changed since the run began."""
    return ShardError(
        f"{url} changed while it was in use. Restore the original file, or start a new run in another --output_dir"
    )


def read_footer(url: str, size: int) -> ParquetFooter:
    """Read the footer of a parquet file.

    Args:
        url: of the file.
        size: of it, in bytes.

    Raises:
        ShardError: it is not parquet, truncated, encrypted, or cannot be read.
    """
    tail = read_range(url, max(0, size - _TAIL), size) if size else b""
    if tail[-4:] == b"PARE":
        raise ShardError(f"{url} is encrypted; decrypt it first")
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if tail[-4:] != _MAGIC or length + len(_MAGIC) > size:
        raise ShardError(
            f"{url} is not a complete parquet file: it does not end with a footer; download or create it again"
        )
    if length > len(tail):
        tail = read_range(url, size - length, size - len(tail)) + tail
    footer = ParquetFooter(url, size, tail[-length:])
    _ = footer.schema  # so that damage shows before the footer is stored
    return footer


class Source(NamedTuple):
    """The source and type of a column.

    Attributes:
        path: of the column, or of the field of a struct, as pyarrow selects it.
        type: without dictionaries, of images and captions with 64-bit offsets.
    """

    path: str
    type: Any


def find_source(footer: ParquetFooter, option: str, column: str) -> Source:
    """The source of a column that an option names: `image_column`, `caption_column` or `class_column`.

    Raises:
        ValueError: the column does not exist, or has an unsupported type.
    """
    schema = footer.schema
    if schema.names.count(column) != 1:
        raise ValueError(
            f"{footer.url} has the columns {', '.join(schema.names)}; --{option}={column!r} is not one of them."
        )
    kind = schema.field(column).type
    find, expected = _KINDS[option]
    source = find(column, kind)
    if source is None:
        raise ValueError(f"{footer.url}: --{option}={column!r} is a column of {kind}; expected {expected}.")
    return source


def _image_source(column: str, kind: Any) -> Source | None:
    """Images, by the bytes of their files."""
    if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        column, kind = f"{column}.bytes", kind.field("bytes").type
    named = str(_value_type(kind)).partition("[")[0]
    known = ("binary", "large_binary", "binary_view", "fixed_size_binary", "null")
    return Source(column, pyarrow.large_binary()) if named in known else None


def _caption_source(column: str, kind: Any) -> Source | None:
    """Captions, or lists of them."""
    if _is_text(kind):
        return Source(column, pyarrow.large_string())
    if str(kind).partition("<")[0] in ("list", "large_list", "fixed_size_list") and _is_text(kind.value_type):
        return Source(column, pyarrow.list_(pyarrow.large_string()))
    return None


def _class_source(column: str, kind: Any) -> Source | None:
    """Classes, words or numbers."""
    value = _value_type(kind)
    return Source(column, value) if _is_text(value) or pyarrow.types.is_integer(value) else None


_KINDS = {
    "image_column": (_image_source, "binary, or a struct of bytes and path as `datasets` writes images"),
    "caption_column": (_caption_source, "string, or list<string>"),
    "class_column": (_class_source, "integers or strings"),
}


def _value_type(kind: Any) -> Any:
    """The type of a column's values where they are encoded by a dictionary, or else its own."""
    return kind.value_type if pyarrow.types.is_dictionary(kind) else kind


def _is_text(kind: Any) -> bool:
    """Whether a column's values are strings, or all null."""
    return str(_value_type(kind)) in ("string", "large_string", "string_view", "null")


def column_chunks(footer: ParquetFooter, number: int, source: Source) -> list[Any]:
    """The footer's metadata of a source's part of a row group, `pyarrow.parquet.ColumnChunkMetaData` each."""
    group = footer.metadata.row_group(number)
    chunks = (group.column(place) for place in range(group.num_columns))
    return [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(f"{source.path}.")]


def read_row_group(footer: ParquetFooter, number: int, sources: Mapping[str, Source]) -> Iterator[Any]:
    """Read some columns of a row group, a piece at a time.

    Args:
        footer: of the file.
        number: of the row group.
        sources: of the columns, by the names that they are given.

    Yields:
        `pyarrow.RecordBatch`es, of at least one row each.

    Raises:
        ShardError: it cannot be read or decoded, or the file changed.
    """
    reader = RangeReader(footer.url, footer.size)
    rows, found = footer.metadata.row_group(number).num_rows, 0
    chunks = chain.from_iterable(column_chunks(footer, number, source) for source in sources.values())
    size = sum(chunk.total_uncompressed_size for chunk in chunks)
    schema = pyarrow.schema({name: source.type for name, source in sources.items()})
    try:
        file = pyarrow.parquet.ParquetFile(
            reader, metadata=footer.metadata, buffer_size=_PIECE, pre_buffer=False, page_checksum_verification=True
        )
        for batch in file.iter_batches(
            batch_size=max(1, rows * _BATCH // max(size, _BATCH)),
            row_groups=[number],
            columns=[source.path for source in sources.values()],
            use_threads=False,  # workers share the cores already
        ):
            found += len(batch)
            columns = [_select(batch, source) for source in sources.values()]
            yield pyarrow.RecordBatch.from_arrays(columns, schema=schema)
    except ShardError as error:
        raise ShardError(f"{error} (in row group {number})") from error
    except (pyarrow.ArrowException, OSError) as error:
        footer.check_unchanged()
        raise ShardError(
            f"row group {number} of {footer.url} cannot be decoded: {_one_line(error)}. If the file is damaged, "
            "download or create it again"
        ) from error
    footer.check_unchanged()
    if found != rows:
        raise ShardError(
            f"row group {number} of {footer.url} has {found} of {rows} rows: download or create the file again"
        )


def _select(batch: Any, source: Source) -> Any:
    """The values of a source in a batch, in its plain type."""
    name, _, field = source.path.rpartition(".") if source.path not in batch.schema.names else (source.path, "", "")
    values = batch.column(name)
    if field:
        values = pyarrow.compute.struct_field(values, field)  # null where the struct is
    if pyarrow.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    return values.cast(source.type)


def _one_line(error: Exception) -> str:
    """pyarrow's error in one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
