"""Accelerator and processes of a run."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs

from ..utils.distributed import Processes, launched_processes
from .config import ComputeConfig
from .fsdp import CAN_SHARD_ON_CPU

TIMEOUT = timedelta(minutes=10)
"""Timeout for other processes within a step. A dead process is noticed earlier, because its connections close; while
the main process works alone, others wait without a timeout.
"""

_OTHERS = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


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
            InitProcessGroupKwargs(timeout=TIMEOUT),
            # Otherwise all gradients are stored twice, 10 GB more for SDXL.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    _check_processes(accelerator.num_processes)
    if accelerator.distributed_type in _OTHERS:
        raise ValueError(
            f"accelerate is configured for {accelerator.distributed_type.value}, which cannot skip steps or write "
            "interchangeable checkpoints. Use --sharding of the training instead, which divides parameters and "
            "optimizer state over processes like FSDP2 and ZeRO, and launch with --multi_gpu; see "
            "examples/configs/accelerate."
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision=fp16 needs a GPU; on a CPU use bf16 or no.")
    if accelerator.mixed_precision == "fp16" and config.sharding != "none":
        raise ValueError(
            f"--sharding={config.sharding} is not compatible with --mixed_precision=fp16; use bf16 or no."
        )
    if accelerator.device.type == "cpu" and config.sharding != "none" and not CAN_SHARD_ON_CPU:
        raise ValueError(f"--sharding={config.sharding} on CPUs needs a newer torch than {torch.__version__}.")
    return accelerator, launched_processes()


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
