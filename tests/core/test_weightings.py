import math

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr

from zsnr_diffusers.core import (
    LOSS_WEIGHTINGS,
    PREDICTION_TYPES,
    NoiseLevel,
    add_noise,
    alpha_bar_table,
    enforce_zero_terminal_snr,
    level_features,
    loss_weights,
    noise_level,
    training_target,
    uncertainty_loss,
    v_loss,
)
from zsnr_diffusers.core.choices import EPSILON_AT_ZERO_SNR
from zsnr_diffusers.core.noise import BETA_SCHEDULES

ALIVE = [name for name in LOSS_WEIGHTINGS if name != "min_snr"]
PURE_NOISE = NoiseLevel(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))


def levels(beta_schedule="scaled_linear", zero_snr=False):
    table = alpha_bar_table(beta_schedule)
    return noise_level(enforce_zero_terminal_snr(table) if zero_snr else table, torch.arange(1000))


def snr_of(level):
    return level.alpha**2 / level.sigma**2


FORMULAS = {
    "constant": lambda snr, gamma: torch.ones_like(snr),
    "min_snr": lambda snr, gamma: snr.clamp(max=gamma) / (snr + 1),
    "min_snr_floored": lambda snr, gamma: snr.clamp(1, gamma) / (snr + 1),
    # Crowson et al. write the weight of an error of x_0 over EDM's noise, whose square is 1 / snr.
    "soft_min_snr_floored": lambda snr, gamma: (1 / (1 / snr + 1 / gamma)).clamp(min=1) / (snr + 1),
}


