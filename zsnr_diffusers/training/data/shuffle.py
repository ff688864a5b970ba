"""A random order of rows in shards that stays near: what is shown within a while comes from a few shards."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import overload

import torch


class ShardShuffle(Sequence[int]):
    """Shards in a random order, cut into windows of some; and the rows of each window in a random order.

    Each row comes once. A window's order is made when it is asked for, so nothing here is as long as the data. With
    all shards in one window it is a random order of all rows.

    Args:
        counts: rows of each shard; their numbers run on from one shard to the next.
        width: shards of a window.
        stream: a generator of its own for each number; 0 is for the shards, the others for windows.
    """

    def __init__(self, counts: Sequence[int], width: int, stream: Callable[[int], torch.Generator]) -> None:
        self._stream = stream
        starts = [0, *accumulate(counts)]
        shards = torch.randperm(len(counts), generator=stream(0)).tolist()
        rows = [range(starts[shard], starts[shard + 1]) for shard in shards]
        self._windows = [rows[at : at + width] for at in range(0, len(rows), width)]
        self._ends = list(accumulate(sum(map(len, window)) for window in self._windows))

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
    def _shuffled_window(self, number: int) -> torch.Tensor:
        """Row indices of a window of shards in random order; the last few windows are cached."""
        rows = torch.cat([torch.arange(part.start, part.stop) for part in self._windows[number]])
        return rows[torch.randperm(len(rows), generator=self._stream(number + 1))]
