"""What a run is said to take of memory, beside what it takes."""

import pytest
import torch
from training_runs import launched, shown

from zsnr_diffusers.training import PixelTrainingConfig, TrainingConfig, run, train
from zsnr_diffusers.training.kinds import open_task
from zsnr_diffusers.training.memory import estimate_memory, example_inputs
from zsnr_diffusers.training.network import TrainedNetwork
from zsnr_diffusers.training.optimization import Optimization
from zsnr_diffusers.training.run import create_trainer


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def state_tensors(optimizer):
    """Without bitsandbytes' maps of its numbers, of which there are two in all."""
    named = (item for state in optimizer.state.values() for item in state.items())
    return [value for name, value in named if torch.is_tensor(value) and "qmap" not in name]


def opened(config):
    accelerator, processes = launched(config)
    task, _ = open_task(config)
    return task, accelerator, processes


def check_state(config):
    """Weights, gradients, optimizer and average of a run after a step, byte for byte."""
    task, accelerator, processes = opened(config)
    said = estimate_memory(task.unet, config, None, task.sample_size())
    samples = task.samples(range(4), config.global_batch(1))
    task.plan_cache(accelerator, processes, samples, shown(config))
    trainer, gradients = create_trainer(config, accelerator, processes, task, samples), []
    zero_grad = trainer.optimization.inner.zero_grad
    trainer.optimization.inner.zero_grad = lambda **kwargs: (
        gradients.append(bytes_of(p.grad for p in trainer.network.parameters)) or zero_grad(**kwargs)
    )
    with trainer.batches(1) as batches:
        trainer.train_step(batches)
    states = trainer.optimization.inner.state.values()
    tensors = [
        value for state in states for name, value in state.items() if torch.is_tensor(value) and "qmap" not in name
    ]
    assert said.weights == bytes_of(trainer.network.module.parameters())
    assert gradients[-1:] == [said.gradients]
    assert said.optimizer == bytes_of(tensors)
    assert said.ema == bytes_of(trainer.network.ema.shadow_params)
    assert said.total >= said.weights + said.gradients + said.optimizer + said.ema + said.activations > 0


def test_a_dry_run_under_a_preset_estimates_once(options, monkeypatch, capsys):
    estimated = []
    monkeypatch.setattr(run, "estimate_memory", lambda *args: estimated.append(args) or estimate_memory(*args))
    train(TrainingConfig(**{**options, "preset": "24gb", "use_8bit_adam": False, "dry_run": True}))
    assert len(estimated) == 1
    assert " on each device: " in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "lion"])
def test_the_state_is_told_to_the_byte(options, optimizer):
    if optimizer == "lion":
        pytest.importorskip("bitsandbytes")
    check_state(TrainingConfig(**options, optimizer=optimizer))


def test_weights_in_bfloat16_and_one_gradient_at_a_time(options):
    changes = {"full_bf16": True, "mixed_precision": "bf16", "ema_decay": 0.0, "optimizer": "adafactor"}
    kept = TrainingConfig(**options, **changes)
    at_once = TrainingConfig(**options, **changes, fused_backward_pass=True, max_grad_norm=0.0)
    wide = TrainingConfig(**{**options, "optimizer": "adafactor"})
    task, *_ = opened(wide)
    plain, half, fused = (
        estimate_memory(task.unet, config, torch.bfloat16, task.sample_size()) for config in (wide, kept, at_once)
    )
    assert plain.weights == 2 * half.weights == 2 * fused.weights
    assert plain.optimizer == half.optimizer == fused.optimizer
    largest = max(value.numel() for value in task.unet.parameters())
    assert half.gradients == plain.gradients // 2 + 24 * largest
    assert fused.gradients == (2 + 24) * largest
    assert (half.ema, fused.ema) == (0, 0)
    assert half.activations < plain.activations  # autocast makes no copies of weights


def test_the_state_of_a_lora(options):
    pytest.importorskip("peft")
    check_state(TrainingConfig(**options, lora_rank=4))


def test_the_state_in_8_bits(options):
    pytest.importorskip("bitsandbytes")
    config = TrainingConfig(**options, use_8bit_adam=True)
    task, accelerator, _ = opened(config)
    said = estimate_memory(task.unet, config, None, task.sample_size())
    network = TrainedNetwork(task.unet, config, accelerator)
    optimization = Optimization([{"params": network.parameters}], config, accelerator)
    for parameter in network.parameters:
        parameter.grad = torch.ones_like(parameter)
    optimization.update(finite=True)
    tensors = state_tensors(optimization.inner)
    assert said.optimizer == pytest.approx(bytes_of(tensors), rel=0.01)  # numbers of steps are no tensors here


