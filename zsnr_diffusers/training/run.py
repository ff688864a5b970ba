"""Start a run from a configuration: model, data and folder are checked before the first step."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if missing := [name for name in ("accelerate", "datasets") if find_spec(name) is None]:
    raise ImportError(f'Training needs {" and ".join(missing)}: python -m pip install "zsnr_diffusers[train]"')

from accelerate import Accelerator

from ..core import flow_times
from ..schedulers.config import is_flow
from ..utils.distributed import Processes
from ..utils.tables import KeyValues, Part, Report
from ..utils.terminal import show
from .accelerator import create_accelerator, mixed_precision_dtype
from .automatic import resolve_compile, resolve_mixed_precision
from .checkpointing.checkpoint import latest_valid, quarantine, remove_partial_checkpoints
from .checkpointing.fingerprint import Fingerprint, compute_fingerprint
from .checkpointing.lock import lock_run_folder
from .checkpointing.run_folder import (
    check_disk_space,
    check_fingerprint,
    check_run_folder,
    read_options,
    write_run_record,
)
from .checkpointing.saver import CheckpointSaver
from .config import (
    ComputeConfig,
    NetworkConfig,
    ObjectiveConfig,
    OptimizationConfig,
    OutputConfig,
    RunConfig,
    StepsConfig,
)
from .data.dataset import check_images, open_file_index
from .data.held_out import hold_out_rows
from .data.loader import TrainingDataset
from .data.shard_formats import index_shards
from .launch_settings import fsdp_options
from .loop import TrainingLoop
from .loss import LossWeighting
from .measure import time_training_steps
from .memory import MemoryEstimate, check_memory, estimate_memory
from .network import TrainedNetwork
from .optimizers import check_optimizer, check_updates, checkpoint_bytes
from .parameters import trainable_parameters
from .pixels import PixelTask, PixelTrainingConfig
from .reporting.upload import create_run_repo, hub_repo_name
from .reporting.validation import ValidationLogger
from .schedule import betas_alpha_bar
from .speed import check_speed, matmul_precision
from .stable_diffusion import StableDiffusionTask, TrainingConfig
from .task import Task
from .timesteps import SampledFlowTimes, SampledSteps, SampledTimesteps
from .trainer import Trainer

TASKS: dict[type[RunConfig], type[Task]] = {TrainingConfig: StableDiffusionTask, PixelTrainingConfig: PixelTask}
"""The task of each kind of configuration."""


def train(config: RunConfig, on_step: Callable[[int], None] | None = None) -> None:
    """Train as configured, and write the result, a pipeline or a LoRA, to `config.output_dir`.

    Input errors are detected before the first step.

    Args:
        config: model, data and options: a `TrainingConfig` for Stable Diffusion, a `PixelTrainingConfig` for
            pixel-space networks.
        on_step: called in every process with the number of steps made: before the first one, which is above 0 where
            the run continues, and after each. For a progress display of your own; the run then shows none.

    Raises:
        ValueError: model, data, options or output folder cannot be used.
        OSError: a file or repo is missing, or the folder cannot be written.
        TrainingError: the loss or the gradients became NaN or infinite, or a checkpoint could not be written.
        TrainingInterrupted: SIGTERM or SIGINT was received; the step was finished and a checkpoint written.
    """
    with contextlib.ExitStack() as stack:
        config = stack.enter_context(fsdp_options(config))
        check_speed(config)
        check_optimizer(config)
        config = resolve_mixed_precision(config, read_options(Path(config.output_dir)) if config.resume else {})
        accelerator, processes = create_accelerator(
            config, config.gradient_accumulation_steps, config.report_to, output_dir=config.output_dir
        )
        check_updates(config, accelerator)
        identity = config.identity_values()
        stack.enter_context(matmul_precision(config.allow_tf32))
        checkpoint, damaged = processes.run_on_main(lambda: _lock_run_folder(config, identity, stack))
        index_shards(config, processes)
        task = processes.main_first(lambda: TASKS[type(config)](config))
        images = processes.run_on_main(lambda: check_images(task.rows, config, index=open_file_index(config)))
        held_out = processes.run_on_main(lambda: hold_out_rows(task.rows, images, config, config.validation_rows))
        samples = task.samples(images, config.global_batch(processes.size), held_out)
        task.plan_cache(accelerator, processes, samples)
        if (gigabytes := config.gpu_gigabytes) is not None:
            estimate = functools.partial(_estimate_memory, task, accelerator)
            processes.run_on_main(lambda: check_memory(config, gigabytes, estimate))
        if accelerator.is_local_main_process:
            print(damaged + (f"{config.to_yaml(changed_only=True)}\n" if config.dry_run else ""), end="")
            ships = f"{_describe_export(task)}, in {config.output_dir}"
            shown = config.max_train_steps * config.global_batch(processes.size)
            summary = {**task.summary(samples), **samples.describe_mix(shown), **_describe_held_out(config, held_out)}
            if config.dry_run:
                found_memory = _estimate_memory(task, accelerator, config)
                summary |= {"memory": f"{found_memory}; libraries need another 1 to 3 GB of a GPU"}
            show(_plan_run(config, summary, samples.epoch_length, processes.size, checkpoint, ships))
        if config.push_to_hub and config.dry_run:
            hub_repo_name(config)
        if config.dry_run and not config.measure:
            return
        if config.measure:
            trainer = create_trainer(config, accelerator, processes, task, samples, checkpoint)
            batch = config.global_batch(processes.size)
            accelerator.print(time_training_steps(trainer, accelerator, batch, config.max_train_steps))
            return
        trained = trainable_parameters(task.unet).values()
        checkpoint_size = checkpoint_bytes(config, [parameter.shape for parameter in trained])
        found = processes.run_on_main(
            lambda: _check_fingerprint_and_disk(config, task, samples.usable_rows, checkpoint_size)
        )
        repo = processes.run_on_main(lambda: create_run_repo(config)) if config.push_to_hub else None
        trainer = create_trainer(config, accelerator, processes, task, samples, checkpoint)
        options = dataclasses.asdict(config)
        processes.run_on_main(lambda: write_run_record(Path(config.output_dir), options, found))
        validation = ValidationLogger(config, accelerator, task, samples.usable_rows)
        TrainingLoop(config, trainer, validation, options, repo, on_step).run()


def create_trainer(
    config: StepsConfig,
    accelerator: Accelerator,
    processes: Processes,
    task: Task,
    samples: TrainingDataset,
    checkpoint: Path | None = None,
) -> Trainer:
    """Build the `Trainer` of a run: network, loss weighting and timed samples, on their devices.

    Args:
        config: of the run.
        accelerator: of the run.
        processes: of the run.
        task: of the run.
        samples: of the task, after `Task.plan_cache`.
        checkpoint: to continue from.
    """
    config = resolve_compile(config, task.unet, accelerator.device)
    batch = config.global_batch(accelerator.num_processes)
    timed = _add_timesteps(config, task, task.prepare(accelerator, processes, samples), batch)
    weighting = LossWeighting(config, task.schedule, accelerator.device)
    network = TrainedNetwork(task.unet, config, accelerator)
    saver = CheckpointSaver(processes, checkpoint, config.async_checkpointing)
    return Trainer(config, task, timed, network, weighting, processes, saver, checkpoint)


def _add_timesteps(config: ObjectiveConfig, task: Task, samples: TrainingDataset, batch: int) -> SampledTimesteps:
    """Wrap training samples so that each has a timestep, or flow time, of the configured density."""
    if task.trained_timesteps is not None:
        return SampledSteps(samples, config.timestep_sampling, task.trained_timesteps, batch)
    if not config.is_flow:
        return SampledTimesteps(samples, config.timestep_sampling, len(task.schedule), batch)
    density = functools.partial(
        flow_times,
        sampling=config.flow_time_sampling,
        shift=config.flow_shift,
        logit_mean=config.logit_mean,
        logit_std=config.logit_std,
        alphas_cumprod=betas_alpha_bar(task.betas) if config.flow_time_sampling == "snr" else None,
    )
    return SampledFlowTimes(samples, config.timestep_sampling, density, batch)


def _lock_run_folder(
    config: OutputConfig, identity: Mapping[str, Any], stack: contextlib.ExitStack
) -> tuple[Path | None, str]:
    """Check and lock the run's folder; the checkpoint to resume from, and a line for each damaged one."""
    check_run_folder(config, identity)
    folder, lines = Path(config.output_dir), ""
    if not config.dry_run:
        stack.enter_context(lock_run_folder(folder))
    checkpoint, damaged = latest_valid(folder)
    for path, defect in damaged.items():
        kept = path if config.dry_run else quarantine(path)
        lines += f"{path.name} is damaged and was skipped: {defect}. It was renamed to {kept.name}.\n"
    return checkpoint, lines


