import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from zsnr_diffusers.core import NoiseLevel, ddim_updates, kappa, multistep_updates
from zsnr_diffusers.core.flow import (
    check_flow_times,
    dynamic_shift,
    flow_level,
    flow_time,
    is_stock_spacing,
    kappa_times,
    sample_scale,
    shifted_time,
    stretch_to_terminal,
    trailing_times,
    unshifted_time,
    variance_preserving,
)
from zsnr_diffusers.core.spacing import clean_position, position, scales_of_steps

times = st.floats(0.0, 1.0)
shifts = st.floats(0.05, 20.0)


@given(times)
def test_a_variance_preserving_level_has_the_same_snr_and_leads_back(s):
    level = variance_preserving(flow_level(s))
    assert level.alpha**2 + level.sigma**2 == pytest.approx(1, abs=1e-14)
    assert level.alpha * s == pytest.approx(level.sigma * (1 - s), abs=1e-14)
    assert flow_time(level) == pytest.approx(s, abs=1e-14)


def test_pure_noise_is_pure_noise_on_both_sides():
    assert variance_preserving(flow_level(1.0)) == NoiseLevel(0.0, 1.0)
    assert flow_time(NoiseLevel(0.0, 1.0)) == 1.0
    assert sample_scale(flow_level(1.0)) == 1.0


@given(times, st.floats(-5, 5), st.floats(-5, 5))
def test_samples_of_one_snr_differ_by_the_scale(s, x_0, noise):
    flow, kept = flow_level(s), variance_preserving(flow_level(s))
    of_flow, of_kept = (level.alpha * x_0 + level.sigma * noise for level in (flow, kept))
    assert of_flow == pytest.approx(of_kept * sample_scale(flow), abs=1e-13)


def test_levels_may_be_tensors():
    s = torch.linspace(0, 1, 5, dtype=torch.float64)
    torch.testing.assert_close(flow_time(variance_preserving(flow_level(s))), s)


@given(times.filter(lambda s: s > 1e-3), shifts)
def test_a_shift_multiplies_the_noise_to_signal_ratio_and_can_be_taken_back(s, shift):
    shifted = shifted_time(s, shift)
    assert shifted * (1 - s) == pytest.approx(shift * s * (1 - shifted), abs=1e-13)
    assert unshifted_time(shifted, shift) == pytest.approx(s, abs=1e-12)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("mu", [0.3, 1.15, 3.0])
def test_dynamic_shifts_are_those_of_stock(kind, mu):
    stock = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    s = torch.linspace(0.02, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(shifted_time(s, dynamic_shift(mu, kind)), stock.time_shift(mu, 1.0, s))


@pytest.mark.parametrize("n", [2, 3, 8, 50])
def test_stretched_times_are_those_of_stock(n):
    stock = FlowMatchEulerDiscreteScheduler(shift_terminal=0.1)
    wanted = stock.stretch_shift_to_terminal(torch.tensor(trailing_times(n, 3.0), dtype=torch.float64))
    assert trailing_times(n, 3.0, 0.1) == pytest.approx(wanted.tolist())
    assert trailing_times(n, 3.0, 0.1)[-1] == pytest.approx(0.1)


def test_a_single_step_is_not_stretched_away():
    assert stretch_to_terminal([1.0], 0.1) == [1.0]


@pytest.mark.parametrize("n", [*range(1, 60), 100, 501, 1000])
def test_kappa_times_are_even_in_position_from_pure_noise_on(n):
    found = kappa_times(n)
    assert found[0] == 1.0
    assert len(found) == n
    assert all(0 < b < a <= 1 for a, b in pairwise(found)) or n == 1
    kappas = torch.tensor([kappa(flow_level(s)) for s in found], dtype=torch.float64)
    scales = scales_of_steps(n)
    wanted = clean_position(scales) * torch.arange(n, dtype=torch.float64) / n
    torch.testing.assert_close(position(kappas, scales), wanted, rtol=1e-9, atol=1e-9)


def test_what_pipelines_pass_by_themselves_is_told_from_what_a_caller_asks_for():
    for n in (1, 2, 4, 28, 50):
        assert is_stock_spacing(np.linspace(1.0, 1 / n, n).tolist())
        assert is_stock_spacing(np.linspace(1.0, 1 / n, n, dtype=np.float32).tolist())
        assert is_stock_spacing(trailing_times(n))
    assert is_stock_spacing((np.linspace(1000, 1, 30) / 1000).tolist())
    for given_times in ([1.0, 0.6, 0.1], trailing_times(8, 3.0), [0.9, 0.45], [1.0, 0.9, 0.8]):
        assert not is_stock_spacing(given_times)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([], r"must lie in \(0, 1\]"),
        ([1.2, 0.5], r"\[1.2, 0.5\] must lie in \(0, 1\]"),
        ([0.5, -0.1], r"must lie in \(0, 1\]"),
        ([0.0], r"must lie in \(0, 1\]"),
        ([math.nan], r"must lie in \(0, 1\]"),
        ([1.0, 0.5, 0.5], "must decrease strictly; 0.5 follows 0.5"),
        ([0.5, 0.7], "must decrease strictly; 0.7 follows 0.5"),
    ],
)
def test_flow_times_that_are_none_are_refused(sigmas, message):
    with pytest.raises(ValueError, match=message):
        check_flow_times(sigmas)


