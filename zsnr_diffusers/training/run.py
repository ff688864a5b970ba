"""Start a run from a configuration: model, data and folder are checked before the first step."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

if missing := [name for name in ("accelerate", "datasets") if find_spec(name) is None]:
    raise ImportError(f'Training needs {" and ".join(missing)}: python -m pip install "zsnr_diffusers[train]"')

from accelerate import Accelerator

from ..core import flow_times
from ..utils.distributed import Processes
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
    DataConfig,
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
from .kinds import open_task
from .launch_settings import fsdp_options
from .loop import TrainingLoop
from .loss import LossWeighting
from .measure import time_training_steps
from .memory import check_memory, estimate_memory
from .network import TrainedNetwork
from .optimizers import check_optimizer, check_updates, checkpoint_bytes
from .parameters import trainable_parameters
from .plan import Plan, describe_memory, describe_result, describe_samples, describe_steps
from .reporting.upload import create_run_repo, hub_repo_name
from .reporting.validation import ValidationLogger
from .schedule import betas_alpha_bar
from .speed import check_speed, matmul_precision
from .task import Task
from .timesteps import SampledFlowTimes, SampledSteps, SampledTimesteps
from .trainer import Trainer

Network = TypeVar("Network", bound=NetworkConfig)


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
        config = stack.enter_context(_settle_options(config, Path(config.output_dir) if config.resume else None))
        accelerator, processes = create_accelerator(
            config, config.gradient_accumulation_steps, config.report_to, output_dir=config.output_dir
        )
        check_updates(config, accelerator)
        identity, options = config.identity_values(), dataclasses.asdict(config)
        checkpoint, damaged = processes.run_on_main(lambda: _lock_run_folder(config, identity, stack))
        index_shards(config, processes)
        task, output = processes.main_first(lambda: open_task(config))
        batch = config.global_batch(processes.size)
        shown = config.max_train_steps * batch
        samples = _open_samples(config, task, processes, batch, config.validation_rows)
        task.plan_cache(accelerator, processes, samples, shown)
        memory = _check_memory(config, task, accelerator, processes, config.gpu_gigabytes, config.dry_run)
        if accelerator.is_local_main_process:
            print(damaged + (f"{config.to_yaml(changed_only=True)}\n" if config.dry_run else ""), end="")
            lines = config.describe_preset() | task.summary(samples) | describe_samples(config, samples, shown)
            lines |= memory | describe_steps(config, samples.epoch_length, processes.size, checkpoint)
            show(Plan(lines | describe_result(output, config.output_dir)))
        new_trainer = functools.partial(create_trainer, config, accelerator, processes, task, checkpoint=checkpoint)
        if config.dry_run:
            _end_dry_run(config, task, samples, new_trainer, accelerator, processes)
            return
        found, repo = processes.run_on_main(lambda: _claim_folder(config, task, samples, _state_size(config, task)))
        trainer = new_trainer(samples)
        processes.run_on_main(lambda: write_run_record(Path(config.output_dir), options, found))
        validation = ValidationLogger(config, accelerator, task, output, samples.usable_rows)
        TrainingLoop(config, trainer, output, validation, options, repo, on_step).run()


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


@contextlib.contextmanager
def _settle_options(config: Network, resumed: Path | None) -> Iterator[Network]:
    """Context with a run's options as they are on this machine, where nothing is left to accelerate or to `auto`.

    Args:
        config: how the network is computed and updated.
        resumed: folder of the run that is continued.
    """
    with fsdp_options(config) as found:
        check_speed(found)
        check_optimizer(found)
        found = resolve_mixed_precision(found, {} if resumed is None else read_options(resumed))
        with matmul_precision(found.allow_tf32):
            yield found


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


def _open_samples(
    config: DataConfig, task: Task, processes: Processes, global_batch: int, validation_rows: int | None
) -> TrainingDataset:
    """The samples of a task's data whose images can be read, without the rows that are kept aside."""
    images = processes.run_on_main(lambda: check_images(task.rows, config, index=open_file_index(config)))
    held_out = processes.run_on_main(lambda: hold_out_rows(task.rows, images, config, validation_rows))
    return task.samples(images, global_batch, held_out)


def _check_memory(
    config: NetworkConfig,
    task: Task,
    accelerator: Accelerator,
    processes: Processes,
    gigabytes: float | None,
    dry_run: bool,
) -> dict[str, str]:
    """Refuse a step that does not fit into a GPU of so many gigabytes; for a dry run, a line of the plan about it."""
    if gigabytes is None and not dry_run:
        return {}
    half = mixed_precision_dtype(accelerator)
    size, count, frozen = task.sample_size(), accelerator.num_processes, task.frozen_bytes(half)
    found = processes.run_on_main(
        lambda: check_memory(
            config, gigabytes, lambda changed: estimate_memory(task.unet, changed, half, size, count, frozen)
        )
    )
    return describe_memory(found) if dry_run else {}


def _end_dry_run(
    config: OutputConfig,
    task: Task,
    samples: TrainingDataset,
    new_trainer: Callable[[TrainingDataset], Trainer],
    accelerator: Accelerator,
    processes: Processes,
) -> None:
    """What a dry run does after its plan: check the name of the repo, and measure speed, if asked for."""
    if config.push_to_hub:
        hub_repo_name(config)
    if config.measure:
        trainer = new_trainer(task.measure_cache(accelerator, processes, samples))
        accelerator.print(time_training_steps(trainer))


def _state_size(config: OptimizationConfig, task: Task) -> int:
    """Bytes of a checkpoint."""
    return checkpoint_bytes(config, [parameter.shape for parameter in trainable_parameters(task.unet).values()])


def _claim_folder(
    config: OutputConfig, task: Task, samples: TrainingDataset, checkpoint_size: int
) -> tuple[Fingerprint, str | None]:
    """Check a run against its folder and the disk, and create its repo, before anything is trained.

    Returns:
        Fingerprint of data and base, and the repo to push to, None for none.
    """
    found = compute_fingerprint(task, samples.usable_rows)
    check_fingerprint(config, found)
    remove_partial_checkpoints(Path(config.output_dir))
    check_disk_space(config, checkpoint_size)
    return found, create_run_repo(config) if config.push_to_hub else None
