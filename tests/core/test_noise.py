import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zsnr_diffusers.core import (
    NoiseLevel,
    add_noise,
    alpha_bar_table,
    enforce_zero_terminal_snr,
    noise_level,
    shift_snr,
    snr,
    transition,
)
from zsnr_diffusers.core.noise import BETA_SCHEDULES, noise_level_of_ratio

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def digits(value: float) -> str:
    return f"{value:.6e}"


@pytest.mark.parametrize(
    ("schedule", "snr_T", "alpha_T"),
    [
        ({"beta_schedule": "linear"}, "4.035993e-05", "6.353e-03"),
        (STABLE_DIFFUSION, "4.682e-03", "6.8265e-02"),
    ],
)
def test_terminal_snr_is_table_1_of_the_paper(schedule, snr_T, alpha_T):
    """Lin et al. 2023, Table 1, to every digit that it prints (at most six)."""
    level = noise_level(alpha_bar_table(**schedule), -1)
    for value, printed in ((snr(level), snr_T), (level.alpha, alpha_T)):
        decimals = len(printed.split("e")[0]) - 2
        assert f"{value:.{decimals}e}" == printed


def test_capped_cosine_is_table_1_of_the_paper():
    """The paper computed its cosine row in float32: the fifth digit is rounding, and in float32 we get it too."""
    table = alpha_bar_table("squaredcos_cap_v2")
    assert digits(snr(noise_level(table, -1))) == "2.428767e-09"
    betas = 1 - table / torch.cat([torch.ones(1), table[:-1]])
    last = torch.cumprod(1 - betas.float(), dim=0)[-1]
    assert digits(last / (1 - last)) == "2.428735e-09"
    assert digits(last.sqrt()) == "4.928220e-05"


def test_cosine_without_cap_ends_at_zero_snr_and_is_the_squared_cosine():
    table = alpha_bar_table("cosine", 100)
    assert snr(noise_level(table, -1)) < 1e-30
    for t in (0, 10, 63, 98):
        curve = math.cos(((t + 1) / 100 + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
        assert table[t].item() == pytest.approx(curve**2, rel=1e-12)


@pytest.mark.parametrize("T", [2, 100, 1000, 1024])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_tables_equal_stock(schedule, T):
    from diffusers import DDPMScheduler

    try:
        stock = DDPMScheduler(beta_schedule=schedule, num_train_timesteps=T).alphas_cumprod
    except NotImplementedError:
        pytest.skip(f"this diffusers knows no {schedule} schedule")
    # float32 rounds each of stock's T factors once, and of 1 - 0.999, the cosine's last factor, it keeps four digits
    rtol = 6e-8 * T + (6e-5 if schedule == "squaredcos_cap_v2" else 1e-6)
    torch.testing.assert_close(alpha_bar_table(schedule, T).float(), stock, rtol=rtol, atol=0)


def test_trained_betas_are_taken_as_they_are():
    betas = [0.1, 0.2, 0.5]
    torch.testing.assert_close(
        alpha_bar_table(trained_betas=betas), torch.tensor([0.9, 0.72, 0.36], dtype=torch.float64), rtol=1e-15, atol=0
    )


@pytest.mark.parametrize("T", [2, 3, 100, 1000, 1024])
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_algorithm_1(schedule, T):
    """Last exactly zero, first kept, sqrt(alpha_bar) an affine map of what it was, and once is enough."""
    before = alpha_bar_table(schedule, T)
    after = enforce_zero_terminal_snr(before)
    assert after.dtype == torch.float64
    assert after[-1] == 0
    assert after[0] == before[0]
    shift, scale = before[-1].sqrt(), before[0].sqrt() / (before[0].sqrt() - before[-1].sqrt())
    torch.testing.assert_close(after.sqrt(), (before.sqrt() - shift) * scale, rtol=1e-12, atol=1e-15)
    assert bool((after[1:] < after[:-1]).all())
    torch.testing.assert_close(enforce_zero_terminal_snr(after), after, rtol=1e-15, atol=0)


def test_algorithm_1_equals_stock():
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    stock = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    ours = enforce_zero_terminal_snr(alpha_bar_table(**STABLE_DIFFUSION)).float()
    torch.testing.assert_close(ours, stock, rtol=0, atol=2e-6)  # stock's is float32 throughout


@given(st.lists(st.floats(1e-5, 0.5), min_size=2, max_size=50))
def test_algorithm_1_for_any_betas(betas):
    after = enforce_zero_terminal_snr(alpha_bar_table(trained_betas=betas))
    assert after[-1] == 0
    assert bool(((after >= 0) & (after < 1)).all())


@pytest.mark.parametrize("T", [1, 0, -3])
def test_too_few_timesteps_are_refused(T):
    with pytest.raises(ValueError, match=rf"num_train_timesteps={T}|at least two"):
        enforce_zero_terminal_snr(alpha_bar_table("linear", T))


@pytest.mark.parametrize("betas", [[], [0.1, 0.0], [0.1, 1.5], [0.1, float("nan")], [-0.1, 0.1]])
def test_betas_outside_the_unit_interval_are_refused(betas):
    with pytest.raises(ValueError, match="Betas must lie in"):
        alpha_bar_table(trained_betas=betas)


def test_unknown_schedule_is_refused_by_name():
    with pytest.raises(ValueError, match="'quadratic' is unknown; choose one of linear"):
        alpha_bar_table("quadratic")


def test_table_that_does_not_decrease_is_refused():
    with pytest.raises(ValueError, match="decrease strictly"):
        enforce_zero_terminal_snr(torch.tensor([0.5, 0.5, 0.1]))


def test_noise_level_has_unit_variance_and_add_noise_follows_it():
    table = enforce_zero_terminal_snr(alpha_bar_table(**STABLE_DIFFUSION))
    alpha, sigma = noise_level(table, torch.arange(1000))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000, dtype=torch.float64), rtol=1e-14, atol=0)
    x_0, noise = torch.full((2,), 3.0), torch.full((2,), 5.0)
    assert add_noise(x_0, noise, noise_level(table, 999)).tolist() == [5.0, 5.0]


