import pytest

from zsnr_diffusers.training.launch import launch

LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU")


@pytest.fixture
def environment(monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch.setenv


def test_one_process(config, environment):
    accelerator, processes = launch(config)
    assert (accelerator.num_processes, processes.rank, processes.size) == (1, 0, 1)


def test_one_process_of_accelerate_launch(config, environment):
    environment("ACCELERATE_USE_CPU", "True")
    assert launch(config)[0].num_processes == 1


def test_processes_that_accelerate_did_not_start_are_missed(config, environment):
    """What `accelerate launch --cpu --num_processes 2` sets for the one process that it starts."""
    for name, value in (("ACCELERATE_USE_CPU", "True"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        environment(name, value)
    with pytest.raises(ValueError, match=r"Several processes were asked for, and accelerate sees 1\. .* torchrun"):
        launch(config)


def test_processes_that_would_train_each_by_itself_are_refused(config, environment):
    environment("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were started, and accelerate sees 1\."):
        launch(config)
