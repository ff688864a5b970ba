"""Runs of a scheduler on data whose right result is known.

Two numbers are sampled side by side. All data of the first is one point: a sampler reaches it in any step count,
whatever its method, unless it leaves noise, diverges or crashes. Data of the second is Gaussian, as wide as the
brightness of latents; what the exact rule of DDIM makes of it on the same timesteps tells a wrong step size.
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
from ..core.spacing import LARGEST_SCALE
from ..utils.extras import import_extra

POINT = 0.7
TOLERANCE = 1e-3
"""Half of half a grey level. Stock's stand-in for zero SNR, alpha = 2^-12, leaves a quarter of it in one step."""

_QUICK = 200
"""Numbers of steps that are run in seconds."""

_MEAN, _SPREAD = torch.tensor([POINT, 0.0]).double(), torch.tensor([0.0, LARGEST_SCALE]).double()
_START = torch.tensor([2.0, 1.0]).double()


@dataclass(frozen=True)
class Simulation:
    """One step count.

    Attributes:
        num_inference_steps: n.
        timesteps: those that were visited.
        missed: how far from the point it ended, infinite if not finite; None if it crashed.
        wide: what it made of a noise of 1 where the data is as wide as brightness; None if it crashed.
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
        return "what it needs is not installed"
    parameters = list(inspect.signature(scheduler.step).parameters.values())
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if needed != ["model_output", "timestep", "sample"]:
        return f"its step takes {', '.join(needed)}"
    if "Inverse" in type(scheduler).__name__:
        return "it leads from images to noise"
    return None


def simulate(scheduler: Any, num_inference_steps: int, table: Tensor, timesteps: Any = None) -> Simulation:
    """Sample as a pipeline does, with the ideal network for the betas that a scheduler was trained on.

    Args:
        scheduler: its config says what the network predicts.
        num_inference_steps: n.
        table: alpha_bar of training, shape [T].
        timesteps: the timesteps themselves instead of n.
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
    """Sample as a pipeline does, with an ideal network, and record where it ends or what it raises.

    Args:
        scheduler: it steps.
        num_inference_steps: n.
        choose: calls its `set_timesteps`.
        levels: what the network is told at each of its timesteps then.
        prediction_type: what the network predicts.
        sign: -1 where it predicts the opposite.
    """
    visited: tuple[float, ...] = ()
    try:
        choose()
        visited = tuple(scheduler.timesteps.tolist())
        x = _sample(scheduler, levels(), prediction_type, sign)
    except Exception as error:  # whatever a scheduler raises is what is looked for
        return Simulation(
            num_inference_steps, visited, error=f"{type(error).__name__}: {' '.join(str(error).split())}"
        )
    point, wide = x.flatten().tolist()
    missed = abs(point - POINT)
    return Simulation(num_inference_steps, visited, missed if math.isfinite(missed) else math.inf, wide)


def _sample(scheduler: Any, levels: Sequence[NoiseLevel], prediction_type: str, sign: float) -> Tensor:
    """Run the sampling loop from fixed noise; its results for the point and for wide data, shape [1, 1, 1, 2]."""
    seeded = "generator" in inspect.signature(scheduler.step).parameters
    noise = {"generator": torch.Generator().manual_seed(0)} if seeded else {}
    x = (_START * float(getattr(scheduler, "init_noise_sigma", 1.0))).reshape(1, 1, 1, 2)
    for t, level in zip(scheduler.timesteps, levels, strict=True):
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = sign * ideal_output(prediction_type, seen, level, _MEAN, _SPREAD)
        x = scheduler.step(output, t, x, return_dict=False, **noise)[0]
    return x


def training_level(table: Tensor, timestep: float) -> NoiseLevel:
    """Noise level that a network was trained on at a timestep, clamped to [0, T - 1] and rounded as stock needs it."""
    return noise_level(table, min(max(round(timestep), 0), len(table) - 1))


def simulate_all(scheduler: Any, table: Tensor, numbers: Iterable[int]) -> tuple[Simulation, ...]:
    """Simulate sampling in each step count; what stock warns of on the way is ignored."""
    with suppress_warnings():
        return tuple(simulate(scheduler, n, table) for n in with_progress(numbers))


def with_progress(numbers: Iterable[int]) -> Iterator[int]:
    """The same step counts, with a bar of all their steps on a terminal where they take minutes."""
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
    """Whether DDIM's first step with fresh noise (eta = 1) is not finite."""
    scheduler.set_timesteps(num_inference_steps)
    x, t = _START.reshape(1, 1, 1, 2), scheduler.timesteps[0]
    output = ideal_output(scheduler.config.prediction_type, x, training_level(table, float(t)), _MEAN, _SPREAD)
    generator = torch.Generator().manual_seed(0)
    return not bool(scheduler.step(output, t, x, eta=1.0, generator=generator, return_dict=False)[0].isfinite().all())


def timesteps_with_wrong_noise(
    scheduler: Any, table: Tensor, dtype: torch.dtype, num_inference_steps: int
) -> list[int]:
    """Timesteps at which `add_noise` in a half-precision dtype is off by more than 5%; a rounding is below 1%."""
    scheduler.set_timesteps(num_inference_steps)  # stock's multistep schedulers noise to those that are set only
    timesteps = scheduler.timesteps.long()
    timesteps, times = timesteps.unique(return_counts=True)
    timesteps = timesteps[(timesteps >= 0) & (timesteps < len(table)) & (times == 1)]  # twice: rounded
    noise = torch.ones(len(timesteps), 1, 1, 1, dtype=dtype)
    added = scheduler.add_noise(torch.zeros_like(noise), noise, timesteps).double().flatten()
    sigma = torch.as_tensor(noise_level(table, timesteps).sigma)
    return sorted(timesteps[~((added - sigma).abs() <= 0.05 * sigma)].tolist())
