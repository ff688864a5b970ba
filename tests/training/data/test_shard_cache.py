"""Row groups on a local disk: read once for all processes, and no more of them than there is room for."""

import multiprocessing
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow
import pytest

from zsnr_diffusers.training.data import shard_cache
from zsnr_diffusers.training.data.remote import ShardError
from zsnr_diffusers.training.data.shard_cache import ShardCache, map_table, write_table

KEYS = [f"{number:032x}" for number in range(5)]


def batches(key, rows=100):
    """Two batches, of about 1,600 bytes."""
    return [pyarrow.RecordBatch.from_pydict({"value": [int(key, 16)] * (rows // 2)}) for _ in range(2)]


class Reads(list):
    """Notes which keys are read."""

    def of(self, key):
        def read():
            self.append(key)
            return iter(batches(key))

        return read


@pytest.fixture
def reads():
    return Reads()


def get(cache, key, reads, size=1600):
    table = cache.get(key, size, reads.of(key))
    assert table.column("value").to_pylist() == [int(key, 16)] * 100
    return table


def whole_files(folder):
    return {path.stem for path in folder.glob("*.arrow")}


def test_a_table_is_read_once_by_all_caches_of_a_folder(tmp_path, reads):
    caches = [ShardCache(tmp_path / "new", 10**6, 2) for _ in range(2)]
    for key in (KEYS[0], KEYS[1], KEYS[0]):
        for cache in caches:
            get(cache, key, reads)
    assert reads == KEYS[:2]
    assert whole_files(tmp_path / "new") == set(KEYS[:2])


@pytest.mark.parametrize("folder", [True, False])
def test_no_more_tables_are_open_than_needed(tmp_path, reads, folder):
    cache = ShardCache(tmp_path if folder else None, 10**6, 2)
    for key in (0, 1, 0, 2, 0, 1):
        get(cache, KEYS[key], reads)
        assert len(cache._open) <= 2
    assert reads == [KEYS[key] for key in ((0, 1, 2) if folder else (0, 1, 2, 1))]
    assert whole_files(tmp_path) == (set(KEYS[:3]) if folder else set())


def test_the_least_recently_used_make_room(tmp_path, reads):
    size = sum(path.stat().st_size for path in [tmp_path / "one.arrow"] if not write_table(path, batches(KEYS[0])))
    (tmp_path / "one.arrow").unlink()
    cache = ShardCache(tmp_path, 3 * size, 1)
    for moment, key in enumerate(KEYS[:3]):
        get(cache, key, reads, size)
        os.utime(tmp_path / f"{key}.arrow", (moment, moment))  # clocks of file systems are coarse
    get(cache, KEYS[0], reads, size)  # is used again
    get(cache, KEYS[3], reads, size)
    assert whole_files(tmp_path) == {KEYS[0], KEYS[2], KEYS[3]}
    get(cache, KEYS[4], reads, 3 * size)  # is estimated to take all
    assert whole_files(tmp_path) == {KEYS[4]}


def test_a_table_that_is_in_use_may_be_removed(tmp_path, reads):
    table = get(ShardCache(tmp_path, 10**6, 1), KEYS[0], reads)
    get(ShardCache(tmp_path, 0, 1), KEYS[1], reads)
    assert whole_files(tmp_path) == {KEYS[1]}
    assert table.column("value")[99].as_py() == 0


def test_a_damaged_file_is_read_again(tmp_path, reads):
    get(ShardCache(tmp_path, 10**6, 1), KEYS[0], reads)
    (file,) = tmp_path.glob("*.arrow")
    for content in (b"", file.read_bytes()[:-1], b"ARROW1"):
        file.unlink()
        file.write_bytes(content)
        assert map_table(file) is None
        get(ShardCache(tmp_path, 10**6, 1), KEYS[0], reads)
    assert len(reads) == 4


@pytest.mark.parametrize("error", [ShardError("in the midst"), OSError(28, "No space left on device")])
def test_what_ends_with_an_error_leaves_nothing(tmp_path, error):
    def read():
        yield batches(KEYS[0])[0]
        raise error

    cache = ShardCache(tmp_path, 10**6, 1)
    said = (
        "^in the midst$"
        if isinstance(error, ShardError)
        else r" cannot store a row group: .* space .*\. Free some space"
    )
    with pytest.raises(ShardError, match=said):
        cache.get(KEYS[0], 100, read)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert get(cache, KEYS[0], Reads())


def test_a_file_that_another_process_wrote_and_uses_need_not_be_replaced(tmp_path):
    """As on Windows, where it cannot be."""

    def read():
        write_table(tmp_path / f"{KEYS[0]}.arrow", batches(KEYS[0]))
        yield batches(KEYS[0])[0]
        raise PermissionError("in use")

    assert len(ShardCache(tmp_path, 10**6, 1).get(KEYS[0], 100, read)) == 100


def test_partial_files_of_killed_processes_are_removed_and_others_not(tmp_path, reads):
    old, new = tmp_path / ".old.partial", tmp_path / ".new.partial"
    for file, age in ((old, shard_cache._ABANDONED + 60), (new, 60)):
        file.write_bytes(b"x")
        os.utime(file, (time.time() - age,) * 2)
    get(ShardCache(tmp_path, 10**6, 1), KEYS[0], reads)
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.parametrize("missing", ["fcntl", "locks"])
def test_without_locks_each_reads_for_itself(tmp_path, reads, monkeypatch, missing):
    if missing == "fcntl":
        monkeypatch.setattr(shard_cache, "fcntl", None)
    else:
        monkeypatch.setattr(shard_cache.fcntl, "lockf", lambda *args: (_ for _ in ()).throw(OSError("ENOLCK")))
    get(ShardCache(tmp_path, 10**6, 1), KEYS[0], reads)
    assert whole_files(tmp_path) == {KEYS[0]}


def test_where_files_cannot_be_mapped_tables_are_in_memory(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(shard_cache, "map_table", lambda file: None)
    get(ShardCache(tmp_path, 10**6, 1), KEYS[0], reads)


def test_threads_share_a_table(tmp_path, reads):
    cache = ShardCache(tmp_path, 10**6, 5)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: get(cache, KEYS[number % 5], reads), range(100)))
    assert sorted(reads) == KEYS


def test_a_copy_for_another_process_holds_no_table(tmp_path, reads):
    cache = ShardCache(tmp_path, 10**6, 1)
    get(cache, KEYS[0], reads)
    content = pickle.dumps(cache)
    assert len(content) < 1000
    get(pickle.loads(content), KEYS[0], reads)
    assert reads == KEYS[:1]


def _read_slowly(folder, start, log):
    """Read two keys, and note each that nobody had read."""

    def read(key):
        with log.open("a") as notes:
            notes.write(f"{key}\n")
        for batch in batches(key):
            time.sleep(0.05)
            yield batch

    start.wait()
    cache = ShardCache(folder, 10**6, 2)
    for key in KEYS[:2]:
        assert len(cache.get(key, 1600, lambda key=key: read(key))) == 100


@pytest.mark.full
@pytest.mark.skipif(shard_cache.fcntl is None, reason="no locks")
def test_processes_wait_for_the_one_that_reads(tmp_path):
    context = multiprocessing.get_context("fork")
    start, log = context.Event(), tmp_path / "log"
    processes = [context.Process(target=_read_slowly, args=(tmp_path / "cache", start, log)) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(log.read_text().split()) == KEYS[:2]


def test_space_that_is_missing(tmp_path, monkeypatch):
    write_table(tmp_path / "one.arrow", batches(KEYS[0]))
    stored = (tmp_path / "one.arrow").stat().st_size
    usage = shard_cache.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shard_cache.shutil, "disk_usage", lambda path: usage)
    cache = ShardCache(tmp_path, 10**6, 1)
    assert cache.missing_space(stored + 1001) == 1
    assert cache.missing_space(10**9) == 10**6 - stored - 1000  # no more than the limit is stored
    assert ShardCache(tmp_path / "not" / "yet", 10**6, 1).missing_space(900) == -100
    assert ShardCache(None, 0, 1).missing_space(10**9) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["one.arrow"]
