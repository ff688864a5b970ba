"""The fit of a whole run's weights: where its objective is least, what it keeps, and what it gives."""

import pytest
import torch

from zsnr_diffusers.core import spectrum_fit
from zsnr_diffusers.core.spectrum_fit import NUM_SCALES, RIDGE, SPECTRUM, fit_to_spectrum

SCALES = torch.logspace(*torch.tensor(SPECTRUM).log10().tolist(), NUM_SCALES, dtype=torch.float64)


def kappas_of(n, start=0.0):
    """Kappas that grow about evenly in asinh(20 kappa), from pure noise or from a later start."""
    first = torch.tensor(20 * start, dtype=torch.float64).asinh().item()
    return torch.linspace(first, 6.5, n, dtype=torch.float64).sinh() / 20


def rows_of(kappas, order=3):
    """Weights that extrapolate as Adams' do; those of a step sum to its length, those of the last one to 1."""
    rows = [torch.tensor([1.6, -0.8, 0.2][: min(i + 1, order)], dtype=torch.float64) for i in range(len(kappas))]
    lengths = [*kappas.diff().tolist(), 1.0]
    return [length * row / row.sum() for length, row in zip(lengths, rows, strict=True)]


def ends(rows, kappas):
    """Relative end of a run on each scale, step by step."""
    growth = (1 + (SCALES[:, None] * kappas) ** 2).sqrt()
    y, outputs = growth[:, 0], []
    for i, row in enumerate(rows):
        outputs.insert(0, SCALES**2 * kappas[i] / growth[:, i] ** 2 * y)
        added = sum(weight * output for weight, output in zip(row, outputs, strict=False))
        y = added if i + 1 == len(rows) else y + added
    return y / SCALES


def objective(moves, rows, kappas):
    """Squared errors of the ends, and the ridge on all moves in units of each row's sum."""
    moved, n = [], len(rows)
    for row, move in zip(rows, moves, strict=True):
        moved.append(row + row.sum() * torch.cat([-move.sum()[None], move]))
    ridge = RIDGE**2 / n**5 * sum(move.square().sum() for move in moves)
    return (ends(moved, kappas) - 1).square().mean() + ridge


def value_and_gradient(moves, rows, kappas):
    moves = [move.detach().requires_grad_() for move in moves]
    value = objective(moves, rows, kappas)
    value.backward()
    return value.item(), torch.cat([move.grad for move in moves])


@pytest.mark.parametrize("start", [0.0, 0.3])
@pytest.mark.parametrize("n", [2, 3, 5, 8, 20])
def test_the_objective_is_least_at_the_fitted_weights(n, start):
    """By automatic differentiation of the steps themselves, which shares nothing with the fit."""
    kappas = kappas_of(n, start)
    rows = rows_of(kappas)
    fitted = [row.clone() for row in rows]
    fit_to_spectrum(fitted, kappas)
    moves = [((new - old) / old.sum())[1:] for new, old in zip(fitted, rows, strict=True)]
    value, gradient = value_and_gradient(moves, rows, kappas)
    before, gradient_before = value_and_gradient([torch.zeros_like(move) for move in moves], rows, kappas)
    assert value < before
    assert gradient.norm() < 1e-4 * gradient_before.norm()  # after four iterations, not at their limit


@pytest.mark.parametrize("n", [2, 5, 20])
def test_sums_of_rows_stay(n):
    kappas = kappas_of(n)
    rows = rows_of(kappas)
    sums = [row.sum().item() for row in rows]
    fit_to_spectrum(rows, kappas)
    assert [row.sum().item() for row in rows] == pytest.approx(sums, rel=1e-12)


def test_rows_of_one_weight_have_nothing_to_fit():
    rows = rows_of(kappas_of(4), order=1)
    before = [row.clone() for row in rows]
    fit_to_spectrum(rows, kappas_of(4))
    assert all(torch.equal(row, old) for row, old in zip(rows, before, strict=True))


def test_a_ridge_without_end_moves_nothing(monkeypatch):
    monkeypatch.setattr(spectrum_fit, "RIDGE", 1e6)
    rows = rows_of(kappas_of(6))
    before = torch.cat(rows)
    fit_to_spectrum(rows, kappas_of(6))
    assert torch.allclose(torch.cat(rows), before, atol=1e-8)
