"""The positions of the samples in a WebDataset tar shard, found by reading only headers, and stored on disk.

A sample consists of consecutive members with the same name up to the first dot: `000123.jpg`, `000123.txt`,
`000123.json`. Its image is the first member with an image extension, its caption is in `.txt` or `.json`. Other
members, such as pickles, are never opened.
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
from .shards import size_or_zero

_FORMAT = 4
"""Raised whenever an index of the same shard would be another than before."""

_WINDOW = 2**14
"""Bytes that are read around a header, which usually include the small members next to an image."""

_NO_MEMBER = (-1, 0)


@dataclass(frozen=True)
class TarIndex:
    """The complete samples of a shard.

    Attributes:
        places: int64 [rows, 4]: offset and size of the image, and of the caption's member.
        names: of the images, and of the captions' members; one without caption has the empty name.
        incomplete: what has no caption, or no image.
        sizes: int32 [rows, 2], (height, width) of the images; zeros where they cannot be read, or were not asked for.
    """

    places: NDArray[np.int64]
    names: list[tuple[str, str]]
    incomplete: list[str]
    sizes: NDArray[np.int32]

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
        """Write the index atomically, in a folder that is created if necessary.

        Raises:
            OSError: the disk is full or the folder read-only.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file, shared=True) as partial, partial.open("xb") as opened:
            text = np.frombuffer(self._names_json(), np.uint8)
            np.savez(opened, places=self.places, sizes=self.sizes, text=text)

    @classmethod
    def load(cls, file: Path) -> "TarIndex | None":
        """Read a saved index; None if there is none or it is damaged."""
        try:
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
                names, incomplete = json.loads(arrays["text"].tobytes())
                pairs = [(image, caption) for image, caption in names]
                return cls(arrays["places"], pairs, incomplete, arrays["sizes"])
        except Exception:  # various exceptions for a file that is not an archive, truncated, or has other content
            return None


def read_index(url: str, size: int, captions: Sequence[str], measure: bool = False) -> TarIndex:
    """Find the samples of a tar shard by reading its headers.

    Args:
        url: of the shard.
        size: of it, in bytes.
        captions: endings of the members that captions may be in, the best first; none if no captions are needed.
        measure: whether sizes of images are read, from their headers.

    Raises:
        ShardError: it is not a tar, truncated, or cannot be read.
    """
    places, names, incomplete, sizes = [], [], [], []
    found: dict[int, tuple[int, int]] = {}
    members_of = groupby(
        _read_members(url, size, found if measure else None), key=lambda member: _split_member_name(member.name)[0]
    )
    for key, members in members_of:
        by_ending = {_split_member_name(member.name)[1]: member for member in members}
        image = next((member for ending, member in by_ending.items() if _is_image_suffix(ending)), None)
        caption = next((by_ending[ending] for ending in captions if ending in by_ending), None)
        if image is not None and (caption is not None or not captions):
            places.append((*_member_span(image), *_member_span(caption)))
            names.append((image.name, caption.name if caption else ""))
            sizes.append(found.get(image.offset_data, (0, 0)))
        elif image is not None or caption is not None:  # not a README, statistics, ...
            incomplete.append(f"{key} (no {'image' if image is None else 'caption'})")
    sizes_array = np.array(sizes, np.int32).reshape(-1, 2)
    return TarIndex(np.array(places, np.int64).reshape(-1, 4), names, incomplete, sizes_array)


def index_path(folder: Path, url: str, state: FileState, captions: Sequence[str], measure: bool = False) -> Path:
    """Path in `folder` of the saved index of a tar shard in this state."""
    facts = json.dumps([_FORMAT, url, *state, list(captions), measure])
    return folder / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.npz"


def _read_members(url: str, size: int, sizes: dict[int, tuple[int, int]] | None = None) -> Iterator[tarfile.TarInfo]:
    """Headers of the regular files in a tar shard, in order; refuses one that is cut off.

    Args:
        url: of the shard.
        size: of it, in bytes.
        sizes: to which those of images are added, by where their data begin; None for none.
    """
    reader = RangeReader(url, size, _WINDOW)
    try:
        with tarfile.open(fileobj=reader, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps all of them
                hidden = member.name.rpartition("/")[2].startswith(".")  # such as a Mac's ._000.jpg
                if member.isreg() and not member.issparse() and not hidden:
                    if sizes is not None and _is_image_suffix(_split_member_name(member.name)[1]):
                        sizes[member.offset_data] = _read_image_size(reader, member)
                    yield member
            end = tar.offset
    except tarfile.TarError as error:
        raise ShardError(f"{url} is not a complete tar: {error}") from error
    reader.seek(end)
    if reader.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise ShardError(f"{url} is not a complete tar: the final block of zeros is missing")


def _read_image_size(reader: RangeReader, member: tarfile.TarInfo) -> tuple[int, int]:
    """(height, width) of an image in a tar, zeros if it cannot be read.

    The beginning of a JPEG says it, and was mostly read along with the member's header; in other formats what turns an
    image may stand at their end.
    """
    reader.seek(member.offset_data)
    start = reader.read(min(member.size, _WINDOW // 2))
    if start.startswith(b"\xff\xd8") and any(size := size_or_zero(start)):
        return size
    reader.seek(member.offset_data)
    return size_or_zero(reader.read(member.size))


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
