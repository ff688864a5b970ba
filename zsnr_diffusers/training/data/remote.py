"""Files on any fsspec file system (disks, HTTP, S3, the Hub, ...): found by pattern, read by range."""

import hashlib
import io
import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import fsspec
from fsspec.asyn import reset_lock
from fsspec.implementations.local import LocalFileSystem

T = TypeVar("T")

RETRY_DELAYS = (1.0, 4.0, 16.0)
"""Seconds before each retry: servers are restarted, and connections lost."""

if hasattr(os, "register_at_fork"):
    # Older versions of fsspec leave it to others: a worker would wait for a thread that only its parent has.
    os.register_at_fork(after_in_child=reset_lock)


class ShardError(OSError):
    """A data file that cannot be read or is invalid; the message names it and the reason."""


def resolve_urls(pattern: str) -> list[str]:
    """URLs of the files that a pattern matches: braces list values, `*`, `?`, `[]` are as in a shell.

    Returns:
        Their addresses, in the order of the braces and sorted within a glob; without a glob they need not exist.

    Raises:
        ShardError: nothing matches, or the place cannot be reached.
    """
    files = [file for one in expand_braces(pattern) for file in _expand_glob(one)]
    if not files:
        raise ShardError(f"{pattern}: no file matches.")
    return files


def expand_braces(pattern: str) -> list[str]:
    """`{08..10}.{x,y}` as 08.x, 08.y, 09.x, ...; numbers keep the width of the first.

    Raises:
        ShardError: braces that do not pair, or stand within each other.
    """
    found = re.fullmatch(r"([^{}]*)\{([^{}]*)\}(.*)", pattern)
    if found is None:
        if re.search(r"[{}]", pattern):
            raise ShardError(f"{pattern}: unmatched or nested braces.")
        return [pattern]
    before, within, after = found.groups()
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", within)
    if numbers:
        values = [f"{n:0{len(numbers[1])}d}" for n in range(int(numbers[1]), int(numbers[2]) + 1)]
    else:
        values = within.split(",")
    return [before + value + rest for value in values for rest in expand_braces(after)]


class FileState(NamedTuple):
    """The state of a file, to detect changes without reading it.

    Attributes:
        size: in bytes.
        sha256: of all that its file system says of it, such as the time of its last change or an ETag.
    """

    size: int
    sha256: str


def file_state(url: str) -> FileState:
    """Size of a remote file, and a hash that changes with the file.

    Raises:
        ShardError: it is not there, or its size is not available.
    """
    facts = _retry(url, lambda system, path: system.info(path), no_retry=(FileNotFoundError,))
    if facts.get("size") is None:
        raise ShardError(f"{url}: its size is not available from there, so it cannot be read by range")
    return FileState(int(facts["size"]), hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest())


def is_local(url: str) -> bool:
    """Whether a file lies on a local or mounted disk."""
    return isinstance(_file_system(url)[0], LocalFileSystem)


def read_range(url: str, start: int, end: int) -> bytes:
    """Read bytes `start` to `end` of a remote file, with a few retries after pauses.

    Raises:
        ShardError: it still fails, or other than the wanted bytes come.
    """

    def read(system: Any, path: str) -> bytes:
        # The Hub's file system would read 5 MiB ahead.
        options = {"cache_type": "none"} if system.protocol == "hf" else {}
        data: bytes = system.cat_file(path, start=start, end=end, **options)
        if len(data) != end - start:
            raise OSError(
                f"the server returned {len(data):,} bytes for the range {start:,} to {end:,}: the file has "
                "become shorter, or the server does not support ranges"
            )
        return data

    return _retry(url, read)


class RangeReader(io.RawIOBase):
    """A remote file as a file object, read by range.

    Args:
        url: of the file.
        size: of it, in bytes.
        window: the least bytes that are read at a time, for what is asked for next.
    """

    def __init__(self, url: str, size: int, window: int = 0) -> None:
        self.url, self.size, self.least, self.at, self.start, self.window = url, size, window, 0, 0, b""

    def seekable(self) -> bool:
        """True."""
        return True

    def readable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Position in the file, in bytes."""
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position in the file without reading; returns it."""
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def read(self, count: int = -1) -> bytes:
        """Read bytes from the buffered window, refilled by range as needed.

        Raises:
            ShardError: as `read_range`.
        """
        end = self.size if count < 0 else min(self.at + count, self.size)
        if end <= self.at:
            return b""
        if not self.start <= self.at < end <= self.start + len(self.window):
            self.start = self.at
            self.window = read_range(self.url, self.at, min(max(end, self.at + self.least), self.size))
        data = self.window[self.at - self.start : end - self.start]
        self.at += len(data)
        return data


def _retry(url: str, work: Callable[[Any, str], T], no_retry: tuple[type[Exception], ...] = ()) -> T:
    """Call `work` with a URL's file system and path, again after pauses while it fails."""
    system, path = _file_system(url)
    for pause in (*RETRY_DELAYS, None):
        try:
            return work(system, path)
        except Exception as error:  # each kind of file system has errors of its own
            if pause is None or isinstance(error, no_retry):
                raise ShardError(f"{url} cannot be read: {_error_reason(error)}") from error
        time.sleep(pause)
    raise AssertionError("unreachable: the last try raises")


def _file_system(url: str) -> tuple[Any, str]:
    """A URL's file system, and the path in it."""
    try:
        # Not kept: fsspec does that itself, and knows which file systems do not survive a fork.
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ShardError(f"{url} cannot be read: {_error_reason(error)}") from error
    return system, path


def _error_reason(error: Exception) -> str:
    """A file system's error in one line."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return " ".join(str(error).split()) or type(error).__name__


def _expand_glob(pattern: str) -> list[str]:
    """URLs that a glob pattern matches, sorted; a pattern without wildcards as it is."""
    if not re.search(r"[*?\[]", pattern):
        return [pattern]

    def glob(system: Any, path: str) -> list[str]:
        found = sorted(system.glob(path))
        return found if isinstance(system, LocalFileSystem) else [system.unstrip_protocol(one) for one in found]

    return _retry(pattern, glob)