def _check_fingerprint_and_disk(
    config: OutputConfig, task: Task, usable_rows: Sequence[int], checkpoint_size: int
) -> Fingerprint:
    """Fingerprint of the run's data and base, checked against the folder's; refuse a disk too full for checkpoints."""
    found = compute_fingerprint(task, usable_rows)
    check_fingerprint(config, found)
    remove_partial_checkpoints(Path(config.output_dir))
    check_disk_space(config, checkpoint_size)
    return found


@dataclass(frozen=True)
class Plan(Report):
    """The plan of a run, by name."""

    lines: Mapping[str, str]

    def __str__(self) -> str:
        width = max(map(len, self.lines))
        return "\n".join(f"{name:>{width}}: {text}" for name, text in self.lines.items())

    def parts(self) -> Iterator[Part]:
        """The plan as one table for a terminal."""
        yield KeyValues(("training", ""), tuple(self.lines.items()))


def _describe_export(task: Task) -> str:
    """The exported scheduler in words, for the plan."""
    scheduler = task.output.export_scheduler()
    if is_flow(scheduler.config):
        return f"{type(scheduler).__name__} over flow times, shift {scheduler.config.flow_shift:g}"
    return f"{type(scheduler).__name__}, {scheduler.config.timestep_spacing} spacing"


