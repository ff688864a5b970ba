"""An index of facts about files that have not changed since they were read: a table on disk, by path, size and mtime.

Decoding and hashing a million images takes an hour, listing their sizes and times takes a minute. Results are stored,
and only new or changed files are read again. The index uses arrays, with 64 bytes per file for any path length.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...utils.files import atomic_write

FILE_NAME = "files.npy"
"""Of the table, in a folder of caches."""

RECORD = np.dtype(
    [
        *(("key", "<u8"), ("size", "<i8"), ("mtime", "<i8")),
        # Zeros where they are not known.
        *(("height", "<i4"), ("width", "<i4"), ("sha256", "u1", 32)),
    ]
)
"""A file: a hash of its path, its size and modification time in nanoseconds, and the facts about it."""

Records = NDArray[Any]
"""Of dtype `RECORD`, shape [n]."""

_STATE = ("key", "size", "mtime")
_FACTS = (("height", "width"), ("sha256",))
_MISSING = -1
"""The size of what is not there."""

_THREADS = 16
"""That ask for sizes and times, for the sake of network file systems."""

_CHUNK = 1000


class FileIndex:
    """An index of files, in memory and on disk.

    Args:
        file: of the table, which other runs may also write to; None for memory only.
        read_only: whether not to write to it.
        rehash: whether to ignore and replace known facts.
    """

    def __init__(self, file: Path | None = None, *, read_only: bool = False, rehash: bool = False) -> None:
        self.file, self.read_only, self.rehash = file, read_only, rehash
        self._fresh: Records = np.empty(0, RECORD)
        """What was read by this object, which holds even if all is to be read again."""

    def fill(self, records: Records) -> Records:
        """Fill in known facts about files whose size and modification time have not changed."""
        for known in (self._fresh,) if self.rehash else (self._read(), self._fresh):
            _fill_from(records, known)
        return records

    def store(self, records: Records) -> None:
        """Store facts about files, for this process and, if possible, on disk.

        If writing fails, files are read again at the next start; this is not an error.
        """
        records = records[records["size"] != _MISSING]
        self._fresh = _merge(self._fresh, records)
        if self.file is None or self.read_only:
            return
        merged = _merge(self._read(), records)
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.file, shared=True) as partial, partial.open("xb") as opened:
                np.save(opened, merged, allow_pickle=False)
        except OSError:
            return

    def _read(self) -> Records:
        """The table on disk; empty if there is none, or it is damaged or of another format."""
        try:
            if self.file is not None:
                table: Records = np.load(self.file, allow_pickle=False)
                if table.dtype == RECORD and table.ndim == 1:
                    return table
        except (OSError, ValueError, EOFError):
            pass
        return np.empty(0, RECORD)


def file_records(paths: Sequence[str]) -> Records:
    """New records for files, with only their current sizes and modification times.

    Args:
        paths: of files, absolute.
    """
    records = np.zeros(len(paths), RECORD)

    def describe(first: int) -> None:
        for place in range(first, min(first + _CHUNK, len(paths))):
            try:
                status = os.stat(paths[place])
                size, mtime = status.st_size, status.st_mtime_ns
            except (OSError, ValueError):
                size, mtime = _MISSING, 0
            records[place] = (_hash_key(paths[place]), size, mtime, 0, 0, 0)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(describe, range(0, len(paths), _CHUNK)))
    return records


def row_records(fingerprint: str, rows: NDArray[np.int64]) -> Records:
    """Records of images that lie in the rows of a dataset, which changes its fingerprint if it changes.

    Args:
        fingerprint: of the dataset.
        rows: numbers of the rows.
    """
    records = np.zeros(len(rows), RECORD)
    start = _hash_key(fingerprint)
    with np.errstate(over="ignore"):
        # Rows must not share a key with those of others: an odd factor permutes the 64-bit numbers.
        records["key"] = (rows.astype(np.uint64) + np.uint64(start)) * np.uint64(0x9E3779B97F4A7C15)
    return records


def is_known(records: Records, what: str) -> NDArray[np.bool_]:
    """Whether records have `height` (and width) or `sha256`, bool [n]."""
    found = records[what] != 0
    return found.any(axis=1) if found.ndim > 1 else found


def _hash_key(text: str) -> int:
    """64 bits of a text's hash."""
    data = text.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _fill_from(records: Records, known: Records) -> None:
    """Complete records with the known facts about the same, unchanged files."""
    if not len(known):
        return
    places = np.searchsorted(known["key"], records["key"])
    places[places == len(known)] = 0
    found = known[places]
    same = np.logical_and.reduce([found[field] == records[field] for field in _STATE])
    for fields in _FACTS:
        take = same & is_known(found, fields[0]) & ~is_known(records, fields[0])
        for field in fields:
            records[field][take] = found[field][take]


def _merge(known: Records, new: Records) -> Records:
    """Merge records, sorted by key; new ones replace known ones, but keep their facts that are still valid."""
    new = new.copy()
    _fill_from(new, known)
    both = np.concatenate([new, known])
    _, first = np.unique(both["key"], return_index=True)  # the first of several: the new one
    return both[first]
