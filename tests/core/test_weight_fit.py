import pytest
import torch

from zsnr_diffusers.core.weight_fit import (
    broyden_update,
    fit_step_weights,
    levenberg_marquardt_step,
    robust_image_weights,
)

OUTPUTS = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
START = torch.tensor([2.0, -0.7, 0.2], dtype=torch.float64)
OTHER = torch.tensor([1.0, 0.8, -0.5], dtype=torch.float64)
"""Of another sum: what overshoots is to count for less."""


def test_without_ridge_the_weights_that_made_the_sum_are_found():
    found = fit_step_weights(START, OUTPUTS, OTHER @ OUTPUTS, ridge=0.0)
    torch.testing.assert_close(found, OTHER, rtol=0, atol=1e-12)


def test_with_a_large_ridge_they_stay():
    found = fit_step_weights(START, OUTPUTS, OTHER @ OUTPUTS, ridge=1e9)
    torch.testing.assert_close(found, START, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ridge", [0.0, 0.1, 3.0])
def test_the_error_does_not_grow_and_a_ridge_holds_the_weights_back(ridge):
    wanted = OUTPUTS.sin().sum(dim=0)
    found = fit_step_weights(START, OUTPUTS, wanted, ridge)
    errors = [(wanted - weights @ OUTPUTS).norm() for weights in (found, START)]
    assert errors[0] < errors[1]
    assert (fit_step_weights(START, OUTPUTS, wanted, ridge + 1) - START).norm() < (found - START).norm()


def test_one_output_that_overshoots_counts_for_less():
    weights = torch.tensor([1.5], dtype=torch.float64)
    found = fit_step_weights(weights, OUTPUTS[:1], 1.2 * OUTPUTS[0], 0.0)
    assert found.item() == pytest.approx(1.2, rel=1e-12)


def test_single_precision_outputs_are_fitted_in_double():
    found = fit_step_weights(START, OUTPUTS.float(), OTHER @ OUTPUTS, ridge=0.0)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, OTHER, rtol=0, atol=1e-6)  # rounding of the outputs


def test_a_move_takes_away_an_error_that_is_linear_in_it():
    move = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(levenberg_marquardt_step(OUTPUTS, move @ OUTPUTS, 0.0), move, rtol=0, atol=1e-12)
    damped = levenberg_marquardt_step(OUTPUTS, move @ OUTPUTS, 1.0)
    assert damped.norm() < move.norm()


def test_directions_that_change_nothing_are_not_gone_in():
    assert torch.equal(
        levenberg_marquardt_step(torch.zeros(2, 5), torch.ones(5), 1e-2), torch.zeros(2, dtype=torch.float64)
    )


def test_what_a_move_did_is_what_derivatives_say_after_an_update():
    """Along the move; across it they say what they said."""
    result = lambda p: torch.stack([p[0] ** 2, p[0] * p[1], p[1].exp()])  # noqa: E731
    at, moves = torch.tensor([0.5, -0.2]).double(), torch.tensor([0.3, 0.4]).double()
    directions = torch.autograd.functional.jacobian(result, at).T.contiguous()
    before, change = directions.clone(), result(at + moves) - result(at)
    broyden_update(directions, moves, change)
    torch.testing.assert_close(moves @ directions, change)
    across = torch.tensor([0.4, -0.3]).double()
    torch.testing.assert_close(across @ directions, across @ before)
    broyden_update(directions, torch.zeros(2).double(), change)
    assert directions.isfinite().all()


def test_images_far_off_count_less():
    errors = torch.tensor([0.0, 1.0, 2.0, 2.0, 1e6])
    weights = robust_image_weights(errors[:, None, None] * torch.ones(5, 3, 4))
    assert weights.shape == (5, 1, 1)
    assert weights.flatten().tolist() == pytest.approx([2**0.5, (8 / 5) ** 0.5, 1, 1, 2**1.5 * 1e-6], rel=1e-5)
    assert robust_image_weights(torch.zeros(3, 2)).isfinite().all()


def test_an_image_that_ended_elsewhere_does_not_decide():
    """Nine images agree on the weights, and one of them wants something else altogether."""
    outputs = torch.randn(3, 10, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.tensordot(OTHER, outputs, dims=1)
    wanted[0] += 100
    weighed = robust_image_weights(wanted - torch.tensordot(START, outputs, dims=1))
    plain, found = (
        fit_step_weights(START, (by * outputs).flatten(1), (by * wanted).flatten(), ridge=0.0)
        for by in (torch.ones(10, 1), weighed)
    )
    assert (found - OTHER).norm() < 0.05 * (plain - OTHER).norm()
