"""What frozen networks compute, kept on disk and read by row.

A cache is a folder of shards: safetensors files of some rows, `keys` [n, 32] beside tensors [n, ...], which say in
their metadata what was computed. A key hashes all that its row depends on: what has changed is not found, and is
computed again while the rest stays. The name of a shard is the sha256 of its bytes, which tells when it is cut off or
damaged. It is written under another name, renamed and never changed, so runs may share a cache at the same time.
"""

import contextlib
import hashlib
import itertools
import json
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...hub.weight_files import prepare_for_safetensors
from ...utils.files import atomic_write
from ...utils.hashing import file_sha256

SHARD_BYTES, SHARD_SECONDS = 2**26, 60.0
"""A shard is written when it is so large, or took so long: what a killed run loses."""

_KEY_BYTES = 32
_ABANDONED_SECONDS = 86_400

Rows = dict[str, Tensor]


class Cache:
    """Rows of tensors by key.

    Args:
        folder: of caches, in which this one has a folder of its own; made when something is written.
        name: of what is cached.
        facts: on which every row depends: weights, sizes, dtype, versions. With other facts it is another cache.
    """

    def __init__(self, folder: Path, name: str, facts: Mapping[str, Any]) -> None:
        self._facts = json.dumps(dict(facts), sort_keys=True)
        self._salt = hashlib.sha256(self._facts.encode()).digest()
        self.folder = folder / f"{name}-{self._salt.hex()[:16]}"
        self.damaged: list[Path] = []
        self._places: dict[bytes, tuple[Path, int]] = {}
        self._files: dict[Path, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Each process opens the files itself.
        return {**self.__dict__, "_files": {}}

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
        keys = {key: content for content in contents if (key := self._row_key(content)) not in self._places}
        shards = sorted(self.folder.glob("*.safetensors"))
        self.damaged = []
        with ThreadPoolExecutor() as pool:
            for shard, rows in zip(shards, pool.map(lambda one: _find_rows(one, keys, verify), shards), strict=True):
                if rows is None:
                    self.damaged.append(shard)
                else:
                    self._places |= {key: (shard, row) for key, row in rows.items()}
        return [content for key, content in keys.items() if key not in self._places]

    def __getitem__(self, content: bytes) -> Rows:
        """The tensors of a row that was found; nothing else of its shard is read."""
        shard, row = self._places[self._row_key(content)]
        if shard not in self._files:
            self._files[shard] = safe_open(shard, "pt")
        file = self._files[shard]
        return {name: file.get_slice(name)[row] for name in file.keys() if name != "keys"}  # noqa: SIM118

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
        for _, alike in itertools.groupby(batches, lambda batch: _row_shapes(batch[1])):
            self._write_same_shapes(alike)

    def _write_same_shapes(self, batches: Iterable[tuple[Sequence[bytes], Rows]]) -> None:
        """Write rows of the same shapes, in shards of limited size and age."""
        keys: list[bytes] = []
        parts: list[Rows] = []
        size, started = 0, time.monotonic()
        for contents, rows in batches:
            keys.extend(map(self._row_key, contents))
            parts.append({name: values.cpu() for name, values in rows.items()})
            size += sum(values.nbytes for values in rows.values())
            if size >= SHARD_BYTES or time.monotonic() - started >= SHARD_SECONDS:
                self._write_shard(keys, parts)
                keys, parts, size, started = [], [], 0, time.monotonic()
        if keys:
            self._write_shard(keys, parts)

    def _write_shard(self, keys: Sequence[bytes], parts: Sequence[Rows]) -> None:
        """Write one cache shard atomically, named by its SHA-256."""
        tensors = {name: torch.cat([rows[name] for rows in parts]) for name in parts[0]}
        tensors["keys"] = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).reshape(-1, _KEY_BYTES)
        data = save(prepare_for_safetensors(tensors), metadata={"computed": self._facts})
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / f"{hashlib.sha256(data).hexdigest()}.safetensors", shared=True) as partial:
            partial.write_bytes(data)


def _row_shapes(rows: Rows) -> dict[str, torch.Size]:
    """Shape of one row of each tensor."""
    return {name: values.shape[1:] for name, values in rows.items()}


def _find_rows(shard: Path, wanted: Container[bytes], verify: bool) -> dict[bytes, int] | None:
    """Row index of each wanted key in a cache shard, None if it is damaged; only shards with any are hashed."""
    try:
        with safe_open(shard, "pt") as file:
            keys = file.get_tensor("keys").numpy().tobytes()
        found = {keys[at : at + _KEY_BYTES]: at // _KEY_BYTES for at in range(0, len(keys), _KEY_BYTES)}
        found = {key: row for key, row in found.items() if key in wanted}
        whole = not (found and verify) or file_sha256(shard) == shard.stem
    except FileNotFoundError:  # another run found it damaged
        return {}
    except SafetensorError:
        return None
    return found if whole else None
