"""Few steps of a network, compared with the teacher's run: their weights, fitted step by step to the teacher's path.

Everything is computed in y = x / sigma, where a step of the ODE only adds a weighted sum of x_0 outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import NoiseLevel, multistep_updates, noise_level, schedule_table
from ..core.multistep import order_of_run
from ..core.noise import SCHEDULE_NAMES, kappa
from ..core.weight_fit import fit_step_weights, robust_image_weights
from .network import GuidedNetwork
from .trajectory import Trajectory

RIDGE = 0.1
"""Relative error, over a run, that moving each weight by the whole step must save."""


class State(NamedTuple):
    """State before a step: y = x / sigma, and the last x_0 outputs, newest first."""

    y: Tensor
    outputs: tuple[Tensor, ...]


class Steps(NamedTuple):
    """What a run does.

    Attributes:
        timesteps: n of them, from T-1 down.
        weights: of the outputs of each step, newest first, float64.
        keeps: the factor of y in each step: 1, and 0 in the last, or near that.
    """

    timesteps: list[int]
    weights: list[Tensor]
    keeps: list[float]


@dataclass(frozen=True)
class Fit:
    """A run of the student.

    Attributes:
        steps: what it does.
        states: before each step.
        clean: the resulting clean samples.
        error: geometric mean over images of the RMS difference to the teacher's clean samples.
    """

    steps: Steps
    states: list[State]
    clean: Tensor
    error: float


class Student:
    """Few-step runs of a network, compared with the teacher's run of the same network from the same noise.

    Args:
        network: the network and its initial noise.
        scheduler: the default sampler, whose weights initialize and regularize a fit.
        teacher: a run that visits every candidate timestep.
    """

    def __init__(self, network: GuidedNetwork, scheduler: Any, teacher: Trajectory) -> None:
        self._network, self._scheduler, self._teacher = network, scheduler, teacher
        config = scheduler.config
        self._table = schedule_table(**{name: config[name] for name in SCHEDULE_NAMES})
        self._solver_order, self._corrector = config["solver_order"], config["corrector"]

    def num_outputs(self, n: int) -> int:
        """How many outputs a step weighs at most in a run of n steps."""
        return int(order_of_run(self._solver_order, n) + self._corrector)

    @property
    def clean(self) -> Tensor:
        """The teacher's clean samples."""
        return self._teacher.clean

    def fit(self, timesteps: Sequence[int]) -> Fit:
        """Fit the weights step by step, each on what the steps before it lead to.

        Args:
            timesteps: of the teacher's, from T-1 down.
        """
        ts, states = list(timesteps), list[State]()
        steps = Steps(ts, [], [1.0] * (len(ts) - 1) + [0.0])
        for i, start in enumerate(self._default_weights(ts)):
            states.append(self._evaluate_network(steps, states))
            steps.weights.append(self._fit_step_weights(ts, i, states[i], start))
        return self._finish(steps, states)

    def run(self, steps: Steps, states: Sequence[State] = ()) -> Fit:
        """Sample with the given steps.

        Args:
            steps: timesteps, weights and factors.
            states: of another run that begins alike, as far as it does; they take no network calls.
        """
        found = list(states)
        while len(found) < len(steps.timesteps):
            found.append(self._evaluate_network(steps, found))
        return self._finish(steps, found)

    def step_sizes(self, timesteps: Sequence[int]) -> list[float]:
        """The sum of each step's weights by which a constant output is exact: kappa_s - kappa_t, and 1 at last."""
        return [after - before for before, after in pairwise(self.kappas(timesteps))] + [1.0]

    def kappas(self, timesteps: Sequence[int]) -> list[float]:
        """alpha / sigma of the model's schedule at each timestep."""
        return [float(kappa(self._noise_level(timestep))) for timestep in timesteps]

    def _finish(self, steps: Steps, states: list[State]) -> Fit:
        """The run that ends with the last step."""
        clean = _apply_step(states[-1], steps.weights[-1], steps.keeps[-1])
        return Fit(steps, states, clean, self._teacher.error(clean))

    def _evaluate_network(self, steps: Steps, before: Sequence[State]) -> State:
        """Call the network after the last of the states, and put its x_0 before the outputs that a step weighs."""
        i = len(before)
        timestep = steps.timesteps[i]
        sigma = float(self._noise_level(timestep).sigma)
        y = _apply_step(before[-1], steps.weights[i - 1], steps.keeps[i - 1]) if before else None
        x_t = self._network.noise if y is None else y * sigma
        output, t = self._network(x_t, timestep), torch.tensor([timestep])
        x_0 = self._scheduler.get_original_sample(output, x_t, t)
        older = before[-1].outputs if before else ()
        return State(x_t / sigma, (x_0, *older)[: self.num_outputs(len(steps.timesteps))])

    def _fit_step_weights(self, ts: Sequence[int], i: int, state: State, start: Tensor) -> Tensor:
        """The weights of step i that best match the teacher's sample, by least squares."""
        last = i + 1 == len(ts)
        goal = self._teacher.clean if last else self._teacher.samples[ts[i + 1]].float() / self._sigma(ts[i + 1])
        wanted = goal if last else goal - state.y
        weighed = robust_image_weights(goal - _apply_step(state, start, float(not last)))
        outputs = torch.stack([(weighed * output).flatten() for output in state.outputs])
        ridge = RIDGE / len(ts) * float(goal.square().mean().sqrt())
        return fit_step_weights(start, outputs, (weighed * wanted).flatten(), ridge)

    def _noise_level(self, timestep: int) -> NoiseLevel:
        """Noise level of the model's schedule at a timestep."""
        return noise_level(self._table, timestep)

    def _sigma(self, timestep: int) -> float:
        """sigma at a timestep: y there is x_t / sigma."""
        return float(self._noise_level(timestep).sigma)

    def _default_weights(self, timesteps: Sequence[int]) -> Iterator[Tensor]:
        """Weights of the default sampler for each step, padded to the maximum number of outputs."""
        path = [NoiseLevel(*map(float, self._noise_level(timestep))) for timestep in timesteps]
        updates = multistep_updates(path, order_of_run(self._solver_order, len(path)), self._corrector)
        for i, (update, sigma) in enumerate(zip(updates, [*(level.sigma for level in path[1:]), 1.0], strict=True)):
            row = torch.zeros(min(i + 1, self.num_outputs(len(path))), dtype=torch.float64)
            row[: len(update.gains)] = torch.tensor(update.gains, dtype=torch.float64) / sigma
            yield row


def _apply_step(state: State, weights: Tensor, keep: float) -> Tensor:
    """y after a step, or the clean samples after the last."""
    return keep * state.y + sum(
        weight * output for weight, output in zip(weights.tolist(), state.outputs, strict=True)
    )
