"""The scheduler under test, created from its config."""

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor

from .. import schedulers
from ..core import SCHEDULE_NAMES, NoiseLevel, noise_level, schedule_table
from ..core.choices import check_prediction_type
from ..schedulers.config import betas_list, check_config_types, check_variance_preserving, own_spacing
from .simulate import TOLERANCE, Simulation, simulate, simulate_all, why_not_runnable
from .sources import Source

REPORTED_STEPS = (5, 20, 50)
"""Step counts that the report shows. A sampler that fails at one of these fails the audit; failing at others is a
note."""

TESTED_STEPS = (*range(1, 21), 25, 28, 30, 40, 50, 60, 61, 75, 100)
"""Step counts that are run by default: all small ones, common ones, and two (28 and 61) at which diffusers is known to
fail.
"""

ZERO = 1e-6
"""sqrt(alpha_bar_T) up to which a schedule counts as zero SNR, to allow for rounding. The cosine schedule's 5e-5 is
above it.
"""

STAND_IN = 2.0**-24
"""alpha_bar_T that diffusers' sigma-based samplers use instead of zero."""


@dataclass(frozen=True)
class SchedulerUnderTest:
    """A scheduler created from a config, and its simulated runs.

    Attributes:
        source: the audited model.
        scheduler_class: the loaded class.
        config: its full config, including defaults.
        scheduler: created from it, without clipping; a placeholder if a library is missing.
        trained: alpha_bar of the schedule that the config describes, float64 [T].
        numbers: step counts to run.
    """

    source: Source
    scheduler_class: Any
    config: dict[str, Any]
    scheduler: Any
    trained: Tensor
    numbers: tuple[int, ...]

    flow: ClassVar[bool] = False
    """Whether this is a flow-matching model."""

    @cached_property
    def applies_zero_snr_flag(self) -> bool:
        """Whether the scheduler's schedule has the zero SNR of its config; some classes ignore the flag."""
        if not self.config.get("rescale_betas_zero_snr"):
            return True
        table = getattr(self.scheduler, "alphas_cumprod", None)
        last = math.inf if table is None else float(table[-1])
        without = float(self._alpha_bar_without_flag[-1])
        # The cosine schedule ends below this substitute anyway.
        return last <= STAND_IN and (without <= ZERO**2 or not math.isclose(last, without, rel_tol=0.01))

    @cached_property
    def _alpha_bar_without_flag(self) -> Tensor:
        """alpha_bar of the config's betas before rescaling to zero SNR, float64 [T]."""
        return _alpha_bar({**self.config, "rescale_betas_zero_snr": False})

    @cached_property
    def sampled_alpha_bar(self) -> Tensor:
        """alpha_bar of the schedule that the scheduler runs, float64 [T]; `trained` unless it ignores the flag."""
        return self.trained if self.applies_zero_snr_flag else self._alpha_bar_without_flag

    @property
    def final_level(self) -> NoiseLevel | None:
        """Noise level where sampling ends; None if unknown."""
        final = getattr(self.scheduler, "final_alpha_cumprod", None)
        return None if final is None else noise_level(torch.as_tensor(final).double().reshape(1), 0)

    @property
    def terminal_level(self) -> NoiseLevel:
        """Noise level at T - 1 of the schedule that the scheduler runs."""
        return noise_level(self.sampled_alpha_bar, -1)

    @property
    def terminal_alpha(self) -> float:
        """sqrt(alpha_bar_T) of the schedule that the scheduler runs."""
        return float(self.terminal_level.alpha)

    @property
    def zero_snr(self) -> bool:
        """Whether the config describes a schedule that ends at zero SNR, by flag or by its betas."""
        return float(noise_level(self.trained, -1).alpha) <= ZERO

    @property
    def has_no_ideal_network(self) -> bool:
        """Whether no ideal network exists to simulate with, because epsilon is predicted at zero SNR."""
        return self.zero_snr and self.config["prediction_type"] == "epsilon"

    @property
    def skip_reason(self) -> str | None:
        """Why the scheduler is not simulated; None if it is."""
        if self.has_no_ideal_network:
            return "no ideal epsilon model exists at zero SNR"
        return why_not_runnable(self.scheduler)

    @cached_property
    def simulations(self) -> tuple[Simulation, ...]:
        """A simulated run for each step count; none if the scheduler is skipped or samples another schedule."""
        if self.skip_reason is not None or not self.applies_zero_snr_flag:
            return ()
        return simulate_all(self.scheduler, self.trained, self.numbers)

    @property
    def finished_simulations(self) -> tuple[Simulation, ...]:
        """Simulated runs that finished and visited only timesteps of the model."""
        return tuple(run for run in self.simulations if run.missed is not None and min(run.timesteps) >= 0)

    @property
    def point_errors(self) -> dict[int, float]:
        """By step count, distance of a simulation from single-point data, if beyond `TOLERANCE`."""
        return {
            r.num_inference_steps: r.missed
            for r in self.finished_simulations
            if r.missed is not None and not r.missed <= TOLERANCE
        }

    @cached_property
    def wide_errors(self) -> dict[int, float]:
        """By step count, relative error on Gaussian data against exact DDIM on the same timesteps."""
        whole = [run for run in self.finished_simulations if all(t == int(t) for t in run.timesteps)]
        made = {run.num_inference_steps: (run.wide or 0.0, self._ddim_result(run)) for run in whole}
        return {n: wide / exact - 1 for n, (wide, exact) in made.items() if exact}  # one step from zero SNR makes 0

    def _ddim_result(self, run_of_stock: Simulation) -> float:
        """The result of exact DDIM for the Gaussian data on the timesteps that diffusers' run visited."""
        facts = {key: self.config[key] for key in (*SCHEDULE_NAMES, "prediction_type") if key in self.config}
        ddim = schedulers.ZeroSNRDDIMScheduler(**{"rescale_betas_zero_snr": False, **facts})
        timesteps = [int(t) for t in run_of_stock.timesteps]
        return simulate(ddim, run_of_stock.num_inference_steps, self.trained, timesteps).wide or 0.0

    @property
    def first_timesteps(self) -> tuple[tuple[int, float], ...]:
        """Pairs of a reported step count and its noisiest timestep."""
        return tuple((n, max(timesteps)) for n, timesteps in self.visited_timesteps.items())

    @cached_property
    def visited_timesteps(self) -> dict[int, tuple[float, ...]]:
        """Timesteps that the scheduler visits for each of `REPORTED_STEPS`."""
        found = {}
        for n in runnable_step_numbers(self.config, REPORTED_STEPS):
            try:
                self.scheduler.set_timesteps(n)
                found[n] = tuple(self.scheduler.timesteps.tolist())
            except Exception:  # any error is reported by the simulated runs
                continue
        return found

    @property
    def visited_indices(self) -> dict[int, tuple[float, ...]]:
        """Indices into `trained` of the timesteps visited for each of `REPORTED_STEPS`."""
        return self.visited_timesteps


