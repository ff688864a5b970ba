"""Options that are `auto`: what they become on a CPU and on a GPU, and that a resumed run keeps it."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from training_runs import same, trained

from zsnr_diffusers.training import TrainingConfig, automatic
from zsnr_diffusers.training.automatic import bfloat16_speedup, resolve_compile, resolve_mixed_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
AUTO = TrainingConfig(pretrained_model_name_or_path="base", train_data_dir="photos", mixed_precision="auto")


@pytest.fixture
def trial(monkeypatch):
    """Speedups that trials find, one after the other; those that were asked for are gone."""
    found = []
    monkeypatch.setattr(automatic, "bfloat16_speedup", lambda: found.pop(0))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return found


@pytest.mark.parametrize(("speedup", "precision"), [(1.6, "bf16"), (1.05, "no"), (0.5, "no")])
def test_on_a_cpu_the_trial_decides(trial, speedup, precision):
    trial.append(speedup)
    assert resolve_mixed_precision(AUTO, {}).mixed_precision == precision
    assert trial == []


def test_a_processor_without_bfloat16_is_not_tried(trial, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert resolve_mixed_precision(AUTO, {}).mixed_precision == "no"


def test_several_processes_on_cpus_are_asked_to_choose(trial, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"--mixed_precision=auto .* several processes .* pass bf16 or no"):
        resolve_mixed_precision(AUTO, {})


@pytest.mark.parametrize(("supported", "precision"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_is_asked(trial, monkeypatch, supported, precision):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert resolve_mixed_precision(AUTO, {}).mixed_precision == precision


def test_what_is_chosen_by_name_is_kept(trial):
    for precision in (None, "no", "fp16"):
        config = dataclasses.replace(AUTO, mixed_precision=precision)
        assert resolve_mixed_precision(config, {"mixed_precision": "bf16"}) is config


def test_a_trial_is_of_a_second():
    assert 0.01 < bfloat16_speedup() < 100


@pytest.mark.full
def test_a_resumed_run_keeps_what_the_first_trial_found(options, trial, tmp_path):
    options |= {"mixed_precision": "auto", "resume": True}
    trial += [2.0, 0.5]
    whole = trained(TrainingConfig(**{**options, "output_dir": str(tmp_path / "whole")}))
    written = yaml.safe_load((tmp_path / "whole" / "training_config.yaml").read_text())
    assert (written["mixed_precision"], written["compile"]) == ("bf16", "auto")
    AcceleratorState._reset_state(True)
    (tmp_path / "whole" / "model_index.json").unlink()
    for step in (tmp_path / "whole").glob("checkpoint-000004/*"):
        step.unlink()
    (tmp_path / "whole" / "checkpoint-000004").rmdir()
    assert same(trained(TrainingConfig(**{**options, "output_dir": str(tmp_path / "whole")})), whole)
    assert trial == [0.5]


BLOCKS = SimpleNamespace(_repeated_blocks=["BasicTransformerBlock"])


@pytest.mark.parametrize(
    ("device", "unet", "changes", "found"),
    [
        (CUDA, BLOCKS, {}, "blocks"),
        (CPU, BLOCKS, {}, "none"),
        (CUDA, SimpleNamespace(), {}, "none"),
        (CUDA, BLOCKS, {"max_train_steps": 999}, "none"),
        (CUDA, BLOCKS, {"sharding": "optimizer"}, "none"),
        (CUDA, BLOCKS, {"compile": "none"}, "none"),
        (CPU, BLOCKS, {"compile": "network"}, "network"),
    ],
)
def test_blocks_are_compiled_in_long_runs_on_a_gpu(monkeypatch, device, unet, changes, found):
    monkeypatch.setattr(automatic, "_compiler_works", lambda device: True)
    assert resolve_compile(dataclasses.replace(AUTO, **changes), unet, device).compile == found
    monkeypatch.setattr(automatic, "_compiler_works", lambda device: False)
    kept = found if "compile" in changes else "none"
    assert resolve_compile(dataclasses.replace(AUTO, **changes), unet, device).compile == kept


def test_a_compiler_that_fails_is_noticed(monkeypatch):
    monkeypatch.setattr(automatic, "BACKEND", "eager")
    assert automatic._compiler_works(CPU)

    def without_triton(graph, inputs):
        raise RuntimeError("Cannot find a working triton installation")

    monkeypatch.setattr(automatic, "BACKEND", without_triton)
    assert not automatic._compiler_works(CPU)
