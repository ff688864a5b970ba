"""The scheduler of a flow-matching model under test: the flow times it visits, and simulated runs over them."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from .. import schedulers
from ..core import NoiseLevel, flow_level, kappa, trailing_times, variance_preserving
from ..core.spacing import clean_position, position
from ..hub.flow_models import pipeline_source_code
from ..schedulers.config import OWN_SPACING, check_config_types, is_flow, own_spacing, with_class_defaults
from ..schedulers.flow import FlowMatchScheduler
from .simulate import Simulation, simulate_with_ideal_network, suppress_warnings, why_not_runnable, with_progress
from .sources import Source
from .subject import (
    REPORTED_STEPS,
    TESTED_STEPS,
    SchedulerUnderTest,
    make_scheduler,
    resolve_scheduler_class,
    runnable_step_numbers,
)

SPACING_STEPS = range(1, 101)
"""Step counts whose flow times are checked, without running them."""

_OWN_SIGMAS = "np.linspace(1"
"""How diffusers pipelines create the sigmas 1, (n - 1) / n, ..., 1 / n that they pass to the scheduler."""


@dataclass(frozen=True)
class FlowSchedulerUnderTest(SchedulerUnderTest):
    """The scheduler that a flow-matching model's config describes.

    `trained` is alpha_bar at flow times 1 / T, ..., 1, as variance-preserving levels of the same signal-to-noise
    ratio. `prediction_type` may be known from the class alone.
    """

    flow = True

    @property
    def has_flow_config(self) -> bool:
        """Whether the scheduler's config, and not only the network, is for flow matching."""
        return is_flow(self.config)

    @cached_property
    def pipeline_class(self) -> Any:
        """Class of the pipeline; None for a scheduler alone, or if diffusers has no such class."""
        name = self.source.index.get("_class_name")
        return getattr(diffusers, name, None) if isinstance(name, str) else None

    @cached_property
    def pipeline_source_code(self) -> str:
        """Python source of the pipeline, which shows what it requires of its scheduler."""
        return pipeline_source_code(self.pipeline_class)

    @property
    def passes_sigmas(self) -> bool:
        """Whether the pipeline passes its own evenly spaced flow times; others pass only the step count."""
        return _OWN_SIGMAS in self.pipeline_source_code

    @property
    def is_distilled(self) -> bool:
        """Whether the model was distilled at specific flow times, as far as the config shows."""
        return bool(self.config.get("stochastic_sampling")) or "scale_factors" in self.config

    @property
    def may_be_distilled(self) -> bool:
        """Whether it may have been distilled: models such as Flux schnell have no shift, but so do others."""
        return self.is_distilled or (self.shift == 1 and not self.config.get("use_dynamic_shifting"))

    @property
    def shift(self) -> float:
        """Shift of the flow times, as configured; 1 means no shift."""
        return float(self.config.get("flow_shift", self.config.get("shift", 1.0)))

    @property
    def is_from_this_package(self) -> bool:
        """Whether the audited scheduler is one of this package's for flow matching."""
        return issubclass(self.scheduler_class, FlowMatchScheduler)

    # -- visited flow times

    def set_timesteps_like_pipeline(self, num_inference_steps: int) -> None:
        """Call the scheduler's `set_timesteps` with the arguments that the audited pipeline passes."""
        dynamic = bool(self.config.get("use_dynamic_shifting"))
        mu = {"mu": float(self.config.get("max_shift") or 1.0)} if dynamic else {}
        if self.passes_sigmas:
            self.scheduler.set_timesteps(sigmas=np.array(trailing_times(num_inference_steps)), **mu)
        else:
            self.scheduler.set_timesteps(num_inference_steps, **mu)

    @property
    def flow_times(self) -> list[float]:
        """Flow times of the steps that are set on the scheduler, from 1 to 0, including the end of the last step."""
        sigmas = self.scheduler.sigmas.double().tolist()
        return [1 - s for s in sigmas] if self.config.get("invert_sigmas") else list(sigmas)

    @property
    def order(self) -> int:
        """Network calls per step of the audited scheduler."""
        return int(getattr(self.scheduler, "order", 1))

    @cached_property
    def flow_times_by_steps(self) -> dict[int, tuple[float, ...]]:
        """Flow times for each of `SPACING_STEPS`, including the end of the last step; omitted where the scheduler
        raises.
        """
        if self.skip_reason is not None:
            return {}
        found = {}
        for n in runnable_step_numbers(self.config, [*SPACING_STEPS]):
            try:
                with suppress_warnings():
                    self.set_timesteps_like_pipeline(n)
                    levels = self.flow_times
            except Exception:  # any error is reported by the simulated runs
                continue
            found[n] = tuple(levels if self.order == 1 else [levels[0], *levels[1 :: self.order]])
        return found

    @property
    def valid_flow_times(self) -> dict[int, tuple[float, ...]]:
        """Those of `flow_times_by_steps` that decrease strictly and match the requested step count."""
        return {
            n: path
            for n, path in self.flow_times_by_steps.items()
            if len(path) == n + 1 and all(math.isfinite(s) for s in path) and all(a > b for a, b in pairwise(path))
        }

    @cached_property
    def visited_timesteps(self) -> dict[int, tuple[float, ...]]:
        """Timesteps that the scheduler visits for each of `REPORTED_STEPS`."""
        found = {}
        for n in runnable_step_numbers(self.config, REPORTED_STEPS) if self.skip_reason is None else ():
            if n in self.flow_times_by_steps:
                with suppress_warnings():
                    self.set_timesteps_like_pipeline(n)
                found[n] = tuple(self.scheduler.timesteps.double().tolist())
        return found

    @property
    def visited_indices(self) -> dict[int, tuple[float, ...]]:
        """Indices into `trained` of the timesteps visited for each of `REPORTED_STEPS`."""
        T, inverted = len(self.trained), self.config.get("invert_sigmas")
        return {
            n: tuple((T - t if inverted else t) - 1 for t in timesteps)
            for n, timesteps in self.visited_timesteps.items()
        }

    @property
    def first_timesteps(self) -> tuple[tuple[int, float], ...]:
        """Pairs of a reported step count and its noisiest timestep, which is 0 for Mochi."""
        noisiest = min if self.config.get("invert_sigmas") else max
        return tuple((n, noisiest(timesteps)) for n, timesteps in self.visited_timesteps.items())

    # -- results

    @property
    def sampled_alpha_bar(self) -> Tensor:
        """alpha_bar of training, float64 [T]: a flow scheduler samples the same levels."""
        return self.trained

    @property
    def terminal_level(self) -> NoiseLevel:
        """Noise level where sampling begins, as the simulated scheduler visits it."""
        path = next((self.flow_times_by_steps[n] for n in REPORTED_STEPS if n in self.flow_times_by_steps), (1.0,))
        return flow_level(torch.tensor(path[0], dtype=torch.float64))

    @property
    def final_level(self) -> NoiseLevel | None:
        """Noise level where sampling ends; None if unknown."""
        path = next((self.flow_times_by_steps[n] for n in REPORTED_STEPS if n in self.flow_times_by_steps), None)
        return None if path is None else flow_level(torch.tensor(path[-1], dtype=torch.float64))

    @property
    def has_no_ideal_network(self) -> bool:
        """False: in flow time an ideal network exists at every level."""
        return False

    @property
    def skip_reason(self) -> str | None:
        """Why the scheduler is not simulated; None if it is."""
        if not self.has_flow_config:
            return "it has betas, and this is a flow-matching model"
        if not (self.config.get("use_flow_sigmas") or self.scheduler_class.__name__.startswith("FlowMatch")):
            return "it works only in its own pipeline"
        return why_not_runnable(self.scheduler)

    @cached_property
    def simulations(self) -> tuple[Simulation, ...]:
        """A simulated run for each step count, with an ideal network evaluated at the sample's own flow time."""
        if self.skip_reason is not None:
            return ()
        with suppress_warnings():
            return tuple(self._simulate(n) for n in with_progress(self.numbers))

    def _simulate(self, num_inference_steps: int) -> Simulation:
        """Simulate sampling over the scheduler's own flow times."""
        sign = -1.0 if self.config.get("invert_sigmas") else 1.0

        def levels() -> list[NoiseLevel]:
            return [flow_level(s) for s in self.flow_times[:-1]]

        return simulate_with_ideal_network(
            self.scheduler,
            num_inference_steps,
            choose=lambda: self.set_timesteps_like_pipeline(num_inference_steps),
            levels=levels,
            prediction_type=self.config["prediction_type"],
            sign=sign,
        )

    @property
    def finished_simulations(self) -> tuple[Simulation, ...]:
        """Simulated runs that finished."""
        return tuple(run for run in self.simulations if run.missed is not None)


