"""A run that is killed at any moment leaves nothing damaged, and goes on bit for bit."""

from pathlib import Path

import pytest
from kill_trials import AIMS, KillTrials, checkpoint_digest
from parquet_shards import write_parquet
from tar_shards import captioned
from tiny_pipelines import tiny_unconditional
from training_runs import same, trained, weights

from zsnr_diffusers.training.checkpointing.checkpoint import checkpoint_step, list_checkpoints
from zsnr_diffusers.training.pixels import PixelTrainingConfig


@pytest.fixture
def pixel_options(small_run, image_folder, tmp_path):
    """A run on five row groups, of which it reads each in five steps, without an end."""
    tiny_unconditional().save_pretrained(tmp_path / "base")
    changes = {
        "pretrained_model_name_or_path": str(tmp_path / "base"),
        "train_shards": write_parquet(tmp_path / "data", captioned(image_folder), ((2, 2), (2, 2), (2,))),
        "shuffle_shards": 2,
        "checkpointing_steps": 1,
        "validation_images": 0,
        "lr_scheduler": "constant",
        "max_train_steps": 100_000,
    }
    return {**small_run, **changes}


@pytest.mark.parametrize(
    "kills",
    [pytest.param(10, marks=pytest.mark.full), pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
)
def test_killed_again_and_again(pixel_options, tmp_path, kills):
    """Of 200 kills, at least 60 come while a checkpoint is written, and 40 while a row group is."""
    trials = KillTrials(pixel_options, tmp_path / "log")
    for number in range(kills):
        trials.kill_once(AIMS[number % len(AIMS)])
        print(f"{number + 1} kills, of which within the write of:", dict(trials.hits), flush=True)
    steps = trials.finish(2)
    assert trials.hits["checkpoint"] >= 0.3 * kills
    assert trials.hits["row group"] >= 0.2 * kills
    whole = {"output_dir": str(tmp_path / "whole"), "max_train_steps": steps, "checkpoints_total_limit": steps}
    assert same(trained(PixelTrainingConfig(**{**pixel_options, **whole})), weights(pixel_options["output_dir"]))
    expected = {checkpoint_step(one): checkpoint_digest(one) for one in list_checkpoints(tmp_path / "whole")}
    assert {step: expected[step] for step in trials.digests} == trials.digests
    row_groups = {file.name: file.read_bytes() for file in Path(tmp_path, "whole").glob("cache/shard_data/*.arrow")}
    assert trials.row_groups == row_groups
