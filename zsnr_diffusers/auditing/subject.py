"""A scheduler as its config describes it, made and measured."""

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
from ..core.predictions import check_prediction_type
from ..schedulers.config import betas_list, check_types, check_variance_preserving, own_spacing
from .simulate import TOLERANCE, Simulation, run, runs, why_not_runnable
from .sources import Source

REPORTED_STEPS = (5, 20, 50)
"""Numbers of steps that the report shows. A sampler that fails at one of these fails the audit; failing at others is a
note."""

TESTED_STEPS = (*range(1, 21), 25, 28, 30, 40, 50, 60, 61, 75, 100)
"""Numbers of steps that are run unless asked for others: all small ones, those that people use, and two (28 and 61)
that stock is known to fail at."""

ZERO = 1e-6
"""sqrt(alpha_bar_T) up to which a schedule ends at zero SNR: rounding. The cosine schedule's 5e-5 is above it."""

STAND_IN = 2.0**-24
"""alpha_bar_T that stock's samplers in sigma have in place of zero."""


@dataclass(frozen=True)
class SchedulerUnderTest:
    """What a config makes.

    Attributes:
        source: where it comes from.
        scheduler_class: the class that is loaded.
        config: its full config, gaps filled.
        scheduler: made from it, without clipping; a placeholder where something is not installed.
        trained: alpha_bar of the schedule that the config describes, float64 [T].
        numbers: of steps, to run.
    """

    source: Source
    scheduler_class: Any
    config: dict[str, Any]
    scheduler: Any
    trained: Tensor
    numbers: tuple[int, ...]

    flow: ClassVar[bool] = False
    """Whether the model is of flow matching."""

    @cached_property
    def honours_flag(self) -> bool:
        """Whether the scheduler's schedule is the one that the config asks for."""
        if not self.config.get("rescale_betas_zero_snr"):
            return True
        table = getattr(self.scheduler, "alphas_cumprod", None)
        last = math.inf if table is None else float(table[-1])
        without = float(self._without_flag[-1])
        # The cosine schedule ends below the stand-in by itself.
        return last <= STAND_IN and (without <= ZERO**2 or not math.isclose(last, without, rel_tol=0.01))

    @cached_property
    def _without_flag(self) -> Tensor:
        return _table({**self.config, "rescale_betas_zero_snr": False})

    @cached_property
    def sampled(self) -> Tensor:
        """alpha_bar of the schedule that the scheduler runs."""
        return self.trained if self.honours_flag else self._without_flag

    @property
    def final_level(self) -> NoiseLevel | None:
        """Where sampling ends; None where the scheduler does not say."""
        final = getattr(self.scheduler, "final_alpha_cumprod", None)
        return None if final is None else noise_level(torch.as_tensor(final).double().reshape(1), 0)

    @property
    def terminal_level(self) -> NoiseLevel:
        """The noise level at T of the schedule that the scheduler runs."""
        return noise_level(self.sampled, -1)

    @property
    def terminal_alpha(self) -> float:
        """sqrt(alpha_bar_T) of the schedule that the scheduler runs."""
        return float(self.terminal_level.alpha)

    @property
    def zero_snr(self) -> bool:
        """Whether the config describes a schedule that ends at zero SNR, by flag or by its betas."""
        return float(noise_level(self.trained, -1).alpha) <= ZERO

    @property
    def has_no_ideal(self) -> bool:
        """Whether it is an epsilon model at zero SNR."""
        return self.zero_snr and self.config["prediction_type"] == "epsilon"

    @property
    def not_run(self) -> str | None:
        """Why the scheduler is not run; None if it is."""
        if self.has_no_ideal:
            return "an epsilon model has no ideal at zero SNR"
        return why_not_runnable(self.scheduler)

    @cached_property
    def runs(self) -> tuple[Simulation, ...]:
        """A run for each number of steps; none where it cannot be run, or samples another schedule."""
        if self.not_run is not None or not self.honours_flag:
            return ()
        return runs(self.scheduler, self.trained, self.numbers)

    @property
    def regular(self) -> tuple[Simulation, ...]:
        """Runs that came to an end and visited timesteps of the model only."""
        return tuple(run for run in self.runs if run.missed is not None and min(run.timesteps) >= 0)

    @property
    def missing(self) -> dict[int, float]:
        """Numbers of steps that end away from the point, and how far."""
        return {
            r.num_inference_steps: r.missed for r in self.regular if r.missed is not None and not r.missed <= TOLERANCE
        }

    @cached_property
    def wide_errors(self) -> dict[int, float]:
        """Relative error of each number of steps on wide data, against DDIM's rule on the same timesteps."""
        whole = [run for run in self.regular if all(t == int(t) for t in run.timesteps)]
        made = {run.num_inference_steps: (run.wide or 0.0, self._by_rule(run)) for run in whole}
        return {n: wide / exact - 1 for n, (wide, exact) in made.items() if exact}  # one step from zero SNR makes 0

    def _by_rule(self, run_of_stock: Simulation) -> float:
        facts = {key: self.config[key] for key in (*SCHEDULE_NAMES, "prediction_type") if key in self.config}
        ddim = schedulers.ZeroSNRDDIMScheduler(**{"rescale_betas_zero_snr": False, **facts})
        timesteps = [int(t) for t in run_of_stock.timesteps]
        return run(ddim, run_of_stock.num_inference_steps, self.trained, timesteps).wide or 0.0

    @property
    def first_timesteps(self) -> tuple[tuple[int, float], ...]:
        """Pairs of a number of steps that the report shows and the noisiest timestep that it visits."""
        return tuple((n, max(timesteps)) for n, timesteps in self.visited.items())

    @cached_property
    def visited(self) -> dict[int, tuple[float, ...]]:
        """The timesteps of each number of steps that the report shows."""
        found = {}
        for n in possible(self.config, REPORTED_STEPS):
            try:
                self.scheduler.set_timesteps(n)
                found[n] = tuple(self.scheduler.timesteps.tolist())
            except Exception:  # whatever it is, the runs tell
                continue
        return found

    @property
    def places(self) -> dict[int, tuple[float, ...]]:
        """The same as places in `trained`."""
        return self.visited


