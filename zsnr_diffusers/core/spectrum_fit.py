"""Weights of a multistep sampler that make the end of a whole run exact on Gaussian data, over a spectrum of scales.

For N(0, s^2) the exact path is known: x / sigma = sqrt(1 + s^2 kappa^2) x_T, and x_0 = s x_T at its end. A sampler of
given weights is linear there, so its end and the derivative by each weight are exact too, and a few steps of Gauss and
Newton fit all weights at once.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SPECTRUM = (0.2, 16.0)
"""Standard deviations of the Gaussian data: what most dimensions of an image or a latent have."""
NUM_SCALES = 64
RIDGE = 4.2
"""RMS relative error, times n^2.5, that moving one weight by its whole step must save over n steps, or it stays.

The more steps, the nearer polynomials are by themselves, and the less error there is to fit to.
"""
ITERATIONS = 4
"""Of Gauss and Newton; after three of them the weights change by less than 1e-5."""


class _Run(NamedTuple):
    """A sampler on all scales [S] at once, its rows of weights in a matrix [n, n]: step i by output j."""

    outputs: Tensor
    """x_0 at each step, [S, n]."""
    end: Tensor
    """The clean sample, [S]."""
    sensitivities: Tensor
    """Derivative of the end by what each step adds, [S, n]."""


def fit_to_spectrum(rows: Sequence[Tensor], kappas: Tensor) -> None:
    """Fit the weights of the outputs in each step, in place, to Gaussian data of all scales in `SPECTRUM`.

    Least squares of the relative error at the end of the run, with a ridge towards the weights as they are. The sum of
    each row, which makes a constant output exact, stays.

    Args:
        rows: for each step the weights of its outputs, newest first; in x / sigma, and in the data for the last step.
        kappas: alpha / sigma of each step, shape [n].
    """
    smallest, largest = map(math.log10, SPECTRUM)
    scales = torch.logspace(smallest, largest, NUM_SCALES, dtype=torch.float64)
    steps, outputs = _movable_weights([len(row) for row in rows])
    start, sums = _as_matrix(rows), torch.stack([row.sum() for row in rows])[steps]
    ridge = RIDGE**2 / len(rows) ** 5 * NUM_SCALES * torch.eye(len(steps), dtype=torch.float64)
    moves, matrix = torch.zeros_like(sums), start
    for _ in range(ITERATIONS):
        run = _sample_gaussians(matrix, kappas, scales)
        by_move = run.sensitivities[:, steps] * (run.outputs[:, outputs] - run.outputs[:, steps]) * sums
        jacobian, error = by_move / scales[:, None], run.end / scales - 1
        moves = torch.linalg.solve(jacobian.T @ jacobian + ridge, jacobian.T @ (jacobian @ moves - error))
        matrix = start.index_put((steps, outputs), moves * sums, accumulate=True)
        matrix = matrix.index_put((steps, steps), -moves * sums, accumulate=True)
    for i, row in enumerate(rows):
        row.copy_(matrix[i, i + 1 - len(row) : i + 1].flip(0))


def _movable_weights(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Step and output of every weight but the newest output's, whose weight takes what the others give."""
    pairs = [(i, j) for i, length in enumerate(lengths) for j in range(i + 1 - length, i)]
    steps, outputs = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    return steps, outputs


def _as_matrix(rows: Sequence[Tensor]) -> Tensor:
    matrix = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for i, row in enumerate(rows):
        matrix[i, i + 1 - len(row) : i + 1] = row.flip(0)
    return matrix


def _sample_gaussians(matrix: Tensor, kappas: Tensor, scales: Tensor) -> _Run:
    """Sample N(0, s^2) from where its exact path is at the first kappa, by one triangular system for each scale s."""
    n = len(kappas)
    growth = (1 + (scales[:, None] * kappas) ** 2).sqrt()
    slopes = scales[:, None] ** 2 * kappas / growth**2  # x_0 = slope * x / sigma
    earlier = torch.ones(n, n, dtype=torch.float64).tril(-1)
    added = earlier @ matrix  # to x / sigma, by each output before a step; the last step adds to nothing
    system = torch.eye(n, dtype=torch.float64) - slopes[:, :, None] * added
    outputs = torch.linalg.solve_triangular(system, (slopes * growth[:, :1])[:, :, None], upper=False)[:, :, 0]
    last = matrix[-1].expand(len(scales), n)[:, :, None]
    by_output = torch.linalg.solve_triangular(system.mT, last, upper=True)[:, :, 0]
    sensitivities = (by_output * slopes) @ earlier
    sensitivities[:, -1] = 1
    return _Run(outputs, outputs @ matrix[-1], sensitivities)
