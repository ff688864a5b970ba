"""Samplers that diffusers lacks: their order, equality with its own where it has the formula, their grids."""

import math

import diffusers
import numpy as np
import pytest
import torch
from rivals import (
    SMALLEST_ALPHA_BAR,
    FlowUniPCBH2Scheduler,
    GradientEstimationScheduler,
    IPNDMScheduler,
    LMSScheduler,
    UniPCBH2Scheduler,
    integral_weights,
)
from samplers import MODEL, SCHEDULE, Sampler, rival_samplers, sample
from suites import Gaussian, Suite

from zsnr_diffusers import ZeroSNRDDIMScheduler

LARGEST = math.sqrt((1 - SMALLEST_ALPHA_BAR) / SMALLEST_ALPHA_BAR)
STD = torch.tensor([[0.2, 0.7, 2.0]], dtype=torch.float64)


def network(scheduler, std=STD):
    """v of N(0, std^2), whose x_0 at z is z / (1 + sigma^2 / std^2), for samples of any kind."""

    def v(x_t, step):
        sigma = float(scheduler.sigmas[step])
        alpha = 1 / math.hypot(1, sigma)
        x_0 = (x_t / alpha) * std**2 / (std**2 + sigma**2)
        return (alpha * x_t - x_0) / (alpha * sigma)

    return v


def run(scheduler, x, sigmas, timesteps=None, path=None, given=0):
    """Over given levels, with v of a Gaussian; where its exact path is known, so many steps may be taken from it."""
    scheduler.timesteps = torch.arange(len(sigmas) - 1, 0, -1) if timesteps is None else timesteps
    scheduler.start(sigmas)
    v = network(scheduler)
    for step, t in enumerate(scheduler.timesteps):
        x = scheduler.step(v(scheduler.scale_model_input(x, t), step), t, x, return_dict=False)[0]
        if step < given:
            x = path(sigmas[step + 1])
    return x


def path(sigma):
    """Of z, exact: dz / dsigma = sigma z / (std^2 + sigma^2)."""
    return (STD**2 + sigma**2).sqrt()


def order_of(make, even, given=0):
    """From the errors at 80 and 160 steps between two levels, where no step is special.

    The first steps, which are of lower order, may be taken from the exact path.
    """
    errors = []
    for n in (80, 160):
        grid = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        sigmas = (3 - 2.5 * grid if even else 3 * (0.5 / 3) ** grid).tolist()
        end = run(make(), path(sigmas[0]), sigmas, path=path, given=given)
        errors.append(float((end - path(sigmas[-1])).abs().max()))
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_has_its_order_on_any_steps_and_ipndm_on_even_ones(order):
    lms, ipndm = (lambda: LMSScheduler(solver_order=order)), (lambda: IPNDMScheduler(solver_order=order))
    assert order_of(lms, even=True, given=order - 1) == pytest.approx(order, abs=0.3)
    assert order_of(lms, even=False, given=order - 1) == pytest.approx(order, abs=0.3)
    assert order_of(ipndm, even=True, given=order - 1) == pytest.approx(order, abs=0.3)
    assert order_of(ipndm, even=False, given=order - 1) == pytest.approx(min(order, 2), abs=0.3)


def test_gradient_estimation_has_order_1_and_is_adams_bashforth_at_a_gamma_of_three_halves(monkeypatch):
    assert order_of(GradientEstimationScheduler, even=True) == pytest.approx(1, abs=0.2)
    sigmas = [3.0, 2.5, 2.0, 1.5]
    assert GradientEstimationScheduler().weights(sigmas, 0) == [-0.5]
    assert GradientEstimationScheduler().weights(sigmas, 2) == [-1.0, 0.5]
    monkeypatch.setattr("rivals.GAMMA", 1.5)
    assert GradientEstimationScheduler().weights(sigmas, 2) == pytest.approx(integral_weights(sigmas, 2, 2))


def test_lms_of_order_2_is_the_variable_step_formula_in_closed_form():
    sigmas = [5.0, 3.0, 2.6]
    ratio = (2.6 - 3.0) / (3.0 - 5.0)
    assert integral_weights(sigmas, 1, 2) == pytest.approx([-0.4 * (1 + ratio / 2), -0.4 * (-ratio / 2)])


@pytest.mark.parametrize("where", ["beta", "normal", "exponential"])
def test_lms_is_diffusers_on_the_same_levels(where):
    ours = LMSScheduler(timestep_spacing=where, rescale_betas_zero_snr=False)
    stock = diffusers.LMSDiscreteScheduler(**SCHEDULE, prediction_type="v_prediction")
    ours.set_timesteps(12)
    stock.set_timesteps(len(ours.timesteps))
    stock.timesteps, stock.sigmas = ours.timesteps, ours.sigmas
    v = network(ours)
    x = y = STD * ours.init_noise_sigma
    for step, t in enumerate(ours.timesteps):
        x = ours.step(v(ours.scale_model_input(x), step), t, x).prev_sample
        y = stock.step(v(stock.scale_model_input(y, t), step), t, y, order=4).prev_sample
    torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)