def scheduler_under_test(source: Source, numbers: Sequence[int] | None = None) -> SchedulerUnderTest:
    """Make the scheduler that a source describes.

    Args:
        source: from `read_source`.
        numbers: of steps, to run; those above T are left out.

    Raises:
        ValueError: the config describes no scheduler of a variance-preserving model, or one that cannot be made.
    """
    name, scheduler_class = scheduler_class_of(source)
    parameters = inspect.signature(scheduler_class.__init__).parameters
    defaults = {p.name: p.default for p in parameters.values() if p.default is not p.empty}
    config = {"prediction_type": "epsilon", **defaults, **source.config, **source.assigned, "_class_name": name}
    if hasattr(schedulers, name):
        config["timestep_spacing"] = own_spacing(config)
    check_variance_preserving(config)
    missing = [key for key in ("num_train_timesteps", "beta_schedule") if key not in config]
    if missing:  # the defaults of a class that is not installed are not known
        raise ValueError(f"{name} has no schedule: {' and '.join(missing)} is missing.")
    check_types(config, defaults)
    check_prediction_type(config["prediction_type"], zero_terminal_snr=False)
    if source.prediction_type is not None:
        check_prediction_type(source.prediction_type, zero_terminal_snr=False)
    scheduler = make(scheduler_class, {**config, "clip_sample": False, "thresholding": False})
    return SchedulerUnderTest(
        source, scheduler_class, config, scheduler, _table(config), possible(config, numbers or TESTED_STEPS)
    )


def possible(config: Mapping[str, Any], numbers: Sequence[int]) -> tuple[int, ...]:
    """Numbers of steps up to T, or up to those that a model was distilled at."""
    T, distilled = config["num_train_timesteps"], config.get("original_inference_steps")
    most = min(T, distilled) if isinstance(distilled, int) and distilled > 0 else T
    return tuple(n for n in numbers if 1 <= n <= most)


def scheduler_class_of(source: Source) -> tuple[str, Any]:
    """The class that a pipeline's loader takes: `model_index.json` says it, and else the config."""
    if source.live is not None:
        return type(source.live).__name__, type(source.live)
    entry = source.index.get("scheduler")
    name = entry[1] if isinstance(entry, list) and len(entry) == 2 else source.config.get("_class_name")
    if name is None:
        raise ValueError(f"{source.name}: the config names no class; add '_class_name', or pass the scheduler itself.")
    found = getattr(schedulers, str(name), None) or getattr(diffusers, str(name), None)
    if not isinstance(name, str) or not name.endswith("Scheduler") or not isinstance(found, type):
        raise ValueError(f"{source.name}: {name!r} is no scheduler of diffusers or of this package.")
    return name, found


def make(scheduler_class: Any, config: Mapping[str, Any]) -> Any:
    """A scheduler with what it takes of a config; None if something that it needs is not installed.

    Raises:
        ValueError: it refuses.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of algorithms that are to go
            return scheduler_class(**_taken(scheduler_class, config))
    except ImportError:
        return None
    except Exception as error:  # stock raises whatever a wrong value leads to
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{scheduler_class.__name__} cannot be made from this config: {type(error).__name__}: {reason}"
        ) from error


def _taken(scheduler_class: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(scheduler_class.__init__).parameters
    return {key: value for key, value in config.items() if key in parameters}


def accepted(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of a class of diffusers, without what this class does not take."""
    return {"_class_name": config["_class_name"], **_taken(getattr(diffusers, config["_class_name"]), config)}


def _table(config: Mapping[str, Any]) -> Tensor:
    """alpha_bar of the schedule that a config describes.

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


def rescaled_by_flag(config: Mapping[str, Any], table: Tensor) -> bool:
    """Whether a table is that of the config's own schedule, brought to zero terminal SNR.

    Saved betas have been through float32 and through ratios of neighbours, which costs four digits near the end.
    """
    flagged = _table({**config, "trained_betas": None, "rescale_betas_zero_snr": True})
    return len(flagged) == len(table) and bool(
        torch.allclose(flagged.sqrt(), table.double().sqrt(), atol=1e-3, rtol=0)
    )
