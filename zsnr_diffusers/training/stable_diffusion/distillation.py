"""A LoRA that takes few steps without guidance where the base takes many with it. The formulas are in `core`."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...core import (
    NoiseLevel,
    converted_prediction,
    guided_prediction,
    noise_level,
    spaced_timesteps,
    student_sampler,
    subdivided_timesteps,
    teacher_sampler,
)
from ...schedulers.base import ZeroSNRScheduler
from ..data.loader import Batch
from ..objective import NoisedBatch
from ..schedule import betas_alpha_bar
from .base import Base
from .config import DistillationConfig

CONDITIONS = ("text", "pooled", "time_ids")
"""What of a batch a UNet receives in addition to sample and timestep."""

Predict = Callable[[Any, Tensor, Batch], Tensor]


class Distillation:
    """Training batches of a student, which is a UNet with its adapter, from its teacher, the UNet without.

    Each sample starts from pure noise and goes through the student's own steps up to the timestep that is trained; so
    it is trained on what it will meet, and no image is needed. From there the teacher leads on, guided.

    Args:
        unet: with an adapter.
        schedule: of both, v-prediction at zero terminal SNR.
        predict: as `Task.predict`.
        steps: of the student.
        substeps: of the teacher for each.
        guidance: of the teacher: scale, rescale, kept low frequencies.

    Attributes:
        timesteps: that the student visits, from T-1 down.

    Raises:
        ValueError: there are too few timesteps for so many steps.
    """

    def __init__(
        self,
        unet: Any,
        schedule: ZeroSNRScheduler,
        predict: Predict,
        steps: int,
        substeps: int,
        guidance: tuple[float, float, int],
    ) -> None:
        self._unet, self._schedule, self._predict, self._guidance = unet, schedule, predict, guidance
        table = betas_alpha_bar(schedule)
        self.timesteps = spaced_timesteps("trailing", steps, table)
        inside = subdivided_timesteps(self.timesteps, substeps, table)
        self._student = student_sampler(self.timesteps, _levels(self.timesteps, table))
        self._teacher = teacher_sampler(inside, [_levels(row, table) for row in inside])

    @torch.no_grad()
    def noised_batch(self, batch: Batch, timesteps: Tensor, no_caption: Mapping[str, Tensor]) -> NoisedBatch:
        """What the student has made of noise up to its timesteps, and the v by which it lands where the teacher does.

        Args:
            batch: with `noise`, `timestep` and what the UNet is told, on the device.
            timesteps: among the student's, shape [B], on the CPU.
            no_caption: text of the empty caption, a row.
        """
        steps = torch.tensor([self.timesteps.index(timestep) for timestep in timesteps.tolist()])
        told = {name: batch[name] for name in CONDITIONS if name in batch}
        x_t = self._student_samples(batch["noise"], steps, told)
        untold = {**told, **{name: no_caption[name].expand_as(told[name]) for name in no_caption if name in told}}
        with self._without_adapter():
            x_s = self._teacher.run(x_t, steps, functools.partial(self._guided_x_0, told=told, untold=untold))
        x_0, level = self._student.mean_x_0(x_t, x_s, steps), self._schedule.noise_level(batch["timestep"], x_t)
        target = converted_prediction(x_0, x_t, level, "sample", "v_prediction", level)
        return NoisedBatch(x_t, batch["timestep"], target, lambda output: output)

    def _student_samples(self, noise: Tensor, steps: Tensor, told: Batch) -> Tensor:
        """Noise after the student's own steps, of which each sample makes so many."""
        x_t = noise.clone()
        for step in range(int(steps.max())):
            rows = (steps > step).nonzero().flatten()
            here = {name: value[rows] for name, value in told.items()}
            x_t[rows] = self._student.run(
                x_t[rows], torch.full_like(rows, step), functools.partial(self._x_0, told=here)
            )
        return x_t

    def _x_0(self, x_t: Tensor, timesteps: Tensor, told: Batch) -> Tensor:
        """x_0 as the UNet is now."""
        output = self._predict(self._unet, x_t, {**told, "timestep": timesteps})
        return self._schedule.get_original_sample(output, x_t, timesteps)

    def _guided_x_0(self, x_t: Tensor, timesteps: Tensor, told: Batch, untold: Batch) -> Tensor:
        """x_0 under guidance, if there is any; guidance is rescaled on v, which is what the UNet predicts."""
        if self._guidance[0] <= 1:
            return self._x_0(x_t, timesteps, told)
        both = {name: torch.cat([untold[name], told[name]]) for name in told}
        twice = {**both, "timestep": torch.cat([timesteps, timesteps])}
        unconditional, conditional = self._predict(self._unet, torch.cat([x_t, x_t]), twice).chunk(2)
        guided = guided_prediction(unconditional, conditional, *self._guidance)
        return self._schedule.get_original_sample(guided, x_t, timesteps)

    @contextlib.contextmanager
    def _without_adapter(self) -> Iterator[None]:
        """The UNet as it was before it had an adapter."""
        self._unet.disable_adapters()
        try:
            yield
        finally:
            self._unet.enable_adapters()


def create_distillation(config: DistillationConfig, base: Base, predict: Predict) -> Distillation:
    """The distillation that a configuration asks for, of a base whose UNet has its adapter."""
    steps, substeps = int(config.distill_steps or 0), config.teacher_substeps
    schedule: Any = base.schedule
    try:
        return Distillation(base.pipeline.unet, schedule, predict, steps, substeps, config.guidance)
    except ValueError as error:
        raise ValueError(f"--distill_steps={steps} --teacher_substeps={substeps}: {error}") from error


def _levels(timesteps: list[int], alphas_cumprod: Tensor) -> list[NoiseLevel]:
    """Noise levels of timesteps, as numbers."""
    levels = [noise_level(alphas_cumprod, timestep) for timestep in timesteps]
    return [NoiseLevel(float(level.alpha), float(level.sigma)) for level in levels]
