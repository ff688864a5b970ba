"""Timestep sampling, and the loss by timestep."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from .data.loader import Batch, TrainingDataset, derive_seed, make_generator

_BINS = 10


def stratified_timestep(drawn: int, place: int, count: int, num_train_timesteps: int) -> int:
    """A uniform timestep in [0, T-1] squeezed into part `place` of `count` equal parts of all timesteps.

    Where the place is uniform too, so is the result, exactly: `place * T + drawn` is uniform over 0 to count T - 1.
    """
    return (place * num_train_timesteps + drawn) // count


class SampledTimesteps(Dataset[Batch]):
    """Samples whose timesteps are each uniform, and together more even than independent ones.

    They are functions of the seed and the position, as all else in a sample, so it does not matter how a global batch
    is divided, nor where a run was interrupted. Strata depend on the global batch's size as well: a run that continues
    with another one has other strata from there on.

    - `stratified`: each sample of a global batch has an equal part of all timesteps to itself. Which part its place
      in the batch gives it turns by a random amount each step. (Kingma et al. 2021, VDM, arXiv:2107.00630, have one
      draw for all of a batch, and timesteps at equal distances.)
    - `antithetic`: positions 2 i and 2 i + 1 have t and T - 1 - t.

    Args:
        samples: whose timesteps are uniform and independent.
        sampling: uniform, stratified or antithetic.
        num_train_timesteps: T.
        global_batch: samples per optimizer step.
    """

    def __init__(self, samples: TrainingDataset, sampling: str, num_train_timesteps: int, global_batch: int) -> None:
        self.samples, self.sampling, self.seed = samples, sampling, samples.seed
        self.num_train_timesteps, self.global_batch = num_train_timesteps, global_batch

    def __getitem__(self, position: int) -> Batch:
        """The sample at a position, at its timestep."""
        batch = self.samples[position]
        return {**batch, "timestep": torch.tensor(self._draw_timestep(position, int(batch["timestep"])))}

    def row_at(self, position: int) -> int:
        """Index of the data row that the sample at a position is made from."""
        return self.samples.row_at(position)

    def _draw_timestep(self, position: int, drawn: int) -> int:
        """The timestep at a position under the configured sampling, from a uniform and independent one."""
        last = self.num_train_timesteps - 1
        if self.sampling == "stratified":
            step, place = divmod(position, self.global_batch)
            rotated = (place + derive_seed(self.seed, 3, step)) % self.global_batch
            return stratified_timestep(drawn, rotated, self.global_batch, last + 1)
        if self.sampling == "antithetic":
            pair, second = divmod(position, 2)
            shared = int(torch.randint(last + 1, (), generator=make_generator(self.seed, 4, pair)))
            return last - shared if second else shared
        return drawn


class SampledSteps(SampledTimesteps):
    """Samples at a few timesteps, each as often as the others, drawn as timesteps are.

    Args:
        samples: whose timesteps are replaced.
        sampling: uniform, stratified or antithetic.
        timesteps: to choose from.
        global_batch: samples per optimizer step.
    """

    def __init__(self, samples: TrainingDataset, sampling: str, timesteps: Sequence[int], global_batch: int) -> None:
        super().__init__(samples, sampling, len(timesteps), global_batch)
        self.timesteps = timesteps

    def __getitem__(self, position: int) -> Batch:
        """The sample at a position, at one of the timesteps."""
        drawn = int(torch.randint(len(self.timesteps), (), generator=make_generator(self.seed, 7, position)))
        chosen = self.timesteps[self._draw_timestep(position, drawn)]
        return {**self.samples[position], "timestep": torch.tensor(chosen)}


class SampledFlowTimes(SampledTimesteps):
    """Samples at flow times of a density, as timesteps 1000 s, float32.

    Each is the quantile of a uniform number, of which there are `PARTS`, drawn as timesteps are: independently, in
    strata of the global batch, or in pairs u and 1 - u.

    Args:
        samples: whose timesteps are replaced.
        sampling: uniform, stratified or antithetic.
        density: the quantile, from float64 in (0, 1) to flow times.
        global_batch: samples per optimizer step.
    """

    PARTS = 2**40
    """Of (0, 1); a draw is the middle of one, so never an end, where a quantile may be infinite."""

    def __init__(
        self, samples: TrainingDataset, sampling: str, density: Callable[[Tensor], Tensor], global_batch: int
    ) -> None:
        super().__init__(samples, sampling, self.PARTS, global_batch)
        self.density = density

    def __getitem__(self, position: int) -> Batch:
        """The sample at a position, at its flow time."""
        drawn = int(torch.randint(self.PARTS, (), generator=make_generator(self.seed, 6, position)))
        u = (self._draw_timestep(position, drawn) + 0.5) / self.PARTS
        s = self.density(torch.tensor(u, dtype=torch.float64))
        return {**self.samples[position], "timestep": (1000 * s).float()}


class LossByTimestep:
    """Mean loss over bins of timesteps, and at the last one alone, since the last request.

    Fractional timesteps are rounded down; T itself, which occurs in flow matching, belongs to the last.

    Args:
        num_train_timesteps: T.
        device: where losses come from; nothing is read from it until the means are.
    """

    def __init__(self, num_train_timesteps: int, device: torch.device) -> None:
        self._sums = torch.zeros(2, num_train_timesteps, device=device)  # of losses, and how many

    def add(self, losses: Tensor, timesteps: Tensor) -> None:
        """Count the losses of samples, shape [B], at their timesteps, shape [B], both on the device.

        Losses that are not finite are skipped, as is their step.
        """
        losses = losses.detach()
        finite = losses.isfinite()
        if timesteps.is_floating_point():
            timesteps = timesteps.long().clamp(max=self._sums.shape[1] - 1)
        self._sums.index_add_(1, timesteps, torch.stack([losses.where(finite, 0), finite.to(losses)]))

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Mean losses by timestep bin over all processes' samples, then start again; empty bins are omitted."""
        sums = accelerator.reduce(self._sums, "sum").cpu().double()
        self._sums.zero_()
        last = sums.shape[1] - 1
        ends = [(last + 1) * k // _BINS for k in range(_BINS + 1)]
        digits = len(str(last))
        bins = {
            f"loss/t{start:0{digits}d}-{end - 1:0{digits}d}": sums[:, start:end].sum(dim=1)
            for start, end in pairwise(ends)
        }
        bins["loss/last"] = sums[:, last]
        return {name: float(total / count) for name, (total, count) in bins.items() if count > 0}
