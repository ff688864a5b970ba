"""The optimizer steps of a run, on accelerate."""

import contextlib
import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..core import v_loss
from ..utils.distributed import Processes
from .checkpointing.checkpoint import checkpoint_step, read_checkpoint
from .checkpointing.saver import CheckpointSaver
from .checkpointing.signals import StopSignals
from .checkpointing.state import TrainingState
from .config import OptimizationConfig
from .data.dataset import row_name
from .data.loader import Batch, DistributedBatchSampler, create_dataloader, derive_seed
from .errors import TrainingError
from .fsdp import full_tensor
from .host_copy import HostCopy
from .loss import LossWeighting
from .network import TrainedNetwork
from .optimization import Optimization
from .optimizers import optimizer_kind
from .task import Task
from .timesteps import LossByTimestep, SampledTimesteps

_MOST_ROWS_NAMED = 128
_LAST_STEPS = 100
"""Whose mean loss the model card has."""


def sample_losses(task: Task, unet: Any, batch: Batch, timesteps: Tensor) -> Tensor:
    """The loss of each sample of a batch without weights, shape [B].

    Args:
        task: that is trained.
        unet: its network.
        batch: on the device, from `Task.encode`.
        timesteps: as `batch` has them, preferably on the CPU, to avoid a synchronization.
    """
    asked = task.noised_batch(batch, timesteps)
    output = task.predict(unet, asked.x_t, {**batch, "timestep": asked.timestep})
    return v_loss(asked.convert_output(output), asked.target)


