"""Tars that lie elsewhere are copied to the local disk while their first rows are read by range."""

import os
import time
from pathlib import Path

import pytest
from tar_shards import FlakyFileSystem, captioned, to_memory, write_shards

from zsnr_diffusers.training import TrainingConfig
from zsnr_diffusers.training.data import shard_cache
from zsnr_diffusers.training.data.dataset import open_rows
from zsnr_diffusers.training.data.shard_cache import ShardCache, map_copy

KEYS = [f"{number:032x}" for number in range(4)]


def wait_for(condition):
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def copies(folder):
    return sorted(path.stem for path in Path(folder).glob("*.copy"))


@pytest.fixture
def elsewhere(options, image_folder, tmp_path, reads):
    """Options of a run on three tars that lie on no disk."""
    write_shards(tmp_path / "shards", captioned(image_folder))
    pattern = to_memory(tmp_path / "shards", "flaky")
    return {**options, "train_data_dir": None, "train_shards": pattern, "shuffle_shards": 3}


def test_rows_are_read_by_range_until_their_tar_is_there(elsewhere, reads, tmp_path, image_folder):
    rows = open_rows(TrainingConfig(**elsewhere))
    reads.clear()
    first = [rows[index]["image"]["bytes"] for index in range(10)]
    assert first == [path.read_bytes() for path in sorted(image_folder.glob("*.png"))]
    wait_for(lambda: len(copies(tmp_path / "run" / "cache" / "shard_data")) == 3)
    reads.clear()
    assert [rows[index]["image"]["bytes"] for index in range(10)] == first
    assert [rows[index]["text"] for index in range(10)] == [*rows["text"]]
    again = open_rows(TrainingConfig(**elsewhere))
    assert [again[index]["image"]["bytes"] for index in range(10)] == first
    assert reads == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shard_cache_gb": 1e-6}, "--shard_cache_gb=1e-06 is less than the 0.00 GB that --shuffle_shards=3 of them"),
        ({"shard_cache_gb": 0.0}, ""),
        ({"dry_run": True}, ""),
    ],
)
def test_nothing_is_copied_where_it_would_not_help_or_is_not_wanted(
    elsewhere, reads, tmp_path, changes, reason, capsys
):
    rows = open_rows(TrainingConfig(**{**elsewhere, **changes}))
    assert reason in capsys.readouterr().out
    assert [rows[index]["image"]["bytes"][:4] for index in range(10)] == [b"\x89PNG"] * 10
    assert rows.shards.cache._copier is None
    assert not (tmp_path / "run" / "cache" / "shard_data").exists()


def test_tars_on_this_disk_are_read_where_they_lie(options, image_folder, tmp_path):
    pattern = write_shards(tmp_path / "shards", captioned(image_folder))
    rows = open_rows(TrainingConfig(**{**options, "train_data_dir": None, "train_shards": pattern}))
    assert rows[0]["image"]["bytes"]
    assert rows.shards.cache._copier is None


def test_a_place_that_fails_is_read_by_range_and_tried_again_later(elsewhere, reads, tmp_path, monkeypatch):
    rows = open_rows(TrainingConfig(**elsewhere))
    data = rows[0]["image"]["bytes"]
    monkeypatch.setattr(shard_cache, "_RETRY", 0.0)
    folder = tmp_path / "run" / "cache" / "shard_data"
    wait_for(lambda: copies(folder))
    (copy,) = folder.glob("*.copy")
    copy.write_bytes(copy.read_bytes()[:-1])  # cut off
    rows = open_rows(TrainingConfig(**elsewhere))
    failed = []

    def cat_file(self, path, start=None, end=None, original=FlakyFileSystem.cat_file, **kwargs):
        if end - start > 20_000 and not failed:
            failed.append(path)
            raise OSError("no route")
        return original(self, path, start=start, end=end, **kwargs)

    monkeypatch.setattr(FlakyFileSystem, "cat_file", cat_file)
    wait_for(lambda: rows[0]["image"]["bytes"] == data and failed and map_copy(copy, rows.shards.all[0].state.size))


# -- the cache itself


def copied(cache, key, content):
    wait_for(lambda: cache.get_copy(key, len(content), lambda: iter([content[:3], content[3:]])) is not None)
    return cache.get_copy(key, len(content), lambda: iter([]))[:]


def test_copies_and_tables_share_the_room_and_the_least_recently_used_go(tmp_path):
    cache = ShardCache(tmp_path, 3000, 2)
    for moment, key in enumerate(KEYS[:3]):
        assert copied(cache, key, bytes([moment]) * 1000) == bytes([moment]) * 1000
        os.utime(tmp_path / f"{key}.copy", (moment, moment))
    assert copied(ShardCache(tmp_path, 3000, 2), KEYS[0], bytes(1000)) == bytes(1000)  # is used again
    assert copied(cache, KEYS[3], bytes(1000)) == bytes(1000)
    assert copies(tmp_path) == [KEYS[0], KEYS[2], KEYS[3]]
    assert cache.get_copy(KEYS[1], 3001, lambda: iter([bytes(3001)])) is None  # more than there may be
    assert len(cache._open) <= 2


def test_what_another_process_copies_is_not_copied_twice(tmp_path):
    read = []
    cache = ShardCache(tmp_path, 3000, 2)

    def parts():
        read.append(os.getpid())
        yield b"abc"

    tmp_path.joinpath(".lock").touch()
    child, parent = os.pipe()
    if (pid := os.fork()) == 0:  # locks of one process do not stop it
        with shard_cache._hold(tmp_path, KEYS[0]):
            os.read(child, 1)
        os._exit(0)
    wait_for(lambda: not _is_free(tmp_path, KEYS[0]))
    assert cache._store_copy(KEYS[0], 3, parts) is None
    assert read == []
    os.write(parent, b"x")
    os.waitpid(pid, 0)
    cache._store_copy(KEYS[0], 3, parts)
    cache._store_copy(KEYS[0], 3, parts)
    assert read == [os.getpid()]
    assert cache.get_copy(KEYS[0], 3, parts)[:] == b"abc"


def _is_free(folder, key):
    with shard_cache._hold(folder, key, wait=False) as held:
        return held
