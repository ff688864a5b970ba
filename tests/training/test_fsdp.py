"""Runs whose parameters are divided over two processes, beside such as are not."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from child_processes import exit_code, start_ranks
from safetensors.torch import load_file
from training_runs import launched, logged, same, trained, weights

from zsnr_diffusers.training import TrainingConfig, loop, trainer
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
    # Gradients of its passes are added before they are divided.
    assert losses(other) == pytest.approx(losses(sharded)[HALF:], rel=1e-5)
    trained(TrainingConfig(**{**run_options, "output_dir": str(alone), "resume": True}))
    assert losses(alone) == pytest.approx(losses(sharded)[HALF:], rel=1e-5)


def count_collectives():
    """Let a process say after each step how often layers were gathered and gradients reduced, and in which dtypes."""
    seen, train_step = [], trainer.Trainer.train_step

    def count(name, what):
        function = getattr(torch.distributed, name, None)

        def counted(*args, **kwargs):
            seen.append((what, str((args[0] if args else kwargs["output"]).dtype)))
            return function(*args, **kwargs)

        setattr(torch.distributed, name, counted)

    def step(self, batches):
        seen.clear()
        loss = train_step(self, batches)
        print("collectives", *(f"{what} {dtype};" for what, dtype in seen), flush=True)
        return loss

    for kind in ("single", "tensor"):  # as they are called now, and were
        count(f"reduce_scatter_{kind}", "reduced")
    for name in ("all_gather_single", "all_gather_into_tensor"):
        count(name, "gathered")
    trainer.Trainer.train_step = step


@pytest.mark.full
@pytest.mark.skipif(not CAN_SHARD_ON_CPU, reason="this torch shards on GPUs alone")
def test_gradients_of_accumulated_passes_are_reduced_once_or_kept_divided(run_options, tmp_path):
    """Layers are gathered in half precision, and gradients added in float32."""
    alone = {**run_options, "train_batch_size": 2, "max_train_steps": 2, "mixed_precision": "bf16"}
    trained(TrainingConfig(**{**alone, "gradient_accumulation_steps": 3, "output_dir": str(tmp_path / "alone")}))
    counts = {}
    for sharding in ("optimizer", "parameters"):
        folder = tmp_path / sharding
        folder.mkdir()
        changes = {"sharding": sharding, "train_batch_size": 1, "output_dir": folder / "run"}
        changes["gradient_accumulation_steps"] = 3
        ranks = start_ranks({**alone, **changes}, folder, prepare=count_collectives)
        assert [exit_code(rank) for rank in ranks] == [0, 0], (folder / "rank0.log").read_text()
        *_, step = re.findall(r"collectives (.*);", (folder / "rank0.log").read_text())
        assert set(step.split("; ")) == {"gathered torch.bfloat16", "reduced torch.float32"}
        counts[sharding] = step.count("reduced")
        # bfloat16 has three digits, and a batch is divided in other places.
        assert losses(folder / "run") == pytest.approx(losses(tmp_path / "alone"), rel=5e-3)
    assert counts["parameters"] == 3 * counts["optimizer"]
    assert counts["optimizer"] > 10  # layers, not blocks


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
    with pytest.raises(ValueError, match="--sharding=optimizer is not compatible with --mixed_precision=fp16"):
        launched(TrainingConfig(**{**options, "sharding": "optimizer"}))


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_accelerate_s_own_sharding_is_refused(options, monkeypatch, kind):
    from zsnr_diffusers.training import accelerator as module

    class Accelerator:
        num_processes, mixed_precision, distributed_type = 1, "no", module.DistributedType[kind]

    monkeypatch.setattr(module, "Accelerator", lambda **options: Accelerator())
    with pytest.raises(ValueError, match=f"accelerate is configured for {kind}, .* --sharding of the training"):
        launched(TrainingConfig(**options))
