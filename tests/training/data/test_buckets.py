import itertools
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsnr_diffusers.training.data.buckets import (
    assign_to_buckets,
    bucket_sizes,
    epoch_order,
    nearest_bucket,
    round_up_to_batches,
)
from zsnr_diffusers.training.data.loader import make_generator
from zsnr_diffusers.training.data.row_values import ImageSizes

RESOLUTIONS = st.tuples(st.integers(1, 40), st.sampled_from([8, 32, 64])).map(
    lambda pair: (pair[0] * pair[1], pair[1])
)
SIDES = st.integers(1, 5000)


# -- sizes


@given(RESOLUTIONS)
def test_sizes_are_all_that_the_rule_allows(case):
    """By brute force over all pairs of sides a whole number of steps from the square's."""
    resolution, multiple = case
    step = next(step for step in range(multiple, resolution + multiple, multiple) if 16 * step >= resolution)
    sides = [side for side in range(resolution % step or step, 5 * resolution, step)]
    expected = set()
    for long in (side for side in sides if side >= resolution):
        short = max((side for side in sides if side <= long and side * long <= resolution**2), default=None)
        if short is not None and long <= 4 * short:
            expected |= {(long, short), (short, long)}
    sizes = bucket_sizes(resolution, multiple)
    assert set(sizes) == expected
    assert len(set(sizes)) == len(sizes)
    assert sizes[0] == (resolution, resolution)
    assert all(side % multiple == 0 for size in sizes for side in size)
    assert len(sizes) <= 33


SDXL = {
    *((512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600)),
    *((640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152)),
    *((896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024)),
}
"""Heights and widths of SDXL's training, Podell et al. 2023, appendix I, the lying half."""


@pytest.mark.parametrize("multiple", [32, 64])
def test_at_1024_they_are_sizes_of_sdxl(multiple):
    sizes = set(bucket_sizes(1024, multiple))
    assert sizes <= SDXL | {size[::-1] for size in SDXL}
    assert len(sizes) == 33


# -- choice


@given(st.tuples(SIDES, SIDES), RESOLUTIONS)
def test_the_nearest_in_the_logarithm_of_the_aspect_ratio_is_chosen(size, case):
    buckets = bucket_sizes(*case)

    def distance(bucket):
        return abs(math.log(size[1] / size[0]) - math.log(bucket[1] / bucket[0]))

    # Logarithms are rounded, so of two that are as near either may be theirs.
    assert distance(nearest_bucket(size, buckets)) <= min(map(distance, buckets)) + 1e-12


@pytest.mark.parametrize("case", [(1024, 64), (512, 64), (16, 8)])
def test_between_neighbours_the_geometric_mean_decides(case):
    """At half a per cent of it to either side; the arithmetic mean is further off."""
    buckets = sorted(bucket_sizes(*case), key=lambda size: size[1] / size[0])
    for one, other in itertools.pairwise(buckets):
        mean = math.sqrt(one[1] / one[0] * other[1] / other[0])
        assert nearest_bucket((10_000, round(9_950 * mean)), buckets) == one
        assert nearest_bucket((10_000, round(10_050 * mean)), buckets) == other


def test_of_two_as_near_the_first_is_chosen():
    assert nearest_bucket((10, 10), [(2, 4), (4, 2)]) == (2, 4)
    assert nearest_bucket((10, 10), [(4, 2), (2, 4)]) == (4, 2)


def test_too_narrow_images_go_to_the_narrowest():
    assert nearest_bucket((10, 4000), bucket_sizes(1024, 64)) == (512, 2048)
    assert nearest_bucket((4000, 10), bucket_sizes(1024, 64)) == (2048, 512)


@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=20))
def test_every_row_is_in_its_bucket_and_no_bucket_is_empty(images):
    sizes = bucket_sizes(512, 64)
    buckets = assign_to_buckets(ImageSizes.of(enumerate(images)), sizes)
    assert sorted(row for rows in buckets.values() for row in rows) == list(range(len(images)))
    for size, rows in buckets.items():
        assert rows
        assert all(nearest_bucket(images[row], sizes) == size for row in rows)


# -- order

GROUPS = st.lists(st.integers(1, 20), min_size=1, max_size=5).map(
    lambda counts: [list(range(100 * place, 100 * place + count)) for place, count in enumerate(counts)]
)


@given(GROUPS, st.integers(1, 9), st.integers(0, 3))
def test_an_epoch_is_whole_batches_of_one_group_that_show_every_row(groups, batch, seed):
    order = epoch_order(groups, batch, make_generator(seed))
    assert len(order) == sum(round_up_to_batches(len(group), batch) for group in groups)
    for start in range(0, len(order), batch):
        assert len({row // 100 for row in order[start : start + batch]}) == 1
    shown = Counter(order)
    for group in groups:
        times = [shown.pop(row) for row in group]
        assert sum(times) - len(times) < batch  # what fills up the last batch
        assert max(times) - min(times) <= 1  # shared by all
    assert not shown


def test_rows_and_batches_and_fillers_are_random():
    groups = [list(range(10)), list(range(100, 109))]
    orders = [epoch_order(groups, 4, make_generator(0, epoch)) for epoch in range(200)]
    assert orders[0] == epoch_order(groups, 4, make_generator(0, 0))
    assert len({tuple(order) for order in orders}) == 200
    firsts = Counter(order[0] // 100 for order in orders)  # half of the batches are of each group
    assert abs(firsts[0] - 100) < 4 * 50**0.5
    again = Counter(row for order in orders for row, times in Counter(order).items() if times > 1 and row < 100)
    assert set(again) == set(range(10))
    assert all(abs(times - 40) < 4 * (200 * 0.2 * 0.8) ** 0.5 for times in again.values())


def test_one_group_that_need_not_be_kept_together_is_shuffled_alone():
    order = epoch_order([list(range(50))], 1, make_generator(7))
    assert sorted(order) == list(range(50))
    assert list(order) != list(range(50))
