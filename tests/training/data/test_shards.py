"""Training on shards of both formats: the rows, their order, and what becomes of a run when they cannot be read."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import torch
from child_processes import exit_code, start_ranks
from diffusers import UNet2DConditionModel
from parquet_shards import write_parquet
from tar_shards import FlakyFileSystem, captioned, serve_ranges, to_memory, write_shards
from training_runs import logged, same, trained, weights

from zsnr_diffusers.training import PixelTrainingConfig, TrainingConfig, TrainingError, train
from zsnr_diffusers.training.checkpointing.checkpoint import list_checkpoints, read_checkpoint
from zsnr_diffusers.training.data import remote
from zsnr_diffusers.training.data.dataset import image_sha256, open_rows, read_image, row_name
from zsnr_diffusers.training.data.remote import ShardError
from zsnr_diffusers.training.reporting.luminance import read_luminance_file


@dataclass(frozen=True)
class Format:
    """A format of shards: how ten samples become three shards of it, of 4, 3 and 3 rows or as `sizes` says."""

    ending: str
    write: Callable
    sizes: object
    """Other sizes of the shards."""
    pattern: str
    """Of the files' names."""
    row_5: str
    """A pattern of row 5's name, and of other rows in its shard."""
    files: int
    not_whole: str
    stored: set
    """Folders of a run's cache."""


FORMATS = {
    "tar": Format("tar", write_shards, (3, 4, 3), "{0..2}.tar", r"0000\d\.png in 1\.tar", 3, "tar", {"shards"}),
    "parquet": Format(
        ending="parquet",
        write=write_parquet,
        sizes=((3, 4), (3,)),
        pattern="{0..1}.parquet",
        row_5=r"row \d of row group 1 in 0\.parquet",
        files=2,
        not_whole="parquet file",
        stored={"shards", "shard_data"},
    ),
}


@pytest.fixture(params=FORMATS)
def shards(request):
    return FORMATS[request.param]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(remote, "RETRY_DELAYS", (0.0, 0.0))
    monkeypatch.setattr(FlakyFileSystem, "errors", [])


@pytest.fixture
def shard_options(options, shards, image_folder, tmp_path):
    """A small run's options on three shards of ten images; the same images are in `image_folder`."""
    pattern = shards.write(tmp_path / "shards", captioned(image_folder))
    return {**options, "train_data_dir": None, "train_shards": pattern, "shuffle_shards": 2}


def opened(options, **changes):
    return open_rows(TrainingConfig(**{**options, **changes}))


def run(options, **changes):
    return trained(TrainingConfig(**{**options, **changes}))


# -- rows


def test_rows_are_those_of_the_folder(shard_options, options, shards):
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
    assert re.fullmatch(rf"5 \({shards.row_5}\)", row_name(rows, "image", 5))
    with pytest.raises(KeyError):
        rows.select_columns(["text"])[0]["image"]


# -- runs


@pytest.mark.full
def test_where_shards_lie_does_not_matter_nor_do_workers(shard_options, shards, tmp_path):
    first = run(shard_options, output_dir=str(tmp_path / "disk"))
    memory = to_memory(tmp_path / "shards", ending=shards.ending)
    assert same(run(shard_options, train_shards=memory, dataloader_num_workers=2), first)


@pytest.mark.full
def test_the_format_does_not_matter(options, image_folder, tmp_path):
    found = []
    for name, shards in FORMATS.items():
        pattern = shards.write(tmp_path / name, captioned(image_folder))
        changes = {"train_data_dir": None, "train_shards": pattern, "output_dir": str(tmp_path / f"{name}-run")}
        found.append(run(options, **changes, shuffle_shards=2))
    assert same(*found)


