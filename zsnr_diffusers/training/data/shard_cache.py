"""Shards on a local disk, which all processes of a run map into memory.

Reading one sample of a row group means reading all of it; so one process reads it once and stores it decoded as an
Arrow file, which any number of processes map without a copy. A tar is copied unchanged, while its first samples are
still read by range. The least recently used shards are removed first.
"""

import contextlib
import math
import mmap
import os
import queue
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.ipc

from ...utils.files import atomic_write
from .remote import ShardError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LOCK_FILE = ".lock"

_RETRY = 60.0
"""Seconds before a file is copied again that could not be."""

_ABANDONED = 3600.0
"""Seconds without a byte written, after which a partial file is one of a process that was killed."""


class ShardCache:
    """Tables and copies of files by key, as files that processes share; tables may be in the memory of each.

    Args:
        folder: of the files, which may also be used by other runs; None keeps tables in memory.
        limit: bytes that all files may take.
        most_open: files that a process has open, or tables in memory, at a time.
    """

    def __init__(self, folder: Path | None, limit: int, most_open: int) -> None:
        self.folder, self.limit, self.most_open = folder, limit, most_open
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._copier: _Copier | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardCache, (self.folder, self.limit, self.most_open)  # a mapped file would be copied

    def get(self, key: str, size: int, read: Callable[[], Iterable[Any]]) -> Any:
        """The table of a key, read if it is not there.

        Args:
            key: 32 hexadecimal digits.
            size: of the table, in bytes; an estimate.
            read: its record batches.

        Raises:
            ShardError: the disk is full or the folder read-only; and what `read` raises.
        """
        with self._lock:
            table = self._open.pop(key, None)
            return self._keep_open(key, self._load(key, size, read) if table is None else table)

    def get_copy(self, key: str, size: int, read: Callable[[], Iterable[bytes]]) -> Any:
        """The bytes of a file, if a copy is on the disk; else None, and it is copied for later.

        Args:
            key: 32 hexadecimal digits.
            size: of the file, in bytes.
            read: its bytes, in parts.
        """
        if self.folder is None or size > self.limit:
            return None
        with self._lock:
            copy = self._open.pop(key, None)
            copy = map_copy(self.folder / f"{key}.copy", size) if copy is None else copy
            if copy is not None:
                return self._keep_open(key, copy)
            if self._copier is None or self._copier.process != os.getpid():  # no thread survives a fork
                self._copier = _Copier()
            self._copier.submit(key, lambda: self._store_copy(key, size, read))
        return None

    def _keep_open(self, key: str, opened: Any) -> Any:
        """Keep a table or copy open as the most recently used one, which is returned."""
        self._open[key] = opened
        while len(self._open) > self.most_open:
            self._open.popitem(last=False)
        return opened

    def _store_copy(self, key: str, size: int, read: Callable[[], Iterable[bytes]]) -> None:
        """Write the copy of a file, if no other process does so already."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{key}.copy"
        with _hold(self.folder, key, wait=False) as held:
            if held and map_copy(file, size) is None:
                self._make_room(self.folder, size)
                with atomic_write(file, shared=True) as partial, partial.open("xb") as opened:
                    opened.writelines(read())

    def missing_space(self, size: int) -> int:
        """Missing disk space for this number of bytes of row groups, including stored ones."""
        if self.folder is None:
            return 0
        stored = sum(one.size for one in _list_files(self.folder)) if self.folder.exists() else 0
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        return min(size, self.limit) - stored - shutil.disk_usage(there).free

    def _load(self, key: str, size: int, read: Callable[[], Iterable[Any]]) -> Any:
        """The table of a key, mapped from its file, which is written first if necessary."""
        table = None
        if self.folder is not None:
            file = self.folder / f"{key}.arrow"
            table = map_table(file)
            if table is None:
                self._store(file, size, read)
                table = map_table(file)
        return pyarrow.Table.from_batches(read()) if table is None else table  # also where files cannot be mapped

    def _store(self, file: Path, size: int, read: Callable[[], Iterable[Any]]) -> None:
        """Write the file of a table, if no other process does so meanwhile."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with _hold(file.parent, file.stem):
                if map_table(file) is None:
                    self._make_room(file.parent, size)
                    write_table(file, read())
        except ShardError:
            raise
        except OSError as error:
            if map_table(file) is not None:  # without locks; on Windows, a file that is in use cannot be replaced
                return
            raise ShardError(
                f"{file.parent} cannot store a row group: {error}. Free some space there, lower --shard_cache_gb, or "
                "set it to 0 to keep row groups in memory"
            ) from error

    def _make_room(self, folder: Path, size: int) -> None:
        """Remove the least recently used files until this number of bytes fits."""
        files = sorted(_list_files(folder), key=lambda file: file.used)
        excess = sum(file.size for file in files) + size - self.limit
        now = time.time()
        for file in files:
            abandoned = file.partial and file.used < now - _ABANDONED
            if abandoned or (excess > 0 and not file.partial):
                with contextlib.suppress(OSError):  # on Windows, one that is in use stays
                    file.path.unlink(missing_ok=True)
                    excess -= file.size


