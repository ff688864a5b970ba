"""The training loop, on accelerate."""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from ..core import add_noise, training_target, v_loss
from .checkpoints import CONFIG_FILE, check_output_dir, load_checkpoint, save_checkpoint
from .config import RunConfig
from .data import check_images
from .pixels import PixelTask, PixelTrainingConfig
from .previews import save_preview
from .samples import Batch, Positions, Samples, load_batches, seed_of
from .stable_diffusion import StableDiffusionTask, TrainingConfig
from .task import Task
from .timesteps import LossByTimestep, SpreadTimesteps
from .weighting import LossWeighting

TASKS: dict[type[RunConfig], type[Task]] = {TrainingConfig: StableDiffusionTask, PixelTrainingConfig: PixelTask}
"""What each kind of configuration trains."""

_WARMUP_STEPS, _MEASURED_STEPS, _MEASURED_SECONDS = 3, 50, 60


class TrainingError(RuntimeError):
    """Training had to stop; the message says at which step, why, and what is kept."""


def train(config: RunConfig) -> None:
    """Train as configured, and write the result, a pipeline, to `config.output_dir`.

    Everything that can be wrong with the input is found before the first step.

    Args:
        config: what to train, on what, and how: a `TrainingConfig` for Stable Diffusion, a `PixelTrainingConfig` for
            networks of pixels.

    Raises:
        ValueError: model, data, options or output folder cannot be used.
        OSError: a file or repo is missing.
        TrainingError: the loss or the gradients became NaN or infinite.
    """
    tracker = None if config.report_to == "none" else config.report_to
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        log_with=tracker,
        project_dir=config.output_dir,
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision=fp16 needs a GPU; on a CPU take bf16 or no.")
    checkpoint = check_output_dir(config)
    with accelerator.main_process_first():
        task = TASKS[type(config)](config)
    good = [check_images(task.rows, config) if accelerator.is_main_process else []]
    good = broadcast_object_list(good)[0]
    accelerator.print(_plan(config, task, len(good), accelerator.num_processes, checkpoint))
    if config.dry_run and not config.measure:
        return
    run = _Run(config, accelerator, task, task.samples(good), checkpoint)
    if config.measure:
        accelerator.print(run.measure())
    else:
        run.run()


def _plan(config: RunConfig, task: Task, images: int, processes: int, checkpoint: Path | None) -> str:
    global_batch = config.train_batch_size * config.gradient_accumulation_steps * processes
    shipped = task.shipped_scheduler()
    lines = {
        **task.plan(images),
        "global batch": f"{global_batch} = {config.train_batch_size} x {config.gradient_accumulation_steps} forward "
        f"passes x {processes} processes",
        "steps": f"{config.max_train_steps:,} = {config.max_train_steps * global_batch / images:,.1f} epochs"
        + (f", going on from {checkpoint.name}" if checkpoint else ""),
        "ships": f"{type(shipped).__name__}, {shipped.config.timestep_spacing} spacing, in {config.output_dir}",
    }
    width = max(map(len, lines))
    plan = "\n".join(f"{name:>{width}}: {text}" for name, text in lines.items())
    return f"{config.to_yaml()}\n{plan}" if config.dry_run else plan


