"""The loss on rows that are kept aside, step by step: where it rises while that of training falls, a run overfits."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...evaluation.plots import plot_validation_loss
from ...utils.files import write_json
from ..config import OutputConfig
from ..trainer import Trainer, sample_losses

VALIDATION_LOSS_FILE, VALIDATION_LOSS_PLOT = "validation_loss.json", "validation_loss.png"
_AT_ONCE = 4
"""Timesteps of a row in a forward pass; always as many, since kernels for other batch sizes round otherwise."""

Losses = Mapping[str, float]
"""Mean losses by name: `mean` over all timesteps but the last, that at each of them, at the `last`, and, if there were
steps before, the mean loss of the last of them in `training`."""


class ValidationLoss:
    """Mean losses at fixed timesteps of the rows that a run keeps aside, of the weights that are saved.

    Each row has its own noise, caption and crop, always the same, and its own forward passes, so it matters neither
    how rows are divided over processes nor how large batches are in training.

    Args:
        config: with the folder.
        trainer: of the run.
    """

    def __init__(self, config: OutputConfig, trainer: Trainer) -> None:
        self.folder, self.trainer = Path(config.output_dir), trainer
        self.samples, self.task = trainer.samples.samples, trainer.task
        self.timesteps = self.task.objective.fixed_timesteps()

    def save(self, step: int) -> float:
        """Measure, log and write down the losses at a step; collective. Returns their mean."""
        trainer, losses = self.trainer, self.measure()
        recent = {"training": sum(trainer.losses) / len(trainer.losses)} if trainer.losses else {}
        figures = {"mean": losses[:, :-1].mean().item(), **self._by_timestep(losses.mean(dim=0)), **recent}
        with trainer.processes.sync_errors():
            if trainer.processes.is_main:
                self._write(step, figures)
        logged = {
            f"validation_loss/{name}": value for name, value in figures.items() if name not in ("mean", "training")
        }
        trainer.accelerator.log({"validation_loss": figures["mean"], **logged}, step=step)
        return figures["mean"]

    def _write(self, step: int, figures: Losses) -> None:
        """Write down the losses of a step; one that is not finite is only told, and no reason to end a run."""
        line = f"step {step}: validation loss {figures['mean']:.4f}, {figures['last']:.4f} at the last timestep"
        if all(map(math.isfinite, figures.values())):
            add_validation_loss(self.folder, step, figures)
        else:
            line += "; not written down"
        tqdm.write(line)

    @torch.no_grad()
    def measure(self) -> Tensor:
        """The loss of each row at each timestep, float64 [rows, timesteps], in every process; collective."""
        processes, rows = self.trainer.processes, self.samples.held_out
        losses = torch.zeros(len(rows), len(self.timesteps), dtype=torch.float64)
        with processes.sync_errors(), self.trainer.export_unet(everywhere=True) as unet:
            if unet is not None:  # else a network that is divided is whole in the main process alone
                share = 1 if self.trainer.network.sharded else processes.size
                for place in range(processes.rank, len(rows), share):
                    losses[place] = self._row_losses(unet, rows[place])
        return torch.stack(processes.gather(losses)).sum(dim=0)

    def _row_losses(self, unet: torch.nn.Module, row: int) -> Tensor:
        """Losses of a row at all timesteps, on the CPU."""
        accelerator = self.trainer.accelerator
        sample = self.samples.validation_sample(row)
        batch = self.task.encode({name: value[None].to(accelerator.device) for name, value in sample.items()})
        found = []
        for timesteps in torch.split(self.timesteps, _AT_ONCE):
            repeated = {name: value.expand(len(timesteps), *value.shape[1:]) for name, value in batch.items()}
            repeated["timestep"] = timesteps.to(accelerator.device)
            with accelerator.autocast():
                found.append(sample_losses(self.task, unet, repeated, timesteps))
        return torch.cat(found).cpu()

    def _by_timestep(self, losses: Tensor) -> dict[str, float]:
        """Losses [timesteps] by the names of these."""
        digits = len(str(self.task.objective.num_train_timesteps - 1))
        names = [*(f"t{int(timestep):0{digits}d}" for timestep in self.timesteps[:-1].tolist()), "last"]
        return dict(zip(names, losses.tolist(), strict=True))


def read_validation_loss(folder: Path) -> dict[int, dict[str, float]]:
    """Losses by step from a run's folder; empty if there is no such file or it is damaged."""
    file = folder / VALIDATION_LOSS_FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return {int(step): {name: float(value) for name, value in losses.items()} for step, losses in found.items()}
    except (ValueError, TypeError, AttributeError):
        return {}  # no reason to end a run


def add_validation_loss(folder: Path, step: int, losses: Losses) -> None:
    """Add the losses of a step to a run's file and plot; what they say of later steps is dropped, they come again."""
    before = {other: found for other, found in read_validation_loss(folder).items() if other < step}
    found = {**before, step: losses}
    write_json(folder / VALIDATION_LOSS_FILE, found)
    plot_validation_loss(folder / VALIDATION_LOSS_PLOT, found)
