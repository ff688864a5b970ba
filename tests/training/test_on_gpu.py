"""Small runs on a GPU: precisions, adapters, caches, previews, compilation, checkpoints, and where a step waits."""

import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from training_runs import launched, same, trained

from zsnr_diffusers.training import TrainingConfig, TrainingInterrupted, train, trainer
from zsnr_diffusers.training import run as run_module
from zsnr_diffusers.training.checkpointing.checkpoint import find_corruption, list_checkpoints

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

WAYS = {
    "float32": {},
    "bf16": {"mixed_precision": "bf16"},
    "fp16": {"mixed_precision": "fp16"},
    "uncached": {"mixed_precision": "bf16", "cache": "none"},
    "lora": {"mixed_precision": "bf16", "lora_rank": 4},
    "dora": {"mixed_precision": "fp16", "lora_rank": 4, "use_dora": True},
    "channels_last": {"mixed_precision": "bf16", "channels_last": True},
    "checkpointing": {"mixed_precision": "bf16", "gradient_checkpointing": True},
    "8-bit": {"mixed_precision": "bf16", "use_8bit_adam": True},
    "ema on the host": {"mixed_precision": "bf16", "ema_device": "cpu", "ema_update_interval": 2},
    "flow": {"mixed_precision": "bf16", "prediction_type": "flow_prediction"},
    "learned": {"mixed_precision": "bf16", "loss_weighting": "learned_uncertainty"},
    "accumulated": {"mixed_precision": "bf16", "gradient_accumulation_steps": 2},
}


def run(options, **changes):
    AcceleratorState._reset_state(True)
    return TrainingConfig(**{**options, **changes})


def weights(folder):
    """The trained weights of the last checkpoint."""
    return load_file(list_checkpoints(Path(folder))[-1] / "unet.safetensors")


@pytest.mark.parametrize("way", WAYS)
def test_a_run_makes_its_files_and_continues_from_a_checkpoint(options, tmp_path, monkeypatch, way):
    """With previews and brightness on the way, and a signal in the third step of the second run."""
    if way == "8-bit":
        pytest.importorskip("bitsandbytes")
    options |= {**WAYS[way], "luminance_images": 2, "validation_prompts": ["snow"], "validation_steps": 2}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(run(options, output_dir=str(whole)))
    v_loss, calls = trainer.v_loss, []
    passes = options.get("gradient_accumulation_steps", 1)

    def signalling(*args):
        calls.append(args)
        if len(calls) == 2 * passes + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return v_loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "v_loss", signalling)
        with pytest.raises(TrainingInterrupted):
            train(run(options, output_dir=str(stopped)))
    train(run(options, output_dir=str(stopped), resume=True))
    assert all(find_corruption(one) is None for folder in (whole, stopped) for one in list_checkpoints(folder))
    assert (whole / "previews" / "step-000004.png").exists()
    found, expected = weights(stopped), weights(whole)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Sums whose order the GPU chooses turn some of Adam's first steps, which are of the learning rate's size.
        torch.testing.assert_close(found[name], value, rtol=0, atol=2 * options["learning_rate"], msg=name)


@pytest.mark.parametrize("way", ["blocks", "network"])
def test_a_compiled_network_trains(options, way):
    assert trained(run(options, mixed_precision="bf16", compile=way, max_train_steps=2))


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(options, monkeypatch, precision):
    """The device leaves the update out by itself, and the host counts it."""
    v_loss, factors = trainer.v_loss, iter((1.0, float("nan"), 1.0))
    monkeypatch.setattr(trainer, "v_loss", lambda *args: v_loss(*args) * next(factors))
    steps = {"checkpointing_steps": 1, "checkpoints_total_limit": 9, "max_train_steps": 3, "nan_skip": 1}
    config = run(options, mixed_precision=precision, **steps)
    train(config)
    first, second, third = (
        {file.stem: load_file(file) for file in one.glob("*.safetensors")}
        for one in list_checkpoints(Path(config.output_dir))
    )
    assert all(same(first[name], second[name]) for name in first)
    assert not same(second["unet"], third["unet"])


@pytest.mark.parametrize("way", ["bf16", "uncached", "fp16", "flow", "learned", "accumulated"])
def test_a_step_makes_no_call_that_waits_for_the_device(options, way):
    """CUDA itself objects to any; that for the metrics is to an event, of which it says nothing."""
    config = run(options, **WAYS[way])
    accelerator, processes = launched(config)
    task = run_module.TASKS[type(config)](config)
    samples = task.samples(range(4), config.global_batch(1))
    task.plan_cache(accelerator, processes, samples)
    made = run_module.create_trainer(config, accelerator, processes, task, samples)
    with made.batches(3) as batches:
        for _ in range(2):  # tables and state come to the device
            made.train_step(batches)
        torch.cuda.set_sync_debug_mode("error")
        try:
            made.train_step(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
