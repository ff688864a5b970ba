"""FSDP2 of `accelerate launch`: its settings as options, and runs that are really launched with them."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from child_processes import arguments, exit_code, start_ranks
from training_runs import launched, logged

import zsnr_diffusers
from zsnr_diffusers.training import TrainingConfig, loop, train
from zsnr_diffusers.training.accelerator import _backend
from zsnr_diffusers.training.fsdp import CAN_SHARD_ON_CPU
from zsnr_diffusers.training.launch_settings import fsdp_options

CONFIGS = Path(zsnr_diffusers.__file__).parents[1] / "examples" / "configs" / "accelerate"
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
"""As a launcher sets them for every process; the last is its default."""
SHARDS = pytest.mark.skipif(not CAN_SHARD_ON_CPU, reason="this torch shards on GPUs alone")


def hybrid(copies, shards, **sizes):
    sizes = {"DP_REPLICATE_SIZE": copies, "DP_SHARD_SIZE": shards, **sizes}
    values = {f"PARALLELISM_CONFIG_{name}": str(size) for name, size in sizes.items()}
    return {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "WORLD_SIZE": "4", **values}


@pytest.fixture
def environment():
    """Sets variables as a launcher does."""
    with mock.patch.dict(os.environ):
        yield os.environ.update


# -- as options


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"sharding": "parameters"}),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, {"sharding": "optimizer"}),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {"sharding": "parameters", "fsdp_offload_params": True}),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {"sharding": "parameters", "gradient_checkpointing": True}),
        (hybrid(2, 2), {"sharding": "parameters", "dp_replicate_size": 2}),
    ],
)
def test_settings_are_options(config, environment, settings, expected):
    environment({**FSDP2, **settings})
    with fsdp_options(config) as found:
        plain = vars(config)
        assert {name: value for name, value in vars(found).items() if value != plain[name]} == expected
        assert "ACCELERATE_USE_FSDP" not in os.environ
        assert "ACCELERATE_USE_PARALLELISM_CONFIG" not in os.environ
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"


def test_without_fsdp_nothing_changes(config, environment):
    environment({"FSDP_VERSION": "2", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"})
    with fsdp_options(config) as found:
        assert found is config
        assert os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"


@pytest.mark.parametrize(
    ("settings", "changes", "refusal"),
    [
        ({"FSDP_VERSION": "1"}, {}, r"configured for FSDP1, .* Set fsdp_version: 2"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, {}, "none for FSDP2 .*; see `accelerate to-fsdp2`"),
        ({"FSDP_IGNORED_MODULES": "conv_in"}, {}, "fsdp_ignored_modules is not supported: remove it"),
        (hybrid(2, 1, TP_SIZE=2), {}, r"has tp_size=2, .*: take dp_replicate_size and dp_shard_size"),
        (hybrid(2, 4), {}, r"is one for 2 x 4 processes .*, and there are 4"),
        ({}, {"sharding": "optimizer"}, "--sharding=optimizer, and accelerate is configured for parameters"),
        ({}, {"lora_rank": 4}, "FSDP2, which is .* for a LoRA, which is small.* with --multi_gpu"),
        ({}, {"compile": "blocks"}, "FSDP2, which is .* --compile=blocks and --sharding=parameters are not"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_anything(options, environment, settings, changes, refusal):
    environment({**FSDP2, **settings})
    with pytest.raises(ValueError, match=refusal):
        train(TrainingConfig(**{**options, **changes}))
    assert not Path(options["output_dir"]).exists()


@pytest.mark.parametrize("changes", [{"dp_replicate_size": 2}, {"fsdp_offload_params": True}])
def test_options_of_sharding_need_sharding(options, changes):
    with pytest.raises(ValueError, match="--dp_replicate_size and --fsdp_offload_params need --sharding, of opt"):
        train(TrainingConfig(**{**options, **changes}))


@SHARDS
@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"dp_replicate_size": 2}, "--dp_replicate_size=2 does not divide 1 processes into groups of two or more"),
        ({"fsdp_offload_params": True}, "--fsdp_offload_params needs a launcher for one GPU, too"),
    ],
)
def test_sharding_that_processes_cannot_do_is_refused(options, changes, refusal):
    with pytest.raises(ValueError, match=refusal):
        launched(TrainingConfig(**{**options, "sharding": "parameters", **changes}))


def test_only_what_is_offloaded_from_gpus_needs_gloo_too(options, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    offloaded, kept = (
        TrainingConfig(**{**options, "sharding": "parameters", "fsdp_offload_params": flag}) for flag in (True, False)
    )
    assert (_backend(offloaded), _backend(kept)) == ("cuda:nccl,cpu:gloo", "nccl")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert _backend(offloaded) == "nccl"  # which stands for the default


# -- launched


@pytest.fixture
def run_options(options):
    """A global batch of four in one piece, with weights of the loss that are trained beside the network."""
    more = {"report_to": "tensorboard", "train_batch_size": 4, "loss_weighting": "learned_uncertainty"}
    return {**options, **more, "max_train_steps": 4, "checkpointing_steps": 2}


def say_share():
    """Let a process say what share of the network's numbers it holds, and on what mesh."""
    run = loop.TrainingLoop.run

    def saying(self):
        parameters = list(self.trainer.network.module.parameters())
        held = sum(one.to_local().numel() for one in parameters)
        print(f"holds {held / sum(one.numel() for one in parameters):.3f}", flush=True)
        print(f"mesh {tuple(parameters[0].device_mesh.shape)}", flush=True)
        run(self)

    loop.TrainingLoop.run = saying


