"""Tar shards: what is a sample, and what is read of it; what all formats share is in `test_shards.py`."""

import fsspec
import pytest
from tar_shards import FlakyFileSystem, captioned, tar, to_memory, write_shards
from training_runs import trained

from zsnr_diffusers.training import PixelTrainingConfig, TrainingConfig, train
from zsnr_diffusers.training.checkpointing.fingerprint import _data_sha256
from zsnr_diffusers.training.data import remote
from zsnr_diffusers.training.data import tar_shards as sharded
from zsnr_diffusers.training.data.dataset import (
    check_images,
    image_size,
    open_rows,
    read_image,
    row_name,
)
from zsnr_diffusers.training.data.shard_formats import index_shards
from zsnr_diffusers.utils.distributed import Processes


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(remote, "RETRY_DELAYS", (0.0, 0.0))
    monkeypatch.setattr(FlakyFileSystem, "errors", [])


@pytest.fixture
def shard_options(options, image_folder, tmp_path):
    """A small run's options on three shards of ten images; the same images are in `image_folder`."""
    pattern = write_shards(tmp_path / "shards", captioned(image_folder))
    return {**options, "train_data_dir": None, "train_shards": pattern, "shuffle_shards": 2}


def opened(options, **changes):
    return open_rows(TrainingConfig(**{**options, **changes}))


def run(options, **changes):
    return trained(TrainingConfig(**{**options, **changes}))


def write(tmp_path, data, name="shard.tar"):
    (tmp_path / name).write_bytes(data)
    return {"train_shards": str(tmp_path / name), "train_data_dir": None}


def test_a_row_is_one_read_and_its_name_none(shard_options, tmp_path, monkeypatch):
    rows = opened(shard_options, train_shards=to_memory(tmp_path / "shards", "flaky"), shard_cache_gb=0.0)
    monkeypatch.setattr(FlakyFileSystem, "reads", [])
    row_name(rows, "image", 3)
    assert FlakyFileSystem.reads == []
    rows.select_columns(["text"])[3]["text"], rows[3]["image"]["bytes"]
    assert image_size(rows, "image", 3) == read_image(rows, "image", 3).size[::-1]
    assert len(FlakyFileSystem.reads) == 1


def test_image_and_caption_far_apart_are_read_one_by_one(options, tmp_path, monkeypatch):
    big = tar({"a.png": b"image", "a.npy": b"x" * (sharded._NEAR + 1), "a.txt": b"text"})
    fsspec.filesystem("flaky").pipe("/far/0.tar", big)
    rows = opened(options, train_data_dir=None, train_shards="flaky://far/0.tar", shard_cache_gb=0.0)
    monkeypatch.setattr(FlakyFileSystem, "reads", [])
    assert (rows[0]["text"], rows[0]["image"]["bytes"]) == ("text", b"image")
    assert FlakyFileSystem.reads == [4, 5]


def test_captions_in_json(options, tmp_path):
    json = b'{"text": ["one", "two"], "caption": "of json", "nothing": null}'
    folder = write(tmp_path, tar({"a.png": b"", "a.json": json, "a.txt": b" of txt\n", "b.png": b"", "b.json": json}))
    assert opened(options, **folder)[[0, 1]]["text"] == ["of txt", ["one", "two"]]
    assert opened(options, **folder, caption_column="caption")[1]["caption"] == "of json"
    assert opened(options, **folder, caption_column="nothing")[1]["nothing"] is None
    assert opened(options, **folder, caption_column="absent")[1]["absent"] is None


def test_a_byte_order_mark_is_no_part_of_a_caption(options, tmp_path):
    members = {
        "a.png": b"",
        "a.txt": "\ufeffsnow\r\n".encode(),
        "b.png": b"",
        "b.json": '\ufeff{"text": "sea"}'.encode(),
    }
    assert opened(options, **write(tmp_path, tar(members)))[[0, 1]]["text"] == ["snow", "sea"]


@pytest.mark.parametrize("bad", [b"{", b"[1]", b"\xff\xfe"])
def test_captions_that_cannot_be_read_are_named(options, tmp_path, bad):
    rows = opened(options, **write(tmp_path, tar({"a.png": b"", "a.json": bad})))
    with pytest.raises(sharded.CaptionError, match=r"cannot read the caption of a\.png in shard\.tar: "):
        rows[0]["text"]


def test_samples_that_are_not_whole_are_named_or_left_out(options, tmp_path, capsys):
    folder = write(tmp_path, tar({"a.png": b"", "b.png": b"", "b.txt": b"", "c.txt": b""}))
    config = TrainingConfig(**{**options, **folder})
    with pytest.raises(
        ValueError,
        match=r"2 samples of .*shard\.tar are incomplete:\s+a \(no caption\) in "
        r"shard\.tar",
    ):
        check_images(opened(options, **folder), config)
    config.on_bad_image = "skip"
    assert list(check_images(opened(options, **folder), config)) == [0]
    assert "c (no image) in shard.tar" in capsys.readouterr().out


def test_shards_without_samples(options, tmp_path):
    folder = write(tmp_path, tar({"readme.md": b""}))
    with pytest.raises(ValueError, match="contains no sample"):
        check_images(opened(options, **folder), TrainingConfig(**{**options, **folder}))


def test_indices_are_shared_by_processes_and_stored_once(shard_options, tmp_path, monkeypatch):
    config = TrainingConfig(**shard_options)
    read, urls = sharded.read_index, []
    monkeypatch.setattr(sharded, "read_index", lambda url, *args: urls.append(url) or read(url, *args))
    for rank in range(2):
        processes = Processes()
        processes.rank, processes.size = rank, 2
        index_shards(config, processes)
        assert len(urls) == (1, 3)[rank]
    opened(shard_options)
    assert len(urls) == 3
    damaged = sorted(config.cache_folder.rglob("*.npz"))[0]
    damaged.write_bytes(b"")
    opened(shard_options)
    assert len(urls) == 4
    assert damaged.stat().st_size > 0


def test_no_more_indices_are_held_than_needed(shard_options):
    rows = opened(shard_options, shuffle_shards=1)
    for index in (0, 5, 9, 0, 5, 9):
        assert rows[index]["text"] == opened(shard_options)[index]["text"]
        assert len(rows.shards._indices) <= 2


def test_the_fingerprint_is_of_names_sizes_and_places(shard_options, image_folder, tmp_path):
    def sha256(**changes):
        rows = opened({**shard_options, **changes})
        return _data_sha256(rows, range(len(rows)), "image")

    first = sha256()
    moved = write_shards(tmp_path / "moved", captioned(image_folder))
    assert sha256(train_shards=moved) == first
    samples = captioned(image_folder)
    samples[9] = (samples[9][0], samples[9][1], samples[9][2] + "!")
    assert sha256(train_shards=write_shards(tmp_path / "caption", samples)) != first
    assert sha256(train_shards=write_shards(tmp_path / "sizes", captioned(image_folder), (3, 4, 3))) != first
    assert sha256(train_shards=moved.replace("{0..2}", "{0..1}")) != first


def test_tars_have_no_classes(small_run, shard_options):
    options = {**small_run, "train_shards": shard_options["train_shards"], "class_column": "label"}
    with pytest.raises(ValueError, match="--class_column needs --dataset_name, --train_data_dir, or parquet files"):
        train(PixelTrainingConfig(**options))
