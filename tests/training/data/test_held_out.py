"""Rows that are kept aside: drawn by the seed, of any kind of data, and in no order of what is trained on."""

import shutil
from pathlib import Path

import pytest
import torch
from many_shapes import make_shapes
from parquet_shards import write_parquet
from tar_shards import captioned, write_shards
from training_runs import shown

from zsnr_diffusers.training import TrainingConfig
from zsnr_diffusers.training.data.dataset import check_images
from zsnr_diffusers.training.data.held_out import draw_rows, hold_out_rows, without_rows
from zsnr_diffusers.training.data.row_values import ImageSizes
from zsnr_diffusers.training.stable_diffusion import StableDiffusionTask
from zsnr_diffusers.utils.images import ImageError

ROWS = 3


@pytest.fixture
def sources(image_folder, shapes_folder, tmp_path):
    """Options of the same captioned images, or some more, in every form that data have."""
    shutil.copytree(image_folder, tmp_path / "hills")
    (tmp_path / "shapes").mkdir()
    make_shapes(tmp_path / "shapes")
    samples = captioned(image_folder)
    return {
        "folder": {"train_data_dir": str(image_folder)},
        "buckets": {"train_data_dir": str(shapes_folder), "aspect_ratio_buckets": True, "resolution": 64},
        "parquet": {"train_shards": write_parquet(tmp_path / "parquet", samples), "shuffle_shards": 2},
        "tars": {"train_shards": write_shards(tmp_path / "tars", samples), "shuffle_shards": 2},
        "tars in buckets": {"train_shards": write_shards(tmp_path / "more", samples), "aspect_ratio_buckets": True},
        "mix": {"data_mix": [f"{tmp_path}/hills=0.7", f"{tmp_path}/shapes=0.3"], "resolution": 64},
    }


def samples_of(options, source, batch=1, **changes):
    config = TrainingConfig(**{**options, "train_data_dir": None, "validation_rows": ROWS, **source, **changes})
    task = StableDiffusionTask(config)
    images = check_images(task.rows, config, progress=False)
    held_out = hold_out_rows(task.rows, images, config, config.validation_rows)
    return task, task.samples(images, batch, held_out), images


@pytest.mark.parametrize("kind", ["folder", "buckets", "parquet", "tars", "tars in buckets", "mix"])
def test_what_is_trained_on_is_all_the_rest(options, sources, kind):
    _, samples, images = samples_of(options, sources[kind], batch=2)
    assert len(samples.held_out) == ROWS
    assert sorted([*samples.held_out, *samples.usable_rows]) == sorted(images)
    shown = {samples.row_at(position) for position in range(40 * len(images))}
    assert shown == set(samples.usable_rows)
    if samples.buckets:
        assert sorted(row for rows in samples.buckets.values() for row in rows) == sorted(samples.usable_rows)
    for row in samples.held_out:
        sample = samples.validation_sample(row)
        assert tuple(sample["noise"].shape) == samples.latent_shape(row)
        assert tuple(sample["pixel_values"].shape[1:]) == samples.bucket_size(row)
        again = samples.validation_sample(row)
        assert all(torch.equal(sample[name], again[name]) for name in sample)


def test_of_parquet_files_they_are_of_as_few_row_groups_as_are_shuffled(options, sources):
    task, samples, _ = samples_of(options, {**sources["parquet"], "shuffle_shards": 1})
    shards = task.rows.shards
    assert len({shards._locate_row(row)[0] for row in samples.held_out}) == 1


def test_images_of_shards_that_cannot_be_read_are_not_kept_aside(options, image_folder, tmp_path):
    samples = [(name, b"no image", text) for name, _, text in captioned(image_folder)]
    broken = {"train_shards": write_shards(tmp_path / "broken", samples)}
    with pytest.raises(ImageError):
        samples_of(options, broken)
    with pytest.raises(ValueError, match="--validation_rows=3: none of the rows that were drawn can be read"):
        samples_of(options, broken, on_bad_image="skip")
    good = [*captioned(image_folder)[:-1], samples[-1]]
    _, found, _ = samples_of(
        options, {"train_shards": write_shards(tmp_path / "one", good)}, on_bad_image="skip", validation_rows=9
    )
    assert found.held_out == [row for row in range(9) if row in found.held_out]
    assert len(found.held_out) in (8, 9)


def test_rows_that_are_kept_aside_are_encoded_with_the_others(options, sources, tmp_path):
    from accelerate import Accelerator

    from zsnr_diffusers.utils.distributed import Processes

    task, samples, _ = samples_of(options, sources["folder"], cache="both", max_train_steps=1)
    accelerator = Accelerator(cpu=True)
    task.plan_cache(accelerator, Processes(), samples, shown(task.config))
    assert task.embedding_cache.statuses["latents"].count == 2 + ROWS  # of one step, and these
    plain = [task.encode({k: v[None] for k, v in samples.validation_sample(row).items()}) for row in samples.held_out]
    samples = task.prepare(accelerator, Processes(), samples)
    for row, expected in zip(samples.held_out, plain, strict=True):
        stored = samples.validation_sample(row)
        assert "pixel_values" not in stored
        for name, value in expected.items():
            torch.testing.assert_close(stored[name], value[0], rtol=0, atol=1e-4)  # float32 in batches of other sizes
    shutil.rmtree(Path(task.config.cache_folder))


def test_rows_are_drawn_alike_from_arrays_and_ranges_and_differ_by_stream():
    sizes = ImageSizes.of({row: (8, 8) for row in range(50)})
    assert without_rows(sizes, [3, 7]).tolist() == [row for row in range(50) if row not in (3, 7)]
    assert without_rows(range(50), []) == range(50)
    assert [*without_rows({5, 1, 9}, [])] == [1, 5, 9]
    assert draw_rows(range(50), 0, 5, 8) == draw_rows([*range(50)], 0, 5, 8) != draw_rows(range(50), 0, 5, 5)


def test_a_source_of_a_mix_that_would_be_left_without_rows_is_refused(options, sources):
    with pytest.raises(
        ValueError, match=r"--data_mix: .*shapes has no usable images|--data_mix: .*hills has no usable images"
    ):
        samples_of(options, sources["mix"], validation_rows=19)
