import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zsnr_diffusers.core import (
    CLEAN,
    NoiseLevel,
    alpha_bar_table,
    consistency_updates,
    ddim_update,
    ddpm_updates,
    enforce_zero_terminal_snr,
    inversion_updates,
    noise_level,
    pndm_updates,
)

PURE_NOISE = NoiseLevel(0.0, 1.0)
angles = st.floats(0.0, math.pi / 2 - 1e-3)
etas = st.floats(0.0, 1.0)


def level(angle: float) -> NoiseLevel:
    """0 is pure noise, pi / 2 is clean."""
    return NoiseLevel(math.sin(angle), math.cos(angle))


@given(angles, angles, etas)
def test_a_step_preserves_mean_and_variance(a, b, eta):
    """With the true x_0, x_s has mean alpha_s x_0 and variance sigma_s^2 whatever eta: eqs. 12 and 16."""
    a, b = sorted((a, b))
    if b - a < 1e-6:
        return
    now, following = level(a), level(b)
    keep, (gain,), noise = ddim_update(now, following, eta)
    assert keep * now.alpha + gain == pytest.approx(following.alpha, rel=1e-12)
    assert (keep * now.sigma) ** 2 + noise**2 == pytest.approx(following.sigma**2, rel=1e-9, abs=1e-15)


@given(st.floats(1e-3, math.pi / 2 - 1e-3), st.floats(1e-3, math.pi / 2 - 1e-3))
def test_eta_one_is_the_posterior_of_ddpm(a, b):
    """Ho et al. 2020, eqs. 6 and 7."""
    a, b = sorted((a, b))
    if b - a < 1e-3:
        return
    now, following = level(a), level(b)
    alpha_bar_t, alpha_bar_s = now.alpha**2, following.alpha**2
    beta = 1 - alpha_bar_t / alpha_bar_s
    keep, (gain,), noise = ddim_update(now, following, 1.0)
    assert keep == pytest.approx(math.sqrt(1 - beta) * (1 - alpha_bar_s) / (1 - alpha_bar_t), rel=1e-9)
    assert gain == pytest.approx(math.sqrt(alpha_bar_s) * beta / (1 - alpha_bar_t), rel=1e-9)
    assert noise**2 == pytest.approx((1 - alpha_bar_s) / (1 - alpha_bar_t) * beta, rel=1e-9)


@given(angles, etas)
def test_the_last_step_returns_x_0(a, eta):
    assert ddim_update(level(a), CLEAN, eta) == (0.0, (1.0,), 0.0)


@given(st.floats(1e-6, math.pi / 2 - 1e-3), etas)
def test_from_pure_noise_everything_is_finite(b, eta):
    keep, (gain,), noise = ddim_update(PURE_NOISE, level(b), eta)
    assert keep == pytest.approx(math.cos(b) * math.sqrt(1 - eta**2), abs=1e-12)
    assert gain == math.sin(b)
    assert noise == pytest.approx(eta * math.cos(b))


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_outside_the_unit_interval_is_refused(eta):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        ddim_update(PURE_NOISE, CLEAN, eta)


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (0.5, 0.4)])
def test_a_step_to_more_noise_is_refused(a, b):
    with pytest.raises(ValueError, match="cleaner"):
        ddim_update(level(a), level(b))


# -- PNDM, consistency models, inversion


def test_pndm_holds_constant_outputs_exactly_and_uses_adams_bashforth_weights():
    path = [level(angle) for angle in (0.0, 0.3, 0.6, 0.9, 1.2, 1.4)]
    updates = pndm_updates(path)
    for i, (update, now, following) in enumerate(zip(updates, path, [*path[1:], CLEAN], strict=True)):
        ddim = ddim_update(now, following)
        assert (update.keep, sum(update.gains)) == pytest.approx((ddim.keep, ddim.gains[0]))
        weights = [gain / ddim.gains[0] for gain in update.gains]
        moments = [sum(w * (-j) ** power for j, w in enumerate(weights)) for power in range(len(weights))]
        if i < len(path) - 1:
            assert len(weights) == min(i + 1, 4)
            assert moments == pytest.approx([1 / (power + 1) for power in range(len(weights))])  # exact for t^power
    assert updates[-1] == (0.0, (1.0,), 0.0)


