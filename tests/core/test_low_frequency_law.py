from dataclasses import replace

import pytest
import torch

from zsnr_diffusers.core.dct import dct, inverse_dct
from zsnr_diffusers.core.low_frequency_law import LowFrequencyLaw
from zsnr_diffusers.core.noise import NoiseLevel, alpha_bar_table, noise_level

TABLE = alpha_bar_table("scaled_linear", 1000, 0.00085, 0.012)
C, K, F = 2, 2, 3
D = C * K * K


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def law(scale=1.0):
    factor = torch.randn(D, D, generator=generator(1), dtype=torch.float64)
    bias = torch.randn(C, K, K, generator=generator(2), dtype=torch.float64)
    weight = torch.randn(D, F, generator=generator(3), dtype=torch.float64)
    bounds = torch.stack([torch.full_like(bias, -99), torch.full_like(bias, 99)])
    return LowFrequencyLaw(bias, weight, scale * factor @ factor.mT / D, bounds)


FEATURES = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)


@pytest.mark.parametrize("timestep", [999, pytest.param(951, marks=pytest.mark.full), 500])
def test_the_marginal_is_that_of_noising_data_of_this_law(timestep):
    """x_0 is drawn by a factor of the covariance and noised; both laws have the same moments over all of x_t."""
    number, side = 1_000_000 // 50, 4
    level = NoiseLevel(*map(float, noise_level(TABLE, timestep)))
    ours = law()
    mean = ours.mean(FEATURES)
    noise = torch.randn(50 * number, C, side, side, generator=generator(4), dtype=torch.float64)
    drawn = ours.noisy(noise, mean.expand(len(noise), -1, -1, -1), level).flatten(1)
    # In closed form: low = side (mean + residual) in orthonormal coefficients, which is linear in the residual.
    basis = inverse_dct(torch.eye(D, dtype=torch.float64).reshape(D, C, K, K), (side, side)).flatten(1)
    expected_mean = level.alpha * side * (mean.flatten() @ basis)
    expected = (level.alpha * side) ** 2 * basis.mT @ ours.covariance @ basis
    expected += level.sigma**2 * torch.eye(len(expected), dtype=torch.float64)
    # Standard errors over 1e6 draws; the largest of 1024 covariances is within 5 of them.
    spread = expected.diagonal().sqrt()
    assert ((drawn.mean(0) - expected_mean).abs() < 5 * spread / len(drawn) ** 0.5).all()
    found = torch.cov(drawn.mT)
    error = (spread[:, None] ** 2 * spread**2 + expected**2).sqrt() / len(drawn) ** 0.5
    assert ((found - expected).abs() < 5 * error).all()


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_less_noise_in_low_frequencies_leaves_less_of_it(share):
    level = NoiseLevel(0.3, 0.91**0.5)
    ours = replace(law(), noise=share)
    noise = torch.randn(200_000, C, 2, 2, generator=generator(), dtype=torch.float64)
    x = dct(ours.noisy(noise, ours.mean(FEATURES).expand(len(noise), -1, -1, -1), level), (K, K)).flatten(1)
    expected = (0.3 * 2) ** 2 * ours.covariance + (share * level.sigma) ** 2 * torch.eye(D, dtype=torch.float64)
    error = 5 * float(expected.diagonal().max()) * 2**0.5 / len(noise) ** 0.5  # five standard errors
    torch.testing.assert_close(torch.cov(x.mT), expected, rtol=0, atol=error)


def test_above_its_frequencies_it_is_noise():
    level = NoiseLevel(0.3, 0.91**0.5)
    noise = torch.randn(3, C, 8, 6, generator=generator())
    x = law().noisy(noise, law().mean(FEATURES).expand(3, -1, -1, -1), level)
    ours, theirs = (dct(values.double(), (8, 6)) for values in (x, noise))
    high = torch.ones(8, 6, dtype=torch.bool)
    high[:K, :K] = False
    torch.testing.assert_close(ours[..., high], level.sigma * theirs[..., high], rtol=0, atol=2e-6)
    assert (ours[..., ~high] - theirs[..., ~high]).abs().min() > 1e-3