def build_scheduler_under_test(source: Source, numbers: Sequence[int] | None = None) -> SchedulerUnderTest:
    """Create the scheduler that a source describes, for the audit's checks.

    Args:
        source: from `read_source`.
        numbers: step counts to run; those above T are ignored.

    Raises:
        ValueError: the config describes no variance-preserving scheduler, or one that cannot be created.
    """
    name, scheduler_class = resolve_scheduler_class(source)
    parameters = inspect.signature(scheduler_class.__init__).parameters
    defaults = {p.name: p.default for p in parameters.values() if p.default is not p.empty}
    config = {"prediction_type": "epsilon", **defaults, **source.config, **source.assigned, "_class_name": name}
    if hasattr(schedulers, name):
        config["timestep_spacing"] = own_spacing(config)
    check_variance_preserving(config)
    missing = [key for key in ("num_train_timesteps", "beta_schedule") if key not in config]
    if missing:  # the defaults of a missing class are unknown
        raise ValueError(f"{name} has no schedule: {' and '.join(missing)} is missing.")
    check_config_types(config, defaults)
    check_prediction_type(config["prediction_type"], zero_terminal_snr=False)
    if source.prediction_type is not None:
        check_prediction_type(source.prediction_type, zero_terminal_snr=False)
    scheduler = make_scheduler(scheduler_class, {**config, "clip_sample": False, "thresholding": False})
    return SchedulerUnderTest(
        source,
        scheduler_class,
        config,
        scheduler,
        _alpha_bar(config),
        runnable_step_numbers(config, numbers or TESTED_STEPS),
    )