def test_consistency_steps_go_to_x_0_and_back():
    path = [level(angle) for angle in (0.0, 0.5, 1.0)]
    for update, following in zip(consistency_updates(path), [*path[1:], CLEAN], strict=True):
        assert update == (0.0, (following.alpha,), following.sigma)


def test_ddim_undoes_the_inversion_where_outputs_are_given():
    """Where the outputs depend on the level alone, DDIM leads back to the first level exactly."""
    path = [level(angle) for angle in (1.5, 1.2, 0.8, 0.3, 0.0)]
    outputs = [0.3, -0.2, 0.5, 0.1, 0.7]
    clean = outputs[0]  # what the last step back returns
    x, seen = clean, []
    for update, output in zip(inversion_updates(path), outputs, strict=True):
        seen.insert(0, output)
        x = update.keep * x + sum(gain * o for gain, o in zip(update.gains, seen, strict=False))
    noised = x
    assert math.isfinite(noised)
    for now, following, output in zip(path[::-1], [*path[-2::-1], CLEAN], outputs[::-1], strict=True):
        update = ddim_update(now, following)
        x = update.keep * x + update.gains[0] * output
        if following == path[0]:
            first = x  # alpha x_0 + sigma noise, with the noise that the clean sample and the first output imply
    assert x == pytest.approx(clean)
    assert first == pytest.approx(path[0].alpha * clean + (clean - path[0].alpha * outputs[0]))


TABLES = {
    "linear": alpha_bar_table(),
    "zero SNR": enforce_zero_terminal_snr(alpha_bar_table()),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_ddpm_is_the_papers_posterior(table, variance_type):
    """Ho et al. 2020, eqs. 6 and 7, from the betas, at every one of 1000 steps."""
    alpha_bar = TABLES[table]
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    beta = 1 - alpha_bar / before
    of_x_0 = before.sqrt() * beta / (1 - alpha_bar)
    of_x_t = (1 - beta).sqrt() * (1 - before) / (1 - alpha_bar)
    small = (1 - before) / (1 - alpha_bar) * beta
    expected = torch.stack([of_x_t, of_x_0, small if variance_type == "fixed_small" else beta]).flip(1)

    path = [NoiseLevel(*map(float, noise_level(alpha_bar, t))) for t in range(999, -1, -1)]
    updates = ddpm_updates(path, variance_type)
    ours = torch.tensor([(u.keep, u.gains[0], u.noise**2) for u in updates], dtype=torch.float64).T
    torch.testing.assert_close(ours[:, :-1], expected[:, :-1], rtol=1e-9, atol=1e-15)  # beta is a difference of 1e-4
    assert updates[-1] == (0.0, (1.0,), 0.0)  # algorithm 1 of the paper adds no noise in its last step


@pytest.mark.parametrize("table", TABLES)
def test_the_forward_chain_has_the_levels_mean_and_variance(table):
    """Ho et al. 2020, eq. 2 step by step against eq. 4."""
    alpha_bar = TABLES[table]
    mean, variance, before = 1.0, 0.0, 1.0
    for t, now in enumerate(alpha_bar.tolist()):
        beta = 1 - now / before
        mean, variance, before = mean * math.sqrt(1 - beta), variance * (1 - beta) + beta, now
        alpha, sigma = noise_level(alpha_bar, t)
        assert mean == pytest.approx(float(alpha), rel=1e-11, abs=1e-300)
        assert variance == pytest.approx(float(sigma) ** 2, rel=1e-11)


def test_an_unknown_variance_is_refused():
    with pytest.raises(ValueError, match="variance_type='learned' is unknown; choose one of fixed_small, fixed_large"):
        ddpm_updates([PURE_NOISE], "learned")
