"""Several datasets in one run: their shares, and that order is of seed and place alone."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from many_shapes import make_shapes
from training_runs import same, trained

from zsnr_diffusers.training import PixelTrainingConfig, TrainingConfig, train
from zsnr_diffusers.training.data.dataset import check_images, open_rows
from zsnr_diffusers.training.data.mix import BLOCK, Mix
from zsnr_diffusers.training.stable_diffusion import StableDiffusionTask

WEIGHTS = st.lists(st.floats(1e-4, 1e4), min_size=2, max_size=6)


@given(WEIGHTS, st.integers(0, 3))
def test_every_block_has_the_shares_to_one_in_a_thousand(weights, seed):
    mix = Mix(weights, seed)
    total = sum(weights)
    assert sum(mix.counts) == BLOCK
    rare = sum(weight / total * BLOCK < 1 for weight in weights)
    for weight, count in zip(weights, mix.counts.tolist(), strict=True):
        assert count >= 1
        assert abs(count - weight / total * BLOCK) <= 1 + rare
    assert Mix([0.7, 0.3], 0).shares == [0.7, 0.3]
    for block in (0, 5):
        found = Counter(mix.locate(block * BLOCK + place)[0] for place in range(BLOCK))
        assert [found[source] for source in range(len(weights))] == mix.counts.tolist()


@given(WEIGHTS, st.integers(0, 3), st.integers(0, 3 * BLOCK))
def test_units_of_a_source_are_counted_without_a_gap(weights, seed, end):
    mix, seen = Mix(weights, seed), Counter()
    for unit in range(max(0, end - 50), end):
        source, before = mix.locate(unit)
        assert before == mix.counts_before(unit)[source]
        seen[source] += 1
    assert mix.counts_before(0) == [0] * len(weights)
    assert sum(mix.counts_before(end)) == end


def test_orders_differ_by_seed_and_block():
    orders = {tuple(Mix([1, 1], seed).locate(block * BLOCK + place)[0] for place in range(50))
              for seed in (0, 1) for block in (0, 1)}  # fmt: skip
    assert len(orders) == 4


@pytest.fixture
def mixed(options, image_folder, tmp_path):
    """A run on seven samples of ten images for every three of ten others."""
    (tmp_path / "shapes").mkdir()
    make_shapes(tmp_path / "shapes")
    shutil.copytree(image_folder, tmp_path / "hills")
    mix = [f"{tmp_path}/hills=0.7", f"{tmp_path}/shapes=0.3"]
    return {**options, "train_data_dir": None, "data_mix": mix, "resolution": 64}


def samples_of(options, batch=1):
    task = StableDiffusionTask(TrainingConfig(**options))
    return task.samples(check_images(task.rows, task.config, False), batch)


def test_each_source_comes_by_its_share_and_each_of_its_rows_in_turn(mixed):
    samples = samples_of(mixed)
    rows = [samples.row_at(position) for position in range(BLOCK)]
    assert sum(row < 10 for row in rows) == 700
    for source, rounds in ((range(10), 70), (range(10, 20), 30)):
        shown = [row for row in rows if row in source]
        for start in range(0, 10 * rounds, 10):
            assert sorted(shown[start : start + 10]) == list(source)
    assert set(samples.rows_seen(12)) == {samples.row_at(position) for position in range(12)}
    assert set(samples.rows_seen(10**6)) == set(range(20))


def test_in_buckets_a_global_batch_is_of_one_source_and_size(mixed):
    samples = samples_of({**mixed, "aspect_ratio_buckets": True}, 4)
    for batch in range(50):
        rows = [samples.row_at(position) for position in range(4 * batch, 4 * batch + 4)]
        assert len({(row < 10, samples.bucket_size(row)) for row in rows}) == 1
    assert set(samples.rows_seen(80)) == {samples.row_at(position) for position in range(80)}


def test_rows_are_those_of_the_folders(mixed, options, tmp_path):
    rows = open_rows(TrainingConfig(**mixed))
    for first, name in ((0, "hills"), (10, "shapes")):
        alone = open_rows(TrainingConfig(**{**options, "train_data_dir": str(tmp_path / name)}))
        for index in range(10):
            assert rows[first + index]["image"] == alone[index]["image"]
            assert rows[first + index]["text"] == [alone[index]["text"] or ""]


def test_the_plan_and_the_card_say_the_shares(mixed, tmp_path, capsys):
    train(TrainingConfig(**{**mixed, "max_train_steps": 1}))
    out = " ".join(capsys.readouterr().out.split())
    assert "70.0% of the samples: 10 images" in out
    card = Path(mixed["output_dir"], "README.md").read_text()
    assert "Trained on samples of several datasets: 70% hills, 30% shapes." in card
    assert str(tmp_path) not in card


@pytest.mark.full
def test_a_resumed_run_on_a_mix_is_the_uninterrupted_one(mixed, tmp_path):
    whole = trained(TrainingConfig(**{**mixed, "max_train_steps": 6, "output_dir": str(tmp_path / "whole")}))
    trained(TrainingConfig(**{**mixed, "max_train_steps": 2}))
    assert same(trained(TrainingConfig(**{**mixed, "max_train_steps": 6, "resume": True})), whole)
    swapped = [entry.replace("0.3", "0.4") for entry in mixed["data_mix"]]
    with pytest.raises(ValueError, match="--data_mix was"):
        train(TrainingConfig(**{**mixed, "max_train_steps": 6, "resume": True, "data_mix": swapped}))


@pytest.mark.parametrize(
    ("mix", "said"),
    [
        (["a"], r"--data_mix='a' must be a folder or dataset and a weight above 0"),
        (["a=0", "b=1"], r"--data_mix='a=0' must be"),
        (["a=1"], "must name at least two different datasets"),
        (["a=1", "a=2"], "at least two different"),
    ],
)
def test_what_is_no_mix_is_refused(options, mix, said):
    with pytest.raises(ValueError, match=said):
        TrainingConfig(**{**options, "train_data_dir": None, "data_mix": mix})


def test_one_source_of_data_and_no_classes(options, mixed):
    with pytest.raises(ValueError, match="--train_shards and --data_mix"):
        TrainingConfig(**{**mixed, "train_data_dir": "d"})
    with pytest.raises(ValueError, match="--data_mix does not support classes"):
        open_rows(PixelTrainingConfig(data_mix=mixed["data_mix"], class_column="label"))