def share_of_last_step(path: Sequence[float]) -> float:
    """How much of the path from noise to data the last step covers, as a multiple of an even step (1 / n).

    Measured in `position`, which is the information that the network has still to provide, averaged over Gaussian data
    of all scales.
    """
    level = flow_level(torch.tensor(path[-2], dtype=torch.float64))
    come = float(position(torch.as_tensor(kappa(level)))) / clean_position()
    return (1 - come) * (len(path) - 1)


def is_flow_source(source: Source) -> bool:
    """Whether an audited source is a flow-matching model, by its scheduler or by what is known about its training.

    Raises:
        ValueError: it names no scheduler.
    """
    config = {**source.config, "_class_name": resolve_scheduler_class(source)[0]}
    return source.prediction_type == "flow_prediction" or is_flow(with_class_defaults(config))


def build_flow_scheduler_under_test(source: Source, numbers: Sequence[int] | None = None) -> FlowSchedulerUnderTest:
    """Create the scheduler that a flow-matching source describes, for the audit's checks.

    Args:
        source: from `read_source`.
        numbers: step counts to run; those above T are ignored.

    Raises:
        ValueError: the config describes no scheduler, or one that cannot be created.
    """
    name, cls = resolve_scheduler_class(source)
    parameters = inspect.signature(cls.__init__).parameters
    defaults = {p.name: p.default for p in parameters.values() if p.default is not p.empty}
    config: dict[str, Any] = {
        "prediction_type": "flow_prediction",
        "num_train_timesteps": 1000,
        **defaults,
        **source.config,
        **source.assigned,
        "_class_name": name,
    }
    if OWN_SPACING in config or hasattr(schedulers, name):
        config["timestep_spacing"] = own_spacing(config)
    check_config_types(config, defaults)
    s = torch.arange(1, config["num_train_timesteps"] + 1, dtype=torch.float64) / config["num_train_timesteps"]
    trained = torch.as_tensor(variance_preserving(flow_level(s)).alpha) ** 2
    return FlowSchedulerUnderTest(
        source,
        cls,
        config,
        make_scheduler(cls, config),
        trained,
        runnable_step_numbers(config, numbers or TESTED_STEPS),
    )
