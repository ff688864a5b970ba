"""Aspect-ratio buckets and random crops in runs on Stable Diffusion."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from child_processes import exit_code, start_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from many_shapes import SIZES
from PIL import Image, ImageOps
from published_models import published
from safetensors import safe_open
from tiny_pipelines import tiny_stable_diffusion
from training_runs import logged, same, shown, trained

from zsnr_diffusers.training import TrainingConfig, train
from zsnr_diffusers.training.data.buckets import bucket_sizes, nearest_bucket
from zsnr_diffusers.training.data.dataset import check_images
from zsnr_diffusers.training.data.loader import DistributedBatchSampler
from zsnr_diffusers.training.data.row_values import ImageSizes
from zsnr_diffusers.training.stable_diffusion import StableDiffusionTask
from zsnr_diffusers.training.stable_diffusion.conditioning import Conditioning
from zsnr_diffusers.training.stable_diffusion.samples import CaptionedDataset
from zsnr_diffusers.utils.distributed import Processes

CONDITIONS = Conditioning([tiny_stable_diffusion().tokenizer])


BUCKETS = [(128, 128), (192, 64), (64, 192), (256, 64), (64, 256)]
"""Of the least resolution at which Stable Diffusion has any: it halves images six times."""


@pytest.fixture(scope="module")
def base_folder():
    """Stable Diffusion 1.5 on disk, with all its levels: they decide on the sizes of buckets; do not change it."""
    return published("1.5")


class Captions:
    """Rows of nothing but captions."""

    def select_columns(self, names):
        return self


@pytest.fixture
def shapes(options, shapes_folder):
    """A small run in buckets of 128 x 128 and of at most its area."""
    return {**options, "train_data_dir": str(shapes_folder), "aspect_ratio_buckets": True, "resolution": 128}


def samples_of(options, global_batch=1, **changes):
    task = StableDiffusionTask(TrainingConfig(**{**options, **changes}))
    return task.samples(check_images(task.rows, task.config, progress=False), global_batch)


def losses(folder):
    return [value for _, value in logged(folder)["loss"]]


# -- batches

IMAGES = st.lists(st.tuples(st.integers(1, 100), st.integers(1, 100)), min_size=1, max_size=40)


@settings(deadline=None)
@given(IMAGES, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2))
def test_every_global_batch_is_of_one_bucket_and_every_image_comes_in_its_turn(images, batch, passes, world, seed):
    config = TrainingConfig(
        pretrained_model_name_or_path="b",
        train_data_dir="d",
        aspect_ratio_buckets=True,
        train_batch_size=batch,
        gradient_accumulation_steps=passes,
        seed=seed,
    )
    size, sizes = config.global_batch(world), bucket_sizes(64, 8)
    samples = CaptionedDataset(
        Captions(), ImageSizes.of(enumerate(images)), config, CONDITIONS, sizes, (4, 8), 1000, size
    )
    steps = samples.epoch_length // size
    assert samples.epoch_length == steps * size
    for epoch in range(2):
        taken = [
            list(DistributedBatchSampler(config, range(epoch * steps, (epoch + 1) * steps), rank, world))
            for rank in range(world)
        ]
        shown = Counter()
        for step in range(steps):
            rows = [
                samples.row_at(position)
                for rank in taken
                for forward in rank[step * passes : (step + 1) * passes]
                for position in forward
            ]
            assert len(rows) == size
            assert len({samples.bucket_size(row) for row in rows}) == 1
            shown.update(rows)
        assert set(shown) == set(range(len(images)))
        for rows in samples.buckets.values():
            times = [shown[row] for row in rows]
            assert sum(times) - len(rows) < size
            assert max(times) - min(times) <= 1
    some = min(3, steps) * size
    assert set(samples.rows_seen(some)) == {samples.row_at(position) for position in range(some)}
    assert set(samples.rows_seen(10 * samples.epoch_length)) == set(range(len(images)))


def test_samples_have_the_size_of_their_bucket(shapes):
    samples = samples_of(shapes, 2)
    seen = {}
    for position in range(samples.epoch_length):
        sample, row = samples[position], samples.row_at(position)
        height, width = seen[row] = nearest_bucket(SIZES[row], BUCKETS)
        assert sample["pixel_values"].shape == (3, height, width)
        assert sample["noise"].shape == sample["posterior_noise"].shape == (4, height // 8, width // 8)
    assert len(seen) == 10
    assert len(set(seen.values())) == 5


# -- runs


@pytest.mark.slow  # the same is shown of the loop itself
def test_accumulation_and_processes_do_not_matter_nor_do_caches(shapes, tmp_path):
    """The sum over a batch in another order; float32 keeps seven digits."""
    shapes |= {"report_to": "tensorboard", "train_batch_size": 4, "max_train_steps": 6, "random_flip": True}
    trained(TrainingConfig(**shapes))
    expected = losses(shapes["output_dir"])
    parts = {"train_batch_size": 1, "gradient_accumulation_steps": 4, "cache": "none", "dataloader_num_workers": 1}
    trained(TrainingConfig(**{**shapes, **parts, "output_dir": str(tmp_path / "parts")}))
    assert losses(tmp_path / "parts") == pytest.approx(expected, rel=1e-5)
    two = {**shapes, "train_batch_size": 1, "gradient_accumulation_steps": 2, "output_dir": str(tmp_path / "two")}
    codes = [exit_code(process) for process in start_ranks(two, tmp_path)]
    assert codes == [0, 0], (tmp_path / "rank0.log").read_text()
    assert losses(tmp_path / "two") == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow  # the same is shown of the loop itself
@pytest.mark.parametrize(("stop", "random_crop"), [(1, False), (5, True)])
def test_resumed_is_bitwise_the_uninterrupted_run(shapes, tmp_path, stop, random_crop):
    """Five buckets at a global batch of 2: seven steps are an epoch."""
    shapes |= {"max_train_steps": 9, "random_crop": random_crop, "checkpointing_steps": 100}
    whole = trained(TrainingConfig(**shapes))
    parts = {**shapes, "output_dir": str(tmp_path / "parts")}
    trained(TrainingConfig(**{**parts, "max_train_steps": stop}))
    assert same(trained(TrainingConfig(**{**parts, "resume": True})), whole)


@pytest.mark.full
def test_a_run_keeps_its_buckets_and_crops(shapes):
    trained(TrainingConfig(**shapes))
    with pytest.raises(ValueError, match="--aspect_ratio_buckets was True and is now False"):
        trained(TrainingConfig(**{**shapes, "aspect_ratio_buckets": False, "resume": True}))
    with pytest.raises(ValueError, match="--random_crop was False and is now True"):
        trained(TrainingConfig(**{**shapes, "random_crop": True, "resume": True}))


@pytest.mark.full
def test_without_them_nothing_has_changed_for_images_of_one_shape(options, tmp_path):
    """One bucket of ten images and batches of two: each epoch is the same permutation."""
    options |= {"resolution": 128}
    assert same(
        trained(TrainingConfig(**options)),
        trained(TrainingConfig(**{**options, "aspect_ratio_buckets": True, "output_dir": str(tmp_path / "buckets")})),
    )


# -- what is stored


def filled(options, **changes):
    config = TrainingConfig(**{**options, "max_train_steps": 20, **changes})
    accelerator, task = Accelerator(cpu=True), StableDiffusionTask(config)
    samples = task.samples(check_images(task.rows, config, progress=False), config.global_batch(1))
    task.plan_cache(accelerator, Processes(), samples, shown(config))
    task.prepare(accelerator, Processes(), samples)
    return task, samples


def test_latents_of_all_sizes_are_stored_and_are_those_that_are_computed(shapes, tmp_path):
    shapes |= {"cache_dir": str(tmp_path / "cache"), "random_flip": True}
    (task, stored), (_, online) = filled(shapes), filled(shapes, cache="none")
    assert "20 of 6.14 kB to 8.19 kB each" in str(task.embedding_cache.statuses["latents"])
    task.autoencoder.network.to("meta")  # from here on nothing is computed
    encode = StableDiffusionTask(TrainingConfig(**shapes)).autoencoder
    for position in range(stored.epoch_length):
        moments = {name: stored[position][name] for name in ("mean", "std")}
        computed = encode(online[position]["pixel_values"][None])
        for name, values in moments.items():
            # kernels for batches of other sizes round otherwise
            torch.testing.assert_close(values, computed[name][0], rtol=0, atol=1e-5)
    shapes_of_shards = set()
    for shard in (tmp_path / "cache").glob("latents-*/*.safetensors"):
        with safe_open(shard, "pt") as file:
            shapes_of_shards.add(tuple(file.get_slice("mean").get_shape()[1:]))
    assert shapes_of_shards == {(4, height // 8, width // 8) for height, width in BUCKETS}


def test_what_is_stored_is_found_by_size(shapes, tmp_path):
    """Squares of the same files are others; those that are square in both are not stored again."""
    shapes |= {"cache_dir": str(tmp_path / "cache")}
    task, samples = filled(shapes)
    square = len(samples.buckets[128, 128])
    config = TrainingConfig(**{**shapes, "aspect_ratio_buckets": False, "max_train_steps": 20})
    task = StableDiffusionTask(config)
    samples = task.samples(check_images(task.rows, config, progress=False))
    task.plan_cache(Accelerator(cpu=True), Processes(), samples, shown(config))
    assert len(task.embedding_cache.statuses["latents"].missing) == 10 - square
    assert 0 < square < 10


# -- random crops


def test_with_random_crops_text_alone_is_stored(shapes):
    _, samples = filled(shapes, random_crop=True)
    assert samples.caches.keys() == {"text"}
    for choice in ("latents", "both"):
        with pytest.raises(ValueError, match=rf"--cache={choice} stores .* pass --cache=text, auto or none"):
            TrainingConfig(**{**shapes, "random_crop": True, "cache": choice})


@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize("random_crop", [False, True])
def test_pixels_are_those_at_the_place_that_the_network_is_told_of(xl_options, shapes_folder, buckets, random_crop):
    """Of the upright image, mirrored or not, scaled by Pillow."""
    changes = {"aspect_ratio_buckets": buckets, "random_crop": random_crop, "random_flip": True}
    samples, places, mirrored = samples_of(xl_options, **changes), {}, Counter()
    for position in range(6 * samples.epoch_length):
        sample, row = samples[position], samples.row_at(position)
        original_height, original_width, top, left, height, width = map(int, sample["time_ids"].tolist())
        assert (original_height, original_width) == SIZES[row]
        image = ImageOps.exif_transpose(Image.open(shapes_folder / f"{row}.png")).convert("RGB")
        scale = max(height / original_height, width / original_width)
        whole = [max(height, round(original_height * scale)), max(width, round(original_width * scale))]
        scaled = image.resize(whole[::-1], Image.Resampling.LANCZOS)
        shown = sample["pixel_values"].permute(1, 2, 0).numpy()
        matches = [
            np.array_equal(np.asarray(one)[top : top + height, left : left + width], shown)
            for one in (scaled, ImageOps.mirror(scaled))
        ]
        assert sum(matches) == 1
        mirrored[matches[1]] += 1
        places.setdefault(row, set()).add((top, left))
    assert min(mirrored.values()) > 10
    assert (max(map(len, places.values())) > 2) == random_crop


# -- what is said


def test_dry_run_shows_the_buckets(shapes, capsys):
    train(TrainingConfig(**{**shapes, "dry_run": True, "train_batch_size": 4}))
    text = capsys.readouterr().out
    counts = Counter(nearest_bucket(size, BUCKETS) for size in SIZES)
    batches = {size: -(-count // 4) for size, count in counts.items()}
    repeats = 4 * sum(batches.values()) - 10
    assert f"data: 10 images in 5 buckets (width x height), and {repeats} repeats in an epoch" in text
    for (height, width), count in counts.items():
        again = 4 * batches[height, width] - count
        line = f"{width} x {height}: {count} images, {batches[height, width]} global batches, {again} repeats"
        assert re.search(rf"^ +{line}$", text, re.MULTILINE)
    assert f"steps: 4 = {16 / (10 + repeats):.1f} epochs" in text


def test_a_resolution_that_leaves_no_other_bucket_is_refused(shapes):
    with pytest.raises(ValueError, match=r"--aspect_ratio_buckets: .*multiples of 64 .*--resolution=64; increase it"):
        samples_of(shapes, resolution=64)
    with pytest.raises(ValueError, match="--resolution=160 must be a multiple of 64"):
        samples_of(shapes, resolution=160)


@pytest.mark.full
def test_measuring_in_buckets_trains_on_some_of_each(shapes, capsys):
    train(TrainingConfig(**{**shapes, "dry_run": True, "measure": True, "train_batch_size": 4, "max_train_steps": 60}))
    assert "images/s" in capsys.readouterr().out
