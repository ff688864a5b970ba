import functools

from hypothesis import given
from hypothesis import strategies as st

from zsnr_diffusers.training.data.loader import make_generator
from zsnr_diffusers.training.data.shuffle import ShardShuffle


def order(counts, width, seed=0, epoch=0):
    return ShardShuffle(counts, width, functools.partial(make_generator, seed, 0, epoch))


@given(st.lists(st.integers(0, 9), max_size=9), st.integers(1, 10))
def test_every_row_comes_once_and_shards_stay_together(counts, width):
    found = order(counts, width)
    rows = list(found[:])
    assert sorted(rows) == list(range(sum(counts))) == list(range(len(found)))
    assert [found[place] for place in range(len(found))] == rows
    shard_of = [number for number, count in enumerate(counts) for _ in range(count)]
    place = 0
    for window in range(0, len(counts), width):
        together = [shards for shards in found._windows[window // width]]
        size = sum(map(len, together))
        shards = {shard_of[row] for row in rows[place : place + size]}
        assert len(shards) <= width
        assert {row for part in together for row in part} == set(rows[place : place + size])
        place += size


def test_orders_differ_by_seed_and_epoch_and_by_nothing_else():
    counts = [7, 5, 9, 4]
    orders = {(seed, epoch): tuple(order(counts, 2, seed, epoch)[:]) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(set(orders.values())) == 6
    again = order(counts, 2, 1, 2)
    assert tuple(again[place] for place in reversed(range(25))) == orders[1, 2][::-1]


def test_rows_are_uniform_over_a_window():
    """Where one row comes, over many epochs: each place of its window alike, and each window alike."""
    places = [order([6, 6, 6, 6], 2, 0, epoch)[:].index(3) for epoch in range(960)]
    expected = 960 / 24
    chi_squared = sum((places.count(place) - expected) ** 2 / expected for place in range(24))
    assert chi_squared < 49.7  # 23 degrees of freedom, p = 0.001


def test_windows_of_an_epoch_are_shuffled_each_in_its_own_way():
    rows = order([50, 50], 1)
    first, second = rows[:50], rows[50:]
    assert [row % 50 for row in first] != [row % 50 for row in second]
