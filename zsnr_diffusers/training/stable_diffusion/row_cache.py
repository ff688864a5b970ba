"""Results of frozen networks, stored on disk and read by row.

A cache is a folder of shards: safetensors files with some rows, as `keys` [n, 32], checksums `crc32` [n] and tensors
[n, ...], with a description in the metadata. A key hashes everything that its row depends on, so changed inputs are
not found and are computed again. The name of a shard is the sha256 of its bytes, which detects truncation and damage.
It is written under a temporary name, renamed and never changed, so runs can share a cache at the same time.
"""

import contextlib
import hashlib
import itertools
import json
import time
import zlib
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...hub.weight_files import prepare_for_safetensors
from ...utils.files import atomic_write
from ...utils.hashing import file_sha256
from ..data.file_index import FileIndex, file_records, is_known
from ..data.remote import ShardError

SHARD_BYTES, SHARD_SECONDS = 2**26, 60.0
"""A shard is written when it is so large, or took so long: what a killed run loses."""

_KEY_BYTES = 32
_KEY = np.dtype(f"S{_KEY_BYTES}")
_KEYS, _CHECKSUMS = "keys", "crc32"
"""Names of additional tensors with one entry per row."""

_ABANDONED_SECONDS = 86_400

Rows = dict[str, Tensor]


