"""Simulated runs of a scheduler on data whose correct result is known.

Two numbers are sampled side by side. The data of the first is a single point, which every correct sampler reaches with
any step count. The data of the second is Gaussian with the standard deviation of the brightness of latents; comparison
with exact DDIM on the same timesteps reveals wrong step sizes.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ..core import NoiseLevel, ideal_output, noise_level
from ..utils.extras import import_extra

POINT = 0.7
TOLERANCE = 1e-3
"""A quarter of a gray level. diffusers' substitute for zero SNR, alpha = 2^-12, causes a quarter of this in one step.
"""

_QUICK = 200
"""Step counts that run within seconds."""

_BRIGHTNESS = 32.0
"""Standard deviation of the mean of a latent, in units of one element's."""

_MEAN, _SPREAD = torch.tensor([POINT, 0.0]).double(), torch.tensor([0.0, _BRIGHTNESS]).double()
_START = torch.tensor([2.0, 1.0]).double()


@dataclass(frozen=True)
class Simulation:
    """A simulated run with one step count.

    Attributes:
        num_inference_steps: number of steps.
        timesteps: the visited timesteps.
        missed: distance from the point at the end, infinite if not finite; None if it crashed.
        wide: the result for the Gaussian data from a noise of 1; None if it crashed.
        error: the exception's text, if it crashed.
    """

    num_inference_steps: int
    timesteps: tuple[float, ...]
    missed: float | None = None
    wide: float | None = None
    error: str | None = None


def why_not_runnable(scheduler: Any) -> str | None:
    """Why the audit cannot simulate a scheduler; None if it can."""
    if not isinstance(scheduler, SchedulerMixin):
        return "a library that it needs is not installed"
    parameters = list(inspect.signature(scheduler.step).parameters.values())
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if needed != ["model_output", "timestep", "sample"]:
        return f"its step requires {', '.join(needed)}"
    if "Inverse" in type(scheduler).__name__:
        return "it maps images to noise"
    return None


def simulate(scheduler: Any, num_inference_steps: int, table: Tensor, timesteps: Any = None) -> Simulation:
    """Sample as a pipeline does, with the ideal network for a scheduler's betas.

    Args:
        scheduler: its config gives the prediction type.
        num_inference_steps: number of steps.
        table: alpha_bar of training, shape [T].
        timesteps: explicit timesteps instead of a step count.
    """

    def choose() -> None:
        if timesteps is None:
            scheduler.set_timesteps(num_inference_steps)
        else:
            scheduler.set_timesteps(timesteps=timesteps)

    def levels() -> list[NoiseLevel]:
        return [training_level(table, float(t)) for t in scheduler.timesteps]

    return simulate_with_ideal_network(
        scheduler, num_inference_steps, choose, levels, scheduler.config.prediction_type
    )


def simulate_with_ideal_network(
    scheduler: Any,
    num_inference_steps: int,
    choose: Callable[[], None],
    levels: Callable[[], Sequence[NoiseLevel]],
    prediction_type: str,
    sign: float = 1.0,
) -> Simulation:
    """Sample as a pipeline does, with an ideal network, and record the result or the exception.

    Args:
        scheduler: the scheduler to run.
        num_inference_steps: number of steps.
        choose: calls its `set_timesteps`.
        levels: noise level of the network at each timestep.
        prediction_type: what the network predicts.
        sign: -1 where it predicts the opposite.
    """
    visited: tuple[float, ...] = ()
    try:
        choose()
        visited = tuple(scheduler.timesteps.tolist())
        x = _sample(scheduler, levels(), prediction_type, sign)
    except Exception as error:  # any exception of a scheduler is a result
        return Simulation(
            num_inference_steps, visited, error=f"{type(error).__name__}: {' '.join(str(error).split())}"
        )
    point, wide = x.flatten().tolist()
    missed = abs(point - POINT)
    return Simulation(num_inference_steps, visited, missed if math.isfinite(missed) else math.inf, wide)


def _sample(scheduler: Any, levels: Sequence[NoiseLevel], prediction_type: str, sign: float) -> Tensor:
    """Run the sampling loop from fixed noise; returns the results for both kinds of data, shape [1, 1, 1, 2]."""
    seeded = "generator" in inspect.signature(scheduler.step).parameters
    noise = {"generator": torch.Generator().manual_seed(0)} if seeded else {}
    x = (_START * float(getattr(scheduler, "init_noise_sigma", 1.0))).reshape(1, 1, 1, 2)
    for t, level in zip(scheduler.timesteps, levels, strict=True):
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = sign * ideal_output(prediction_type, seen, level, _MEAN, _SPREAD)
        x = scheduler.step(output, t, x, return_dict=False, **noise)[0]
    return x


def training_level(table: Tensor, timestep: float) -> NoiseLevel:
    """Noise level that a network was trained on at a timestep, clamped to [0, T - 1] and rounded as diffusers
    requires.
    """
    return noise_level(table, min(max(round(timestep), 0), len(table) - 1))


def simulate_all(scheduler: Any, table: Tensor, numbers: Iterable[int]) -> tuple[Simulation, ...]:
    """Simulate sampling with each step count; warnings of diffusers are ignored."""
    with suppress_warnings():
        return tuple(simulate(scheduler, n, table) for n in with_progress(numbers))


def with_progress(numbers: Iterable[int]) -> Iterator[int]:
    """The same step counts, with a progress bar over all their steps if they take minutes."""
    numbers = tuple(numbers)
    shown = len(numbers) > _QUICK
    with import_extra("tqdm").tqdm(
        total=sum(numbers), desc="running the scheduler", unit="step", disable=None if shown else True
    ) as bar:
        for n in numbers:
            yield n
            bar.update(n)


@contextmanager
def suppress_warnings() -> Iterator[None]:
    """Ignore all Python warnings inside the block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def diverges_at_eta_one(scheduler: Any, table: Tensor, num_inference_steps: int) -> bool:
    """Whether DDIM's first step with added noise (eta = 1) is not finite."""
    scheduler.set_timesteps(num_inference_steps)
    x, t = _START.reshape(1, 1, 1, 2), scheduler.timesteps[0]
    output = ideal_output(scheduler.config.prediction_type, x, training_level(table, float(t)), _MEAN, _SPREAD)
    generator = torch.Generator().manual_seed(0)
    return not bool(scheduler.step(output, t, x, eta=1.0, generator=generator, return_dict=False)[0].isfinite().all())


def timesteps_with_wrong_noise(
    scheduler: Any, table: Tensor, dtype: torch.dtype, num_inference_steps: int
) -> list[int]:
    """Timesteps at which `add_noise` in a half-precision dtype is off by more than 5%, more than rounding."""
    scheduler.set_timesteps(num_inference_steps)  # diffusers' multistep schedulers require it
    timesteps = scheduler.timesteps.long()
    timesteps, times = timesteps.unique(return_counts=True)
    timesteps = timesteps[(timesteps >= 0) & (timesteps < len(table)) & (times == 1)]  # twice, due to rounding
    noise = torch.ones(len(timesteps), 1, 1, 1, dtype=dtype)
    added = scheduler.add_noise(torch.zeros_like(noise), noise, timesteps).double().flatten()
    sigma = torch.as_tensor(noise_level(table, timesteps).sigma)
    return sorted(timesteps[~((added - sigma).abs() <= 0.05 * sigma)].tolist())
