"""How many processes read images where nobody says it."""

import os

import pytest

from zsnr_diffusers.training import PixelTrainingConfig, TrainingConfig

DATA = {"pretrained_model_name_or_path": "b", "train_data_dir": "d"}


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(1, 1, 1), (2, 1, 2), (64, 1, 8), (64, 8, 8), (16, 8, 2), (4, 8, 0)]
)
def test_each_process_has_workers_for_its_cores_and_8_at_most(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert TrainingConfig(**DATA).num_workers == workers
    assert TrainingConfig(**DATA, dataloader_num_workers=3).num_workers == 3
    assert PixelTrainingConfig(train_data_dir="d").num_workers == 0


def test_none_where_processes_are_not_forked(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert TrainingConfig(**DATA).num_workers == 0
