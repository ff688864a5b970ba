"""From a configuration to a run: what is trained, on what, in which folder; all checked before the first step."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..utils.tables import Facts, Part, Report
from ..utils.terminal import show
from .accelerator import launch
from .checkpointing.checkpoint import latest_valid, quarantine, remove_partial_checkpoints
from .checkpointing.fingerprint import Fingerprint, fingerprint
from .checkpointing.lock import locked
from .checkpointing.run_folder import check_disk_space, check_fingerprint, check_run_folder, write_run
from .config import RunConfig
from .data.dataset import check_images
from .data.loader import Samples
from .data.tar_shards import index_shards
from .measure import measure
from .parameters import trainable_parameters
from .pixels import PixelTask, PixelTrainingConfig
from .reporting.upload import open_repo, repo_name
from .speed import check_speed, matmul_precision
from .stable_diffusion import StableDiffusionTask, TrainingConfig
from .task import Task
from .trainer import Trainer

TASKS: dict[type[RunConfig], type[Task]] = {TrainingConfig: StableDiffusionTask, PixelTrainingConfig: PixelTask}
"""What each kind of configuration trains."""


def train(config: RunConfig) -> None:
    """Train as configured, and write the result, a pipeline or a LoRA, to `config.output_dir`.

    Everything that can be wrong with the input is found before the first step.

    Args:
        config: what to train, on what, and how: a `TrainingConfig` for Stable Diffusion, a `PixelTrainingConfig` for
            networks of pixels.

    Raises:
        ValueError: model, data, options or output folder cannot be used.
        OSError: a file or repo is missing, or the folder cannot be written.
        TrainingError: the loss or the gradients became NaN or infinite, or a checkpoint could not be written.
        TrainingInterrupted: SIGTERM or SIGINT came; the step was finished and a checkpoint written.
    """
    check_speed(config)
    accelerator, processes = launch(config)
    with matmul_precision(config), contextlib.ExitStack() as folder:
        checkpoint, damaged = processes.from_main(lambda: _open_folder(config, folder))
        index_shards(config, processes)
        task = processes.main_first(lambda: TASKS[type(config)](config))
        images = processes.from_main(lambda: check_images(task.rows, config))
        samples = task.samples(images, config.global_batch(processes.size))
        task.look_up(accelerator, samples)
        if accelerator.is_local_main_process:
            print(damaged + (f"{config.to_yaml()}\n" if config.dry_run else ""), end="")
            show(_plan(config, task, samples, processes.size, checkpoint))
        if config.push_to_hub and config.dry_run:
            repo_name(config)
        if config.dry_run and not config.measure:
            return
        if config.measure:
            trainer = Trainer(config, accelerator, processes, task, samples, checkpoint)
            batch = config.global_batch(processes.size)
            accelerator.print(measure(trainer, accelerator, batch, config.max_train_steps))
            return
        found = processes.from_main(lambda: _check_folder(config, task, samples.good))
        repo = processes.from_main(lambda: open_repo(config)) if config.push_to_hub else None
        trainer = Trainer(config, accelerator, processes, task, samples, checkpoint, repo)
        processes.from_main(lambda: write_run(config, found))
        trainer.train()


def _open_folder(config: RunConfig, stack: contextlib.ExitStack) -> tuple[Path | None, str]:
    """The checkpoint to go on from, in a folder that is locked from now on, and what to say of damaged ones."""
    check_run_folder(config)
    folder, said = Path(config.output_dir), ""
    if not config.dry_run:
        stack.enter_context(locked(folder))
    checkpoint, damaged = latest_valid(folder)
    for path, defect in damaged.items():
        kept = path if config.dry_run else quarantine(path)
        said += f"{path.name} is damaged and passed over: {defect}. It is kept as {kept.name}.\n"
    return checkpoint, said


def _check_folder(config: RunConfig, task: Task, good: Sequence[int]) -> Fingerprint:
    """What tells the run's data and base, which are those of its folder; there is room for its checkpoints."""
    found = fingerprint(config, task, good)
    check_fingerprint(config, found)
    remove_partial_checkpoints(Path(config.output_dir))
    check_disk_space(config, sum(parameter.numel() for parameter in trainable_parameters(task.unet).values()))
    return found


@dataclass(frozen=True)
class Plan(Report):
    """What a run will do, by name."""

    lines: Mapping[str, str]

    def __str__(self) -> str:
        width = max(map(len, self.lines))
        return "\n".join(f"{name:>{width}}: {text}" for name, text in self.lines.items())

    def parts(self) -> Iterator[Part]:
        """A row for each."""
        yield Facts(("training", ""), tuple(self.lines.items()))


def _short_warmup(config: RunConfig) -> dict[str, str]:
    """What becomes of the learning rate if the run is over before its warm-up."""
    warmup, steps = config.lr_warmup_steps or 0, config.max_train_steps
    if warmup < steps or config.lr_scheduler == "constant":
        return {}
    return {
        "warning": f"--lr_warmup_steps={warmup} is as long as the run or longer: the learning rate ends at "
        f"{steps / warmup:.0%} of {config.learning_rate:g}; lower it to some {steps // 10}"
    }


def _plan(config: RunConfig, task: Task, samples: Samples, processes: int, checkpoint: Path | None) -> Plan:
    global_batch = config.global_batch(processes)
    epochs = config.max_train_steps * global_batch / samples.epoch_length
    shipped = task.shipped_scheduler()
    lines = {
        **task.plan(samples),
        "global batch": f"{global_batch} = {config.train_batch_size} x {config.gradient_accumulation_steps} forward "
        f"passes x {processes} processes",
        "steps": f"{config.max_train_steps:,} = {epochs:,.1f} epochs"
        + (f", going on from {checkpoint.name}" if checkpoint else ""),
        **_short_warmup(config),
        "ships": f"{type(shipped).__name__}, {shipped.config.timestep_spacing} spacing, in {config.output_dir}",
    }
    return Plan(lines)
