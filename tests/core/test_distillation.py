import itertools
import math

import pytest
import torch

from zsnr_diffusers.core import (
    NoiseLevel,
    alpha_bar_table,
    ddim_updates,
    enforce_zero_terminal_snr,
    ideal_output,
    noise_level,
    spaced_timesteps,
    student_sampler,
    subdivided_timesteps,
    teacher_sampler,
)

TABLE = enforce_zero_terminal_snr(alpha_bar_table("scaled_linear", 1000, 0.00085, 0.012))
TIMESTEPS = spaced_timesteps("trailing", 4, TABLE)
MEAN, SPREAD = 0.7, 0.4


def level(timestep):
    alpha, sigma = noise_level(TABLE, timestep)
    return NoiseLevel(float(alpha), float(sigma))


def levels(timesteps):
    return [level(timestep) for timestep in timesteps]


def gaussian_x_0(spread):
    """The exact denoiser of data N(MEAN, spread^2), each sample at a timestep of its own."""

    def predict(x_t, timesteps):
        rows = zip(x_t, timesteps.tolist(), strict=True)
        return torch.stack([ideal_output("sample", x, level(timestep), MEAN, spread) for x, timestep in rows])

    return predict


def exact(x_t, now, following, spread=SPREAD):
    """The probability-flow ODE of Gaussian data keeps each sample's distance to the mean in standard deviations."""
    deviation = [math.hypot(alpha * spread, sigma) for alpha, sigma in (now, following)]
    return following.alpha * MEAN + deviation[1] / deviation[0] * (x_t - now.alpha * MEAN)


def teacher(substeps):
    inside = subdivided_timesteps(TIMESTEPS, substeps, TABLE)
    return teacher_sampler(inside, [levels(row) for row in inside])


STUDENT = student_sampler(TIMESTEPS, levels(TIMESTEPS))
ENDS = [*levels(TIMESTEPS[1:]), NoiseLevel(1.0, 0.0)]
X_T = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3)
SEGMENTS = torch.arange(4)


def exact_ends():
    return torch.stack([exact(X_T[i], level(TIMESTEPS[i]), ENDS[i]) for i in range(4)])


def test_the_target_is_the_mean_of_the_ode_over_kappa():
    """d(x / sigma) / d kappa = x_0: over each step, but for the last, whose kappa has no end and which returns x_0."""
    x_0 = STUDENT.mean_x_0(X_T, exact_ends(), SEGMENTS)
    for i in range(3):
        now, following = level(TIMESTEPS[i]), ENDS[i]
        kappas = torch.linspace(now.alpha / now.sigma, following.alpha / following.sigma, 4001, dtype=torch.float64)
        path = [NoiseLevel(float(k / (1 + k**2).sqrt()), float(1 / (1 + k**2).sqrt())) for k in kappas]
        on_the_way = [ideal_output("sample", exact(X_T[i], now, at), at, MEAN, SPREAD) for at in path]
        mean = torch.trapezoid(torch.stack(on_the_way), kappas, dim=0) / (kappas[-1] - kappas[0])
        torch.testing.assert_close(x_0[i], mean, rtol=0, atol=1e-6)  # of the trapezoids
    torch.testing.assert_close(x_0[3], exact_ends()[3])


def test_a_student_that_learned_it_generates_the_data_in_four_steps():
    noise = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    x = noise
    for i in range(4):
        step = torch.full((7,), i)

        def learned(x_t, timesteps, i=i, step=step):
            assert timesteps.tolist() == [TIMESTEPS[i]] * 7
            return STUDENT.mean_x_0(x_t, exact(x_t, level(TIMESTEPS[i]), ENDS[i]), step)

        x = STUDENT.run(x, step, learned)
    torch.testing.assert_close(x, MEAN + SPREAD * noise)


def test_the_teacher_is_of_order_2():
    errors = []
    for substeps in (4, 8, 16):
        off = teacher(substeps).run(X_T, SEGMENTS, gaussian_x_0(SPREAD)) - exact_ends()
        errors.append(float(off.square().mean().sqrt()))
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine > 3.0  # 4 in the limit, and timesteps are whole numbers
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("substeps", [1, 2, 3, 7])
def test_data_that_is_one_point_is_reached_exactly(substeps):
    x_s = teacher(substeps).run(X_T, SEGMENTS, gaussian_x_0(0.0))
    torch.testing.assert_close(x_s[3], torch.full((3,), MEAN, dtype=torch.float64))
    x_0 = STUDENT.mean_x_0(X_T, x_s, SEGMENTS)
    torch.testing.assert_close(x_0, torch.full_like(X_T, MEAN))


def test_each_sample_goes_as_it_would_alone():
    sampler, predict = teacher(3), gaussian_x_0(SPREAD)
    segments = torch.tensor([2, 0, 3, 2])
    together = sampler.run(X_T, segments, predict)
    for row in range(4):
        alone = sampler.run(X_T[row : row + 1], segments[row : row + 1], predict)
        assert torch.equal(together[row : row + 1], alone)


def test_the_student_takes_steps_of_ddim():
    updates = ddim_updates(levels(TIMESTEPS))
    x_0 = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_s = STUDENT.run(X_T, SEGMENTS, lambda x_t, timesteps: x_0)
    for i, update in enumerate(updates):
        torch.testing.assert_close(x_s[i], update.keep * X_T[i] + update.gains[0] * x_0[i])
    torch.testing.assert_close(STUDENT.mean_x_0(X_T, x_s, SEGMENTS), x_0)
