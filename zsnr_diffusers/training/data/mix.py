"""Mix several datasets into one sequence of samples, by weight."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

BLOCK = 1000
"""Block size for exact proportions: samples, or global batches with aspect-ratio buckets."""


class Mix:
    """The source of each unit of an endless sequence, in random order, as a function of seed and position.

    Every block of `BLOCK` units has the same number of units of each source, at least one, by largest remainders. So
    proportions are exact from the start, and the number of a source's units before a position needs no counting.

    Args:
        weights: of the sources, above 0.
        seed: of the order.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self._seed = seed
        exact = np.asarray(weights, np.float64) / sum(weights) * BLOCK
        self.counts = np.maximum(np.floor(exact), 1).astype(np.int64)
        for place in np.argsort(np.floor(exact) - exact, kind="stable").tolist():
            if self.counts.sum() < BLOCK and exact[place] > 1:
                self.counts[place] += 1
        self.counts[np.argmax(self.counts)] += BLOCK - self.counts.sum()  # what sources of less than one took

    @property
    def shares(self) -> list[float]:
        """The share of each source in all units."""
        return [count / BLOCK for count in self.counts.tolist()]

    def locate(self, unit: int) -> tuple[int, int]:
        """The source of a unit, and how many units of that source come before."""
        block, place = divmod(unit, BLOCK)
        sources, ranks = self._order(block)
        source = int(sources[place])
        return source, block * int(self.counts[source]) + int(ranks[place])

    def counts_before(self, unit: int) -> list[int]:
        """Units of each source before a place."""
        block, place = divmod(unit, BLOCK)
        within = np.bincount(self._order(block)[0][:place], minlength=len(self.counts))
        counts: list[int] = (block * self.counts + within).tolist()
        return counts

    @lru_cache(maxsize=4)  # noqa: B019  lives as long as the run
    def _order(self, block: int) -> tuple[Any, Any]:
        """Source of each unit in a block, and its number among those of its source there."""
        seed = np.random.SeedSequence((self._seed, 7, block)).generate_state(1, np.uint64)[0]
        draw = torch.Generator().manual_seed(int(seed))
        sources = np.repeat(np.arange(len(self.counts)), self.counts)[torch.randperm(BLOCK, generator=draw).numpy()]
        ranks = np.zeros(BLOCK, np.int64)
        for source, count in enumerate(self.counts.tolist()):
            ranks[sources == source] = np.arange(count)
        return sources, ranks
