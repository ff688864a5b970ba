"""Runs whose parameters are divided over two processes, beside such as are not."""

import shutil
from pathlib import Path

import pytest
import torch
from child_processes import exit_code, start_ranks
from safetensors.torch import load_file
from training_runs import launched, logged, same, trained, weights

from zsnr_diffusers.training import TrainingConfig, loop
from zsnr_diffusers.training.fsdp import CAN_SHARD_ON_CPU

STEPS, HALF = 4, 2


@pytest.fixture
def run_options(options):
    more = {"report_to": "tensorboard", "checkpointing_steps": HALF, "max_train_steps": STEPS, "luminance_images": 2}
    return {**options, **more}


def two(options, log_folder, **changes):
    """A run of two processes."""
    ranks = start_ranks({**options, **changes}, log_folder, prepare=say_share)
    codes = [exit_code(rank) for rank in ranks]
    assert codes == [0, 0], (log_folder / "rank0.log").read_text()


def losses(folder):
    return [value for _, value in logged(folder)["loss"]]


def state(folder, step):
    """All tensors of a checkpoint, by file and name."""
    files = Path(folder, f"checkpoint-{step:06d}").glob("*.safetensors")
    return {f"{file.stem} {name}": value for file in files for name, value in load_file(file).items()}


def half_of(folder, copy):
    """The run as it was at its first checkpoint."""
    shutil.copytree(folder, copy)
    for path in (copy / f"checkpoint-{STEPS:06d}", copy / "unet", copy / "logs"):
        shutil.rmtree(path)
    return copy


def say_share():
    """Let a process say what share of the network's numbers it holds."""
    run = loop.TrainingLoop.run

    def saying(self):
        parameters = list(self.trainer.network.module.parameters())
        held = sum(one.to_local().numel() for one in parameters)
        print(f"holds {held / sum(one.numel() for one in parameters):.3f}", flush=True)
        run(self)

    loop.TrainingLoop.run = saying


@pytest.mark.full
@pytest.mark.skipif(not CAN_SHARD_ON_CPU, reason="this torch shards on GPUs alone")
def test_sharded_runs_are_those_of_one_process(run_options, tmp_path):
    run_options |= {"train_batch_size": 4, "validation_prompts": ["snow"], "validation_steps": STEPS}
    plain, sharded = tmp_path / "plain", tmp_path / "sharded"
    # One process has nothing to divide.
    trained(TrainingConfig(**{**run_options, "output_dir": str(plain), "sharding": "parameters"}))
    parts = {**run_options, "validation_prompts": "snow", "train_batch_size": 1, "gradient_accumulation_steps": 2}
    two({**parts, "sharding": "parameters"}, tmp_path, output_dir=sharded)
    shares = [float((tmp_path / f"rank{rank}.log").read_text().split("holds ")[1].split()[0]) for rank in (0, 1)]
    assert sum(shares) == pytest.approx(1, abs=0.002)
    assert shares[0] == pytest.approx(0.5, abs=0.1)  # a tensor with an odd number of rows is not halved
    # Gradients are added in another order, as is the norm that they are clipped to; float32 keeps seven digits.
    assert losses(sharded) == pytest.approx(losses(plain), rel=1e-5)
    for step in (HALF, STEPS):
        shapes = [
            {name: (value.shape, value.dtype) for name, value in state(folder, step).items()}
            for folder in (sharded, plain)
        ]
        assert shapes[0] == shapes[1]
    averaged = state(sharded, STEPS)
    assert weights(sharded).keys() == weights(plain).keys()
    assert all(torch.equal(value, averaged[f"ema {name}"]) for name, value in weights(sharded).items())
    assert {path.name for path in (sharded / "previews").iterdir()} == {"step-000000.png", "step-000004.png"}

    again, other, alone = (half_of(sharded, tmp_path / name) for name in ("again", "other", "alone"))
    two({**parts, "sharding": "parameters"}, tmp_path, output_dir=again, resume=True)
    assert same(state(again, STEPS), averaged)
    two({**parts, "sharding": "optimizer"}, tmp_path, output_dir=other, resume=True)
    assert same(state(other, STEPS), averaged)  # the same numbers, kept longer
    trained(TrainingConfig(**{**run_options, "output_dir": str(alone), "resume": True}))
    assert losses(alone) == pytest.approx(losses(sharded)[HALF:], rel=1e-5)


@pytest.mark.skipif(CAN_SHARD_ON_CPU, reason="this torch shards on CPUs too")
def test_a_torch_that_cannot_is_named(options):
    with pytest.raises(ValueError, match="--sharding=optimizer on CPUs needs a newer torch than 2"):
        launched(TrainingConfig(**{**options, "sharding": "optimizer"}))


def test_float16_is_refused(options, monkeypatch):
    from zsnr_diffusers.training import accelerator as module

    class Accelerator:
        num_processes, mixed_precision, distributed_type = 1, "fp16", None
        device = torch.device("cuda")

    monkeypatch.setattr(module, "Accelerator", lambda **options: Accelerator())
    with pytest.raises(ValueError, match="--sharding=optimizer does not go with --mixed_precision=fp16"):
        launched(TrainingConfig(**{**options, "sharding": "optimizer"}))


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_accelerate_s_own_sharding_is_refused(options, monkeypatch, kind):
    from zsnr_diffusers.training import accelerator as module

    class Accelerator:
        num_processes, mixed_precision, distributed_type = 1, "no", module.DistributedType[kind]

    monkeypatch.setattr(module, "Accelerator", lambda **options: Accelerator())
    with pytest.raises(ValueError, match=f"accelerate is configured for {kind}, .* --sharding of the training"):
        launched(TrainingConfig(**options))