def test_at_zero_snr_it_is_the_noise_bit_for_bit():
    noise = torch.randn(3, C, 8, 6, generator=generator(), dtype=torch.float16)
    assert torch.equal(law().noisy(noise, law().mean(FEATURES).expand(3, -1, -1, -1), NoiseLevel(0.0, 1.0)), noise)


def test_towards_zero_snr_it_becomes_the_noise():
    noise = torch.randn(1, C, 8, 6, generator=generator(), dtype=torch.float64)
    for alpha in (1e-2, 1e-4, 1e-6):
        x = law().noisy(noise, law().mean(FEATURES), NoiseLevel(alpha, (1 - alpha**2) ** 0.5))
        assert (x - noise).abs().max() < 10 * alpha


def test_the_same_brightness_at_every_resolution_and_aspect_ratio():
    still = LowFrequencyLaw.of_amplitudes(torch.tensor([[[0.7, 0.0], [0.0, 0.0]], [[-0.2, 0.0], [0.0, 0.0]]]))
    level = NoiseLevel(0.6, 0.8)
    for sides in ((8, 8), (16, 16), (8, 32), (3, 5), (1, 1)):
        noise = torch.zeros(1, C, *sides)
        x = still.noisy(noise, still.mean(torch.zeros(1, 0)), level)
        torch.testing.assert_close(x, 0.6 * torch.tensor([0.7, -0.2]).reshape(1, 2, 1, 1).expand_as(x))


def test_frames_of_a_video_share_their_low_frequencies():
    ours, level = law(), NoiseLevel(0.5, 0.75**0.5)
    noise = torch.randn(20_000, C, 3, 2, 2, generator=generator(), dtype=torch.float64)
    x = ours.noisy(noise, ours.mean(FEATURES).expand(len(noise), -1, -1, -1), level)
    frames = dct(x, (K, K)).transpose(1, 2).flatten(2)  # [B, frames, D]
    expected = level.alpha**2 * 4 * ours.covariance
    between = torch.cov(torch.cat([frames[:, 0], frames[:, 2]], dim=1).mT)
    # Within 5 standard errors: between two frames only x_0 is common.
    error = 5 * between.diagonal().max() / len(noise) ** 0.5
    torch.testing.assert_close(between[:D, D:], expected, rtol=0, atol=float(error))
    within = expected + level.sigma**2 * torch.eye(D, dtype=torch.float64)
    torch.testing.assert_close(between[:D, :D], within, rtol=0, atol=float(error))
    torch.testing.assert_close(frames.mean(0)[1], level.alpha * 2 * ours.mean(FEATURES)[0].flatten(), rtol=0, atol=0.1)


def test_a_sample_depends_on_its_own_noise_alone():
    noise = torch.randn(3, C, 8, 8, generator=generator())
    means = law().mean(torch.randn(3, F, generator=generator(7)))
    whole = law().noisy(noise, means, NoiseLevel(0.1, 0.99**0.5))
    alone = law().noisy(noise[1:2], means[1:2], NoiseLevel(0.1, 0.99**0.5))
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-6, atol=1e-6)  # kernels round by the size of a batch


def test_a_generator_decides_on_a_sample():
    mean, level = law().mean(FEATURES), noise_level(TABLE, 999)
    first, again, other = (law().sample((1, C, 8, 8), mean, level, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_mean_is_not_extrapolated_beyond_what_images_have():
    ours = law()
    low, high = ours.bias - 0.1, ours.bias + 0.2
    bounded = LowFrequencyLaw(ours.bias, ours.weight, ours.covariance, torch.stack([low, high]))
    mean = bounded.mean(1000 * FEATURES)[0]
    assert ((mean == low) | (mean == high)).all()
    torch.testing.assert_close(bounded.mean(1e-3 * FEATURES), ours.mean(1e-3 * FEATURES))


def test_autocast_does_not_round_it():
    noise = torch.randn(2, C, 8, 8, generator=generator())
    args = noise, law().mean(FEATURES).expand(2, -1, -1, -1), NoiseLevel(0.1, 0.99**0.5)
    plain = law().noisy(*args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(law().noisy(*args), plain)


def test_half_precision_comes_back_as_it_was():
    noise = torch.randn(2, C, 8, 8, generator=generator()).half()
    x = law().noisy(noise, law().mean(FEATURES).expand(2, -1, -1, -1), NoiseLevel(0.1, 0.99**0.5))
    assert x.dtype == torch.float16
