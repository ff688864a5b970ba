"""Runs of a network over timesteps: the teacher's, with many steps, and those that are compared with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.spacing import Scales, check_num_inference_steps, position_spaced_timesteps
from ..schedulers import ZeroSNRMultistepScheduler
from .network import GuidedNetwork

START_SCALES = (Scales(0.04, 32.0), Scales(0.1, 32.0))
"""Of the grids that a fit may start from besides the default's: coarser ones, whose last step is longer."""


@dataclass(frozen=True)
class Trajectory:
    """The samples of a run, on the CPU, in half precision if the network is.

    Attributes:
        samples: x_t by timestep, each of shape [N, ...].
        clean: the resulting clean samples, float32.
    """

    samples: dict[int, Tensor]
    clean: Tensor

    @property
    def timesteps(self) -> list[int]:
        """Timesteps of the samples, from T-1 down."""
        return [*self.samples]

    def error(self, result: Tensor) -> float:
        """RMS difference between a result and the clean samples, over their standard deviation: geometric mean over
        images.

        With guidance, some images lie between two outcomes; by chance, they would dominate an arithmetic mean.
        """
        off = (result - self.clean).flatten(1).square().mean(1).sqrt() / self.clean.std()
        return float(off.clamp(min=torch.finfo(off.dtype).eps).log().mean().exp())


def run_sampler(network: GuidedNetwork, scheduler: Any) -> Trajectory:
    """Sample over the timesteps that are set on a scheduler, and keep every x_t."""
    x, samples = network.noise.clone(), {}
    for timestep in scheduler.timesteps.tolist():
        samples[timestep] = x.to(network.dtype)
        x = scheduler.step(network(x, timestep), timestep, x, return_dict=False)[0]
    return Trajectory(samples, x)


def sample_in_steps(network: GuidedNetwork, scheduler: Any, num_inference_steps: int) -> Tensor:
    """Clean samples of the scheduler with this step count, shape [N, ...]."""
    scheduler.set_timesteps(num_inference_steps)
    return run_sampler(network, scheduler).clean


def default_scheduler(scheduler: Any) -> ZeroSNRMultistepScheduler:
    """The multistep sampler for the model of a scheduler, without calibration.

    Raises:
        ValueError: it does not support the scheduler's model.
    """
    known = isinstance(scheduler, ZeroSNRMultistepScheduler)
    spacing: dict[str, Any] = {} if known else {"timestep_spacing": "kappa"}
    default: ZeroSNRMultistepScheduler = ZeroSNRMultistepScheduler.from_config(
        scheduler.config, calibration=None, eta=0.0, **spacing
    )
    return default


def teacher_timesteps(scheduler: Any, teacher_steps: int, steps: Sequence[int]) -> list[int]:
    """The timesteps of the teacher, and those of each step count among them, from T-1 down.

    Raises:
        ValueError: a step count that is not between 2 and the teacher's, or a teacher with more than T.
    """
    check_num_inference_steps(teacher_steps, len(scheduler))
    for n in steps:
        if not 2 <= n < teacher_steps:
            raise ValueError(f"steps={n} must be at least 2, and fewer than the teacher's {teacher_steps}.")
    scheduler.set_timesteps(teacher_steps)
    visited = {*scheduler.timesteps.tolist()}
    for n in steps:
        visited |= {timestep for grid in start_grids(scheduler, n) for timestep in grid}
    return sorted(visited, reverse=True)


def start_grids(scheduler: Any, num_inference_steps: int) -> list[list[int]]:
    """Timesteps that the fit of so many steps may start from: the scheduler's own, and coarser ones."""
    scheduler.set_timesteps(num_inference_steps)
    own = scheduler.timesteps.tolist()
    alphas_cumprod = scheduler.alphas_cumprod
    coarser = [position_spaced_timesteps(num_inference_steps, alphas_cumprod, scales) for scales in START_SCALES]
    return [own, *(grid for grid in coarser if grid != own)]


def run_teacher(network: GuidedNetwork, scheduler: Any, timesteps: Sequence[int]) -> Trajectory:
    """The default sampler's path over many timesteps, dense enough to be accurate."""
    scheduler.set_timesteps(timesteps=timesteps)
    trajectory = run_sampler(network, scheduler)
    if not torch.isfinite(trajectory.clean).all():
        raise ValueError(
            "The network returns values that are not finite; a dtype with a larger range may help (bfloat16)."
        )
    return trajectory
