"""Values by row number, in arrays: of a million rows they take megabytes, where dictionaries take hundreds."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from .transforms import Size

T = TypeVar("T")


class RowValues(Mapping[int, T], Generic[T]):
    """A mapping from row numbers to values.

    Args:
        rows: their numbers, ascending, int64 [n].
        values: one for each, shape [n, ...].
    """

    def __init__(self, rows: NDArray[np.int64], values: NDArray[np.generic]) -> None:
        self.rows, self.values_array = rows, values

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows.tolist())

    def __getitem__(self, row: int) -> T:
        place = int(np.searchsorted(self.rows, row))
        if place == len(self.rows) or self.rows[place] != row:
            raise KeyError(row)
        return self._convert(self.values_array[place])

    def _convert(self, value: NDArray[np.generic]) -> T:
        """A row's value, converted from its part of the array."""
        converted: T = value.item()
        return converted


class ImageSizes(RowValues[Size]):
    """(height, width) of the images of rows; the array is int32 [n, 2]."""

    @classmethod
    def of(cls, sizes: Mapping[int, Size] | Iterable[tuple[int, Size]]) -> "ImageSizes":
        """Convert a mapping, or pairs of row and size in any order."""
        found = sorted(dict(sizes).items())
        rows = np.array([row for row, _ in found], np.int64)
        return cls(rows, np.array([size for _, size in found], np.int32).reshape(-1, 2))

    def first(self, count: int) -> "ImageSizes":
        """The sizes of the first rows."""
        return ImageSizes(self.rows[:count], self.values_array[:count])

    def _convert(self, value: NDArray[np.generic]) -> Size:
        height, width = value.tolist()
        return height, width


class ImageHashes(RowValues[bytes]):
    """SHA-256 of the image files of rows; the array is uint8 [n, 32]."""

    def _convert(self, value: NDArray[np.generic]) -> bytes:
        return value.tobytes()
