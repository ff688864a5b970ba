import errno
import hashlib
import os
import pickle
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from zsnr_diffusers.training.data.file_index import FileIndex
from zsnr_diffusers.training.data.remote import ShardError
from zsnr_diffusers.training.stable_diffusion import row_cache as module
from zsnr_diffusers.training.stable_diffusion.row_cache import Cache
from zsnr_diffusers.utils.hashing import file_sha256

CONTENTS = [f"image {i}".encode() for i in range(5)]
VALUES = {
    "mean": torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0)),
    "std": torch.rand(5, 4, generator=torch.Generator().manual_seed(1)).bfloat16(),
}


def rows(*indices):
    return [CONTENTS[i] for i in indices], {name: values[list(indices)] for name, values in VALUES.items()}


@pytest.fixture
def written(tmp_path):
    """A folder with one shard of all rows."""
    Cache(tmp_path, "x", {"weights": "a"}).write([rows(0, 1, 2), rows(3, 4)])
    return tmp_path


def found(folder, facts=None, contents=CONTENTS):
    cache = Cache(folder, "x", facts or {"weights": "a"})
    return cache, cache.find_missing(contents)


def check(cache, contents=CONTENTS):
    for content in contents:
        row = cache[content]
        assert row.keys() == VALUES.keys()
        for name, values in VALUES.items():
            assert row[name].dtype == values.dtype
            assert torch.equal(row[name], values[CONTENTS.index(content)])


def shards(folder):
    return sorted(folder.rglob("*.safetensors"))


def test_rows_come_back_as_they_were_and_only_by_what_they_were_made_of(written):
    cache, missing = found(written, contents=[b"other", *CONTENTS, b"other"])
    assert missing == [b"other"]
    check(cache)
    _, missing = found(written, {"weights": "b"})
    assert missing == CONTENTS
    other = Cache(written, "x", {"weights": "b"})
    os.renames(shards(written)[0], other.folder / shards(written)[0].name)  # a shard that strayed into another cache
    assert other.find_missing(CONTENTS) == CONTENTS


def test_shards_end_when_they_are_large_or_slow(tmp_path, monkeypatch):
    batches = [rows(0), rows(1, 2), rows(3), rows(4)]
    monkeypatch.setattr(module, "SHARD_BYTES", 2 * 32)  # a row is 2 x 3 x 4 + 4 x 2 = 32 bytes
    Cache(tmp_path, "x", {"weights": "a"}).write(iter(batches))
    assert len(shards(tmp_path)) == 2
    cache, missing = found(tmp_path)
    assert not missing
    check(cache)
    monkeypatch.undo()
    monkeypatch.setattr(module, "SHARD_SECONDS", 0)
    Cache(tmp_path / "slow", "x", {"weights": "a"}).write(iter(batches))
    assert len(shards(tmp_path / "slow")) == 4


def test_reading_processes_open_shards_themselves(written):
    cache, _ = found(written)
    check(cache)
    check(pickle.loads(pickle.dumps(cache)))


def test_finding_more_keeps_what_was_found(written):
    cache, _ = found(written, contents=CONTENTS[:2])
    assert cache.find_missing([*CONTENTS, b"more"]) == [b"more"]
    check(cache)


def test_every_flipped_byte_is_noticed(written):
    """A flip in a key that is not looked for may stay; none in what is read does."""
    (shard,) = shards(written)
    whole = shard.read_bytes()
    for at in range(len(whole)):
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        assert found(written, contents=CONTENTS[:1])[1] == CONTENTS[:1]
    shard.write_bytes(whole)
    assert not found(written)[1]


@given(st.data())
def test_cut_off_and_lengthened_shards_are_noticed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    Cache(folder, "x", {"weights": "a"}).write([rows(0, 1, 2, 3, 4)])
    (shard,) = shards(folder)
    whole = shard.read_bytes()
    length = data.draw(st.integers(0, len(whole) + 8).filter(lambda n: n != len(whole)))
    shard.write_bytes((whole + bytes(8))[:length])
    cache, missing = found(folder)
    assert missing == CONTENTS
    assert cache.damaged == [shard]


def test_damaged_shards_are_removed_and_written_anew(written):
    (shard,) = shards(written)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"!")
    cache, missing = found(written)
    shard.write_bytes(whole)  # by another run
    cache.prune()
    assert shards(written) == [shard]
    shard.write_bytes(whole[:-1] + b"!")
    cache.prune()
    cache.prune()
    assert not shards(written)
    cache.write([rows(0, 1, 2, 3, 4)])
    assert not cache.find_missing(missing)
    check(cache)
    assert shards(written) == [shard]  # the same rows make the same file


def test_a_full_disk_leaves_finished_shards_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 1)
    sync, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) == 3:  # the second file; a folder is synced after the first
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    cache = Cache(tmp_path, "x", {"weights": "a"})
    with pytest.raises(OSError, match="No space left"):
        cache.write([rows(0, 1), rows(2), rows(3)])
    assert cache.find_missing(CONTENTS) == CONTENTS[2:]
    check(cache, CONTENTS[:2])
    assert len(list(cache.folder.iterdir())) == 1


def test_only_what_was_abandoned_long_ago_is_removed(written):
    cache, _ = found(written)
    old, new = cache.folder / ".old.partial", cache.folder / ".new.partial"
    for partial in (old, new):
        partial.write_bytes(b"half")
    os.utime(old, (time.time() - 1e6,) * 2)
    cache.prune()
    assert not old.exists()
    assert new.exists()
    assert not cache.find_missing(CONTENTS)


# -- what is not hashed again


def flip_unseen(shard, at):
    """Change a byte of a file, and leave its size and times as they were."""
    times, whole = shard.stat(), bytearray(shard.read_bytes())
    whole[at] ^= 1
    shard.write_bytes(whole)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_shards_that_have_not_changed_are_hashed_once(written, monkeypatch):
    hashed = []
    monkeypatch.setattr(module, "file_sha256", lambda path: hashed.append(path) or file_sha256(path))
    for rehash, times in ((False, 1), (False, 1), (True, 2), (False, 2)):
        index = FileIndex(written / "files.npy", rehash=rehash)
        assert not Cache(written, "x", {"weights": "a"}, index).find_missing(CONTENTS)
        assert len(hashed) == times


def test_damage_in_a_known_shard_is_found_when_its_row_is_read_or_with_rehash(written):
    def opened(**options):
        return Cache(written, "x", {"weights": "a"}, FileIndex(written / "files.npy", **options))

    assert not opened().find_missing(CONTENTS)
    for shard in shards(written):
        whole = shard.read_bytes()
        flip_unseen(shard, whole.find(VALUES["mean"][3].numpy().tobytes()))
    cache = opened()
    assert not cache.find_missing(CONTENTS)
    with pytest.raises(ShardError, match=r"is damaged in row \d+: restart with --rehash"):
        [cache[content] for content in CONTENTS]
    assert opened(rehash=True).find_missing(CONTENTS)


def test_caches_of_before_have_no_checksums_and_are_read(written, tmp_path):
    for shard in shards(written):
        with safe_open(shard, "pt") as file:
            facts, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        del tensors["crc32"]
        data = save(tensors, metadata=facts)
        shard.unlink()
        shard.with_stem(hashlib.sha256(data).hexdigest()).write_bytes(data)
    cache, missing = found(written)
    assert not missing
    check(cache)