def test_clean_data_may_end_flow_times():
    assert check_flow_times([1.0, 0.5, 0.0]) == [1.0, 0.5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shifted_time(0.5, 0.0), "shift=0.0 must be above 0"),
        (lambda: shifted_time(0.5, -1.0), "shift=-1.0 must be above 0"),
        (lambda: shifted_time(0.5, math.inf), "shift=inf must be above 0"),
        (lambda: dynamic_shift(1.0, "cubic"), "'cubic' is unknown; choose one of exponential, linear"),
        (lambda: trailing_times(0), "num_inference_steps=0 must be an integer"),
        (lambda: kappa_times(2.5), "num_inference_steps=2.5 must be an integer"),
        (lambda: stretch_to_terminal([1.0, 0.5], 1.0), "shift_terminal=1.0 must lie between 0 and 1"),
    ],
)
def test_bad_input_is_refused_with_its_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def solve(updates, path, slope, x):
    """Follow a Gaussian's exact flow: x_0 = slope(kappa) x / sigma."""
    outputs = []
    for update, level in zip(updates, path, strict=True):
        outputs = [slope(kappa(level)) * x / level.sigma, *outputs]
        x = update.keep * x + sum(gain * output for gain, output in zip(update.gains, outputs, strict=False))
    return x


@pytest.mark.parametrize("std", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_convergence_from_flow_time_1(std, order):
    """The exact flow of N(0, std^2) leads from x to std x."""

    def error(n):
        path = [flow_level(s) for s in kappa_times(n)]
        updates = ddim_updates(path) if order == 1 else multistep_updates(path, order, corrector=False)
        return abs(solve(updates, path, lambda k: std**2 * k / (1 + std**2 * k**2), 1.0) - std)

    for coarse, fine in pairwise(map(error, (320, 640, 1280))):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def scale_free(updates, path):
    """Updates as they act on x / sigma, which does not know how a level is scaled."""
    ends = [*(level.sigma for level in path[1:]), 1.0]
    return [
        [update.keep * level.sigma / end, update.noise / end, *(gain / end for gain in update.gains)]
        for update, level, end in zip(updates, path, ends, strict=True)
    ]


@given(st.integers(1, 60), st.integers(1, 3), st.booleans(), st.sampled_from([0.0, 0.5, 1.0]))
def test_steps_over_flow_levels_are_those_over_variance_preserving_levels_of_the_same_snr(n, order, corrector, eta):
    flow = [flow_level(s) for s in kappa_times(n)]
    kept = [variance_preserving(level) for level in flow]
    found, wanted = (scale_free(multistep_updates(path, order, corrector, eta), path) for path in (flow, kept))
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, abs=1e-9)


@pytest.mark.parametrize("n", [*range(1, 130), 250, 501, 999, 1000])
def test_one_point_stays_on_its_path_in_every_number_of_steps(n):
    """(1 - s) point + s noise goes to (1 - r) point + r noise, whatever point and noise are."""
    path = [flow_level(s) for s in kappa_times(n)]
    ends = [*path[1:], flow_level(0.0)]
    for update, now, end in zip(multistep_updates(path), path, ends, strict=True):
        assert update.keep * now.sigma == pytest.approx(end.sigma, abs=1e-12)
        assert update.keep * now.alpha + sum(update.gains) == pytest.approx(end.alpha, abs=1e-12)
