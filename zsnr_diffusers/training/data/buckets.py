"""Buckets of aspect ratios: images keep about their shape, and those of one batch have the same size."""

import itertools
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from .row_values import ImageSizes
from .transforms import Size

_LONGEST = 4
"""Largest aspect ratio, as in the training of SDXL (Podell et al. 2023, arXiv:2307.01952, appendix I)."""
_STEPS = 16
"""Number of steps per side of the square: more would create buckets with few images."""


def bucket_sizes(resolution: int, multiple: int) -> list[Size]:
    """Sizes of aspect-ratio buckets: a square, and portrait and landscape rectangles of at most its area.

    Sides differ from `resolution` by a multiple of a step: a sixteenth of it, at least `multiple`, rounded up to a
    multiple of `multiple`. Each long side, up to four times the short one, has the longest short side that keeps the
    area. At 1024, these are the sizes of SDXL's training, except for intermediate sizes with a smaller area.

    Args:
        resolution: sides of the square, a multiple of `multiple`.
        multiple: divisor of all sides.
    """
    step = multiple * -(-resolution // (_STEPS * multiple))
    sizes = [(resolution, resolution)]
    for long in itertools.count(resolution + step, step):
        short = resolution - step * -(-(resolution - resolution**2 // long) // step)
        if short <= 0 or long > _LONGEST * short:
            return sizes
        sizes += [(long, short), (short, long)]
    raise AssertionError("unreachable: sides get longer")


def nearest_bucket(size: Size, buckets: Iterable[Size]) -> Size:
    """The bucket with the closest log aspect ratio to an image's; the first one in a tie."""
    height, width = size

    def distance(bucket: Size) -> float:
        # The ratio of the two aspect ratios, a quotient of integers: rounded identically on all machines.
        a, b = height * bucket[1], width * bucket[0]
        return max(a, b) / min(a, b)

    return min(buckets, key=distance)


def assign_to_buckets(images: ImageSizes, sizes: Sequence[Size]) -> dict[Size, Sequence[int]]:
    """Data rows of each aspect-ratio bucket, ascending, without empty buckets.

    Args:
        images: size of the image of each row.
        sizes: of the buckets.
    """
    distinct, which = np.unique(images.values_array, axis=0, return_inverse=True)
    number = {size: place for place, size in enumerate(sizes)}
    nearest = np.array([number[nearest_bucket((height, width), sizes)] for height, width in distinct.tolist()])
    bucket = nearest[which.reshape(-1)]
    found = {size: _as_sequence(images.rows[bucket == place]) for place, size in enumerate(sizes)}
    return {size: rows for size, rows in found.items() if rows}


def round_up_to_batches(count: int, batch: int) -> int:
    """`count` rounded up to a multiple of the batch size."""
    return batch * -(-count // batch)


def epoch_order(groups: Sequence[Sequence[int]], batch: int, draw: torch.Generator) -> Sequence[int]:
    """The rows of an epoch in random order, where all rows of a batch come from one group.

    Every row appears once; random rows are repeated to fill a group's last batch.

    Args:
        groups: of rows.
        batch: samples in a batch, all of one group; 1 if rows need not be grouped.
        draw: all that is random.

    Returns:
        Complete batches, concatenated.
    """
    parts = []
    for group in groups:
        shuffled = np.asarray(group, np.int64)[torch.randperm(len(group), generator=draw).numpy()]
        parts.append(np.resize(shuffled, round_up_to_batches(len(group), batch)))  # from the start again
    rows = np.concatenate([*parts, np.empty(0, np.int64)])
    if len(groups) > 1:
        order = torch.randperm(len(rows) // batch, generator=draw).numpy()
        rows = rows.reshape(-1, batch)[order].reshape(-1)
    return _as_sequence(rows)


def whole_batches(
    groups: Sequence[NDArray[np.int64]], batch: int, draw: torch.Generator
) -> tuple[Sequence[int], list[NDArray[np.int64]]]:
    """The full batches of each group in random order, and the remaining rows of each group.

    Args:
        groups: of rows, some of which may be empty.
        batch: samples in a batch, all of one group.
        draw: all that is random.
    """
    parts, left = [], []
    for group in groups:
        shuffled = group[torch.randperm(len(group), generator=draw).numpy()]
        end = len(group) // batch * batch
        parts.append(shuffled[:end])
        left.append(shuffled[end:])
    rows = np.concatenate(parts)
    order = torch.randperm(len(rows) // batch, generator=draw).numpy()
    return _as_sequence(rows.reshape(-1, batch)[order].reshape(-1)), left


def _as_sequence(rows: NDArray[np.int64]) -> Sequence[int]:
    """Rows as a sequence of 64-bit integers."""
    return array("q", rows.astype(np.int64).tobytes())
