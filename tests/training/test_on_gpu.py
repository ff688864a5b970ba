"""Small runs on a GPU: precisions, adapters, caches, previews, compilation, checkpoints, and where a step waits."""

import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from training_runs import launched, same, shown, trained

from zsnr_diffusers.training import TrainingConfig, TrainingInterrupted, train, trainer
from zsnr_diffusers.training import run as run_module
from zsnr_diffusers.training.automatic import resolve_compile, resolve_mixed_precision
from zsnr_diffusers.training.checkpointing.checkpoint import find_corruption, list_checkpoints
from zsnr_diffusers.training.kinds import open_task

pytestmark = [
    pytest.mark.gpu,
    # The compiler's, of its own work and of the card.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
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


def losses(config, steps=3):
    """Of the first steps of a run."""
    accelerator, processes = launched(config)
    task, _ = open_task(config)
    samples = task.samples(range(4), config.global_batch(1))
    task.plan_cache(accelerator, processes, samples, shown(config))
    made = run_module.create_trainer(config, accelerator, processes, task, samples)
    with made.batches(steps) as batches:
        return [made.train_step(batches) for _ in range(steps)]


@pytest.mark.parametrize("way", ["bf16", "fp16", "8-bit", "checkpointing", "channels_last", "ema on the host"])
def test_losses_are_those_in_float32_but_for_rounding(options, way):
    if way == "8-bit":
        pytest.importorskip("bitsandbytes")
    found = losses(run(options, **WAYS[way], lr_warmup_steps=0, learning_rate=1e-4))
    plain = losses(run(options, mixed_precision="no", lr_warmup_steps=0, learning_rate=1e-4))
    assert found == pytest.approx(plain, rel=0.05)  # bfloat16 has three digits


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_caches_that_the_gpu_fills_give_the_losses_of_a_run_without(options, tmp_path, precision):
    """Stored is what encoders give in their precision, in batches of another size."""
    changes = {"mixed_precision": precision, "cache_dir": str(tmp_path / "cache")}
    uncached, cached = (losses(run(options, **changes, cache=cache)) for cache in ("none", "both"))
    assert cached == pytest.approx(uncached, rel=1e-3 if precision == "no" else 0.02)
    assert list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("way", ["bf16", "fp16", "uncached", "lora"])
def test_xl_trains(xl_options, way):
    """Its autoencoder overflows in float16, and is kept out of it."""
    config = run(xl_options, **WAYS[way], max_train_steps=2, luminance_images=2, validation_prompts=["snow"])
    train(config)
    assert all(value.isfinite().all() for value in weights(config.output_dir).values())
    assert (Path(config.output_dir) / "previews" / "step-000002.png").exists()


@pytest.mark.parametrize("way", ["bf16", "fp16", "lora", "checkpointing"])
def test_losses_of_compiled_blocks_are_those_without(options, way):
    torch.compiler.reset()
    compiled, eager = (losses(run(options, **WAYS[way], compile=compile)) for compile in ("blocks", "none"))
    assert compiled == pytest.approx(eager, rel=0.02)


def test_what_is_automatic_is_chosen_for_the_gpu(options):
    config = resolve_mixed_precision(run(options, mixed_precision="auto", max_train_steps=1000), {})
    assert config.mixed_precision in ("bf16", "fp16")
    accelerator, _ = launched(config)
    task, _ = open_task(config)
    assert resolve_compile(config, task.unet, accelerator.device).compile == "blocks"


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
    task, _ = open_task(config)
    samples = task.samples(range(4), config.global_batch(1))
    task.plan_cache(accelerator, processes, samples, shown(config))
    made = run_module.create_trainer(config, accelerator, processes, task, samples)
    with made.batches(3) as batches:
        for _ in range(2):  # tables and state come to the device
            made.train_step(batches)
        torch.cuda.set_sync_debug_mode("error")
        try:
            made.train_step(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
