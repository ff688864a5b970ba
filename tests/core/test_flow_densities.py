"""Densities of flow times: their laws, and what a shift makes of them."""

import pytest
import scipy.stats
import torch

from zsnr_diffusers.core import FLOW_TIME_SAMPLINGS, flow_time, flow_times, noise_level, schedule_table
from zsnr_diffusers.core.flow import unshifted_time

TABLE = schedule_table("scaled_linear", 1000, 0.00085, 0.012, rescale_betas_zero_snr=True)


def evenly(count):
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 1.7), (1.2, 0.4)])
def test_logit_normal_is_its_law(mean, std):
    s = flow_times(evenly(2001), "logit_normal", logit_mean=mean, logit_std=std)
    assert scipy.stats.kstest(s.logit().numpy(), "norm", (mean, std)).statistic < 1e-3


def test_uniform_is_uniform():
    assert torch.equal(flow_times(evenly(100), "uniform"), evenly(100))


def test_snr_is_the_density_of_the_betas():
    """The flow time of a uniform timestep: as many draws lie between two timesteps as timesteps do."""
    of_betas = flow_time(noise_level(TABLE, torch.arange(1000)))
    s = flow_times(evenly(20_000), "snr", alphas_cumprod=TABLE)
    assert scipy.stats.kstest(s.numpy(), of_betas.numpy()).statistic < 2e-3  # a timestep is 1e-3 of them
    ends = flow_times(torch.tensor([0.0, 1.0], dtype=torch.float64), "snr", alphas_cumprod=TABLE)
    assert ends.tolist() == [float(of_betas[0]), 1.0]
    # what stands at whole timesteps is the timestep's own
    whole = torch.arange(1000, dtype=torch.float64) / 999
    torch.testing.assert_close(flow_times(whole, "snr", alphas_cumprod=TABLE), of_betas, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampling", FLOW_TIME_SAMPLINGS)
def test_a_shift_multiplies_sigma_over_alpha(sampling):
    plain = flow_times(evenly(50), sampling, alphas_cumprod=TABLE)
    shifted = flow_times(evenly(50), sampling, shift=3.0, alphas_cumprod=TABLE)
    torch.testing.assert_close(unshifted_time(shifted, 3.0), plain, rtol=0, atol=1e-12)
    assert bool((shifted.diff() > 0).all())


def test_what_means_nothing_is_refused():
    with pytest.raises(ValueError, match=r"'mode' is unknown; choose one of logit_normal, uniform, snr"):
        flow_times(evenly(2), "mode")
    with pytest.raises(ValueError, match="pass alphas_cumprod"):
        flow_times(evenly(2), "snr")
    with pytest.raises(ValueError, match=r"shift=0\.0 must be above 0"):
        flow_times(evenly(2), "uniform", shift=0.0)


def test_the_density_of_sd3_is_the_default():
    assert torch.equal(flow_times(evenly(9)), flow_times(evenly(9), "logit_normal", 1.0, 0.0, 1.0))
