"""Training on tar shards: the rows, their order, and what becomes of a run when they cannot be read."""

import re
from pathlib import Path

import datasets
import fsspec
import pytest
import torch
from child_processes import exit_code, start_ranks
from diffusers import UNet2DConditionModel
from tar_shards import FlakyFileSystem, captioned, serve_ranges, tar, to_memory, write_shards
from training_runs import logged, same, trained, weights

from zsnr_diffusers.training import PixelTrainingConfig, TrainingConfig, TrainingError, train
from zsnr_diffusers.training.checkpointing.checkpoint import list_checkpoints, read_checkpoint
from zsnr_diffusers.training.checkpointing.fingerprint import _data_sha256
from zsnr_diffusers.training.data import remote
from zsnr_diffusers.training.data import tar_shards as sharded
from zsnr_diffusers.training.data.dataset import (
    check_images,
    image_sha256,
    image_size,
    open_rows,
    read_image,
    row_name,
)
from zsnr_diffusers.training.data.remote import ShardError
from zsnr_diffusers.training.data.shard_formats import index_shards
from zsnr_diffusers.training.reporting.luminance import read_luminance_file
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


# -- rows


def test_rows_are_those_of_the_folder(shard_options, options, image_folder):
    rows = opened(shard_options)
    folder = open_rows(TrainingConfig(**options))
    assert isinstance(folder, datasets.Dataset)
    assert len(rows) == len(folder) == 10
    assert rows.column_names == folder.column_names
    for index in range(10):
        assert list(rows[index]) == list(folder[index])
        assert rows[index]["text"] == folder[index]["text"]
        assert read_image(rows, "image", index).tobytes() == read_image(folder, "image", index).tobytes()
        assert image_sha256(rows, "image", index) == image_sha256(folder, "image", index)
    assert rows.select_columns(["text"])[[7, 0]] == folder.select_columns(["text"])[[7, 0]]
    assert row_name(rows, "image", 5) == f"5 ({captioned(image_folder)[5][0]}.png in 1.tar)"
    with pytest.raises(KeyError):
        rows.select_columns(["text"])[0]["image"]


def test_a_row_is_one_read_and_its_name_none(shard_options, tmp_path, monkeypatch):
    rows = opened(shard_options, train_shards=to_memory(tmp_path / "shards", "flaky"))
    monkeypatch.setattr(FlakyFileSystem, "reads", [])
    row_name(rows, "image", 3)
    assert FlakyFileSystem.reads == []
    rows.select_columns(["text"])[3]["text"], rows[3]["image"]["bytes"]
    assert image_size(rows, "image", 3) == read_image(rows, "image", 3).size[::-1]
    assert len(FlakyFileSystem.reads) == 1


def test_image_and_caption_far_apart_are_read_one_by_one(options, tmp_path, monkeypatch):
    big = tar({"a.png": b"image", "a.npy": b"x" * (sharded._NEAR + 1), "a.txt": b"text"})
    fsspec.filesystem("flaky").pipe("/far/0.tar", big)
    rows = opened(options, train_data_dir=None, train_shards="flaky://far/0.tar")
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
    with pytest.raises(ValueError, match=r"2 samples of .*shard\.tar are not whole:\s+a \(no caption\) in shard\.tar"):
        check_images(opened(options, **folder), config)
    config.on_bad_image = "skip"
    assert list(check_images(opened(options, **folder), config)) == [0]
    assert "c (no image) in shard.tar" in capsys.readouterr().out


def test_shards_without_samples(options, tmp_path):
    folder = write(tmp_path, tar({"readme.md": b""}))
    with pytest.raises(ValueError, match="holds no image"):
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


# -- runs


@pytest.mark.full
def test_where_shards_lie_does_not_matter_nor_do_workers(shard_options, tmp_path):
    first = run(shard_options, output_dir=str(tmp_path / "disk"))
    memory = to_memory(tmp_path / "shards")
    assert same(run(shard_options, train_shards=memory, dataloader_num_workers=2), first)


