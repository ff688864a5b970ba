"""metadata.jsonl, metadata.csv and metadata.parquet, in the layout of `datasets`' imagefolder.

Not read with `datasets`, whose errors name neither the file nor the line.
"""

import csv
import json
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

_PATH = "file_name"
_WHOLE = re.compile(r"-?[0-9]+")
_SHORT = 60
"""Characters of a wrong value that an error shows."""


class MetadataError(ValueError):
    """A metadata file that cannot be read; the message names the file, the line and the error."""


@dataclass(frozen=True)
class Record:
    """A row of a metadata file: its values by column, and the line that it begins in, or its number in Parquet."""

    file: Path
    number: int
    values: Mapping[str, Any]

    @property
    def location(self) -> str:
        """File and line or row number of the record."""
        return f"{self.file}, {'row' if self.file.suffix == '.parquet' else 'line'} {self.number}"

    def error(self, what: str) -> MetadataError:
        """A `MetadataError` that names the record's file and line."""
        return MetadataError(f"{self.location}: {what}")


def read_metadata(file: Path) -> list[Record]:
    """Read the rows of a metadata file as records; CSV values are text.

    Raises:
        MetadataError: it is damaged, or holds no rows.
        OSError: it cannot be opened.
    """
    records = [Record(file, number, values) for number, values in _READERS[file.suffix](file)]
    if not records:
        raise MetadataError(f"{file} has no rows: write one for each image, with its {_PATH}.")
    return records


def find_path_column(records: Sequence[Record], image_column: str) -> str:
    """The column of a metadata file that holds the images' paths.

    `file_name` is the column `image`, and `x_file_name` the column `x`, as in `datasets`; a column of the images' own
    name may hold their paths, too.

    Raises:
        MetadataError: there is none.
    """
    columns = column_names(records)
    for name in (*([_PATH] if image_column == "image" else []), f"{image_column}_{_PATH}", image_column):
        if name in columns:
            return name
    place = f"{records[0].file}, line 1" if records[0].file.suffix == ".csv" else records[0].location
    raise MetadataError(
        f"{place}: {_PATH} (the path of the image) is missing; the columns are {', '.join(columns)}. Paths in a "
        "column x_file_name, or x, need --image_column x."
    )


def column_names(records: Sequence[Record]) -> list[str]:
    """All columns of a metadata file, in order of appearance."""
    return list(dict.fromkeys(name for record in records for name in record.values))


def relative_path(record: Record, column: str) -> str:
    """Path of a record's image, relative to its metadata file's folder.

    Raises:
        MetadataError: it is missing, no text, or is outside of the folder.
    """
    value = record.values.get(column)
    if not isinstance(value, str) or not value.strip():
        found = "missing" if column not in record.values else f"{_short_repr(value)}"
        raise record.error(f"{column} is {found}; expected the path of an image, relative to the folder of this file.")
    path = posixpath.normpath(value.replace("\\", "/"))
    if posixpath.isabs(path) or "://" in value or path.split("/")[0] == "..":
        raise record.error(f"{column} is {_short_repr(value)}, which is not below the folder of this file.")
    return path


def caption_values(records: Sequence[Record], column: str) -> list[Any]:
    """Captions in a metadata column, each None, text or a list of texts; all lists if any is.

    Raises:
        MetadataError: one is something else.
    """
    values = [record.values.get(column) for record in records]
    for record, value in zip(records, values, strict=True):
        if not all(isinstance(one, str) for one in _as_list(value)):
            raise record.error(f"{column} is {_short_repr(value)}; a caption is text, or a list of texts.")
    return unify_captions(values)


def _as_list(caption: Any) -> list[Any]:
    """A caption, list of captions or None as a list."""
    return caption if isinstance(caption, list) else [] if caption is None else [caption]


def unify_captions(captions: Sequence[Any]) -> list[Any]:
    """Captions unchanged, or all as lists if any is one, since a column has one type."""
    if any(isinstance(caption, list) for caption in captions):
        return [[caption] if isinstance(caption, str) else caption for caption in captions]
    return list(captions)


def class_values(records: Sequence[Record], column: str) -> list[Any]:
    """Classes in a metadata column, numbers or words, all of one type; digits in CSV become int.

    Raises:
        MetadataError: they are of several types.
    """
    values = [record.values.get(column) for record in records]
    if all(record.file.suffix == ".csv" for record in records):
        values = [value or None for value in values]
        if all(value is None or _WHOLE.fullmatch(value) for value in values):
            return [None if value is None else int(value) for value in values]
    first = next((place for place, value in enumerate(values) if value is not None), 0)
    for record, value in zip(records, values, strict=True):
        if value is not None and type(value) is not type(values[first]):
            raise record.error(
                f"{column} is {_short_repr(value)}, and {_short_repr(values[first])} at {records[first].location}; a "
                "column holds numbers or words."
            )
    return values


def _short_repr(value: Any) -> str:
    """A value's repr for error texts, cut to a few characters."""
    text = repr(value)
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}..."


def _read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of a UTF-8 metadata file's lines."""
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise MetadataError(f"{file}, line {number}: not UTF-8: {error.reason}; save it as UTF-8.") from error


def _read_jsonl(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line, values) of the objects in metadata.jsonl."""
    expected = 'each line is an object, {"file_name": "0001.png", "text": "a caption"}.'
    for number, line in _read_lines(file):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise MetadataError(f"{file}, line {number} is not JSON: {reason}; {expected}") from error
        if not isinstance(values, dict):
            raise MetadataError(f"{file}, line {number} is {_short_repr(values)}; {expected}")
        if "\\ud" in line.lower():
            _check_surrogates(file, number, values)
        yield number, values


def _check_surrogates(file: Path, number: int, values: Any) -> None:
    """Refuse a line of metadata.jsonl whose escapes leave half a character."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise MetadataError(
            f"{file}, line {number} has an incomplete surrogate pair, {error.object[error.start]!r}."
        ) from error


def _read_csv(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line, values) of the rows in metadata.csv."""
    reader = csv.reader((line for _, line in _read_lines(file)), strict=True)
    header, start = None, 1
    try:
        for fields in reader:
            if header is None:
                header = fields
                if len(set(header)) < len(header):
                    raise MetadataError(f"{file}, line 1 has a duplicate column: {', '.join(header)}.")
            elif fields and len(fields) != len(header):
                raise MetadataError(
                    f"{file}, line {start} has {len(fields)} fields, but the header has {len(header)} "
                    f"({', '.join(header)}): put text with commas into double quotes."
                )
            elif fields:
                yield start, dict(zip(header, fields, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        raise MetadataError(f"{file}, line {start} is not CSV: {error}.") from error


def _read_parquet(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(row number, values) of the rows in metadata.parquet."""
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            rows = opened.read().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise MetadataError(f"{file} is not a complete Parquet file: {error}") from error
    yield from enumerate(rows, 1)


_READERS: Mapping[str, Callable[[Path], Iterator[tuple[int, Mapping[str, Any]]]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
