import functools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from zsnr_diffusers.training.data.buckets import round_up_to_batches
from zsnr_diffusers.training.data.loader import make_generator
from zsnr_diffusers.training.data.shuffle import RowGroups, ShardShuffle


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


# -- groups, each in batches of its own

CASES = st.lists(st.lists(st.integers(-1, 2), max_size=12), min_size=1, max_size=6)


@given(CASES, st.integers(1, 7), st.integers(1, 4), st.integers(0, 2))
def test_batches_are_of_one_group_and_every_row_comes_in_its_turn(shards, width, batch, seed):
    """Rows of shards by their group, -1 for what cannot be used."""
    group_of = [group for shard in shards for group in shard]
    groups = [[row for row, found in enumerate(group_of) if found == group] for group in range(3)]
    counts = [*map(len, shards)]
    lengths = set()
    for epoch in range(3):
        stream = functools.partial(make_generator, seed, 0, epoch)
        rows = ShardShuffle(counts, width, stream, RowGroups(groups, counts), batch)
        shown = list(rows[:])
        lengths.add(len(shown))
        for at in range(0, len(shown), batch):
            assert len({group_of[row] for row in shown[at : at + batch]}) == 1
        times = Counter(shown)
        for group in groups:
            mine = [times.pop(row) for row in group]
            assert sum(mine) - len(mine) < batch
        assert not times
        assert [rows[place] for place in reversed(range(len(rows)))] == shown[::-1]
    assert lengths == {sum(round_up_to_batches(len(group), batch) for group in groups)}  # the same for every epoch


def test_only_what_fills_no_batch_leaves_its_window():
    counts, groups = [40] * 6, [[*range(0, 240, 2)], [*range(1, 240, 2)]]
    rows = ShardShuffle(counts, 2, functools.partial(make_generator, 0, 0, 0), RowGroups(groups, counts), 8)
    shard_of = [row // 40 for row in rows[:]]
    assert [len(set(shard_of[at : at + 80])) for at in (0, 80, 160)] == [2, 2, 2]
    rows = ShardShuffle(counts, 1, functools.partial(make_generator, 0, 0, 0), RowGroups(groups, counts), 8)
    shard_of = [row // 40 for row in rows[:]]
    assert [len(set(shard_of[at : at + 32])) for at in range(0, 192, 32)] == [1] * 6  # 20 rows are 2 batches and 4
    assert len(rows) == 240
