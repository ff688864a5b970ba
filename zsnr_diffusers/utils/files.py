"""Atomic and durable file operations."""

import contextlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def fsync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk."""
    if os.name == "nt":  # cannot open folders, and syncs only files open for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Write a file atomically: its path always has the complete new or the complete old content.

    Args:
        path: of the file.
        shared: whether several processes may write it at once, each with its own partial file.

    Yields:
        The path of a partial file in the same folder, to write to.
    """
    partial = path.with_name(f".{uuid.uuid4().hex if shared else path.name}.partial")
    try:
        yield partial
        fsync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync(path.parent)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Write a folder, or a file whose writer depends on its name, atomically; parent folders are created.

    Yields:
        A path with the same name, in a temporary folder next to it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as room:
        new = Path(room, path.name)
        yield new
        if path.is_dir():
            path.rename(Path(room, "old"))
        new.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file with `atomic_write`."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file with `atomic_write`; NaN is refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def atomic_rmtree(folder: Path, name: str) -> None:
    """Remove a folder, if it exists, after renaming it, so that its path never has incomplete content.

    Args:
        folder: to remove.
        name: temporary name in the same parent folder.
    """
    doomed = folder.with_name(name)
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        folder.rename(doomed)
        shutil.rmtree(doomed)