class _Run:
    """One run: the prepared objects, and the steps over them."""

    def __init__(
        self, config: RunConfig, accelerator: Accelerator, task: Task, samples: Samples, checkpoint: Path | None
    ) -> None:
        self.config, self.accelerator, self.task, self.checkpoint = config, accelerator, task, checkpoint
        self.samples = SpreadTimesteps(samples, config, len(task.schedule), self._global_batch)
        self.weighting = LossWeighting(config, task.schedule, accelerator.device)
        self.loss_by_timestep = LossByTimestep(len(task.schedule), accelerator.device)
        unet = task.unet.float().train()
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision)
        task.freeze(accelerator.device, half)
        optimizer = torch.optim.AdamW(
            [{"params": unet.parameters()}, *self.weighting.parameter_groups()],
            lr=config.learning_rate,
            weight_decay=config.adam_weight_decay,
            fused=accelerator.device.type in ("cpu", "cuda"),
        )
        self.learning_rates = [group["lr"] for group in optimizer.param_groups]
        # The factor as a function of the step: nothing to save, nothing that counts processes.
        self.lr_factor = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        ).lr_lambdas[0]
        self.ema = self._ema(unet)
        self.unet, self.optimizer = accelerator.prepare(unet, optimizer)
        self.weighting.prepare(accelerator)
        self.step = load_checkpoint(accelerator, self.ema, checkpoint) if checkpoint else 0

    def _ema(self, unet: Any) -> EMAModel | None:
        decay = self.config.ema_decay
        if decay == 0:
            return None
        ema = EMAModel(
            unet.parameters(),
            decay=decay,
            min_decay=0.0 if self.config.ema_warmup else decay,
            foreach=True,
            model_cls=type(unet),
            model_config=unet.config,
        )
        ema.to(self.accelerator.device)
        return ema

    def run(self) -> None:
        """Train to the last step, then write the pipeline."""
        config, accelerator = self.config, self.accelerator
        if accelerator.is_main_process:
            Path(config.output_dir).mkdir(parents=True, exist_ok=True)
            Path(config.output_dir, CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
        if config.report_to != "none":
            accelerator.init_trackers(
                "logs", {k: v for k, v in vars(config).items() if isinstance(v, int | float | str)}
            )
        batches, global_batch = self._batches(config.max_train_steps), self._global_batch
        progress = tqdm(
            desc="training", total=config.max_train_steps, initial=self.step, disable=not accelerator.is_main_process
        )
        with progress:
            while self.step < config.max_train_steps:
                started = time.perf_counter()
                loss = self._train_step(batches)
                speed = global_batch / (time.perf_counter() - started)
                progress.set_postfix({"loss": f"{loss:.4f}", "images/s": f"{speed:.1f}"}, refresh=False)
                progress.update()
                lr = self.optimizer.param_groups[0]["lr"]
                accelerator.log({"loss": loss, "learning_rate": lr, "images_per_second": speed}, step=self.step)
                self._after_step()
        if accelerator.is_main_process:
            with self._averaged_weights() as unet:
                self.task.save(unet)
            accelerator.print(f"Saved the pipeline in {config.output_dir}")
        accelerator.end_training()

    def measure(self) -> str:
        """Time some steps, and say how long the whole run would take; nothing is written."""
        batches = self._batches(self.step + _WARMUP_STEPS + _MEASURED_STEPS)
        times = [time.perf_counter()]
        for _ in range(_WARMUP_STEPS + _MEASURED_STEPS):
            self._train_step(batches)
            times.append(time.perf_counter())
            if times[-1] - times[0] > _MEASURED_SECONDS and len(times) > _WARMUP_STEPS + 1:
                break
        steps = len(times) - 1 - _WARMUP_STEPS
        seconds = (times[-1] - times[_WARMUP_STEPS]) / steps
        hours = seconds * self.config.max_train_steps / 3600
        device = self.accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        return (
            f"measured: {self._global_batch / seconds:.1f} images/s, {seconds:.3f} s per step over {steps} "
            f"steps on {self.accelerator.num_processes} x {name} in {self.accelerator.mixed_precision} precision; "
            f"{self.config.max_train_steps:,} steps would take {hours:,.1f} hours"
        )

    @property
    def _global_batch(self) -> int:
        config = self.config
        return config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes

    def _batches(self, last_step: int) -> Iterator[Batch]:
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        positions = Positions(self.config, range(self.step, last_step), rank, world_size)
        return iter(load_batches(self.samples, positions, self.config))

    def _after_step(self) -> None:
        config, last = self.config, self.step == self.config.max_train_steps
        if last or self.step % config.checkpointing_steps == 0:
            self.checkpoint = save_checkpoint(self.accelerator, self.ema, config, self.step)
        if last or self.step % config.validation_steps == 0:
            if self.accelerator.is_main_process:
                with self._averaged_weights() as unet:
                    save_preview(self.accelerator, self.task, unet, self.step)
            self.accelerator.wait_for_everyone()

    def _train_step(self, batches: Iterator[Batch]) -> float:
        """One optimizer step over one global batch.

        Returns:
            The loss, averaged over it.
        """
        for group, learning_rate in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
            group["lr"] = learning_rate * self.lr_factor(self.step)
        losses = []
        for part in range(self.config.gradient_accumulation_steps):
            batch = next(batches)
            # Dropout has no generator but the global one.
            torch.manual_seed(seed_of(self.config.seed, 2, self.step, part, self.accelerator.process_index))
            with self.accelerator.accumulate(self.unet):
                loss = self._losses(batch).mean()
                losses.append(loss.detach())
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    mean = float(self.accelerator.reduce(torch.stack(losses).mean(), "mean"))
                    norm = self.accelerator.clip_grad_norm_(self.unet.parameters(), self.config.max_grad_norm)
                    self._check_finite(mean, float(norm))
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.step += 1
        if self.ema is not None:
            self.ema.step(self.unet.parameters())
        if self.step % self.config.logging_steps == 0:
            self.accelerator.log(self.loss_by_timestep.means(self.accelerator), step=self.step)
        return mean

    def _losses(self, batch: Batch) -> Tensor:
        """What is minimized, for each sample of a batch, shape [B]."""
        task, device = self.task, self.accelerator.device
        noise, x_0 = batch["noise"].to(device), task.x_0(batch, device)
        level = task.schedule.noise_level(batch["timestep"], like=x_0)
        output = task.predict(self.unet, add_noise(x_0, noise, level), batch)
        losses = v_loss(output, training_target(self.config.prediction_type, x_0, noise, level))
        timesteps = batch["timestep"].to(device, non_blocking=True)
        self.loss_by_timestep.add(losses, timesteps)
        return self.weighting(losses, timesteps)

    def _check_finite(self, loss: float, norm: float) -> None:
        # Under fp16 an infinite gradient is the scaler's daily business: it skips the step and lowers its scale.
        if math.isfinite(loss) and (math.isfinite(norm) or self.accelerator.scaler is not None):
            return
        kept = f"the last good checkpoint is {self.checkpoint}" if self.checkpoint else "there was no checkpoint yet"
        raise TrainingError(
            f"At step {self.step + 1} the loss was {loss} and the gradient norm {norm}; the weights were not updated, "
            f"and {kept}. Lower --learning_rate or lengthen --lr_warmup_steps, then --resume."
        )

    @contextlib.contextmanager
    def _averaged_weights(self) -> Iterator[Any]:
        """The UNet with the weights that are shipped."""
        unet: Any = self.accelerator.unwrap_model(self.unet)
        if self.ema is not None:
            self.ema.store(unet.parameters())
            self.ema.copy_to(unet.parameters())
        unet.eval()
        try:
            yield unet
        finally:
            unet.train()
            if self.ema is not None:
                self.ema.restore(unet.parameters())
