"""Timesteps and weights of few steps, moved together towards where the teacher's samples end.

Levenberg-Marquardt on differences: the network is called, and nothing is differentiated. Between two sets of
derivatives, Broyden's update keeps them near with the runs that are tried anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..core.weight_fit import broyden_update, levenberg_marquardt_step, robust_image_weights
from .student import Fit, Steps, Student

ROUNDS, TRIES = 4, 5
"""How often derivatives are measured on the way from one grid, and the runs that are tried with each."""
DAMPING = 3e-2
"""With which a round begins, at most."""
ENOUGH = 0.99
"""A round that leaves more of the error is the last."""
DIFFERENCE = 0.01
"""By how much of a step a weight is moved to see what that changes."""
FAR = 0.1
"""By how much of the way to its nearer neighbor a timestep is moved for that."""
LONGEST_MOVE = 0.7
"""Of a parameter in its unit."""
KEEP_UNIT = 0.3
"""The unit of factors of x_t / sigma_t; that of a weight is its step, that of a timestep half the way to the nearer
neighbor."""


class Parameter(NamedTuple):
    """What can be moved in a step: the weight of an output, the factor of x_t / sigma_t, or the timestep."""

    kind: Literal["weight", "keep", "timestep"]
    step: int
    output: int = 0


def max_network_calls(n: int, outputs: int = 3, starts: int = 3) -> int:
    """How often fit and refinement of n steps call the network at most, for each batch.

    Args:
        n: the step count.
        outputs: how many outputs a step weighs at most.
        starts: from how many grids the fit starts.
    """
    of_changes = sum(n - _shared_states(parameter) for parameter in list_parameters(n, outputs))
    return starts * n + (starts + ROUNDS - 1) * (of_changes + TRIES * n)


def list_parameters(n: int, outputs: int) -> list[Parameter]:
    """The weights and the factor of every step, and every timestep but the first."""
    weights = [Parameter("weight", i, j) for i in range(n) for j in range(min(i + 1, outputs))]
    return [
        *weights,
        *(Parameter("keep", i) for i in range(n)),
        *(Parameter("timestep", i) for i in range(1, n)),
    ]


def _shared_states(parameter: Parameter) -> int:
    """How many states of a run stay as they are when a parameter is moved."""
    return parameter.step + (parameter.kind != "timestep")


def fit_steps(student: Student, starts: Sequence[Sequence[int]]) -> Fit:
    """Fit timesteps and weights: a round from each of several grids, and more from the one that is then the nearest.

    Before that round, the grids are told apart less well: the one with the largest error may end with the smallest.

    Args:
        student: runs the network.
        starts: timesteps to begin with, from T-1 down, all of them the teacher's.
    """
    begun = (_improve(student, student.fit(timesteps), DAMPING) for timesteps in starts)
    fit, damping = min(begun, key=lambda found: found[0].error)
    for _ in range(ROUNDS - 1):
        error = fit.error
        fit, damping = _improve(student, fit, min(damping, DAMPING))
        if not fit.error < ENOUGH * error:
            break
    return fit


def _improve(student: Student, fit: Fit, damping: float) -> tuple[Fit, float]:
    """One round from a new set of derivatives; returns what was found, and the damping to continue with."""
    parameters = list_parameters(len(fit.states), student.num_outputs(len(fit.states)))
    changes = torch.stack([_derivative(student, fit, parameter) for parameter in parameters])
    for _ in range(TRIES):
        error = student.clean - fit.clean
        weighed = robust_image_weights(error)
        moves = levenberg_marquardt_step((weighed * changes).flatten(1), (weighed * error).flatten(), damping)
        moves = moves.clamp(-LONGEST_MOVE, LONGEST_MOVE)
        other = student.run(_move(student, fit.steps, parameters, moves))
        broyden_update(changes, moves, other.clean - fit.clean)
        if other.error < fit.error:
            fit, damping = other, damping / 4
        else:
            damping *= 10
    return fit, damping


def _derivative(student: Student, fit: Fit, parameter: Parameter) -> Tensor:
    """Derivative of the clean samples by a parameter, in its unit; from a difference."""
    move = DIFFERENCE
    if parameter.kind == "timestep":
        unit = _timestep_unit(fit.steps.timesteps, parameter.step)
        move = max(1, round(FAR * unit)) / unit
    moved = _move(student, fit.steps, [parameter], torch.tensor([move]))
    other = student.run(moved, fit.states[: _shared_states(parameter)])
    return (other.clean - fit.clean) / move


def _move(student: Student, steps: Steps, parameters: Sequence[Parameter], moves: Tensor) -> Steps:
    """Steps with parameters moved, in their units; weights of a step grow with the step."""
    timesteps, keeps = [float(timestep) for timestep in steps.timesteps], list(steps.keeps)
    shares = [row / size for row, size in zip(steps.weights, student.step_sizes(steps.timesteps), strict=True)]
    for (kind, i, output), move in zip(parameters, moves.tolist(), strict=True):
        if kind == "weight":
            shares[i][output] += move
        elif kind == "keep":
            keeps[i] += KEEP_UNIT * move
        else:
            timesteps[i] += move * _timestep_unit(steps.timesteps, i)
    found = _in_order(timesteps)
    weights = [share * size for share, size in zip(shares, student.step_sizes(found), strict=True)]
    return Steps(found, weights, keeps)


def _timestep_unit(timesteps: Sequence[int], i: int) -> float:
    """Half the way from a timestep to the nearer of its neighbors; below the last is 0."""
    below = timesteps[i + 1] if i + 1 < len(timesteps) else 0
    return max(1.0, min(timesteps[i - 1] - timesteps[i], timesteps[i] - below) / 2)


def _in_order(timesteps: Sequence[float]) -> list[int]:
    """The nearest integers that decrease strictly, and leave room for those that follow."""
    found = [round(timesteps[0])]
    for room, timestep in zip(range(len(timesteps) - 2, -1, -1), timesteps[1:], strict=True):
        found.append(min(max(round(timestep), room), found[-1] - 1))
    return found