def really_saved(unet, batch, size):
    """Bytes that a forward pass with real numbers keeps, each block of memory once and without the weights."""
    known, kept, held = {value.untyped_storage().data_ptr() for value in unet.parameters()}, {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    inputs = example_inputs(unet, batch, size)
    inputs["timestep"] = torch.zeros(batch, dtype=torch.int64)
    if "class_labels" in inputs:
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = unet.train()(**inputs, return_dict=False)[0]
        loss = (output - torch.zeros_like(output)).square().mean()
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["sd", "xl", "lora", "pixels"])
def test_activations_are_those_of_a_real_pass(options, xl_folder, small_run, image_folder, kind, checkpointing):
    changes = {
        "sd": {},
        "xl": {"pretrained_model_name_or_path": str(xl_folder)},
        "lora": {"lora_rank": 4},
    }
    common = {"gradient_checkpointing": checkpointing, "train_batch_size": 3}
    if kind == "pixels":
        config = PixelTrainingConfig(
            **{**small_run, **common, "train_data_dir": str(image_folder), "unet": "small-16"}
        )
    else:
        config = TrainingConfig(**{**options, **common, **changes[kind]})
    task, *_ = opened(config)
    said = estimate_memory(task.unet, config, None, task.sample_size())
    if checkpointing:
        task.unet.enable_gradient_checkpointing()
    assert said.activations == pytest.approx(really_saved(task.unet, 3, task.sample_size()), rel=0.1)
    assert (said.recomputed > 0) == checkpointing


@pytest.mark.parametrize("sharding", ["optimizer", "parameters"])
def test_what_is_divided_is_a_share_and_what_is_gathered_is_whole(options, sharding):
    whole, part = (TrainingConfig(**{**options, "sharding": kind}) for kind in ("none", sharding))
    task, *_ = opened(whole)
    alone = estimate_memory(task.unet, whole, torch.bfloat16, task.sample_size(), processes=4)
    divided = estimate_memory(task.unet, part, torch.bfloat16, task.sample_size(), processes=4)
    for name in ("weights", "gradients", "optimizer", "ema"):
        assert getattr(divided, name) == getattr(alone, name) // 4
    assert alone.gathered == 0
    gathered = alone.weights // 2  # in two bytes each
    assert divided.gathered == gathered if sharding == "optimizer" else 0 < divided.gathered < gathered
    passes = TrainingConfig(**{**options, "sharding": sharding, "gradient_accumulation_steps": 2})
    more = estimate_memory(task.unet, passes, torch.bfloat16, task.sample_size(), processes=4).gathered
    assert more - divided.gathered == (alone.gradients if sharding == "optimizer" else 0)
    assert divided.activations < alone.activations  # autocast makes no copies of weights
    assert estimate_memory(task.unet, part, torch.bfloat16, task.sample_size()) == alone
    hybrid = TrainingConfig(**{**options, "sharding": sharding, "dp_replicate_size": 2})
    assert estimate_memory(task.unet, hybrid, None, task.sample_size(), processes=4).ema == alone.ema // 2
    offloaded = TrainingConfig(**{**options, "sharding": sharding, "fsdp_offload_params": True})
    for processes in (1, 4):
        left = estimate_memory(task.unet, offloaded, None, task.sample_size(), processes)
        assert (left.weights, left.gradients, left.optimizer, left.ema) == (0, 0, 0, 0)
        assert left.gathered > 0


def test_mixed_precision_keeps_less_of_activations_and_copies_of_weights(options):
    config = TrainingConfig(**{**options, "train_batch_size": 64})
    task, *_ = opened(config)
    wide, half = (estimate_memory(task.unet, config, dtype, task.sample_size()) for dtype in (None, torch.bfloat16))
    assert half.weights == wide.weights
    assert half.activations < 0.9 * wide.activations
    once = TrainingConfig(**{**options, "train_batch_size": 1, "gradient_checkpointing": True})
    copies = estimate_memory(task.unet, once, torch.bfloat16, task.sample_size()).recomputed
    assert copies == pytest.approx(half.weights / 2, rel=0.1)  # but for norms


def test_a_dry_run_says_it(options, capsys):
    train(TrainingConfig(**options, dry_run=True, cache="none", ema_device="cpu"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("memory: ")]
    assert "GB on each device: weights" in line
    assert "EMA" not in line
    assert "frozen networks" in line