def test_unipc_is_diffusers_on_its_own_levels():
    stock = diffusers.UniPCMultistepScheduler(**MODEL, solver_order=3, timestep_spacing="trailing")
    stock.set_timesteps(8)
    sigmas, v = stock.sigmas.double(), network(stock)
    x = STD.float()
    for step, t in enumerate(stock.timesteps):
        x = stock.step(v(x, step).float(), t, x).prev_sample
    ours = run(UniPCBH2Scheduler(solver_order=3), STD, sigmas.tolist(), stock.timesteps)
    torch.testing.assert_close(ours.float(), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [2, 3])
def test_unipc_is_diffusers_on_its_own_flow_times(order):
    model = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    stock = diffusers.UniPCMultistepScheduler(**model, solver_order=order)
    stock.set_timesteps(8)
    if stock.sigmas[0] < 0.9999:
        pytest.skip("older diffusers start from a signal")
    times, ends = stock.sigmas.double(), []
    ours = FlowUniPCBH2Scheduler(solver_order=order)
    ours.start([1.0, *times[1:].tolist()])
    for scheduler in (stock, ours):
        x = STD.float()
        for s, t in zip(times, scheduler.timesteps, strict=False):
            x_0 = (1 - s) * STD**2 * x / ((1 - s) ** 2 * STD**2 + s**2)
            x = scheduler.step(((x - x_0) / s).float(), t, x).prev_sample
        ends.append(x.float())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", rival_samplers(), ids=lambda sampler: sampler.label)
def test_a_single_point_is_reached(sampler, schedule):
    """Exactly, but for a trace of the noise: the network's first output is for pure noise, not for the clamped level.

    alpha is 2.2e-4 there, and what extrapolates by fixed weights carries that into its result.
    """
    suite = Suite([Gaussian("", torch.zeros(4).double(), 0.7)], [torch.ones(1, 4).double()], schedule)
    last_x_0 = sampler.cls is UniPCBH2Scheduler or sampler.options["lower_order_final"]
    tolerance = 1e-12 if last_x_0 else 1e-6 if sampler.cls is LMSScheduler else 5e-4
    end = sample(sampler.prepared(6), suite)
    torch.testing.assert_close(end, torch.full_like(end, 0.7), rtol=0, atol=tolerance)


def test_the_grids(schedule):
    beta = LMSScheduler()
    beta.set_timesteps(8)
    u = torch.linspace(0, 1, 2_000_001, dtype=torch.float64)[1:-1]
    density = (u * (1 - u)) ** -0.4
    share = density.cumsum(0) / density.sum()
    quantiles = [u[int((share < 1 - i / 8).sum())].item() * 999 for i in range(1, 8)]
    assert beta.timesteps[0] == 999
    np.testing.assert_allclose(beta.timesteps[1:], quantiles, atol=1.0)
    levels = ((1 - schedule) / schedule).sqrt()
    torch.testing.assert_close(beta.sigmas[1:-1], levels[beta.timesteps[1:]])
    assert beta.sigmas[0].item() == pytest.approx(LARGEST)
    assert beta.sigmas[-1] == 0
    normal = LMSScheduler(timestep_spacing="normal")
    normal.set_timesteps(4)
    assert normal.timesteps.tolist() == [999, 666, 333, 0]
    exponential = LMSScheduler(timestep_spacing="exponential", rescale_betas_zero_snr=False)
    exponential.set_timesteps(5)
    ratios = exponential.sigmas[1:-1] / exponential.sigmas[:-2]
    torch.testing.assert_close(ratios, ratios[:1].expand(4), rtol=0.02, atol=0)


def test_labels_tell_them_apart_and_none_is_one_that_another_program_lacks():
    labels = [sampler.label for sampler in rival_samplers()]
    assert len(labels) == len(set(labels)) == 48


def test_a_pipeline_runs_them(schedule):
    """From the config of another scheduler, in float32, near the same in float64."""
    config = ZeroSNRDDIMScheduler(**SCHEDULE, prediction_type="v_prediction").config
    x_T = torch.linspace(-2, 2, 96).reshape(2, 3, 4, 4)
    for cls in (LMSScheduler, IPNDMScheduler, GradientEstimationScheduler, UniPCBH2Scheduler):
        ends = []
        for dtype in (torch.float32, torch.float64):
            scheduler = cls.from_config(config, solver_order=3, timestep_spacing="beta")
            scheduler.set_timesteps(10, device="cpu")
            x, v = x_T.to(dtype) * scheduler.init_noise_sigma, network(scheduler, torch.tensor(0.5))
            for step, t in enumerate(scheduler.timesteps):
                x = scheduler.step(v(scheduler.scale_model_input(x, t), step), t, x, return_dict=False)[0]
            assert x.dtype == dtype
            ends.append(x.double())
        torch.testing.assert_close(*ends, rtol=1e-3, atol=2e-3)


def test_a_start_from_the_same_noise_and_a_second_run_give_the_same():
    sampler = Sampler(LMSScheduler, {"timestep_spacing": "beta"})
    scheduler = sampler.prepared(5)
    ends = [run(scheduler, STD, scheduler.sigmas.tolist(), scheduler.timesteps) for _ in range(2)]
    assert torch.equal(*ends)
