"""Sizes of images in shards, which aspect-ratio buckets are made of."""

import io

import numpy as np
import pytest
from many_shapes import make_shapes
from parquet_shards import write_parquet
from PIL import Image
from tar_shards import captioned, write_shards
from training_runs import same, trained

from zsnr_diffusers.training import TrainingConfig
from zsnr_diffusers.training.data.dataset import check_images, open_rows
from zsnr_diffusers.training.stable_diffusion import StableDiffusionTask

WRITERS = {"tar": write_shards, "parquet": write_parquet}


def turned_jpeg():
    """12 x 40 once it is turned upright, behind a preview of 40 kB in its EXIF block."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x927C] = bytes(40_000)
    buffer = io.BytesIO()
    Image.new("RGB", (40, 12)).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


@pytest.fixture(params=WRITERS)
def bucketed(request, options, tmp_path):
    """Options of a run in buckets, on shards of a folder's images."""
    (tmp_path / "shapes").mkdir()
    folder = make_shapes(tmp_path / "shapes")
    pattern = WRITERS[request.param](tmp_path / "shards", captioned(folder))
    changes = {"train_data_dir": None, "train_shards": pattern, "aspect_ratio_buckets": True, "resolution": 128}
    return {**options, **changes, "shuffle_shards": 2}


def test_sizes_are_those_of_the_folder(bucketed, options, tmp_path):
    config = TrainingConfig(**bucketed)
    found = check_images(open_rows(config), config, False)
    folder = TrainingConfig(**{**options, "train_data_dir": str(tmp_path / "shapes")})
    assert found == check_images(open_rows(folder), folder, False)
    assert check_images(open_rows(config), config, False) == found  # stored
    assert len(set(found.values())) > 3


@pytest.mark.parametrize("kind", WRITERS)
def test_headers_tell_turned_images_and_bad_ones(options, tmp_path, kind, capsys):
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(256, size=(90, 70, 3), dtype=np.uint8)).save(noise, "PNG")
    images = [turned_jpeg(), b"no image", noise.getvalue()] + [noise.getvalue()] * 7
    pattern = WRITERS[kind](tmp_path / "shards", [(f"{place:03d}", data, "text") for place, data in enumerate(images)])
    changes = {"train_data_dir": None, "train_shards": pattern, "aspect_ratio_buckets": True}
    config = TrainingConfig(**{**options, **changes, "on_bad_image": "skip"})
    found = check_images(open_rows(config), config, False)
    assert found == {0: (40, 12), **dict.fromkeys(range(2, 10), (90, 70))}
    assert "1 of 10 images have no readable header" in capsys.readouterr().out
    config = TrainingConfig(**{**options, **changes})
    with pytest.raises(ValueError, match="1 of 10 images have no readable header"):
        check_images(open_rows(config), config, False)


def test_batches_are_of_one_size_and_every_row_comes(bucketed):
    task = StableDiffusionTask(TrainingConfig(**bucketed))
    samples = task.samples(check_images(task.rows, task.config, False), 2)
    assert samples.epoch_length % 2 == 0
    rows = [samples.row_at(position) for position in range(samples.epoch_length)]
    assert set(rows) == set(range(len(task.rows)))
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        assert samples.bucket_size(one) == samples.bucket_size(other)
    first = samples[0]
    assert first["pixel_values"].shape[1:] == samples.bucket_size(rows[0])


@pytest.mark.full
def test_a_resumed_run_in_buckets_is_the_uninterrupted_one(bucketed, tmp_path):
    whole = trained(TrainingConfig(**{**bucketed, "max_train_steps": 6, "output_dir": str(tmp_path / "whole")}))
    trained(TrainingConfig(**{**bucketed, "max_train_steps": 2}))
    assert same(trained(TrainingConfig(**{**bucketed, "max_train_steps": 6, "resume": True})), whole)
