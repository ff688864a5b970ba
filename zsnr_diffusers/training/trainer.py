"""The training loop, on accelerate."""

import contextlib
import math
import signal
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from ..core import add_noise, training_target, v_loss
from ..utils.distributed import Processes
from ..utils.images import ImageError
from .checkpointing.checkpoint import checkpoint_step, read_checkpoint, write_checkpoint
from .checkpointing.signals import StopSignals
from .checkpointing.state import TrainingState
from .config import RunConfig
from .data.dataset import name_of
from .data.loader import Batch, DistributedBatchSampler, Samples, derive_seed, load_batches
from .data.remote import ShardError
from .errors import TrainingError, TrainingInterrupted
from .fsdp import gather, whole
from .loss import LossWeighting
from .network import TrainedNetwork
from .optimization import Optimization
from .reporting.results import add_results
from .reporting.upload import push
from .reporting.validation import Previews
from .task import Task
from .timesteps import LossByTimestep, SampledTimesteps

_MOST_ROWS_NAMED = 128
_LAST_STEPS = 100
"""Whose mean loss the model card has."""


class Trainer:
    """One run: the prepared objects, and the steps over them."""

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        processes: Processes,
        task: Task,
        samples: Samples,
        checkpoint: Path | None,
        repo: str | None = None,
    ) -> None:
        self.config, self.accelerator, self.task, self.checkpoint = config, accelerator, task, checkpoint
        global_batch = config.global_batch(accelerator.num_processes)
        self.samples = SampledTimesteps(task.prepare(accelerator, samples), config, len(task.schedule), global_batch)
        self.weighting = LossWeighting(config, task.schedule, accelerator.device)
        self.loss_by_timestep = LossByTimestep(len(task.schedule), accelerator.device)
        self.processes, self.row_at = processes, samples.row_at
        self.previews, self.repo = Previews(accelerator, task, samples.good), repo
        self.signals, self.stop = StopSignals(speaks=processes.is_main), False
        self.network = TrainedNetwork(task.unet, config, accelerator)
        groups = [{"params": self.network.parameters()}, *self.weighting.parameter_groups()]
        self.optimization = Optimization(groups, config, accelerator)
        self.weighting.prepare(accelerator)
        self.state = TrainingState(
            {"unet": self.network.module, **self.weighting.networks},
            self.optimization.inner,
            self.network.ema,
            accelerator.scaler,
        )
        self.step = self.left_out = 0
        self.losses: deque[float] = deque(maxlen=_LAST_STEPS)
        if checkpoint:
            tensors, numbers = read_checkpoint(checkpoint)
            self.state.restore(tensors, numbers)
            self.step, self.left_out = checkpoint_step(checkpoint), numbers["left_out"]
            self.losses.extend(numbers.get("losses", ()))

    def train(self) -> None:
        """Train to the last step, then write the result."""
        try:
            self._train()
        except Exception as error:
            for tracker in self.accelerator.trackers:
                tracker.finish()  # it writes every few minutes, and the last ones are of interest now
            if isinstance(error, ImageError | ShardError):
                # A worker's error comes with its traceback, which ends in what it said.
                said = str(error).strip().rpartition(f"{type(error).__name__}: ")[2]
                raise TrainingError(f"At step {self.step + 1}: {said}; {self._kept}. Then --resume.") from error
            if said := self._death_of_worker(error):
                raise TrainingError(f"At step {self.step + 1}: {said}; {self._kept}. Then --resume.") from error
            raise

    def _death_of_worker(self, error: Exception) -> str:
        """What to say of an error by which the death of a DataLoader's worker shows; nothing of another."""
        # torch raises a RuntimeError wherever this process is when it hears of the death.
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            return str(error)
        # While a batch is on its way, it is the connection that breaks first.
        if self.config.dataloader_num_workers > 0 and isinstance(error, ConnectionError | EOFError):
            return f"a DataLoader worker died as it sent a batch ({str(error) or type(error).__name__})"
        return ""

    def _train(self) -> None:
        config, accelerator = self.config, self.accelerator
        if config.report_to != "none":
            accelerator.init_trackers(
                "logs", {k: v for k, v in vars(config).items() if isinstance(v, int | float | str)}
            )
        global_batch = config.global_batch(accelerator.num_processes)
        progress = tqdm(
            desc="training", total=config.max_train_steps, initial=self.step, disable=not accelerator.is_main_process
        )
        with self.signals, progress, self.batches(config.max_train_steps) as batches:
            if self.step % config.validation_steps == 0:  # at step 0, or where a signal came first
                self._preview()
            while self.step < config.max_train_steps:
                started = time.perf_counter()
                loss = self.train_step(batches)
                speed = global_batch / (time.perf_counter() - started)
                progress.set_postfix({"loss": f"{loss:.4f}", "images/s": f"{speed:.1f}"}, refresh=False)
                progress.update()
                lr = self.optimization.learning_rate
                accelerator.log({"loss": loss, "learning_rate": lr, "images_per_second": speed}, step=self.step)
                self._after_step()
            with self.processes.together(), self.network.shipped(self.state.tensors) as unet:
                if self.processes.is_main:
                    self.task.save(unet)
                    add_results(config, self.losses)
        accelerator.print(f"Saved the result in {config.output_dir}")
        if (repo := self.repo) is not None:
            accelerator.print(f"Pushed it to {self.processes.from_main(lambda: push(config, repo))}")
        self._end()

    def _end(self) -> None:
        self.processes.settle()
        self.accelerator.end_training()

    @contextlib.contextmanager
    def batches(self, last_step: int) -> Iterator[Iterator[Batch]]:
        """Batches up to a step; the workers that make them end with the context."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        positions = DistributedBatchSampler(self.config, range(self.step, last_step), rank, world_size)
        batches = iter(load_batches(self.samples, positions, self.config))
        try:
            yield batches
        finally:
            # Left to the garbage collector they live as long as an error's traceback, and they ignore SIGTERM, by
            # which they would be ended at exit.
            getattr(batches, "_shutdown_workers", lambda: None)()

    def _after_step(self) -> None:
        config, last = self.config, self.step == self.config.max_train_steps
        if last or self.stop or self.step % config.checkpointing_steps == 0:
            self._save_checkpoint()
        if self.stop and not last:
            self.accelerator.print(f"Stopped after step {self.step}; {self._kept}. --resume goes on from there.")
            self._end()
            # In a process that heard nothing itself, the others did.
            raise TrainingInterrupted(self.signals.received or signal.SIGTERM)
        if last or self.step % config.validation_steps == 0:
            self._preview()

    def _preview(self) -> None:
        with self.processes.together(), self.network.shipped(self.state.tensors) as unet:
            if self.processes.is_main:
                self.previews.save(unet, self.step)

    def _save_checkpoint(self) -> None:
        folder, limit = Path(self.config.output_dir), self.config.checkpoints_total_limit
        tensors = gather(self.state.tensors(), keep=self.processes.is_main)
        numbers = {**self.state.numbers(), "left_out": self.left_out, "losses": list(self.losses)}
        self.checkpoint = self.processes.from_main(
            lambda: write_checkpoint(folder, self.step, tensors, numbers, limit)
        )

    @property
    def _kept(self) -> str:
        return f"the last good checkpoint is {self.checkpoint}" if self.checkpoint else "there was no checkpoint yet"

    def train_step(self, batches: Iterator[Batch]) -> float:
        """One optimizer step over one global batch.

        Returns:
            The loss, averaged over it.
        """
        self.optimization.set_step(self.step)
        losses, sound = [], True
        for part in range(self.config.gradient_accumulation_steps):
            batch = next(batches)
            # Dropout has no generator but the global one.
            torch.manual_seed(derive_seed(self.config.seed, 2, self.step, part, self.accelerator.process_index))
            with self.accelerator.accumulate(self.network.unet):
                loss = self._losses(batch).mean()
                losses.append(loss.detach())
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.network.unet.parameters(), self.config.max_grad_norm)
                    mean, norm = self._share(torch.stack(losses).mean(), whole(norm))
                    sound = self._is_sound(mean, norm)
                self.optimization.update(sound)
        self.step += 1
        if sound:
            self.losses.append(mean)
            self.network.update_average()
        if self.step % self.config.logging_steps == 0:
            self.accelerator.log(self.loss_by_timestep.means(self.accelerator), step=self.step)
        return mean

    def _losses(self, batch: Batch) -> Tensor:
        """What is minimized, for each sample of a batch, shape [B]."""
        task, device = self.task, self.accelerator.device
        noise, x_0 = batch["noise"].to(device), task.x_0(batch, device)
        level = task.schedule.noise_level(batch["timestep"], like=x_0)
        output = task.predict(self.network.unet, add_noise(x_0, noise, level), batch)
        losses = v_loss(output, training_target(self.config.prediction_type, x_0, noise, level))
        timesteps = batch["timestep"].to(device, non_blocking=True)
        self.loss_by_timestep.add(losses, timesteps)
        return self.weighting(losses, timesteps)

    def _share(self, loss: Tensor, norm: Tensor) -> tuple[float, float]:
        """Loss and gradient norm, averaged over all processes; and, on the same way, whether one was told to stop.

        Here alone a step waits for the device. The weights must not be updated before it is known that they can be.
        """
        told = loss.new_full((), float(self.signals.received > 0))
        mean, norms, stop = self.accelerator.reduce(torch.stack([loss, norm, told]), "mean").tolist()
        self.stop = stop > 0
        return float(mean), float(norms)

    def _is_sound(self, loss: float, norm: float) -> bool:
        """Whether the weights can be updated; an error where they could not be for too many steps in a row."""
        # Under fp16 an infinite gradient is the scaler's daily business: it skips the step and lowers its scale.
        if math.isfinite(loss) and (math.isfinite(norm) or self.accelerator.scaler is not None):
            self.left_out = 0
            return True
        self.left_out += 1
        found = (
            f"At step {self.step + 1} the loss was {loss} and the gradient norm {norm}; the weights were not updated"
        )
        if self.left_out > self.config.nan_skip:
            raise TrainingError(
                f"{found}, and {self._kept}. The batch was made of the rows {self._rows()}. Lower --learning_rate or "
                "lengthen --lr_warmup_steps, then --resume; --nan_skip leaves out single steps."
            )
        if self.processes.is_main:
            tqdm.write(f"{found}. The batch was made of the rows {self._rows()}.")
        return False

    def _rows(self) -> str:
        """The rows of the data that this step's global batch is made of."""
        size = self.config.global_batch(self.accelerator.num_processes)
        rows = [self.row_at(position) for position in range(self.step * size, (self.step + 1) * size)]
        names = [name_of(self.task.rows, self.config.image_column, row) for row in rows[:_MOST_ROWS_NAMED]]
        return ", ".join([*names, *([f"and {size - len(names)} more"] if size > len(names) else [])])
