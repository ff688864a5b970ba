"""What is left out of a step of high order where outputs fall back, and that nothing is where they do not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zsnr_diffusers import ZeroSNRMultistepScheduler
from zsnr_diffusers.core import alpha_bar_table, enforce_zero_terminal_snr
from zsnr_diffusers.core.safeguard import (
    HELD,
    LONGEST,
    Safeguard,
    low_order_share,
    output_projection,
    previous_output_share,
    safeguarded_gains,
)

SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ALPHA_BAR = enforce_zero_terminal_snr(alpha_bar_table("scaled_linear", 1000, 0.00085, 0.012)).double()
KAPPA = (ALPHA_BAR / (1 - ALPHA_BAR)).sqrt()
STDS = torch.logspace(-1.3, 1.5, 40, dtype=torch.float64)


class Unguarded(ZeroSNRMultistepScheduler):
    """The sampler without what is under test."""

    def _make_safeguards(self, *args):
        return []


def guided_slope(kappa, w, conditional, unconditional):
    """x_0 = slope y of N(0, conditional^2) and N(0, unconditional^2) under guidance, with y = x / sigma."""
    c, u = (std**2 * kappa / (1 + (std * kappa) ** 2) for std in (conditional, unconditional))
    return u + w * (c - u)


def amplification(n, w, share, cls=ZeroSNRMultistepScheduler, **options):
    """What becomes of noise of 1, by the standard deviation of the conditional data, for each unconditional one.

    The SDE has fresh noise of 1 in each step.
    """
    scheduler = cls(**SCHEDULE, prediction_type="sample", **options)
    scheduler.set_timesteps(n)
    x = torch.ones(len(STDS), 1, dtype=torch.float64)
    for t in scheduler.timesteps:
        slope = guided_slope(KAPPA[t], w, share * STDS, STDS)[:, None]
        x_0 = slope * x / (1 - ALPHA_BAR[t]).sqrt()
        x = scheduler.step(x_0, t, x, variance_noise=torch.ones_like(x)).prev_sample
    return x[:, 0].abs() / (share * STDS)


def test_the_projection_is_that_of_each_image_on_the_one_before():
    held = torch.tensor([1.5, 0.9, 0.0, -2.0])
    before = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    aside = before.roll(1, 2)
    aside -= output_projection(aside, before) * before
    found = output_projection(held[:, None, None, None] * before + 3 * aside, before)
    torch.testing.assert_close(found, held[:, None, None, None], rtol=0, atol=1e-5)


def test_after_an_output_of_zero_everything_is_held():
    assert output_projection(torch.ones(2, 3), torch.zeros(2, 3)).tolist() == [[1.0], [1.0]]


def test_what_holds_is_trusted_and_longer_steps_are_trusted_less():
    held = torch.tensor([2.0, HELD, HELD / 2, 0.0, -9.0])
    assert low_order_share(held, 0.1).tolist() == pytest.approx([0, 0, 0.05, 0.1, 1], abs=1e-5)
    assert low_order_share(held, 0.8).tolist() == pytest.approx([0, 0.0256, 0.4256, 0.8256, 1])
    assert low_order_share(torch.tensor([1.0]), 1.5 * LONGEST).item() == 1


LOW, MIDDLE, HIGH = (1.2, -0.2), (1.5, -0.5, 0.0), (1.8, -1.2, 0.4)


@pytest.mark.parametrize("middle", [None, MIDDLE])
def test_where_all_is_held_the_gains_stay_exactly(middle):
    for found, gain in zip(safeguarded_gains(torch.ones(3, 1), Safeguard(LOW, middle, HIGH, 0.7)), HIGH, strict=True):
        assert torch.equal(found, torch.full((3, 1), gain))


@pytest.mark.parametrize("middle", [None, MIDDLE])
def test_a_step_that_is_not_trusted_is_of_low_order(middle):
    gains = safeguarded_gains(torch.zeros(1, 1), Safeguard(LOW, middle, HIGH, interval=LONGEST))
    assert [gain.item() for gain in gains] == pytest.approx([*LOW, 0], abs=1e-6)


@pytest.mark.parametrize(("held", "expected"), [(HELD, HIGH), (HELD / 2, (1.65, -0.85, 0.2)), (0.0, MIDDLE)])
def test_reversals_make_short_steps_of_order_three_those_of_order_two(held, expected):
    gains = safeguarded_gains(torch.tensor([[held]]), Safeguard(LOW, MIDDLE, HIGH, interval=1e-6))
    assert [gain.item() for gain in gains] == pytest.approx(expected, abs=1e-5)


@settings(deadline=None)
@given(held=st.floats(-10, 3), interval=st.floats(0.01, 3), middle=st.sampled_from([None, MIDDLE]))
def test_what_is_constant_in_the_outputs_stays_exact(held, interval, middle):
    gains = safeguarded_gains(torch.tensor([[held]], dtype=torch.float64), Safeguard(LOW, middle, HIGH, interval))
    assert sum(gains).item() == pytest.approx(sum(HIGH), abs=1e-12)


def test_outputs_that_swing_around_zero_are_weighed_to_zero():
    for held in (-0.1, -0.5, -1.0):
        share = previous_output_share(torch.tensor(held)).item()
        assert (1 - share) * held + share * 1 == pytest.approx(0, abs=1e-7)
    assert previous_output_share(torch.tensor([0.0, 1.0, -5.0])).tolist() == [0.0, 0.0, 0.5]


def test_on_gaussian_data_without_guidance_every_run_is_as_if_there_were_none():
    """x_0 grows all along the path, whatever the scale. The longest steps, in runs of up to five, are an exception."""
    for n in (1, *range(6, 21), 33, 50, 100):
        plain, guarded = (amplification(n, 1.0, 1.0, cls=cls) for cls in (Unguarded, ZeroSNRMultistepScheduler))
        assert torch.equal(guarded, plain)


@settings(deadline=None, max_examples=100)
@given(n=st.integers(3, 50), w=st.floats(1, 12), share=st.floats(0.2, 1))
def test_amplification_is_of_the_size_of_order_one(n, w, share):
    """The worst found over all scales of guided Gaussians is 6.7 times; without the safeguard it is above 100."""
    order_1 = amplification(n, w, share, solver_order=1, corrector=False)
    assert amplification(n, w, share).max() < 8 * order_1.max().clamp(min=1)


@pytest.mark.parametrize(("eta", "left"), [(0.0, 0.3), (1.0, 0.5)])
@pytest.mark.parametrize("w", [7.5, 12.0])
@pytest.mark.parametrize("n", [5, 8, 10, 20])
def test_under_strong_guidance_far_less_is_amplified_than_without(n, w, eta, left):
    plain, guarded = (amplification(n, w, 0.2, cls=cls, eta=eta) for cls in (Unguarded, ZeroSNRMultistepScheduler))
    assert guarded.max() < left * plain.max()
