"""Multistep samplers that use a polynomial through the last outputs, starting from a signal-to-noise ratio of exactly
zero.

They use the rule of `solvers.py` with a better approximation of x_0(kappa) between steps. High-order samplers are
usually written in log(kappa), which is undefined at zero SNR, so that their first steps fall back to order 1 and their
spacing fails. The variable used here, `position`, is regular at both ends.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby, pairwise

import torch
from torch import Tensor

from .noise import NoiseLevel, kappa
from .safeguard import Safeguard
from .solvers import Update, check_eta
from .spacing import LARGEST_SCALE, Scales, clean_position, position
from .spectrum_fit import fit_to_spectrum

MAX_ORDER = 3
THIRD_ORDER_STEPS = 20
"""With fewer steps, order 3 is less accurate than order 2, most of all under guidance."""
MAX_STEP_RATIO = 2.0
"""Steps are even if no interval is this many times longer than the one before."""
SMALLEST_END_SCALE = 0.05
"""The smallest scale that the last step extrapolates to, for even steps."""
COARSE_END_SCALE, LONG_LAST_STEP = 0.1, 1.1
"""The same if the last step is longer than this in `position`, so that the last output resolves less of it."""
LONGEST_LAST_STEP = 2.5
"""If the last step is longer than this, as with three steps, the outputs resolve no detail at all."""
FEW_STEPS = 64
"""More steps need no fit: their polynomials are nearly exact."""


@lru_cache(maxsize=1)
def _gauss_legendre(num: int = 64) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss-Legendre quadrature on [-1, 1] (Golub & Welsch 1969), float64 [num] each."""
    k = torch.arange(1, num, dtype=torch.float64)
    beside = k / (4 * k**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(beside.diag(1) + beside.diag(-1))
    return nodes, 2 * vectors[0] ** 2


def _lagrange(nodes: Tensor, at: Tensor) -> Tensor:
    """Values at `at` [m, q] of the Lagrange basis polynomials of `nodes` [m, p]; shape [m, p, q]."""
    p = nodes.shape[1]
    factors = (at[:, None, None] - nodes[:, None, :, None]) / (
        (nodes[:, :, None] - nodes[:, None, :]) + torch.eye(p, dtype=nodes.dtype)
    )[..., None]
    return torch.where(torch.eye(p, dtype=torch.bool)[..., None], 1.0, factors).prod(dim=2)


def _quadrature_weights(nodes: Tensor, start: Tensor, end: Tensor, a: float) -> Tensor:
    """Weights of the outputs at kappas `nodes` [m, p] in each step's integral from `start` to `end` [m]; shape [m, p].

    The polynomials run in `position`, the integral in asinh(kappa), where both are smooth; the sum of the weights is
    set to its closed form, so that a constant output is integrated exactly.
    """
    roots, root_weights = _gauss_legendre()
    low, high = (LARGEST_SCALE * start).asinh()[:, None], (LARGEST_SCALE * end).asinh()[:, None]
    w = (low + high) / 2 + (high - low) / 2 * roots
    between = w.sinh() / LARGEST_SCALE
    measure = (high - low) / 2 * root_weights * w.cosh() * (between / end[:, None]) ** a
    weights = (_lagrange(position(nodes), position(between)) * measure[:, None]).sum(dim=2)
    whole = end - start * (start / end) ** a
    return weights * (whole / weights.sum(dim=1))[:, None]


def _adams_weights(kappas: Tensor, ahead: int, most: int, a: float) -> list[Tensor]:
    """Adams weights of the outputs at steps i, i - 1, ... (up to `most` of them), one row for each i.

    `ahead` = 1 predicts the step from i to i + 1; 0 corrects the step that led to i, now that its output is there.
    """
    rows: list[Tensor] = []
    newest = range(1 - ahead, len(kappas) - ahead)
    for count, group in groupby(newest, key=lambda i: min(most, i + 1)):
        i = torch.tensor(list(group))
        nodes = kappas[i[:, None] - torch.arange(count)]
        rows += _quadrature_weights(nodes, kappas[i + ahead - 1], kappas[i + ahead], a)
    return rows


def _last_step_weights(kappas: Tensor, most: int, even: bool) -> Tensor:
    """Weights of the last outputs in the sampler's final, clean sample, newest first.

    Towards clean data, x_0 is a power series in 1 / kappa^2 for every Gaussian, once its scale is resolved; so its
    limit is the value at 0 of the polynomial in this variable through the last outputs. Even steps end before details
    are resolved; then the variable is `position` down to the scale `SMALLEST_END_SCALE`.
    """
    if len(kappas) == 1:
        return torch.ones(1, dtype=torch.float64)
    last = kappas[-most:].flip(0)
    last = last[last > 0]  # pure noise contains no information about the end
    nodes, end, interval = last**-2, 0.0, _position_intervals(kappas)[-1]
    if even and interval <= LONGEST_LAST_STEP:
        scales = Scales(COARSE_END_SCALE if interval > LONG_LAST_STEP else SMALLEST_END_SCALE, LARGEST_SCALE)
        nodes, end = position(last, scales), clean_position(scales)
    return _lagrange(nodes[None], torch.tensor([[end]], dtype=torch.float64))[0, :, 0]


def _position_intervals(kappas: Tensor) -> Tensor:
    """Length of each sampling step in `position`, up to clean data."""
    return torch.cat([position(kappas), torch.tensor([clean_position()], dtype=torch.float64)]).diff()


def _is_evenly_spaced(kappas: Tensor) -> bool:
    """Whether no sampling step, up to clean data, is much longer in `position` than the one before."""
    intervals = _position_intervals(kappas)
    return bool((intervals[1:] <= MAX_STEP_RATIO * intervals[:-1]).all())


def multistep_updates(
    path: Sequence[NoiseLevel], order: int = 2, corrector: bool = True, eta: float = 0.0
) -> list[Update]:
    """All steps of a multistep sampler from the first level of `path` to clean data.

    Between steps, x_0 is approximated by the polynomial through the last `order` outputs in the variable `position`,
    which is regular at pure noise and at clean data; so every order holds from a signal-to-noise ratio of exactly
    zero. The corrector repeats the previous step with the newest output among the nodes. It needs no network call, and
    is added as a difference to the incoming sample, so changes by a pipeline are preserved. These are the predictor
    and corrector of Adams in this variable; Zhao et al. 2023 (UniPC, arXiv:2302.04867) have theirs in log(kappa).

    Without added noise, there are two refinements: the last step extrapolates the last x_0 outputs, see
    `_last_step_weights`; and with few and approximately even steps in `position`, the weights are fitted to a spectrum
    of Gaussian data, see `spectrum_fit.py`.

    Args:
        path: levels, noisiest first, numbers with sigma > 0; the first alpha may be 0. Clean data follows them.
        order: 1 to 3. Order 1 without corrector, on trailing steps, is DDIM for eta 0 and DDPM for eta 1.
        corrector: raise the order by one.
        eta: 0 is the probability-flow ODE, 1 the reverse SDE.

    Raises:
        ValueError: order or eta out of range.

    Examples:
        >>> from zsnr_diffusers.core import NoiseLevel, multistep_updates
        >>> path = [NoiseLevel(0.0, 1.0), NoiseLevel(0.6, 0.8), NoiseLevel(0.8, 0.6)]
        >>> [len(update.gains) for update in multistep_updates(path, order=2)]
        [1, 2, 2]
    """
    check_eta(eta)
    check_order(order)
    kappas = torch.tensor([kappa(level) for level in path], dtype=torch.float64)
    kept, even = _keep_factors(kappas, eta), _is_evenly_spaced(kappas)
    rows = _step_weights(kappas, kept, order, corrector, eta, even)
    if even and eta == 0 and len(path) <= FEW_STEPS:
        fit_to_spectrum(rows, kappas)
    return _assemble_updates(path, kept, rows)


def multistep_updates_between(path: Sequence[NoiseLevel], order: int = 2, corrector: bool = True) -> list[Update]:
    """The steps of the ODE from each level of `path` to the next, the last of which is reached and not left.

    Arguments as in `multistep_updates`. Nothing is fitted, since the fit is to clean data after the last level.
    """
    kappas = torch.tensor([kappa(level) for level in path], dtype=torch.float64)
    kept = _keep_factors(kappas, 0.0)
    rows = _step_weights(kappas, kept, order, corrector, 0.0, even=False)
    return _assemble_updates(path, kept, rows)[:-1]


def _keep_factors(kappas: Tensor, eta: float) -> list[float]:
    """Factor of x / sigma that each step keeps; 1 for the ODE, also from pure noise, since 0 ** 0 = 1."""
    return ((kappas[:-1] / kappas[1:]) ** eta**2).tolist()


def _assemble_updates(path: Sequence[NoiseLevel], kept: Sequence[float], rows: Sequence[Tensor]) -> list[Update]:
    """Sampler updates from each step's weights of x_0 in x_s / sigma_s, and those in the data for the last step."""
    sigmas = [float(level.sigma) for level in path]
    updates = [
        Update(
            keep=keep * sigma_s / sigma_t,
            gains=tuple((sigma_s * row).tolist()),
            noise=sigma_s * math.sqrt((1 - keep) * (1 + keep)),
        )
        for keep, row, (sigma_t, sigma_s) in zip(kept, rows, pairwise(sigmas), strict=False)
    ]
    return [*updates, Update(keep=0.0, gains=tuple(rows[-1].tolist()), noise=0.0)]


def updates_from_weights(
    path: Sequence[NoiseLevel], weights: Sequence[Sequence[float]], keeps: Sequence[float]
) -> list[Update]:
    """Sampler updates of the ODE from given weights: of outputs in x_s / sigma_s, and in the data for the last step.

    Args:
        path: levels as in `multistep_updates`.
        weights: for each step those of its outputs, newest first.
        keeps: for each step the factor of x_t / sigma_t; 1 is that of the ODE, and 0 of its last step.
    """
    sigmas = [*(float(level.sigma) for level in path), 1.0]
    return [
        Update(keep=keep * sigma_s / sigma_t, gains=tuple(sigma_s * weight for weight in row), noise=0.0)
        for keep, row, (sigma_t, sigma_s) in zip(keeps, weights, pairwise(sigmas), strict=True)
    ]


def multistep_safeguards(
    path: Sequence[NoiseLevel], updates: Sequence[Update], order: int = 2, corrector: bool = True, eta: float = 0.0
) -> list[Safeguard]:
    """The `Safeguard` of each step of `multistep_updates` with the same arguments, of order 2 or 3.

    The low order is 1 with corrector. Its last step uses the mean of the last output and the extrapolation of the last
    two.

    Args:
        path: levels as in `multistep_updates`.
        updates: its result.
        order: 2 or 3.
        corrector: as in `multistep_updates`.
        eta: likewise.
    """
    kappas = torch.tensor([kappa(level) for level in path], dtype=torch.float64)
    kept = _keep_factors(kappas, eta)
    rows = _step_weights(kappas, kept, 1, True, eta, _is_evenly_spaced(kappas))
    rows[-1] /= 2
    rows[-1][0] += 0.5
    low, intervals = _assemble_updates(path, kept, rows), _position_intervals(kappas).tolist()
    middle: list[tuple[float, ...] | None] = [None] * len(path)
    if order > 2:
        second_order = multistep_updates(path, 2, corrector, eta)
        middle = [_padded(lower.gains, len(update.gains)) for lower, update in zip(second_order, updates, strict=True)]
    return [
        Safeguard((of_low.gains[0], sum(of_low.gains[1:])), of_middle, update.gains, interval)
        for of_low, of_middle, update, interval in zip(low, middle, updates, intervals, strict=True)
    ]


def _padded(gains: tuple[float, ...], length: int) -> tuple[float, ...]:
    """Gains with zeros for older outputs, so that there are `length`."""
    return gains + (0.0,) * (length - len(gains))


def _step_weights(
    kappas: Tensor, kept: Sequence[float], order: int, corrector: bool, eta: float, even: bool
) -> list[Tensor]:
    """Weights of the outputs in each step, newest first: predictor, corrector of the step before, and the last one."""
    a = eta**2
    predicted = _adams_weights(kappas, 1, order, a)
    corrected = _adams_weights(kappas, 0, order + 1, a)
    rows = []
    for i in range(len(kappas) - 1):
        row = torch.zeros(min(i + 1, order + corrector), dtype=torch.float64)
        row[: len(predicted[i])] = predicted[i]
        if 0 < i < (len(kappas) if corrector else order - 1):  # order 3 corrects its start: it would keep it at 2
            row[: len(corrected[i - 1])] += kept[i] * corrected[i - 1]
            row[1 : 1 + len(predicted[i - 1])] -= kept[i] * predicted[i - 1]
        rows.append(row)
    return [*rows, _last_step_weights(kappas, order + corrector if eta == 0 else 1, even)]


def order_of_run(solver_order: int, num_steps: int) -> int:
    """The order that a run of so many steps uses, at most `solver_order`."""
    return solver_order if num_steps >= THIRD_ORDER_STEPS else min(solver_order, MAX_ORDER - 1)


def check_order(order: int) -> None:
    """Refuse a solver order that is not 1, 2 or 3.

    Raises:
        ValueError: with the value and the range.
    """
    if not (isinstance(order, int) and 1 <= order <= MAX_ORDER):
        raise ValueError(f"solver_order={order} must be 1, 2 or 3; higher orders do not help with few steps.")
