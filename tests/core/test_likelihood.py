import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zsnr_diffusers.core import (
    NoiseLevel,
    alpha_bar_table,
    bound_strata,
    decoder_std,
    discretized_log_likelihood,
    enforce_zero_terminal_snr,
    noise_level,
    prior_kl,
    snr,
    step_kl,
    step_kl_factors,
)
from zsnr_diffusers.core.noise import BETA_SCHEDULES

PURE_NOISE = NoiseLevel(0.0, 1.0)
TABLES = {
    "linear": alpha_bar_table(),
    "zero SNR": enforce_zero_terminal_snr(alpha_bar_table()),
}
GRID = torch.arange(256, dtype=torch.float64) / 127.5 - 1
VARIANCE_TYPES = ["fixed_small", "fixed_large"]


def levels(table):
    return [NoiseLevel(*map(float, noise_level(table, t))) for t in range(len(table))]


def normal_kl(mean1, logvar1, mean2, logvar2):
    return 0.5 * (logvar2 - logvar1 + np.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * np.exp(-logvar2) - 1)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_steps_are_the_papers(table, variance_type):
    """Ho et al. 2020, eqs. 6 to 8, from the betas, at every timestep but the decoder's."""
    alpha_bar = TABLES[table].numpy()
    before = np.append(1.0, alpha_bar[:-1])
    beta = 1 - alpha_bar / before
    variance = beta * (1 - before) / (1 - alpha_bar)
    of_x_0 = np.sqrt(before) * beta / (1 - alpha_bar)
    of_x_t = np.sqrt(1 - beta) * (1 - before) / (1 - alpha_bar)
    x_0, prediction, x_t = np.random.default_rng(0).normal(size=(3, 5))
    path = levels(TABLES[table])
    for t in range(1, 1000):
        q, p = (of_x_0[t] * sample + of_x_t[t] * x_t for sample in (x_0, prediction))
        expected = normal_kl(q, np.log(variance[t]), p, np.log(variance[t] if "small" in variance_type else beta[t]))
        factors = step_kl_factors(path[t], path[t - 1], variance_type)
        found = step_kl(torch.from_numpy(x_0), torch.from_numpy(prediction), factors)
        # the transcription's beta is a difference that keeps 1e-12 of 1e-4
        assert found.numpy() == pytest.approx(expected, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("table", TABLES)
def test_weight_is_a_difference_of_signal_to_noise_ratios(table):
    """Kingma et al. 2021, section 4; at zero terminal SNR too."""
    path = levels(TABLES[table])
    for following, now in pairwise(path):
        offset, weight = step_kl_factors(now, following)
        assert offset == 0
        assert weight == pytest.approx((snr(following) - snr(now)) / 2, rel=1e-9)


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@given(st.floats(1e-3, math.pi / 2 - 1e-3))
def test_the_step_from_pure_noise_is_finite(variance_type, angle):
    following = NoiseLevel(math.cos(angle), math.sin(angle))
    # q is q(x_s | x_0); p has its own mean of it and the variance of q, or 1, which is beta there
    variance = following.sigma**2
    x_0, prediction = torch.tensor([0.3, -1.0], dtype=torch.float64), torch.tensor([0.3, 0.5], dtype=torch.float64)
    found = step_kl(x_0, prediction, step_kl_factors(PURE_NOISE, following, variance_type))
    q, p = (following.alpha * sample.numpy() for sample in (x_0, prediction))
    expected = normal_kl(q, math.log(variance), p, math.log(variance) if "small" in variance_type else 0.0)
    assert found.numpy() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("table", TABLES)
def test_the_larger_variance_costs_where_data_is_one_point_and_pays_where_it_is_noise(table):
    """Ho et al. 2020, section 3.2: each variance is right for one kind of data."""
    path = levels(TABLES[table])
    for following, now in pairwise(path):
        small, large = (step_kl_factors(now, following, variance_type) for variance_type in VARIANCE_TYPES)
        assert small.offset == 0 < large.offset
        spread = now.sigma**2  # of x_0 given x_t, where x_0 is N(0, 1)
        assert large.offset + large.weight * spread < small.weight * spread


def test_unknown_variances_and_wrong_orders_are_refused():
    path = levels(TABLES["linear"])
    with pytest.raises(ValueError, match="variance_type='learned' is unknown"):
        step_kl_factors(path[5], path[4], "learned")
    with pytest.raises(ValueError, match="cleaner"):
        step_kl_factors(path[4], path[5])


# -- the prior


def test_prior_is_exactly_zero_at_pure_noise():
    x_0 = torch.linspace(-1, 1, 7, dtype=torch.float64)
    assert torch.equal(prior_kl(x_0, PURE_NOISE), torch.zeros(7, dtype=torch.float64))
    assert torch.equal(prior_kl(x_0, noise_level(TABLES["zero SNR"], 999)), torch.zeros(7, dtype=torch.float64))


@pytest.mark.parametrize("alpha", [0.9, 0.5, 0.00635])
def test_prior_is_a_kl(alpha):
    x_0 = torch.linspace(-1, 1, 7, dtype=torch.float64)
    found = prior_kl(x_0, NoiseLevel(alpha, math.sqrt(1 - alpha**2)))
    expected = normal_kl(alpha * x_0.numpy(), math.log(1 - alpha**2), 0.0, 0.0)
    assert found.numpy() == pytest.approx(expected, abs=1e-15)  # the transcription cancels


def test_prior_keeps_its_digits_at_a_small_alpha():
    """To first order alpha^2 x_0^2 / 2."""
    x_0 = torch.tensor([0.5, 1.0], dtype=torch.float64)
    found = prior_kl(x_0, NoiseLevel(1e-9, 1.0))
    torch.testing.assert_close(found, 1e-18 * x_0**2 / 2, rtol=1e-12, atol=0)


# -- the decoder


@given(st.floats(-3, 3), st.floats(-4, 1))
def test_the_decoder_sums_to_one(mean, exponent):
    found = discretized_log_likelihood(GRID, torch.full_like(GRID, mean), 10**exponent)
    assert bool((found <= 0).all())
    assert float(found.exp().sum()) == pytest.approx(1, abs=1e-12)


@given(st.integers(0, 255), st.floats(-1e3, 1e3), st.floats(-4, 1))
def test_the_decoder_is_finite(value, mean, exponent):
    found = discretized_log_likelihood(GRID[value], torch.tensor(mean, dtype=torch.float64), 10**exponent)
    assert bool(found.isfinite())


@pytest.mark.parametrize("std", [0.0074, 0.05, 1.0])
@pytest.mark.parametrize("mean", [-0.9, 0.0, 0.31])
def test_bins_inside_by_quadrature(mean, std):
    """Mass relative to the density at the value, so that the far tails keep all digits."""
    inside = GRID[1:-1].numpy()
    nodes, weights = np.polynomial.legendre.leggauss(200)
    z = (inside - mean) / std
    within = nodes / (255 * std)
    relative = (np.exp(-within * (z[:, None] + within / 2)) * weights).sum(axis=1) / (255 * std)
    expected = np.log(relative) - z**2 / 2 - math.log(2 * math.pi) / 2
    found = discretized_log_likelihood(GRID[1:-1], torch.full((254,), mean, dtype=torch.float64), std)
    assert found.numpy() == pytest.approx(expected, rel=1e-12)
    single = discretized_log_likelihood(GRID[1:-1].float(), torch.full((254,), mean), std)
    assert single.dtype == torch.float64
    assert single.numpy() == pytest.approx(expected, rel=1e-3)  # the rounding of its arguments, over the std


def test_bins_at_the_edges_are_open():
    mean = torch.tensor([0.5, 0.5], dtype=torch.float64)
    found = discretized_log_likelihood(torch.tensor([-1.0, 1.0], dtype=torch.float64), mean, 0.4)
    edge = 1 - 1 / 255
    below, above = (0.5 * math.erfc(z / math.sqrt(2)) for z in ((edge + 0.5) / 0.4, (edge - 0.5) / 0.4))
    assert found.tolist() == pytest.approx([math.log(below), math.log(above)], rel=1e-12)


def test_the_decoder_is_symmetric():
    mean = torch.linspace(-1.5, 1.5, 256, dtype=torch.float64)
    there = discretized_log_likelihood(GRID, mean, 0.01)
    back = discretized_log_likelihood(-GRID, -mean, 0.01)
    torch.testing.assert_close(back, there, rtol=1e-12, atol=0)


@pytest.mark.parametrize("table", TABLES)
def test_the_decoder_has_the_second_timesteps_variance(table):
    alpha_bar = TABLES[table]
    beta = 1 - alpha_bar[1] / alpha_bar[0]
    variance = beta * (1 - alpha_bar[0]) / (1 - alpha_bar[1])
    path = levels(alpha_bar)
    assert decoder_std(path[0], path[1]) ** 2 == pytest.approx(float(variance), rel=1e-9)


# -- the whole bound


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_more_steps_tighten_the_bound_on_gaussian_data_towards_its_entropy(schedule):
    """With exact denoisers, at zero terminal SNR, and the decoder with the variance that x_0 has at the first level.

    Kingma et al. 2021, section 4.1: nested levels tighten it; the limit of infinitely many is the entropy itself.
    """
    full, v = levels(enforce_zero_terminal_snr(alpha_bar_table(schedule))), 0.3

    def bound(path):
        spread = [v * level.sigma**2 / (level.alpha**2 * v + level.sigma**2) for level in path]
        weights = [step_kl_factors(now, following).weight for following, now in pairwise(path)]
        steps = sum(weight * after for weight, after in zip(weights, spread[1:], strict=True))
        return steps + math.log(2 * math.pi * math.e * spread[0]) / 2

    entropy = math.log(2 * math.pi * math.e * v) / 2
    gaps = [bound([full[0], *full[stride::stride], full[-1]]) - entropy for stride in (200, 40, 8, 2)]
    gaps.append(bound(full) - entropy)
    assert all(a > b > 0 for a, b in pairwise(gaps))
    angles = np.arctan2(*(np.array(full).T))
    between = np.interp(np.arange(0, 999.001, 1 / 50), np.arange(1000), angles)
    fine = bound([NoiseLevel(math.sin(angle), math.cos(angle)) for angle in between]) - entropy
    assert 0 < fine < gaps[-1] / 30  # of first order in the size of the steps, of which there are 50 times as many


# -- strata


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("T", [2, 3, 50, 1000])
def test_strata_hold_every_timestep_once(schedule, zero, T):
    table = alpha_bar_table(schedule, T)
    path = levels(enforce_zero_terminal_snr(table) if zero else table)
    for count in {2, 3, 7, 49, 50, T // 2, T - 1, T}:
        if not 2 <= count <= T:
            continue
        strata = bound_strata(path, count)
        assert len(strata) == count
        assert [t for stratum in strata for t in stratum] == list(range(T))
        assert strata[0] == range(1)
        assert all(len(stratum) > 0 for stratum in strata)


def test_strata_share_the_bound_of_standard_data_evenly():
    """Where a group has many timesteps, it has its part of sum (SNR_s - SNR_t) / (1 + SNR_t), up to one timestep's."""
    path = levels(TABLES["zero SNR"])
    terms = [math.nan, *(step_kl_factors(now, s).weight * 2 * now.sigma**2 for s, now in pairwise(path))]
    part = 2 * math.log(path[-1].sigma / path[0].sigma) / 30
    strata = bound_strata(path, 31)
    wide = [stratum for stratum in strata if len(stratum) > 10]
    assert len(wide) > 5
    for stratum in wide:
        assert sum(terms[t] for t in stratum) == pytest.approx(part, rel=0.15)