class Trainer:
    """A network, its optimizer and its objective, and the steps over them.

    Args:
        config: with the batches and the limits of a step.
        task: that is trained.
        samples: to train on, from `task.prepare`.
        network: of the task.
        weighting: of losses.
        processes: of the run.
        saver: of its checkpoints.
        checkpoint: to continue from.
    """

    def __init__(
        self,
        config: OptimizationConfig,
        task: Task,
        samples: SampledTimesteps,
        network: TrainedNetwork,
        weighting: LossWeighting,
        processes: Processes,
        saver: CheckpointSaver,
        checkpoint: Path | None = None,
    ) -> None:
        self.config, self.task, self.samples = config, task, samples
        self.network, self.weighting, self.processes = network, weighting, processes
        self.accelerator, self.saver = network.accelerator, saver
        self.loss_by_timestep = LossByTimestep(task.objective.num_train_timesteps, self.accelerator.device)
        self.signals, self.stop = StopSignals(verbose=processes.is_main), False
        groups = [{"params": network.parameters}, *weighting.parameter_groups()]
        self.optimization = Optimization(groups, config, self.accelerator, task.data.seed)
        weighting.prepare(self.accelerator)
        self.state = TrainingState(
            {"unet": network.module, **weighting.networks},
            self.optimization.inner,
            network.ema,
            self.accelerator.scaler,
            optimizer_kind(config).group_values,
        )
        self.step = self.skipped_steps = 0
        self.losses: deque[float] = deque(maxlen=_LAST_STEPS)
        if checkpoint:
            tensors, numbers = read_checkpoint(checkpoint)
            self.state.restore(tensors, numbers)
            self.step, self.skipped_steps = checkpoint_step(checkpoint), numbers["left_out"]
            self.losses.extend(numbers.get("losses", ()))

    @contextlib.contextmanager
    def batches(self, last_step: int) -> Iterator[Iterator[Batch]]:
        """Iterate over batches up to a step; DataLoader workers end with the context."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        positions = DistributedBatchSampler(self.config, range(self.step, last_step), rank, world_size)
        batches = iter(create_dataloader(self.samples, positions, self.task.data))
        try:
            yield batches
        finally:
            # Left to the garbage collector they live as long as an error's traceback, and they ignore SIGTERM, by
            # which they would be ended at exit.
            getattr(batches, "_shutdown_workers", lambda: None)()

    def train_step(self, batches: Iterator[Batch]) -> float:
        """One optimizer step over one global batch.

        Returns:
            The loss, averaged over it.
        """
        self.optimization.set_step(self.step)
        losses: list[Tensor] = []
        passes = self.config.gradient_accumulation_steps
        for part in range(passes):
            batch = next(batches)
            # Dropout has no generator but the global one.
            torch.manual_seed(derive_seed(self.task.data.seed, 2, self.step, part, self.accelerator.process_index))
            with self.network.accumulate(last=part == passes - 1):
                loss = self._compute_losses(batch).mean()
                losses.append(loss.detach())
                mean, finite = self._backward(loss, losses)
        self.step += 1
        if finite:
            self.losses.append(mean)
            self.network.update_ema()
        return mean

    def _compute_losses(self, batch: Batch) -> Tensor:
        """The weighted training loss of each sample of a batch, shape [B]."""
        device, timesteps = self.accelerator.device, batch["timestep"]
        # From pinned memory, without synchronization; casts follow on the device.
        batch = self.task.encode({name: value.to(device, non_blocking=True) for name, value in batch.items()})
        losses = sample_losses(self.task, self.network.unet, batch, timesteps)
        self.loss_by_timestep.add(losses, batch["timestep"])
        return self.weighting(losses, timesteps, batch["timestep"])

    def _backward(self, loss: Tensor, losses: list[Tensor]) -> tuple[float, bool]:
        """A backward pass, and after the last one of a step the update; returns as `_update_weights`."""
        if self.optimization.in_backward:
            return self._update_in_backward(loss)
        self.accelerator.backward(loss)
        if not self.accelerator.sync_gradients:
            return math.nan, False  # more passes follow
        return self._update_weights(torch.stack(losses).mean())

    def _update_in_backward(self, loss: Tensor) -> tuple[float, bool]:
        """The backward pass, which updates the weights, if the loss is finite; returns as `_update_weights`."""
        mean, norms, stop = self._reduce_metrics(loss.detach(), loss.new_zeros(())).tolist()
        self.stop, finite = stop > 0, self._is_finite(mean, norms)
        if finite:
            self.accelerator.backward(loss)
            if not math.isfinite(norm := self.optimization.take_norm().item()):
                kept = self.saver.describe_last()
                raise TrainingError(
                    f"At step {self.step + 1} the gradient norm was {norm}, and --fused_backward_pass had updated the "
                    f"weights by then; {kept}. The batch was made of the rows {self._batch_row_names()}. Lower "
                    "--learning_rate, then --resume."
                )
        return mean, finite

    def _update_weights(self, loss: Tensor) -> tuple[float, bool]:
        """Clip the gradients and update the weights, if loss and gradients are finite in all processes.

        Returns:
            The loss over all processes, and whether the weights were updated.
        """
        limit = self.config.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.network.parameters, limit)
        metrics = self._reduce_metrics(loss, full_tensor(norm).to(loss.device, non_blocking=True))
        on_its_way = HostCopy(metrics)
        if self.optimization.skips_on_device:
            checked = metrics[:1] if self.accelerator.scaler is not None else metrics[:2]  # see `_is_finite`
            self.optimization.update_unless(1 - checked.isfinite().all().float())
        # Here alone a step waits for the device, which has the update to do meanwhile.
        mean, norms, stop = on_its_way.tolist()
        self.stop, finite = stop > 0, self._is_finite(mean, norms)
        if not self.optimization.skips_on_device:
            self.optimization.update(finite)
        return mean, finite

    def _reduce_metrics(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Loss and gradient norm averaged over all processes, and whether one of them has to stop, shape [3]."""
        signaled = loss.new_full((), float(self.signals.received > 0 or self.saver.failed))
        metrics: Tensor = self.accelerator.reduce(torch.stack([loss, norm, signaled]), "mean")
        return metrics

    def _is_finite(self, loss: float, norm: float) -> bool:
        """Whether loss and gradients are finite, so that weights are updated; raises after too many failures."""
        # With fp16, infinite gradients are normal: the scaler skips the step and lowers its scale.
        if math.isfinite(loss) and (math.isfinite(norm) or self.accelerator.scaler is not None):
            self.skipped_steps = 0
            return True
        self.skipped_steps += 1
        found = (
            f"At step {self.step + 1} the loss was {loss} and the gradient norm {norm}; the weights were not updated"
        )
        if self.skipped_steps > self.config.nan_skip:
            kept = self.processes.run_on_main(self.saver.describe_last)
            raise TrainingError(
                f"{found}, and {kept}. The batch contained the rows {self._batch_row_names()}. Lower --learning_rate "
                "or increase --lr_warmup_steps, then --resume; --nan_skip skips single steps."
            )
        if self.processes.is_main:
            tqdm.write(f"{found}. The batch contained the rows {self._batch_row_names()}.")
        return False

    def _batch_row_names(self) -> str:
        """Names of the data rows in this step's global batch, for error texts."""
        size = self.config.global_batch(self.accelerator.num_processes)
        rows = [self.samples.row_at(position) for position in range(self.step * size, (self.step + 1) * size)]
        names = [row_name(self.task.rows, self.task.data.image_column, row) for row in rows[:_MOST_ROWS_NAMED]]
        return ", ".join([*names, *([f"and {size - len(names)} more"] if size > len(names) else [])])

    def export_unet(self, everywhere: bool = False) -> contextlib.AbstractContextManager[Any]:
        """The UNet with the weights to export; collective. See `TrainedNetwork.export_unet`."""
        return self.network.export_unet(self.state.tensors, everywhere)

    def save_checkpoint(self, folder: Path, limit: int) -> None:
        """Save a checkpoint into the run's folder and keep the newest `limit`; collective. See `CheckpointSaver`."""
        numbers = {**self.state.numbers(), "left_out": self.skipped_steps, "losses": list(self.losses)}
        self.saver.save(folder, self.step, self.state.tensors(), numbers, limit)
