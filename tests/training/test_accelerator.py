import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from child_processes import arguments
from training_runs import launched

import zsnr_diffusers
from zsnr_diffusers.training import TrainingConfig, train

LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU")
CONFIGS = Path(zsnr_diffusers.__file__).parents[1] / "examples" / "configs" / "accelerate"


@pytest.fixture
def environment(monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    with mock.patch.dict(os.environ):  # accelerate may add to them, and fail then
        yield monkeypatch.setenv


def test_one_process(config, environment):
    accelerator, processes = launched(config)
    assert (accelerator.num_processes, processes.rank, processes.size) == (1, 0, 1)


def test_one_process_of_accelerate_launch(config, environment):
    environment("ACCELERATE_USE_CPU", "True")
    assert launched(config)[0].num_processes == 1


def test_processes_that_accelerate_did_not_start_are_missed(config, environment):
    """What `accelerate launch --cpu --num_processes 2` sets for the one process that it starts."""
    for name, value in (("ACCELERATE_USE_CPU", "True"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        environment(name, value)
    with pytest.raises(ValueError, match=r"Several processes were requested, but accelerate sees 1\. .* torchrun"):
        launched(config)


@pytest.mark.full
def test_accelerate_launch_that_would_start_one_of_two_processes_is_refused(options):
    """Of itself it starts one, and says nothing."""
    two = (
        "accelerate.commands.launch --cpu --num_processes=2 --num_machines=1 --mixed_precision=no --dynamo_backend=no"
    )
    result = subprocess.run(
        [sys.executable, "-m", *two.split(), "-m", "zsnr_diffusers.training", *arguments(options)],
        env={name: value for name, value in os.environ.items() if name not in LAUNCHED},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "error: Several processes were requested, but accelerate sees 1." in result.stderr


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_examples_for_accelerate_are_read_by_it(file):
    config = load_config_from_file(str(file))
    assert config.distributed_type == ("FSDP" if file.stem.startswith("fsdp2") else "MULTI_GPU")
    assert config.num_processes % config.num_machines == 0
    written = yaml.safe_load(file.read_text())
    assert {name: getattr(config, name) for name in written} == written


def test_processes_that_would_train_each_by_itself_are_refused(config, environment):
    environment("WORLD_SIZE", "2")
    # older versions of accelerate refuse it themselves
    with pytest.raises(ValueError, match=r"2 processes were started, but accelerate sees 1\.|MASTER_ADDR"):
        launched(config)


@pytest.mark.parametrize("tracker", ["wandb", "comet_ml", "tensorboard", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named_with_its_package(options, environment, monkeypatch, tracker):
    monkeypatch.setattr("zsnr_diffusers.training.accelerator.get_available_trackers", list)
    package = {"comet_ml": "comet-ml"}.get(tracker, tracker)
    with pytest.raises(
        ValueError, match=rf"--report_to={tracker} needs .*: pip install {package}, or .*--report_to no"
    ):
        train(TrainingConfig(**{**options, "report_to": tracker}))
    assert not Path(options["output_dir"]).exists()


def test_a_tracker_that_is_unknown_is_named_with_those_that_are(options, environment):
    with pytest.raises(ValueError, match=r"--report_to='wandbb' is unknown; choose one of .*tensorboard.* and none"):
        launched(TrainingConfig(**{**options, "report_to": "wandbb"}))


@pytest.mark.parametrize("tracker", ["tensorboard", "all", "none"])
def test_trackers_that_are_installed(options, environment, tracker):
    accelerator, _ = launched(TrainingConfig(**{**options, "report_to": tracker}))
    assert [str(kind) for kind in accelerator.log_with] == ([] if tracker == "none" else ["tensorboard"])
