"""Where the samples of a WebDataset tar shard lie in it, found by reading headers alone, and kept on disk.

A sample is a run of members whose names are alike up to the first dot: `000123.jpg`, `000123.txt`, `000123.json`. Its
image is the first of them with the ending of an image, its caption is in `.txt` or in `.json`. Members of other kinds,
pickles among them, are never opened.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...utils.files import atomic_write
from ...utils.image_formats import IMAGE_SUFFIXES
from .remote import FileState, RangeReader, ShardError

_FORMAT = 3
"""Raised whenever an index of the same shard would be another than before."""

_WINDOW = 2**14
"""Bytes that are read around a header: the small members beside an image mostly lie in it too."""

_NO_MEMBER = (-1, 0)


@dataclass(frozen=True)
class TarIndex:
    """The samples of a shard that are whole.

    Attributes:
        places: int64 [rows, 4]: offset and size of the image, and of the caption's member.
        names: of the images, and of the captions' members; one without caption has the empty name.
        incomplete: what has no caption, or no image.
    """

    places: NDArray[np.int64]
    names: list[tuple[str, str]]
    incomplete: list[str]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def sha256(self) -> str:
        """SHA-256 of the index's content."""
        return hashlib.sha256(self.places.tobytes() + self._names_json()).hexdigest()

    def _names_json(self) -> bytes:
        """Names and incomplete samples as JSON, for hashing and saving."""
        return json.dumps([self.names, self.incomplete]).encode()

    def save(self, file: Path) -> None:
        """Write the index atomically, in a folder that is created if need be.

        Raises:
            OSError: the disk is full or the folder read-only.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file, shared=True) as partial, partial.open("xb") as opened:
            np.savez(opened, places=self.places, text=np.frombuffer(self._names_json(), np.uint8))

    @classmethod
    def load(cls, file: Path) -> "TarIndex | None":
        """Read a saved index; None if there is none or it is damaged."""
        try:
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
                names, incomplete = json.loads(arrays["text"].tobytes())
                return cls(arrays["places"], [(image, caption) for image, caption in names], incomplete)
        except Exception:  # of many kinds, for what is no archive, is cut off, or says something else
            return None


def read_index(url: str, size: int, captions: Sequence[str]) -> TarIndex:
    """Find the samples of a tar shard by reading its headers.

    Args:
        url: of the shard.
        size: of it, in bytes.
        captions: endings of the members that captions may be in, the best first; none if no captions are needed.

    Raises:
        ShardError: it is no tar, is cut off, or cannot be read.
    """
    places, names, incomplete = [], [], []
    for key, members in groupby(_read_members(url, size), key=lambda member: _split_member_name(member.name)[0]):
        by_ending = {_split_member_name(member.name)[1]: member for member in members}
        image = next((member for ending, member in by_ending.items() if _is_image_suffix(ending)), None)
        caption = next((by_ending[ending] for ending in captions if ending in by_ending), None)
        if image is not None and (caption is not None or not captions):
            places.append((*_member_span(image), *_member_span(caption)))
            names.append((image.name, caption.name if caption else ""))
        elif image is not None or caption is not None:  # not a README, statistics, ...
            incomplete.append(f"{key} (no {'image' if image is None else 'caption'})")
    return TarIndex(np.array(places, np.int64).reshape(-1, 4), names, incomplete)


def index_path(folder: Path, url: str, state: FileState, captions: Sequence[str]) -> Path:
    """Path in `folder` of the saved index of a tar shard in this state."""
    facts = json.dumps([_FORMAT, url, *state, list(captions)])
    return folder / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.npz"


def _read_members(url: str, size: int) -> Iterator[tarfile.TarInfo]:
    """Headers of the regular files in a tar shard, in order; refuses one that is cut off."""
    reader = RangeReader(url, size, _WINDOW)
    try:
        with tarfile.open(fileobj=reader, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps all of them
                hidden = member.name.rpartition("/")[2].startswith(".")  # such as a Mac's ._000.jpg
                if member.isreg() and not member.issparse() and not hidden:
                    yield member
            end = tar.offset
    except tarfile.TarError as error:
        raise ShardError(f"{url} is no whole tar: {error}") from error
    reader.seek(end)
    if reader.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise ShardError(f"{url} is no whole tar: it ends without the block of zeros that is written last")


def _split_member_name(name: str) -> tuple[str, str]:
    """(sample key, ending) of a tar member's name: `a/b.orig.jpg` gives `a/b` and `orig.jpg`."""
    folder, slash, base = name.rpartition("/")
    key, _, ending = base.partition(".")
    return folder + slash + key, ending.lower()


def _is_image_suffix(ending: str) -> bool:
    """Whether a tar member's ending is that of an image."""
    return f".{ending.rpartition('.')[2]}" in IMAGE_SUFFIXES


def _member_span(member: tarfile.TarInfo | None) -> tuple[int, int]:
    """(offset, size) of a tar member's data, `_NO_MEMBER` for None."""
    return _NO_MEMBER if member is None else (member.offset_data, member.size)
