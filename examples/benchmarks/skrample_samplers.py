"""The samplers of skrample (PyPI) on flow-matching models, for `sampler_accuracy.py --flow --skrample`.

    python -m pip install skrample==0.7.0      # needs Python 3.12

It composes a solver, what the solver interpolates (x_0, or the velocity that the network returns), a schedule and its
modifiers. Nothing here needs torch, and samples may be arrays of either kind.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from skrample import scheduling
from skrample.common import Step
from skrample.sampling import structured
from skrample.sampling.models import DataModel, FlowModel

SOLVERS: dict[str, tuple[int, ...]] = {
    "Euler": (1,),
    "DPM": (2, 3),
    "Adams": (2, 3, 4),
    "UniP": (2, 3, 4),
    "UniPC": (1, 2, 3, 4),
    "SPC": (2, 3, 4),
}
"""Those that call the network once a step, and their orders; of SPC that of its corrector."""
SCHEDULES = ("Linear", "Beta", "Probit", "Karras", "Exponential", "Hyper", "Sinner")
"""Of flow times, with their default settings."""


class SkrampleScheduler:
    """One of its samplers, called as a scheduler of diffusers.

    Args:
        solver_type: one of `SOLVERS`.
        solver_order: see there.
        predict_x0: whether the solver interpolates x_0, its default, or what the network returns.
        timestep_spacing: one of `SCHEDULES`.
        shift: of the flow times before that, by `FlowShift`.
    """

    def __init__(
        self,
        solver_type: str,
        solver_order: int,
        predict_x0: bool = True,
        timestep_spacing: str = "Linear",
        shift: float = 1.0,
    ) -> None:
        options = {
            "order": solver_order,
            "corrector": structured.Adams(order=solver_order),
            "derivative_transform": DataModel() if predict_x0 else None,
        }
        cls = getattr(structured, solver_type)
        fields = {field.name for field in dataclasses.fields(cls)}
        self._solver = cls(**{key: value for key, value in options.items() if key in fields})
        times: Any = scheduling.Linear()
        if timestep_spacing != "Linear":
            times = getattr(scheduling, timestep_spacing)(times)
        self._schedule = scheduling.FlowShift(times, shift=shift)

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Begin a run of so many steps."""
        points = self._schedule.schedule_np(num_inference_steps)
        self.timesteps, self.sigmas = points[:, 0], np.append(points[:, 1], 0.0)
        self._previous: list[Any] = []

    def step(self, model_output: Any, timestep: Any, sample: Any) -> SimpleNamespace:
        """x at the next flow time, of any shape; steps follow each other in the order of the timesteps."""
        step = Step.from_int(len(self._previous), len(self.timesteps))
        kept = self._previous[-self._solver.require_previous :] if self._solver.require_previous else []
        done = self._solver.sample(sample, model_output, step, FlowModel(), self._schedule, previous=kept)
        self._previous.append(done)
        return SimpleNamespace(prev_sample=done.final)


def skrample_options(shifts: Sequence[float]) -> list[dict[str, Any]]:
    """What the class above is made with, for every solver, order, prediction and schedule at these shifts."""
    solvers = [(kind, order) for kind, orders in SOLVERS.items() for order in orders]
    return [
        {"solver_type": kind, "solver_order": order, "predict_x0": clean, "timestep_spacing": where, "shift": shift}
        for (kind, order), clean, where, shift in itertools.product(solvers, (True, False), SCHEDULES, shifts)
        if clean or kind != "Euler"
    ]