@pytest.mark.parametrize("gamma", [1.5, 5.0, 20.0])
@pytest.mark.parametrize("name", LOSS_WEIGHTINGS)
def test_weights_of_v_are_the_published_ones(name, gamma):
    level = levels()
    expected = FORMULAS[name](snr_of(level), gamma)
    # the formulas divide by sigma^2, here 4e-4 at least, of which 1 - alpha_bar has 13 digits left
    torch.testing.assert_close(loss_weights(name, level, snr_gamma=gamma), expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("name", ALIVE)
def test_every_timestep_of_every_zero_snr_schedule_has_a_finite_weight_above_zero(
    name, prediction_type, beta_schedule
):
    level = levels(beta_schedule, zero_snr=True)
    weights = loss_weights(name, level, prediction_type)
    assert level.alpha[-1] == 0
    assert bool((weights > 0).all())
    assert bool((weights < math.inf).all())
    assert weights[-1] == 1
    assert bool((weights.float() > 0).all())  # as the trainer keeps them


def test_plain_min_snr_leaves_the_last_timestep_untrained_and_is_refused():
    """The weight of diffusers' training scripts, on the very timestep that zero terminal SNR adds."""
    stock = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    snr = compute_snr(stock, torch.tensor([999]))
    output = torch.ones(1, 3, requires_grad=True)
    losses = v_loss(output, torch.zeros(1, 3))
    (plain,) = torch.autograd.grad((losses * snr.clamp(max=5) / (snr + 1)).sum(), output, retain_graph=True)
    assert not plain.any()
    for name in ALIVE:
        (gradient,) = torch.autograd.grad((losses * loss_weights(name, PURE_NOISE)).sum(), output, retain_graph=True)
        assert bool((gradient > 0).all())
    for prediction_type in PREDICTION_TYPES:
        with pytest.raises(ValueError, match=r"'min_snr' gives the last timestep weight 0.*Use 'min_snr_floored'"):
            loss_weights("min_snr", PURE_NOISE, prediction_type)


def as_errors(prediction_type):
    """Squared errors of one guess, made anew as a prediction of the type, at every level of an ordinary schedule."""
    level = levels()
    level = NoiseLevel(level.alpha[:, None], level.sigma[:, None])
    draw = torch.Generator().manual_seed(0)
    x_0, noise, guess = torch.randn(3, 1000, 4, generator=draw, dtype=torch.float64)
    x_t = add_noise(x_0, noise, level)
    if prediction_type == "epsilon":
        guess = (x_t - level.alpha * guess) / level.sigma
    elif prediction_type == "v_prediction":
        guess = (level.alpha * x_t - guess) / level.sigma
    elif prediction_type == "flow_prediction":
        guess = (x_t - (level.alpha + level.sigma) * guess) / level.sigma
    target = training_target(prediction_type, x_0, noise, level)
    return (guess - target).square().mean(dim=1)


def test_min_snr_is_one_loss_whether_of_v_or_of_epsilon():
    """Hang et al.: min(snr, gamma) / (snr + 1) for v, min(snr, gamma) / snr for epsilon."""
    level = levels()
    snr = snr_of(level)
    of_epsilon = as_errors("epsilon") * snr.clamp(max=5) / snr
    of_v = as_errors("v_prediction") * loss_weights("min_snr", level)
    torch.testing.assert_close(of_v, of_epsilon, rtol=1e-9, atol=0)  # divisions by sigma >= 0.01 on the way


@pytest.mark.parametrize("name", [name for name in LOSS_WEIGHTINGS if name != "constant"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_weighting_is_one_loss_whatever_the_network_predicts(name, prediction_type):
    losses = as_errors(prediction_type) * loss_weights(name, levels(), prediction_type)
    torch.testing.assert_close(losses, as_errors("v_prediction") * loss_weights(name, levels()), rtol=1e-9, atol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_constant_is_1_for_what_is_predicted(prediction_type):
    assert bool((loss_weights("constant", levels(), prediction_type) == 1).all())


@pytest.mark.parametrize("name", [name for name in ALIVE if name != "constant"])
def test_epsilon_at_pure_noise_is_refused_not_divided_by_zero(name):
    with pytest.raises(ValueError) as refused:  # noqa: PT011  compared below
        loss_weights(name, PURE_NOISE, "epsilon")
    assert str(refused.value) == EPSILON_AT_ZERO_SNR


@pytest.mark.parametrize(
    ("name", "gamma", "message"),
    [
        ("p2", 5.0, r"loss_weighting='p2' is unknown; choose one of constant, min_snr_floored"),
        ("min_snr", 0.0, r"snr_gamma=0.0 must be above 0\."),
        ("min_snr_floored", 1.0, r"snr_gamma=1.0 must be above 1, the floor of 'min_snr_floored'"),
        ("soft_min_snr_floored", float("nan"), "snr_gamma=nan must be above 1"),
    ],
)
def test_bad_weightings_name_value_and_remedy(name, gamma, message):
    with pytest.raises(ValueError, match=message):
        loss_weights(name, levels(), snr_gamma=gamma)


# -- learned uncertainty


def test_uncertainty_loss_is_least_at_the_logarithm_of_the_loss():
    loss = torch.tensor([1e-3, 0.5, 7.0], dtype=torch.float64)
    log_variance = loss.log().requires_grad_()
    (gradient,) = torch.autograd.grad(uncertainty_loss(loss, log_variance).sum(), log_variance)
    assert gradient.tolist() == pytest.approx([0, 0, 0], abs=1e-15)
    least = uncertainty_loss(loss, loss.log())
    assert least.tolist() == pytest.approx((1 + loss.log()).tolist())
    assert bool((uncertainty_loss(loss, loss.log() + 0.1) > least).all())
    assert bool((uncertainty_loss(loss, loss.log() - 0.1) > least).all())


def test_features_are_the_chebyshev_polynomials_of_signal_minus_noise():
    """cos(2 phi) = alpha^2 - sigma^2, and cos(k x) is T_k(cos x); at pure noise they are 1, -1, 1 ..."""
    level = levels(zero_snr=True)
    features, x = level_features(level, 6), level.alpha**2 - level.sigma**2
    expected = [torch.ones_like(x), x]
    while len(expected) < 6:
        expected.append(2 * x * expected[-1] - expected[-2])
    torch.testing.assert_close(features, torch.stack(expected, dim=-1), rtol=0, atol=1e-13)
    assert features[-1].tolist() == pytest.approx([1, -1, 1, -1, 1, -1], abs=1e-14)
