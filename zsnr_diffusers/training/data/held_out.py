"""Rows that are drawn from the data by the seed, and those of them that are kept aside for validation."""

import random
from array import array
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..config import DataConfig
from .dataset import Images, Rows, is_row_readable, rows_to_sample
from .loader import derive_seed
from .row_values import ImageSizes

_STREAM = 8
"""Of randomness; see `derive_seed`."""


def draw_rows(usable_rows: Sequence[int], seed: int, count: int, stream: int) -> list[int]:
    """Random rows, all if there are no more than `count`; another `stream` draws others."""
    return random.Random(derive_seed(seed, stream)).sample(usable_rows, min(count, len(usable_rows)))


def draw_readable_rows(
    rows: Rows, config: DataConfig, usable_rows: Sequence[int], count: int, stream: int
) -> list[int]:
    """`draw_rows` without rows of shards that cannot be read, which were not checked before.

    Of parquet files they are of a few row groups: each that one more row lies in has to be read whole.

    Raises:
        ImageError: one cannot be read, and `--on_bad_image` is `fail`.
    """
    drawn = draw_rows(rows_to_sample(rows, usable_rows, config.seed), config.seed, count, stream)
    with ThreadPoolExecutor() as pool:
        usable = pool.map(lambda row: is_row_readable(rows, config, row), drawn)
        return [row for row, can in zip(drawn, usable, strict=True) if can]


def hold_out_rows(rows: Rows, images: Images, config: DataConfig, count: int | None) -> list[int]:
    """The rows that are kept aside, ascending; none if there is no `count`.

    Raises:
        ValueError: they would leave no row to train on, or none of them can be read.
        ImageError: as in `draw_readable_rows`.
    """
    if not count:
        return []
    if count >= len(images):
        raise ValueError(
            f"--validation_rows={count} of {len(images)} rows leaves none to train on: lower it, or leave it out."
        )
    usable = images if isinstance(images, range) else array("q", images)
    if not (held_out := draw_readable_rows(rows, config, usable, count, _STREAM)):
        raise ValueError(f"--validation_rows={count}: none of the rows that were drawn can be read.")
    return sorted(held_out)


def without_rows(rows: Collection[int], held_out: Collection[int]) -> Sequence[int]:
    """The rows of a collection, ascending, that are not kept aside; the collection itself if none is."""
    if isinstance(rows, Sequence) and not held_out:
        return rows
    numbers = rows.rows if isinstance(rows, ImageSizes) else np.fromiter(rows, np.int64, len(rows))
    return array("q", np.setdiff1d(numbers, np.fromiter(held_out, np.int64, len(held_out))).tobytes())
