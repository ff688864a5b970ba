"""Buckets of aspect ratios: images keep about their shape, and those of one batch have the same size."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch

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


def assign_to_buckets(images: Mapping[int, Size], sizes: Sequence[Size]) -> dict[Size, list[int]]:
    """Data rows of each aspect-ratio bucket, without empty buckets.

    Args:
        images: size of the image of each row.
        sizes: of the buckets.
    """
    nearest = {image: nearest_bucket(image, sizes) for image in set(images.values())}
    rows: dict[Size, list[int]] = {size: [] for size in sizes}
    for row, image in images.items():
        rows[nearest[image]].append(row)
    return {size: found for size, found in rows.items() if found}


def round_up_to_batches(count: int, batch: int) -> int:
    """`count` rounded up to a multiple of the batch size."""
    return batch * -(-count // batch)


def epoch_order(groups: Sequence[Sequence[int]], batch: int, draw: torch.Generator) -> list[int]:
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
    rows: list[int] = []
    for group in groups:
        shuffled = [group[i] for i in torch.randperm(len(group), generator=draw).tolist()]
        rows += itertools.islice(itertools.cycle(shuffled), round_up_to_batches(len(group), batch))
    if len(groups) == 1:
        return rows
    order = torch.randperm(len(rows) // batch, generator=draw).tolist()
    return [row for place in order for row in rows[place * batch : (place + 1) * batch]]