@pytest.mark.full
def test_over_http_with_workers(shard_options, shards, tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec reads HTTP with it")
    with serve_ranges(tmp_path / "shards") as place:
        changes = {"train_shards": f"{place}/{shards.pattern}", "dataloader_num_workers": 2}
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
def damaged(shard_options, shards, image_folder, tmp_path):
    """Options of shards, the second of which has a bad image and a pickle that is called an image."""
    samples = captioned(image_folder)
    samples[5] = (samples[5][0], b"\x80\x04cposix\nsystem\n(S'exit 1'\ntR.", samples[5][2])
    samples[6] = (samples[6][0], samples[6][1][:60], samples[6][2])
    shards.write(tmp_path / "shards", samples)
    return {**shard_options, "max_train_steps": 5}


@pytest.mark.full
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_ends_the_run_with_its_name_and_the_checkpoint(damaged, shards, workers):
    damaged |= {"checkpointing_steps": 1, "dataloader_num_workers": workers}
    with pytest.raises(TrainingError, match=rf"^At step \d: cannot read image {shards.row_5}: ") as error:
        run(damaged)
    kept = [path.name for path in list_checkpoints(Path(damaged["output_dir"]))]
    end = rf"; the last good checkpoint is \S*{kept[-1]}\. " if kept else r"; there is no checkpoint yet\. "
    assert re.search(f"{end}Then --resume\\.$", str(error.value))
    assert "\n" not in str(error.value)


def test_a_bad_image_is_named_and_the_next_row_shown(damaged, shard_options, capsys):
    config = TrainingConfig(**{**damaged, "on_bad_image": "skip"})
    train(config)
    out = capsys.readouterr().out
    assert out.count("using the next row instead") == 2
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
    changes["shuffle_shards"] = 3  # of row groups, no others are measured
    train(TrainingConfig(**{**damaged, **changes}))
    coverages = read_luminance_file(Path(damaged["output_dir"]))
    assert [(one.generated.n, one.real.n) for one in coverages.values()] == [(8, 8)] * 2


def test_nothing_but_bad_images_ends_the_run(shard_options, shards, image_folder, tmp_path):
    shards.write(tmp_path / "shards", [(key, b"", text) for key, _, text in captioned(image_folder)])
    with pytest.raises(TrainingError, match=rf"At step 1: cannot read image .*\.{shards.ending}: the file is empty"):
        run(shard_options, on_bad_image="skip")


@pytest.mark.full
@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_fails_in_the_midst_ends_the_run_and_it_goes_on_later(
    shard_options, shards, tmp_path, monkeypatch, workers
):
    shard_options |= {"checkpointing_steps": 1, "dataloader_num_workers": workers, "shard_cache_gb": 0.0}
    pattern = to_memory(tmp_path / "shards", "flaky", shards.ending)
    shard_options |= {"cache_dir": str(tmp_path / "cache"), "train_shards": pattern}
    whole = run(shard_options, output_dir=str(tmp_path / "whole"))
    error = RuntimeError("500, server error")
    hiccups = [None, error, error, None, error]  # each is tried three times
    # A row of a tar is a read, a row group three: images, captions, and whether the footer is still the same.
    reads = {"tar": 2, "parquet": 4}[shards.ending]
    monkeypatch.setattr(FlakyFileSystem, "errors", [*hiccups, *[None] * reads, error])
    with pytest.raises(
        TrainingError,
        match=rf"^At step [34]: flaky://shards/\d\.{shards.ending} cannot be read: 500, .*00000[23]\. Then",
    ):
        run(shard_options)
    monkeypatch.setattr(FlakyFileSystem, "errors", [])
    assert same(run(shard_options, resume=True), whole)


def test_a_missing_file_and_a_truncated_one_stop_before_the_start(shard_options, shards, tmp_path):
    last = shards.files - 1
    with pytest.raises(ShardError, match=rf"{last + 1}\.{shards.ending} cannot be read: no such file"):
        run(shard_options, train_shards=shard_options["train_shards"].replace(f"..{last}", f"..{last + 1}"))
    file = tmp_path / "shards" / f"{last}.{shards.ending}"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ShardError, match=rf"{last}\.{shards.ending} is not a complete {shards.not_whole}"):
        run(shard_options)
    with pytest.raises(ShardError, match="no file matches"):
        run(shard_options, train_shards=str(tmp_path / "*.zip"))


def test_formats_are_not_mixed(options, image_folder, tmp_path):
    for shards in FORMATS.values():
        shards.write(tmp_path, captioned(image_folder))
    with pytest.raises(ShardError, match=r"2 files are parquet, such as .*/0\.parquet, and 3 .* such as .*/0\.tar"):
        opened(options, train_data_dir=None, train_shards=f"{tmp_path}/*")


def test_shards_that_changed_are_not_resumed(shard_options, shards, image_folder, tmp_path):
    run(shard_options, max_train_steps=2)
    shards.write(tmp_path / "shards", captioned(image_folder), shards.sizes)
    with pytest.raises(ValueError, match="the data was"):
        run(shard_options, resume=True)


@pytest.mark.full
def test_a_dry_run_stores_nothing_unless_told_where(shard_options, shards, tmp_path, capsys):
    train(TrainingConfig(**{**shard_options, "dry_run": True}))
    assert "10 images at 64 x 64" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    train(TrainingConfig(**{**shard_options, "dry_run": True, "cache_dir": str(tmp_path / "cache")}))
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == shards.files
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["shards"]
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_nothing_is_computed_of_shards_unless_asked(shard_options, shards, tmp_path):
    run(shard_options)
    assert {path.name for path in (tmp_path / "run" / "cache").iterdir()} == shards.stored
    run(shard_options, cache="both", output_dir=str(tmp_path / "cached"))
    assert len(list((tmp_path / "cached" / "cache").iterdir())) == len(shards.stored) + 2
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