class Cache:
    """Rows of tensors by key.

    Args:
        folder: of caches, in which this one has a folder of its own; made when something is written.
        name: of what is cached.
        facts: on which every row depends: weights, sizes, dtype, versions. With other facts it is another cache.
        index: of what is known of files, by which shards that have not changed are not hashed again.
    """

    def __init__(self, folder: Path, name: str, facts: Mapping[str, Any], index: FileIndex | None = None) -> None:
        self._facts = json.dumps(dict(facts), sort_keys=True)
        self._salt = hashlib.sha256(self._facts.encode()).digest()
        self.folder = folder / f"{name}-{self._salt.hex()[:16]}"
        self.damaged: list[Path] = []
        self._index = index or FileIndex()
        self._shards: list[Path] = []
        # Of the rows that were found, sorted by key; what was a dictionary took ten times as much.
        self._keys, self._places = np.empty(0, _KEY), np.empty((0, 2), np.int64)
        self._files: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Each process opens the files itself.
        return {**self.__dict__, "_files": {}, "_index": FileIndex()}

    def _row_key(self, content: bytes) -> bytes:
        """Hash of a row's content and all the cache's facts."""
        return hashlib.sha256(self._salt + content).digest()

    def find_missing(self, contents: Iterable[bytes], verify: bool = True) -> list[bytes]:
        """Look up rows by content, so that they can be read, and list those that are not cached.

        Args:
            contents: of the inputs, or their hashes.
            verify: leave out shards whose bytes are not those that were written, and list them in `damaged`.

        Returns:
            Those that are not there, in order, each once.

        Raises:
            OSError: a shard cannot be read.
        """
        keys = {self._row_key(content): content for content in contents}
        known = np.isin(np.array([*keys], _KEY), self._keys)
        wanted = {key: content for (key, content), has in zip(keys.items(), known.tolist(), strict=True) if not has}
        shards = sorted(self.folder.glob("*.safetensors"))
        with ThreadPoolExecutor() as pool:
            rows_of = zip(shards, pool.map(lambda shard: _find_rows(shard, wanted), shards), strict=True)
            holding = {shard: rows for shard, rows in rows_of if rows or rows is None}
        damaged = self._find_damaged([shard for shard, rows in holding.items() if rows]) if verify else set()
        whole = {shard: rows for shard, rows in holding.items() if rows is not None and shard not in damaged}
        self.damaged = [shard for shard in holding if shard not in whole]
        self._add_rows(whole)
        found = set().union(*whole.values())
        return [content for key, content in wanted.items() if key not in found]

    def _find_damaged(self, shards: Sequence[Path]) -> set[Path]:
        """Shards whose bytes have changed since they were written; verified ones are not read again."""
        records = self._index.fill(file_records([str(shard.absolute()) for shard in shards]))
        unread = np.flatnonzero(~is_known(records, "sha256")).tolist()

        def read(place: int) -> None:
            with contextlib.suppress(FileNotFoundError):  # another run found it damaged
                digest = bytes.fromhex(file_sha256(shards[place]))
                records["sha256"][place] = np.frombuffer(digest, np.uint8)

        with ThreadPoolExecutor() as pool:
            list(pool.map(read, unread))
        if unread:
            self._index.store(records)
        hashes = [row.tobytes().hex() for row in records["sha256"]]
        return {shard for shard, digest in zip(shards, hashes, strict=True) if digest != shard.stem}

    def _add_rows(self, rows_of: Mapping[Path, Mapping[bytes, int]]) -> None:
        """Let rows of shards be read; all shards at once, since each call sorts the keys."""
        numbered = enumerate(rows_of.values(), len(self._shards))
        places = np.array([(number, row) for number, rows in numbered for row in rows.values()], np.int64)
        keys = np.concatenate([self._keys, np.array([key for rows in rows_of.values() for key in rows], _KEY)])
        order = np.argsort(keys, kind="stable")
        self._keys, self._places = keys[order], np.r_[self._places, places.reshape(-1, 2)][order]
        self._shards += rows_of

    def __getitem__(self, content: bytes) -> Rows:
        """The tensors of a row; the rest of its shard is not read.

        Raises:
            KeyError: it was not found.
            ShardError: its bytes are not those that were written.
        """
        key = np.array(self._row_key(content), _KEY)
        place = int(np.searchsorted(self._keys, key))
        if place == len(self._keys) or self._keys[place] != key:
            raise KeyError(content)
        number, row = self._places[place].tolist()
        if number not in self._files:
            self._files[number] = safe_open(self._shards[number], "pt")
        file = self._files[number]
        found = {name: file.get_slice(name)[row] for name in file.keys() if name != _KEYS}  # noqa: SIM118
        checksum = found.pop(_CHECKSUMS, None)  # which older caches lack
        if checksum is not None and int(checksum) != _row_checksum(found):
            raise ShardError(
                f"{self._shards[number]} is damaged in row {row}: restart with --rehash, which finds and recomputes "
                "all damaged values"
            )
        return found

    def prune(self) -> None:
        """Remove damaged cache shards, and partial ones that killed runs left long ago."""
        for shard in self.damaged:
            with contextlib.suppress(FileNotFoundError):
                if file_sha256(shard) != shard.stem:  # another run may have fixed it
                    shard.unlink()
        for partial in self.folder.glob(".*.partial"):
            with contextlib.suppress(FileNotFoundError):  # finished just now
                if time.time() - partial.stat().st_mtime > _ABANDONED_SECONDS:
                    partial.unlink()

    def write(self, batches: Iterable[tuple[Sequence[bytes], Rows]]) -> None:
        """Write rows as they come, in shards, each of rows of the same shapes.

        Args:
            batches: contents, and tensors with a row for each.

        Raises:
            OSError: the disk is full or the folder read-only; shards that were finished stay.
        """
        pending: list[Future[None]] = []
        with ThreadPoolExecutor(1) as pool:

            def submit(keys: Sequence[bytes], parts: Sequence[Rows]) -> None:
                # The disk works while the next rows are computed; one shard at a time, or memory would fill up.
                while pending:
                    pending.pop().result()
                pending.append(pool.submit(self._write_shard, keys, parts))

            for _, alike in itertools.groupby(batches, lambda batch: _row_shapes(batch[1])):
                self._write_same_shapes(alike, submit)
            while pending:
                pending.pop().result()

    def _write_same_shapes(
        self,
        batches: Iterable[tuple[Sequence[bytes], Rows]],
        submit: Callable[[Sequence[bytes], Sequence[Rows]], None],
    ) -> None:
        """Submit rows of the same shapes to be written, in shards of limited size and age."""
        keys: list[bytes] = []
        parts: list[Rows] = []
        size, started = 0, time.monotonic()
        for contents, rows in batches:
            keys.extend(map(self._row_key, contents))
            parts.append({name: values.cpu() for name, values in rows.items()})
            size += sum(values.nbytes for values in rows.values())
            if size >= SHARD_BYTES or time.monotonic() - started >= SHARD_SECONDS:
                submit(keys, parts)
                keys, parts, size, started = [], [], 0, time.monotonic()
        if keys:
            submit(keys, parts)

    def _write_shard(self, keys: Sequence[bytes], parts: Sequence[Rows]) -> None:
        """Write one cache shard atomically, named by its SHA-256."""
        tensors = {name: torch.cat([rows[name] for rows in parts]) for name in parts[0]}
        rows = [{name: values[row] for name, values in tensors.items()} for row in range(len(keys))]
        tensors[_CHECKSUMS] = torch.tensor(list(map(_row_checksum, rows)))
        tensors[_KEYS] = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).reshape(-1, _KEY_BYTES)
        data = save(prepare_for_safetensors(tensors), metadata={"computed": self._facts})
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / f"{hashlib.sha256(data).hexdigest()}.safetensors", shared=True) as partial:
            partial.write_bytes(data)


def _row_shapes(rows: Rows) -> dict[str, torch.Size]:
    """Shape of one row of each tensor."""
    return {name: values.shape[1:] for name, values in rows.items()}


def _row_checksum(row: Rows) -> int:
    """CRC-32 of a row's tensors, which detects corrupted shards on reading."""
    checksum = 0
    for _, values in sorted(row.items()):
        checksum = zlib.crc32(values.contiguous().reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum


def _find_rows(shard: Path, wanted: Container[bytes]) -> dict[bytes, int] | None:
    """Row index of each wanted key in a cache shard, None if it is cut off."""
    try:
        with safe_open(shard, "pt") as file:
            keys = file.get_tensor(_KEYS).numpy().tobytes()
    except FileNotFoundError:  # another run found it damaged
        return {}
    except SafetensorError:
        return None
    found = {keys[at : at + _KEY_BYTES]: at // _KEY_BYTES for at in range(0, len(keys), _KEY_BYTES)}
    return {key: row for key, row in found.items() if key in wanted}
