"""A few-step sampler fitted to a teacher's path: the weights for given timesteps.

Everything is computed in y = x / sigma, where a step of the ODE only adds a weighted sum of x_0 outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import NoiseLevel, multistep_updates, noise_level, schedule_table
from ..core.noise import SCHEDULE_NAMES
from ..core.weight_fit import fit_step_weights, levenberg_marquardt_step, move_weights, robust_image_weights
from .network import GuidedNetwork
from .trajectory import Trajectory

RIDGE = 0.1
"""Relative improvement of the error that a refinement step must achieve."""
DIFFERENCE = 0.01
"""Finite difference of a weight, as a fraction of its step."""
ROUNDS, TRIES = 2, 2
"""Iterations of the refinement, and the dampings tried in each."""


class State(NamedTuple):
    """State before a step: y = x / sigma, and the last x_0 outputs, newest first."""

    y: Tensor
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Fit:
    """A run of the student.

    Attributes:
        timesteps: n of them, from T-1 down.
        weights: of the outputs of each step, newest first, float64.
        states: before each step.
        clean: the resulting clean samples.
        error: geometric mean over images of the RMS difference to the teacher's clean samples.
    """

    timesteps: list[int]
    weights: list[Tensor]
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
        self._order, self._corrector = config["solver_order"], config["corrector"]

    @property
    def calls(self) -> int:
        """Number of network calls, each for all samples."""
        return self._network.calls // self._network.num_batches

    def fit(self, timesteps: Sequence[int], like: Fit | None = None) -> Fit:
        """Fit the weights step by step, each on the result of the previous steps.

        Args:
            timesteps: among the teacher's, from T-1 down.
            like: a fit for other timesteps; a common beginning is reused without network calls.
        """
        ts, shared = list(timesteps), 0 if like is None else _common_prefix_length(timesteps, like.timesteps)
        states = [] if like is None else like.states[:shared]
        weights = [] if like is None else like.weights[: max(shared - 1, 0)]
        for i, start in enumerate(self._default_weights(ts)):
            if i == len(states):
                states.append(self._evaluate_network(ts[i], self._y_after(states, weights), states))
            if i == len(weights):
                weights.append(self._fit_step_weights(ts, i, states[i], start))
        clean = _apply_step(states[-1], weights[-1], last=True)
        return Fit(ts, weights, states, clean, self._teacher_error(clean))

    def run_with_weights(self, timesteps: Sequence[int], weights: Sequence[Tensor]) -> Fit:
        """Run the student over timesteps with the given weights of each step."""
        ts: list[int] = list(timesteps)
        states: list[State] = []
        for i, timestep in enumerate(ts):
            states.append(self._evaluate_network(timestep, self._y_after(states, weights[:i]), states))
        clean = _apply_step(states[-1], weights[-1], last=True)
        return Fit(ts, list(weights), states, clean, self._teacher_error(clean))

    def refine_weights(self, fit: Fit) -> Fit:
        """Refine all weights together towards the teacher's clean samples, by Levenberg-Marquardt with finite
        differences.
        """
        damping = 1e-2
        for _ in range(ROUNDS):
            places = [(i, j) for i, row in enumerate(fit.weights) for j in range(1, len(row))]
            if not places:  # one output each, determined by the sum
                return fit
            error = self._teacher.clean - fit.clean
            weighed = robust_image_weights(error)
            changes = torch.stack([(weighed * self._weight_derivative(fit, i, j)).flatten() for i, j in places])
            for _ in range(TRIES):
                moves = levenberg_marquardt_step(changes, (weighed * error).flatten(), damping)
                other = self.run_with_weights(fit.timesteps, _move_weights(fit.weights, moves))
                if other.error < fit.error:
                    break
                damping *= 10
            else:
                return fit
            fit, damping = other, damping / 4
        return fit

    def _weight_derivative(self, fit: Fit, i: int, j: int) -> Tensor:
        """Derivative of the clean samples by weight j of step i, in units of the step; from a difference."""
        weights, move = list(fit.weights), torch.zeros(len(fit.weights[i]) - 1, dtype=torch.float64)
        move[j - 1] = DIFFERENCE * weights[i].sum()
        weights[i] = move_weights(weights[i], move)
        states = fit.states[: i + 1]
        for k in range(i + 1, len(weights)):
            states.append(self._evaluate_network(fit.timesteps[k], self._y_after(states, weights[:k]), states))
        return (_apply_step(states[-1], weights[-1], last=True) - fit.clean) / DIFFERENCE

    def _y_after(self, states: Sequence[State], weights: Sequence[Tensor]) -> Tensor | None:
        """y = x / sigma after the last of the student's states; None before the first step."""
        return _apply_step(states[-1], weights[-1], last=False) if states else None

    def _evaluate_network(self, timestep: int, y: Tensor | None, before: Sequence[State]) -> State:
        """Call the network at a timestep, and prepend its x_0 to the outputs of the next step."""
        sigma = float(self._noise_level(timestep).sigma)
        x_t = self._network.noise if y is None else y * sigma
        output, t = self._network(x_t, timestep), torch.tensor([timestep])
        x_0 = self._scheduler.get_original_sample(output, x_t, t)
        older = before[-1].outputs if before else ()
        return State(x_t / sigma, (x_0, *older)[: self._order + self._corrector])

    def _fit_step_weights(self, ts: Sequence[int], i: int, state: State, start: Tensor) -> Tensor:
        """The weights of step i that best match the teacher's sample, by least squares."""
        last = i + 1 == len(ts)
        goal = self._teacher.clean if last else self._teacher.samples[ts[i + 1]].float() / self._sigma(ts[i + 1])
        wanted = goal if last else goal - state.y
        weighed = robust_image_weights(goal - _apply_step(state, start, last))
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
        updates = multistep_updates(path, self._order, self._corrector)
        for i, (update, sigma) in enumerate(zip(updates, [*(level.sigma for level in path[1:]), 1.0], strict=True)):
            row = torch.zeros(min(i + 1, self._order + self._corrector), dtype=torch.float64)
            row[: len(update.gains)] = torch.tensor(update.gains, dtype=torch.float64) / sigma
            yield row

    def _teacher_error(self, clean: Tensor) -> float:
        """Distance of clean samples to the teacher's, see `Trajectory.error`."""
        return self._teacher.error(clean)


def _apply_step(state: State, weights: Tensor, last: bool) -> Tensor:
    """y after a step of given weights, or the clean samples after the last."""
    added = sum(weight * output for weight, output in zip(weights.tolist(), state.outputs, strict=True))
    return torch.as_tensor(added if last else state.y + added)


def _common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of common first timesteps of two runs, whose fit the second can reuse."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _move_weights(weights: Sequence[Tensor], moves: Tensor) -> list[Tensor]:
    """Every row of weights, shifted by its part of `moves` in units of its step."""
    parts = torch.split(moves, [len(row) - 1 for row in weights])
    return [move_weights(row, part * row.sum()) for row, part in zip(weights, parts, strict=True)]