def _estimate_memory(task: Task, accelerator: Accelerator, config: NetworkConfig) -> MemoryEstimate:
    """What a step takes of each device's memory."""
    half = mixed_precision_dtype(accelerator)
    return estimate_memory(
        task.unet, config, half, task.sample_size(), accelerator.num_processes, task.frozen_bytes(half)
    )


def _describe_held_out(config: OutputConfig, held_out: Sequence[int]) -> dict[str, str]:
    """What is kept aside for the validation loss, for the plan; empty for nothing."""
    line = f"loss on {len(held_out):,} images that are kept aside, every {config.validation_loss_steps:,} steps"
    return {"validation": line} if held_out else {}


def _warmup_warning(config: OptimizationConfig) -> dict[str, str]:
    """A warning for the plan if the run ends before its learning-rate warm-up; else empty."""
    warmup, steps = config.lr_warmup_steps or 0, config.max_train_steps
    if warmup < steps or config.lr_scheduler == "constant":
        return {}
    return {
        "warning": f"--lr_warmup_steps={warmup} is as long as the run or longer: the learning rate ends at "
        f"{steps / warmup:.0%} of {config.learning_rate:g}; lower it to about {steps // 10}"
    }


def _describe_sharding(config: ComputeConfig, processes: int) -> dict[str, str]:
    """How the network is divided over processes, for the plan; empty if it is not."""
    if not (share := config.shards_over(processes)):
        return {}
    copies = f", {config.dp_replicate_size} copies" if config.dp_replicate_size > 1 else ""
    on_host = ", kept in the host's memory" if config.fsdp_offload_params else ""
    return {"sharding": f"{config.sharding} over {share} processes{copies}{on_host} (FSDP2)"}


def _plan_run(
    config: StepsConfig,
    summary: Mapping[str, str],
    epoch_length: int,
    processes: int,
    checkpoint: Path | None,
    ships: str,
) -> Plan:
    """The plan of a run that is printed before the first step."""
    global_batch = config.global_batch(processes)
    epochs = config.max_train_steps * global_batch / epoch_length
    lines = {
        **summary,
        **_describe_sharding(config, processes),
        "global batch": f"{global_batch} = {config.train_batch_size} x {config.gradient_accumulation_steps} forward "
        f"passes x {processes} processes",
        "steps": f"{config.max_train_steps:,} = {epochs:,.1f} epochs"
        + (f", continuing from {checkpoint.name}" if checkpoint else ""),
        **_warmup_warning(config),
        "saved scheduler": ships,
    }
    return Plan(lines)