class _Copier:
    """A thread that copies files one after the other; it ends with its process, even during a copy."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._tried: dict[str, float] = {}
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name="copies shards").start()

    def submit(self, key: str, work: Callable[[], None]) -> None:
        """Have a file copied, unless that was tried a moment ago."""
        now = time.monotonic()
        if now - self._tried.get(key, -math.inf) > _RETRY:
            self._tried[key] = now
            self._work.put(work)

    def _run(self) -> None:
        while True:
            # What cannot be copied is read by range all the same, and that says what is wrong.
            with contextlib.suppress(OSError):
                self._work.get()()


class _File(NamedTuple):
    path: Path
    size: int
    used: float
    """When it was last opened or written to, in seconds since the epoch."""

    @property
    def partial(self) -> bool:
        """Whether it is still being written, or was left by a killed process."""
        return self.path.suffix == ".partial"


def _list_files(folder: Path) -> list[_File]:
    """Files in a folder of row groups, whole and partial ones; some may be gone by now."""
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            files.append(_File(path, status.st_size, status.st_mtime))
    return [file for file in files if file.path.name != _LOCK_FILE]


@contextlib.contextmanager
def _hold(folder: Path, key: str, wait: bool = True) -> Iterator[bool]:
    """Lock a key, so that one process reads the data that all of them wait for.

    The operating system releases the lock when the process ends. Without lock support, each process reads the data
    itself, which is slower but correct.

    Yields: Whether the lock was acquired; always true with `wait`.
    """
    with Path(folder, _LOCK_FILE).open("ab") as file:
        held = True
        try:
            if fcntl is not None:
                kind = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
                fcntl.lockf(file, kind, 1, int(key[:7], 16))  # a byte for each key
        except BlockingIOError:
            held = False
        except OSError:
            pass
        yield held


def map_copy(file: Path, size: int) -> Any:
    """The bytes of a file, mapped into memory; None if it does not exist or has another size."""
    try:
        with file.open("rb") as opened:
            copy = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # an empty one cannot be mapped
        return None
    if len(copy) != size:
        return None
    with contextlib.suppress(OSError):  # a folder that others write
        os.utime(file)
    return copy


def map_table(file: Path) -> Any:
    """The `pyarrow.Table` in an Arrow file, mapped into memory; None if there is none or it is damaged."""
    try:
        table = pyarrow.ipc.open_file(pyarrow.memory_map(str(file))).read_all()
    except (pyarrow.ArrowException, OSError):
        return None
    with contextlib.suppress(OSError):  # a folder that others write
        os.utime(file)
    return table


def write_table(file: Path, batches: Iterable[Any]) -> None:
    """Write record batches, of which there is at least one, to an Arrow file atomically, one at a time.

    Raises:
        OSError: the disk is full or the folder read-only.
    """
    batches = iter(batches)
    first = next(batches)
    with (
        atomic_write(file, shared=True) as partial,
        pyarrow.OSFile(str(partial), "wb") as sink,
        pyarrow.ipc.new_file(sink, first.schema) as writer,
    ):
        for batch in chain([first], batches):
            writer.write_batch(batch)