def runnable_step_numbers(config: Mapping[str, Any], numbers: Sequence[int]) -> tuple[int, ...]:
    """The step counts that do not exceed T, or the number of steps that a model was distilled for."""
    T, distilled = config["num_train_timesteps"], config.get("original_inference_steps")
    most = min(T, distilled) if isinstance(distilled, int) and distilled > 0 else T
    return tuple(n for n in numbers if 1 <= n <= most)


def resolve_scheduler_class(source: Source) -> tuple[str, Any]:
    """Name and class that a pipeline's loader uses: from `model_index.json`, or else from the config."""
    if source.live is not None:
        return type(source.live).__name__, type(source.live)
    entry = source.index.get("scheduler")
    name = entry[1] if isinstance(entry, list) and len(entry) == 2 else source.config.get("_class_name")
    if name is None:
        raise ValueError(f"{source.name}: the config names no class; add '_class_name', or pass the scheduler itself.")
    found = getattr(schedulers, str(name), None) or getattr(diffusers, str(name), None)
    if not isinstance(name, str) or not name.endswith("Scheduler") or not isinstance(found, type):
        raise ValueError(f"{source.name}: {name!r} is not a scheduler of diffusers or of this package.")
    return name, found


def make_scheduler(scheduler_class: Any, config: Mapping[str, Any]) -> Any:
    """Create a scheduler from the config keys that it accepts; None if a library that it needs is not installed.

    Raises:
        ValueError: the class rejects the config.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated algorithms
            return scheduler_class(**_accepted_arguments(scheduler_class, config))
    except ImportError:
        return None
    except Exception as error:  # diffusers does not validate values, so any exception is possible
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{scheduler_class.__name__} cannot be created from this config: {type(error).__name__}: {reason}"
        ) from error


def _accepted_arguments(scheduler_class: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The items of a config that the constructor of a class accepts."""
    parameters = inspect.signature(scheduler_class.__init__).parameters
    return {key: value for key, value in config.items() if key in parameters}


def drop_unaccepted_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the keys that its diffusers class does not accept."""
    return {
        "_class_name": config["_class_name"],
        **_accepted_arguments(getattr(diffusers, config["_class_name"]), config),
    }


def _alpha_bar(config: Mapping[str, Any]) -> Tensor:
    """alpha_bar of the schedule that a config describes, float64 [T].

    Raises:
        ValueError: it describes none.
    """
    facts = {key: config[key] for key in SCHEDULE_NAMES if key in config}
    if facts.get("trained_betas") is not None:
        facts["trained_betas"] = betas_list(facts["trained_betas"])
    try:
        return schedule_table(**facts)
    except (TypeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{config['_class_name']} has no schedule: {error}") from error


def is_rescaled_to_zero_snr(config: Mapping[str, Any], table: Tensor) -> bool:
    """Whether a table of alpha_bar [T] is the config's schedule rescaled to zero terminal SNR.

    Saved betas were rounded to float32 and computed as ratios of neighbors, which costs four digits near the end.
    """
    flagged = _alpha_bar({**config, "trained_betas": None, "rescale_betas_zero_snr": True})
    return len(flagged) == len(table) and bool(
        torch.allclose(flagged.sqrt(), table.double().sqrt(), atol=1e-3, rtol=0)
    )