def test_shifting_divides_the_snr():
    table = alpha_bar_table()
    shifted = shift_snr(table, 3.0)
    torch.testing.assert_close(shifted / (1 - shifted), table / (1 - table) / 3, rtol=1e-9, atol=0)
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"snr_shift_scale={scale} must be above 0"):
            shift_snr(table, scale)


@given(st.floats(0.0, 1e6))
def test_a_level_by_its_ratio(ratio):
    alpha, sigma = noise_level_of_ratio(ratio)
    assert alpha**2 + sigma**2 == pytest.approx(1)
    assert sigma == pytest.approx(ratio * alpha)


# A step of the forward chain


@pytest.mark.parametrize("places", [[0, 1, 2, 3], [0, 400, 999], [5, 999], [997, 998, 999]])
def test_steps_of_noise_compose_to_the_marginal(places):
    """Mean and variance after the steps, by the rule of a linear Gaussian chain, are those of q(x_t | x_0)."""
    table = enforce_zero_terminal_snr(alpha_bar_table(**STABLE_DIFFUSION))
    levels = [NoiseLevel(1.0, 0.0), *(noise_level(table, place) for place in places)]
    mean, variance = 1.0, 0.0
    for before, now in pairwise(levels):
        kept, added = transition(before, now)
        mean, variance = kept * mean, kept**2 * variance + added**2
        assert mean == pytest.approx(float(now.alpha), rel=1e-12)
        assert variance == pytest.approx(float(now.sigma) ** 2, rel=1e-9)  # 1 - alpha_bar has 12 digits at t = 0
    assert (mean == 0) == (places[-1] == 999)


def test_one_step_is_beta():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    table = alpha_bar_table()
    kept, added = transition(noise_level(table, torch.arange(999)), noise_level(table, torch.arange(1, 1000)))
    torch.testing.assert_close(kept, (1 - betas[1:]).sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(added**2, betas[1:], rtol=1e-9, atol=0)  # 1 - kept loses four digits


@pytest.mark.parametrize(("cleaner", "noisier"), [(0.5, 0.6), (0.0, 0.0), (float("nan"), 0.0)])
def test_no_step_leads_out_of_noise(cleaner, noisier):
    levels = (NoiseLevel(alpha, math.sqrt(1 - alpha**2)) for alpha in (cleaner, noisier))
    with pytest.raises(ValueError, match="must lead to a noisier level"):
        transition(*levels)
