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
"""Times as long as wide; SDXL was trained on as much (Podell et al. 2023, arXiv:2307.01952, appendix I)."""
_STEPS = 16
"""Steps of a side in which a square's side could be divided: more would make buckets that few images share."""


def bucket_sizes(resolution: int, multiple: int) -> list[Size]:
    """Sizes of aspect-ratio buckets: a square, and portrait and landscape rectangles of at most its area.

    Sides differ from `resolution` by a whole number of steps, of a sixteenth of it or, if that is more, `multiple`,
    rounded up to whole multiples. To each long side, up to four times the short one, belongs the longest short side
    that keeps the area. At 1024 that is what SDXL was trained on, but for sizes of less area between these.

    Args:
        resolution: sides of the square, a multiple of `multiple`.
        multiple: that all sides must be of.
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
    """The bucket whose aspect ratio is nearest to an image's in the logarithm; the first of two as near."""
    height, width = size

    def distance(bucket: Size) -> float:
        # The ratio of the two aspect ratios, a quotient of whole numbers: no machine rounds it otherwise.
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
    """The rows of an epoch in random order, each batch of one group.

    Every row comes once, and some of a group once more, or more often than that where it is smaller than a batch, to
    fill up its last batch; which ones is random.

    Args:
        groups: of rows.
        batch: samples in a batch, all of one group; 1 if rows need not be kept together.
        draw: all that is random.

    Returns:
        Whole batches, one after the other.
    """
    parts = []
    for group in groups:
        shuffled = np.asarray(group, np.int64)[torch.randperm(len(group), generator=draw).numpy()]
        parts.append(np.resize(shuffled, round_up_to_batches(len(group), batch)))  # from its start again
    rows = np.concatenate([*parts, np.empty(0, np.int64)])
    if len(groups) > 1:
        order = torch.randperm(len(rows) // batch, generator=draw).numpy()
        rows = rows.reshape(-1, batch)[order].reshape(-1)
    return _as_sequence(rows)


def whole_batches(
    groups: Sequence[NDArray[np.int64]], batch: int, draw: torch.Generator
) -> tuple[Sequence[int], list[NDArray[np.int64]]]:
    """As many whole batches as there are of each group, in random order, and the rows of each group that are left.

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
    """Rows as a sequence of Python's numbers, 8 bytes each."""
    return array("q", rows.astype(np.int64).tobytes())
