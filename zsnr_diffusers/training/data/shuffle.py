"""A random order of samples in shards with locality: nearby samples come from a few shards."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray

from .buckets import epoch_order, round_up_to_batches, whole_batches


class ShardShuffle(Sequence[int]):
    """Shards in a random order, cut into windows of some; and the rows of each window in a random order.

    Each row comes once. A window's order is made when it is asked for, so nothing here is as long as the data. With
    all shards in one window it is a random order of all rows.

    Rows of different groups may be kept in batches of their own. What is left of a window when all its whole batches
    are made comes in the last window, which is of rows of all shards, filled up there as `epoch_order` does.

    Args:
        counts: rows of each shard; their numbers run on from one shard to the next.
        width: shards of a window.
        stream: a generator of its own for each number; 0 is for the shards, the others for windows.
        groups: of rows that can be used, if there are any; None for all rows alike.
        batch: rows that are of one group.
    """

    def __init__(
        self,
        counts: Sequence[int],
        width: int,
        stream: Callable[[int], torch.Generator],
        groups: "RowGroups | None" = None,
        batch: int = 1,
    ) -> None:
        self._stream, self._groups, self._batch = stream, groups, batch
        starts = [0, *accumulate(counts)]
        shards = torch.randperm(len(counts), generator=stream(0)).tolist()
        rows = [range(starts[shard], starts[shard + 1]) for shard in shards]
        self._windows = [rows[at : at + width] for at in range(0, len(rows), width)]
        lengths = [sum(map(len, window)) for window in self._windows]
        if groups is not None:
            orders = [shards[at : at + width] for at in range(0, len(shards), width)]
            whole = [groups.counts[order].sum(axis=0) // batch * batch for order in orders]
            total = groups.counts.sum(axis=0)
            left = total - np.sum([*whole, np.zeros_like(total)], axis=0)
            lengths = [int(one.sum()) for one in whole]
            lengths.append(sum(round_up_to_batches(int(count), batch) for count in left))
        self._ends = list(accumulate(lengths))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> list[int]: ...
    def __getitem__(self, place: int | slice) -> int | list[int]:
        """The row at a place, or those at a slice of places."""
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        number = bisect_right(self._ends, place)
        return int(self._shuffled_window(number)[place - self._ends[number]])  # counted from its end

    @lru_cache(maxsize=4)  # noqa: B019  lives as long as its epoch is remembered
    def _shuffled_window(self, number: int) -> Sequence[int]:
        """Row indices of a window of shards in random order; the last few windows are cached."""
        if number == len(self._windows):
            return epoch_order(self._left_over, self._batch, self._stream(number + 1))
        rows = self._window_rows(number)
        if self._groups is None:
            return epoch_order([rows], 1, self._stream(number + 1))  # type: ignore[list-item]  # an array will do
        return whole_batches(self._groups.split(rows), self._batch, self._stream(number + 1))[0]

    def _window_rows(self, number: int) -> NDArray[np.int64]:
        """Rows of the shards of a window, in their order."""
        parts = [np.arange(part.start, part.stop) for part in self._windows[number]]
        return np.concatenate([*parts, np.empty(0, np.int64)])

    @cached_property
    def _left_over(self) -> list[Sequence[int]]:
        """Rows of each group that fill no batch in their window."""
        assert self._groups is not None
        parts = [
            whole_batches(self._groups.split(self._window_rows(number)), self._batch, self._stream(number + 1))[1]
            for number in range(len(self._windows))
        ]
        groups = [np.concatenate(rows) for rows in zip(*parts, strict=True)]
        return [rows for rows in groups if len(rows)]  # type: ignore[misc]  # arrays will do


class RowGroups:
    """Which group each row of shards is in.

    Args:
        groups: of rows, without those that cannot be used.
        counts: rows of each shard.

    Attributes:
        counts: rows of each group in each shard, int64 [shards, groups].
    """

    def __init__(self, groups: Sequence[Sequence[int]], counts: Sequence[int]) -> None:
        self._number = np.full(sum(counts), -1, np.int16)
        for number, rows in enumerate(groups):
            self._number[np.asarray(rows, np.int64)] = number
        self._size = len(groups)
        ends = np.cumsum([0, *counts])
        parts = [self._number[start:end] for start, end in pairwise(ends.tolist())]
        found = [np.bincount(part[part >= 0], minlength=self._size) for part in parts]
        self.counts = np.array(found, np.int64).reshape(len(counts), self._size)

    def split(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """The rows of each group among these."""
        number = self._number[rows]
        return [rows[number == group] for group in range(self._size)]