def divided(options, processes, **changes):
    return {**options, "train_batch_size": options["train_batch_size"] // processes, **changes}


def run_ranks(options, folder, count, settings):
    """Run it in as many processes with settings of FSDP2; what each of them said."""
    ranks = start_ranks(divided(options, count), folder, say_share, count, {**FSDP2, **settings})
    codes = [exit_code(rank, seconds=250) for rank in ranks]
    said = [Path(folder, f"rank{number}.log").read_text() for number in range(count)]
    assert codes == [0] * count, said
    return said


def same_losses(folder, other):
    # The sum over a batch is taken in another order; float32 keeps seven digits.
    found, expected = ([value for _, value in logged(one)["loss"]] for one in (folder, other))
    assert found == pytest.approx(expected, rel=3e-6, abs=1e-6)


@SHARDS
@pytest.mark.full
def test_as_accelerate_launches_it_with_the_example(run_options, tmp_path):
    """And resumed by one process, and by two again: losses are those of one process throughout."""
    train(TrainingConfig(**run_options))
    run_options |= {"output_dir": str(tmp_path / "launched"), "checkpointing_steps": 1, "resume": True}
    launch = f"accelerate.commands.launch --config_file={CONFIGS / 'fsdp2.yaml'} --num_processes=2"
    result = subprocess.run(
        [
            *(sys.executable, "-m", *launch.split(), "--mixed_precision=no", "--main_process_port=0"),
            *("-m", "zsnr_diffusers.training", *arguments(divided(run_options, 2, max_train_steps=1))),
        ],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "sharding: parameters over 2 processes (FSDP2)" in result.stdout
    train(TrainingConfig(**{**run_options, "max_train_steps": 2}))
    run_ranks(run_options, tmp_path, 2, {})
    same_losses(run_options["output_dir"], tmp_path / "run")


@SHARDS
@pytest.mark.full
def test_gathered_once_and_checkpointed(run_options, tmp_path):
    train(TrainingConfig(**run_options))
    run_options |= {"output_dir": str(tmp_path / "sharded"), "checkpointing_steps": 4}
    settings = {"FSDP_RESHARD_AFTER_FORWARD": "false", "FSDP_ACTIVATION_CHECKPOINTING": "true"}
    said = run_ranks(run_options, tmp_path, 2, settings)
    assert "sharding: optimizer over 2 processes (FSDP2)" in said[0]
    same_losses(run_options["output_dir"], tmp_path / "run")


@SHARDS
@pytest.mark.full
@pytest.mark.timeout(600)
def test_two_copies_on_two_processes_each_with_their_shares_on_the_host(run_options, tmp_path):
    """Hybrid sharding, and offloading, which on CPUs moves nothing; both are restored from a checkpoint."""
    train(TrainingConfig(**run_options))
    run_options |= {"output_dir": str(tmp_path / "sharded"), "resume": True}
    settings = {**hybrid(2, 2), "FSDP_OFFLOAD_PARAMS": "true"}
    for steps in (2, 4):
        said = run_ranks({**run_options, "max_train_steps": steps}, tmp_path, 4, settings)
    assert "sharding: parameters over 2 processes, 2 copies, kept in the host's memory (FSDP2)" in said[0]
    assert all("mesh (2, 2)" in text for text in said)
    shares = [float(text.split("holds ")[1].split()[0]) for text in said]
    assert shares == pytest.approx([0.5] * 4, abs=0.1)  # a tensor with an odd number of rows is not halved
    assert sum(shares) == pytest.approx(2, abs=0.004)
    same_losses(run_options["output_dir"], tmp_path / "run")
