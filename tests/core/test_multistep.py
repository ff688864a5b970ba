"""Multistep updates against exact probability flows, from a signal-to-noise ratio of exactly zero."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zsnr_diffusers.core import CLEAN, NoiseLevel, ddim_update, multistep_updates, spectrum_fit
from zsnr_diffusers.core import multistep as module
from zsnr_diffusers.core.spacing import clean_position, position

START = torch.linspace(-2, 2, 9, dtype=torch.float64) + 0.05


def level(kappa):
    return NoiseLevel(kappa / math.hypot(1, kappa), 1 / math.hypot(1, kappa))


def even(n):
    """n levels from pure noise on, even in `position` up to clean data."""
    goal = clean_position() * torch.arange(n, dtype=torch.float64) / n
    low, high = torch.zeros_like(goal), torch.full_like(goal, 1e6)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (
            torch.where(position(middle) < goal, middle, low),
            torch.where(position(middle) < goal, high, middle),
        )
    return [level(kappa) for kappa in [0.0, *high[1:].tolist()]]


def run(path, updates, network, x):
    outputs = []
    for now, update in zip(path, updates, strict=True):
        outputs.insert(0, network(x, now))
        x = update.keep * x + sum(gain * output for gain, output in zip(update.gains, outputs, strict=False))
    return x


def gaussian(spread):
    return lambda x, now: now.alpha * spread**2 / (now.alpha**2 * spread**2 + now.sigma**2) * x


def two_modes(mean, spread):
    """E[x_0 | x_t] for modes at -mean and mean; half of the mass each."""

    def network(x, now):
        variance = now.alpha**2 * spread**2 + now.sigma**2
        mode = mean * torch.tanh(now.alpha * mean * x / variance)
        return now.alpha * spread**2 / variance * x + now.sigma**2 / variance * mode

    return network


def flow_to_two_modes(mean, spread, x):
    """In one dimension the flow keeps the order of points, so it maps quantile to quantile."""

    def share_below(z):
        return (torch.special.ndtr((z - mean) / spread) + torch.special.ndtr((z + mean) / spread)) / 2

    goal, low, high = torch.special.ndtr(x), torch.full_like(x, -20.0), torch.full_like(x, 20.0)
    for _ in range(100):
        middle = (low + high) / 2
        below = share_below(middle) < goal
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high


DATA = {
    "detail": (gaussian(0.3), 0.3 * START),
    "unit": (gaussian(1.0), START),
    "brightness": (gaussian(5.0), 5 * START),
    "two modes": (two_modes(1.0, 0.3), flow_to_two_modes(1.0, 0.3, START)),
}


def error(name, n, **kwargs):
    network, exact = DATA[name]
    path = even(n)
    return (run(path, multistep_updates(path, **kwargs), network, START) - exact).abs().max().item()


@pytest.mark.parametrize("name", ["detail", "unit", "brightness"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_convergence_from_zero_snr(name, order):
    errors = [error(name, n, order=order, corrector=False) for n in (320, 640, 1280)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_convergence_where_the_network_is_not_linear(order):
    coarse, fine = (error("two modes", n, order=order, corrector=False) for n in (640, 2560))
    assert math.log2(coarse / fine) / 2 == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("n", [160, 320, 640])
def test_corrector_reduces_the_error(name, order, n):
    assert error(name, n, order=order) < 0.7 * error(name, n, order=order, corrector=False)


@pytest.mark.parametrize("order", [1, 2])
def test_corrector_raises_the_order_by_one(order):
    errors = [error("brightness", n, order=order) for n in (80, 160, 320)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order + 1, abs=0.15)


@pytest.mark.parametrize("n", [6, 10, 20])
def test_fit_to_the_spectrum_reduces_the_error_over_it(n, monkeypatch):
    """Over scales that are not those of the fit."""
    path, scales = even(n), torch.logspace(-1, 1.8, 37, dtype=torch.float64).tolist()

    def geometric_mean():
        updates = multistep_updates(path)
        ends = [run(path, updates, gaussian(s), torch.ones((), dtype=torch.float64)).item() / s for s in scales]
        return math.exp(sum(math.log(abs(end - 1)) for end in ends) / len(ends))

    fitted = geometric_mean()
    monkeypatch.setattr(spectrum_fit, "RIDGE", 1e6)
    assert fitted < 0.5 * geometric_mean()


def test_uneven_steps_are_not_fitted(monkeypatch):
    """Trailing steps are too coarse for brightness; weights that make up for it would be wrong for all else."""
    path = [level(kappa) for kappa in (0.0, 0.1, 0.3, 0.7, 1.4, 3.6)]
    updates = multistep_updates(path)
    monkeypatch.setattr(spectrum_fit, "RIDGE", 1e6)
    assert multistep_updates(path) == updates


@pytest.mark.parametrize("order", [2, 3])
def test_last_step_goes_where_the_outputs_lead(order):
    """Outputs that are polynomials in 1 / kappa^2 have their value at clean data."""
    path = [level(kappa) for kappa in (0.0, 0.1, 0.3, 0.7, 1.4, 3.6)]
    gains = multistep_updates(path, order)[-1].gains
    for power in range(order + 1):
        outputs = [(now.sigma / now.alpha) ** (2 * power) for now in path[:0:-1]]
        assert sum(gain * output for gain, output in zip(gains, outputs, strict=False)) == pytest.approx(
            float(power == 0)
        )
    assert multistep_updates(path, order, eta=0.5)[-1] == (0.0, (1.0,), 0.0)  # fresh noise leads nowhere


paths = st.lists(st.floats(1e-4, 200.0), min_size=1, max_size=12, unique=True).map(
    lambda kappas: [
        level(kappa)
        for kappa in [
            0.0,
            *(k for k, before in zip(sorted(kappas), [0.0, *sorted(kappas)], strict=False) if k > 1.001 * before),
        ]
    ]
)


@settings(max_examples=200, deadline=None)
@given(paths, st.integers(1, 3), st.booleans(), st.floats(0, 1))
def test_a_constant_output_is_exact_whatever_the_levels(path, order, corrector, eta):
    """For a point mass each x_s has the mean alpha_s x_0, and the noise in it the variance sigma_s^2."""
    updates = multistep_updates(path, order, corrector, eta)
    assert len(updates) == len(path)
    mean, variance = 0.0, 1.0
    for update, following in zip(updates, [*path[1:], CLEAN], strict=True):
        assert all(math.isfinite(number) for number in (update.keep, *update.gains, update.noise))
        mean = update.keep * mean + sum(update.gains)
        variance = update.keep**2 * variance + update.noise**2
        assert mean == pytest.approx(following.alpha, rel=1e-9)
        assert variance == pytest.approx(following.sigma**2, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_order_one_is_ddim_and_ddpm(eta):
    path = even(12)
    expected = [ddim_update(now, following, eta) for now, following in zip(path, [*path[1:], CLEAN], strict=True)]
    for ours, ddim in zip(multistep_updates(path, 1, corrector=False, eta=eta), expected, strict=True):
        assert ours.keep == pytest.approx(ddim.keep, rel=1e-12)
        assert ours.gains == pytest.approx(ddim.gains, rel=1e-12)
        assert ours.noise == pytest.approx(ddim.noise, rel=1e-12)


@pytest.mark.parametrize("a", [0.0, 0.3, 1.0])
def test_polynomials_in_the_variable_are_integrated_exactly(a):
    """(1 + a) kappa_s^-a times the integral of kappa^a p(position(kappa)), against a fine trapezoid rule."""
    nodes, end = torch.tensor([0.9, 0.4, 0.1], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    weights = module._quadrature_weights(nodes[None], nodes[:1], end, a)[0]
    kappa = torch.linspace(0.9, 2.0, 200_001, dtype=torch.float64)
    for power in range(3):
        integrand = (1 + a) * (kappa / end) ** a * position(kappa) ** power
        assert (weights @ position(nodes) ** power).item() == pytest.approx(
            torch.trapezoid(integrand, kappa).item(), rel=1e-9
        )


@pytest.mark.parametrize("order", [0, 4, 2.5])
def test_order_that_there_is_no_method_for_is_refused(order):
    with pytest.raises(ValueError, match=f"solver_order={order} must be 1, 2 or 3"):
        multistep_updates(even(5), order)


@pytest.mark.parametrize(("n", "fitted"), [(module.FEW_STEPS, True), (module.FEW_STEPS + 1, False)])
def test_many_steps_need_no_fit(n, fitted, monkeypatch):
    updates = multistep_updates(even(n))
    monkeypatch.setattr(spectrum_fit, "RIDGE", 1e6)
    assert (multistep_updates(even(n)) != updates) is fitted
