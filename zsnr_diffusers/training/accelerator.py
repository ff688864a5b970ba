"""Accelerator and processes of a run."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)

from ..utils.distributed import Processes, launched_processes
from .config import ComputeConfig
from .fsdp import CAN_SHARD_ON_CPU

TIMEOUT = timedelta(minutes=10)
"""Timeout for other processes within a step. A dead process is noticed earlier, because its connections close; while
the main process works alone, others wait without a timeout.
"""

_OTHERS = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
"""Engines of accelerate that are not used. FSDP2 of a launcher is `fsdp_options`' and does not come so far."""


def create_accelerator(
    config: ComputeConfig, gradient_accumulation_steps: int, report_to: str, output_dir: str
) -> tuple[Accelerator, Processes]:
    """The run's `Accelerator`, and its `Processes` for work that only one process does.

    Args:
        config: how steps are computed.
        gradient_accumulation_steps: forward passes per step.
        report_to: a tracker, or `none`.
        output_dir: folder for the tracker.

    Raises:
        ValueError: the launched processes would train independently, or do not support the configuration.
    """
    _check_tracker(report_to)
    accelerator = Accelerator(
        gradient_accumulation_steps=gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        log_with=None if report_to == "none" else report_to,
        project_dir=output_dir,
        kwargs_handlers=[
            InitProcessGroupKwargs(_backend(config), timeout=TIMEOUT),
            # Otherwise all gradients are stored twice, 10 GB more for SDXL.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    _check_processes(accelerator.num_processes)
    if accelerator.distributed_type in _OTHERS:
        raise ValueError(
            f"accelerate is configured for {accelerator.distributed_type.value}, which cannot skip steps or write "
            "interchangeable checkpoints. Use FSDP2 instead, which shards parameters and optimizer state like ZeRO: "
            "launch with distributed_type: FSDP and fsdp_version: 2, see examples/configs/accelerate/fsdp2.yaml, or "
            "with --multi_gpu and --sharding of the training."
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision=fp16 needs a GPU; on a CPU use bf16 or no.")
    if config.sharding != "none":
        _check_sharding(config, accelerator)
    return accelerator, launched_processes()


def _backend(config: ComputeConfig) -> str:
    """Of the processes' connections: the default of accelerate, or also one for what is in the host's memory."""
    on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    return "cuda:nccl,cpu:gloo" if config.fsdp_offload_params and on_gpu else InitProcessGroupKwargs().backend


def _check_sharding(config: ComputeConfig, accelerator: Accelerator) -> None:
    """Refuse sharding that does not go with the processes or their devices."""
    sharding, copies, processes = f"--sharding={config.sharding}", config.dp_replicate_size, accelerator.num_processes
    if accelerator.mixed_precision == "fp16":
        raise ValueError(f"{sharding} is not compatible with --mixed_precision=fp16; use bf16 or no.")
    if accelerator.device.type == "cpu" and not CAN_SHARD_ON_CPU:
        raise ValueError(f"{sharding} on CPUs needs a newer torch than {torch.__version__}.")
    if copies > 1 and (processes % copies or copies == processes):
        raise ValueError(
            f"--dp_replicate_size={copies} does not divide {processes} processes into groups of two or more, each of "
            "which has a copy of the network; use 1, or the number of machines."
        )
    if config.fsdp_offload_params and not torch.distributed.is_initialized():
        raise ValueError(
            "--fsdp_offload_params needs a launcher for one GPU, too: start with torchrun --nproc_per_node 1, or with "
            "accelerate launch --config_file examples/configs/accelerate/fsdp2.yaml --num_processes 1."
        )


def mixed_precision_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """The dtype of the accelerator's mixed precision, None if there is none."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision)


def _check_tracker(name: str) -> None:
    """Refuse a `report_to` that is unknown or not installed, which accelerate would skip silently."""
    known = sorted(LOGGER_TYPE_TO_CLASS)
    if name in ("none", "all"):
        return
    if name not in known:
        raise ValueError(f"--report_to={name!r} is unknown; choose one of {', '.join(known)}, all and none.")
    if name not in [tracker.value for tracker in get_available_trackers()]:
        raise ValueError(
            f"--report_to={name} needs a package that is not installed: pip install {name.replace('_', '-')}, or pass "
            "--report_to none."
        )


def _check_processes(found: int) -> None:
    """Refuse launches in which accelerate does not see the number of started processes."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    # `accelerate launch --cpu --num_processes 2` starts one process, but sets an address for several.
    alone = found == 1 and {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= set(os.environ) and "RANK" not in os.environ
    if found == launched and not alone:
        return
    several = "Several processes were requested" if alone else f"{launched} processes were started"
    raise ValueError(
        f"{several}, but accelerate sees {found}. On CPUs: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu "
        "--num_processes 2 ... (also on CPUs), or ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 ...; for a "
        "single process, unset WORLD_SIZE and MASTER_ADDR."
    )
