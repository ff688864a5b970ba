"""Least-squares fit of a multistep sampler's weights along the sampler's own path.

Everything is linear in the weights of one step. Their sum is fitted as well: with guidance the first outputs
overshoot, and the teacher moves less far than they suggest. Related methods fit coefficients and timesteps to a
teacher by backpropagation through the network: LD3 (Tong et al. 2024, arXiv:2405.15506), S4S (Frankel et al. 2025,
arXiv:2502.17423), GAS (Oganov et al. 2025, arXiv:2510.17699). Here no gradients are needed: one step is solved in
closed form, and all together with finite differences.
"""

import torch
from torch import Tensor


def robust_image_weights(residuals: Tensor) -> Tensor:
    """Robust weight of each image in a least-squares fit of a sampler: 1 / sqrt(e^2 + m^2), e its RMS, m their median.

    With guidance, some images lie between two outcomes; which one a few steps reach is random, and without this weight
    such images would dominate the fit. This minimizes a sum of log(e^2 + m^2) instead of e^2 (Holland & Welsch 1977,
    doi:10.1080/03610927708827533).

    Args:
        residuals: shape [N, ...].

    Returns:
        Shape [N, 1, ...], 1 where e = m.
    """
    error = residuals.double().flatten(1).square().mean(1).sqrt()
    middle = error.median().clamp(min=torch.finfo(torch.float32).tiny)
    weights = (2 / (1 + (error / middle) ** 2)).sqrt()
    return weights.to(residuals).reshape(-1, *[1] * (residuals.ndim - 1))


def fit_step_weights(weights: Tensor, outputs: Tensor, wanted: Tensor, ridge: float) -> Tensor:
    """Fit one multistep step's weights so that the weighted outputs approach a target, by ridge least squares.

    Args:
        weights: initial values, newest output first, shape [m], float64.
        outputs: the outputs to combine, shape [m, N].
        wanted: target of the weighted sum, shape [N].
        ridge: the RMS error that moving each weight by the sum of all of them must save.

    Returns:
        Weights, shape [m].
    """
    outputs, wanted = outputs.double(), wanted.double()
    gram = outputs @ outputs.T
    gram.diagonal().add_(len(wanted) * (ridge / float(weights.sum())) ** 2)
    return weights + torch.linalg.solve(gram, outputs @ (wanted - weights @ outputs))


def levenberg_marquardt_step(directions: Tensor, error: Tensor, damping: float) -> Tensor:
    """The Levenberg-Marquardt step: how far to move along each direction to reduce an error.

    Args:
        directions: the change of the result per unit of each parameter, shape [p, N].
        error: target minus result, shape [N].
        damping: of the normal equations, relative to the mean of their diagonal.

    Returns:
        Shape [p], float64.
    """
    directions = directions.double()
    gram = directions @ directions.T
    gram.diagonal().add_(damping * float(gram.diagonal().mean()) + torch.finfo(torch.float64).tiny)
    return torch.linalg.solve(gram, directions @ error.double())


def broyden_update(directions: Tensor, moves: Tensor, change: Tensor) -> None:
    """Broyden's update, in place: after it, derivatives explain what a move changed (Broyden 1965, "good" method).

    Args:
        directions: the change of the result per unit of each parameter, shape [p, ...].
        moves: how far each parameter was moved, shape [p].
        change: of the result by that, shape [...].
    """
    moves = moves.to(directions)
    length = moves.square().sum()
    if length > 0:
        missed = change - torch.tensordot(moves, directions, dims=1)
        directions += torch.tensordot(moves / length, missed, dims=0)