@pytest.mark.full
def test_over_http_with_workers(shard_options, tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec reads HTTP with it")
    with serve_ranges(tmp_path / "shards") as place:
        changes = {"train_shards": f"{place}/{{0..2}}.tar", "dataloader_num_workers": 2}
        over_http = run(shard_options, output_dir=str(tmp_path / "http"), **changes)
    assert same(over_http, run(shard_options))


@pytest.mark.full
def test_resumed_is_bitwise_the_uninterrupted_run(shard_options, tmp_path):
    """Across the end of an epoch, which comes after five steps."""
    shard_options |= {"max_train_steps": 7, "checkpointing_steps": 3, "lr_scheduler": "constant"}
    whole = run(shard_options, output_dir=str(tmp_path / "whole"))
    run(shard_options, max_train_steps=3)
    assert same(run(shard_options, resume=True), whole)
    with pytest.raises(ValueError, match="--shuffle_shards was 2 and is now 1"):
        run(shard_options, resume=True, shuffle_shards=1)


@pytest.mark.full
def test_two_processes_give_the_loss_of_one(shard_options, tmp_path):
    shard_options |= {"report_to": "tensorboard"}
    run(shard_options)
    two = {**shard_options, "train_batch_size": 1, "output_dir": str(tmp_path / "two")}
    two = {name: value for name, value in two.items() if value is not None}
    assert [exit_code(rank) for rank in start_ranks(two, tmp_path)] == [0, 0]
    losses = [[value for _, value in logged(folder)["loss"]] for folder in (two["output_dir"], tmp_path / "run")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # a sum in another order; float32 keeps seven digits


@pytest.fixture
def damaged(shard_options, image_folder, tmp_path):
    """Options of shards, the second of which has a bad image and a pickle that is called an image."""
    samples = captioned(image_folder)
    samples[5] = (samples[5][0], b"\x80\x04cposix\nsystem\n(S'exit 1'\ntR.", samples[5][2])
    samples[6] = (samples[6][0], samples[6][1][:60], samples[6][2])
    write_shards(tmp_path / "shards", samples)
    return {**shard_options, "max_train_steps": 5}


@pytest.mark.full
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_ends_the_run_with_its_name_and_the_checkpoint(damaged, workers):
    damaged |= {"checkpointing_steps": 1, "dataloader_num_workers": workers}
    with pytest.raises(TrainingError, match=r"^At step \d: cannot read image 0000\d\.png in 1\.tar: ") as error:
        run(damaged)
    kept = [path.name for path in list_checkpoints(Path(damaged["output_dir"]))]
    end = rf"; the last good checkpoint is \S*{kept[-1]}\. " if kept else r"; there was no checkpoint yet\. "
    assert re.search(f"{end}Then --resume\\.$", str(error.value))
    assert "\n" not in str(error.value)


def test_a_bad_image_is_named_and_the_next_row_shown(damaged, shard_options, capsys):
    config = TrainingConfig(**{**damaged, "on_bad_image": "skip"})
    train(config)
    out = capsys.readouterr().out
    assert out.count("the next row is shown in its place") == 2
    from zsnr_diffusers.training.stable_diffusion import StableDiffusionTask

    samples = StableDiffusionTask(config).samples(range(10))
    order = list(samples._epoch_order(0)[:])
    place = next(place for place in range(9) if order[place] in (5, 6) and order[place + 1] not in (5, 6))
    shown, after = samples[place], samples[place + 1]
    # Mirrored or not, and noised otherwise: a sample's randomness is that of its place.
    assert torch.equal(shown["pixel_values"], after["pixel_values"])
    assert not torch.equal(shown["noise"], after["noise"])
    assert same(run(damaged, on_bad_image="skip", resume=True), weights(damaged["output_dir"]))


@pytest.mark.full
def test_bad_images_are_not_measured_either(damaged):
    changes = {"on_bad_image": "skip", "luminance_images": 10, "num_inference_steps": 1, "max_train_steps": 1}
    train(TrainingConfig(**{**damaged, **changes}))
    coverages = read_luminance_file(Path(damaged["output_dir"]))
    assert [(one.generated.n, one.real.n) for one in coverages.values()] == [(8, 8)] * 2


def test_nothing_but_bad_images_ends_the_run(options, tmp_path):
    folder = write(tmp_path, tar({f"{i}.{kind}": b"" for i in range(20) for kind in ("png", "txt")}))
    with pytest.raises(TrainingError, match=r"At step 1: cannot read image \d+\.png in shard\.tar: the file is empty"):
        run(options, **folder, on_bad_image="skip")


@pytest.mark.full
@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_fails_in_the_midst_ends_the_run_and_it_goes_on_later(
    shard_options, tmp_path, monkeypatch, workers
):
    shard_options |= {"checkpointing_steps": 1, "dataloader_num_workers": workers}
    shard_options |= {"cache_dir": str(tmp_path / "cache"), "train_shards": to_memory(tmp_path / "shards", "flaky")}
    whole = run(shard_options, output_dir=str(tmp_path / "whole"))
    error = RuntimeError("500, server error")
    hiccups = [None, error, error, None, error]  # each is tried three times
    monkeypatch.setattr(FlakyFileSystem, "errors", [*hiccups, None, None, error])
    with pytest.raises(
        TrainingError, match=r"^At step 3: flaky://shards/\d\.tar cannot be read: 500, .*000002\. Then"
    ):
        run(shard_options)
    monkeypatch.setattr(FlakyFileSystem, "errors", [])
    assert same(run(shard_options, resume=True), whole)


def test_a_missing_shard_and_a_truncated_one_stop_before_the_start(shard_options, tmp_path):
    with pytest.raises(ShardError, match=r"3\.tar cannot be read: there is no such file"):
        run(shard_options, train_shards=shard_options["train_shards"].replace("..2", "..3"))
    file = tmp_path / "shards" / "1.tar"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ShardError, match=r"1\.tar is no whole tar"):
        run(shard_options)
    with pytest.raises(ShardError, match="no file matches"):
        run(shard_options, train_shards=str(tmp_path / "*.zip"))


def test_a_shard_that_changed_is_not_resumed(shard_options, image_folder, tmp_path):
    run(shard_options, max_train_steps=2)
    write_shards(tmp_path / "shards", captioned(image_folder), (3, 4, 3))
    with pytest.raises(ValueError, match="the data was"):
        run(shard_options, resume=True)


@pytest.mark.full
def test_a_dry_run_stores_nothing_unless_told_where(shard_options, tmp_path, capsys):
    train(TrainingConfig(**{**shard_options, "dry_run": True}))
    assert "10 images at 64 x 64" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    train(TrainingConfig(**{**shard_options, "dry_run": True, "cache_dir": str(tmp_path / "cache")}))
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == 3
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_nothing_is_cached_of_shards_unless_asked(shard_options, tmp_path):
    run(shard_options)
    assert {path.name for path in (tmp_path / "run" / "cache").iterdir()} == {"shards"}
    run(shard_options, cache="both", output_dir=str(tmp_path / "cached"))
    assert len(list((tmp_path / "cached" / "cache").iterdir())) == 3
    # Other batch sizes of autoencoder and text encoder round otherwise. What networks compute is the same, not each
    # weight: the gradient of what normalization takes away is rounding alone, which Adam blows up.
    x_t, text = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(2, 77, 32)
    networks = [UNet2DConditionModel.from_pretrained(tmp_path / name, subfolder="unet") for name in ("run", "cached")]
    with torch.no_grad():
        plain, cached = (network(x_t, 500, text).sample for network in networks)
    torch.testing.assert_close(plain, cached, rtol=0, atol=1e-4)


def test_networks_of_pixels_too(small_run, shard_options, tmp_path):
    pixels = {"unet": "small-16", "train_shards": shard_options["train_shards"], "validation_images": 0}
    train(PixelTrainingConfig(**{**small_run, **pixels, "max_train_steps": 1}))
    tensors, _ = read_checkpoint(tmp_path / "run" / "checkpoint-000001")
    assert "unet" in tensors
    with pytest.raises(ValueError, match="--class_column needs --dataset_name, --train_data_dir"):
        train(PixelTrainingConfig(**{**small_run, **pixels, "class_column": "label"}))
