"""Networks that are exact for their data, asked as those of the other kind."""

import pytest
import torch
from torch import nn

from zsnr_diffusers import FlowMatchMultistepScheduler, ZeroSNRDDIMScheduler, ZeroSNRMultistepScheduler
from zsnr_diffusers.bridges import as_flow_model, as_v_model
from zsnr_diffusers.core import flow_level, flow_time, ideal_output, noise_level

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
MEAN, STD = -0.4, 2.5


class Exact(nn.Module):
    """The best network for N(MEAN, STD^2): of betas if it has a scheduler, of flow matching otherwise."""

    def __init__(self, scheduler=None):
        super().__init__()
        self.scheduler, self.asked = scheduler, []

    def forward(self, sample, timestep, encoder_hidden_states=None, return_dict=True):
        self.asked.append(timestep)
        timestep = torch.as_tensor(timestep).double().flatten()
        if self.scheduler is None:
            kind, level = "flow_prediction", flow_level(timestep / 1000)
        else:
            kind, level = "v_prediction", noise_level(self.scheduler._table, timestep.round().long())
        level = type(level)(*(each.reshape(-1, *[1] * (sample.ndim - 1)) for each in level))
        output = ideal_output(kind, sample.double(), level, MEAN, STD).to(sample.dtype)
        return (output,) if not return_dict else Output(output)


class Output:
    """As diffusers' networks return it."""

    def __init__(self, sample):
        self.sample = sample


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def sampled(scheduler, network, x):
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t, return_dict=False)[0], t, x, return_dict=False)[0]
    return x


def test_a_v_model_is_a_flow_model_at_every_one_of_its_levels():
    scheduler = ZeroSNRDDIMScheduler(**SD)
    network, exact = Exact(scheduler), Exact()
    as_flow_model(network, scheduler)
    timesteps = torch.arange(1000)
    s = flow_time(noise_level(scheduler._table, timesteps))
    x = noise(1000, 2)
    torch.testing.assert_close(network(x, 1000 * s).sample, exact(x, 1000 * s).sample, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(network.asked[0].cpu(), timesteps.double(), rtol=0, atol=1e-5)


def test_a_flow_model_is_a_v_model_at_every_timestep():
    scheduler = ZeroSNRDDIMScheduler(**SD)
    network, exact = Exact(), Exact(scheduler)
    as_v_model(network, scheduler)
    timesteps, x = torch.arange(1000), noise(1000, 2)
    torch.testing.assert_close(network(x, timesteps).sample, exact(x, timesteps).sample, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [1, 4, 10, 28])
def test_trajectories_are_the_same_whoever_samples(n):
    """The same levels by either scheduler; x_flow = x_vp / (alpha + sigma), which is 1 at both ends."""
    of_betas = ZeroSNRMultistepScheduler(**SD)
    of_betas.set_timesteps(n)
    wanted = sampled(of_betas, Exact(of_betas), noise(3, 4))

    of_flow, network = FlowMatchMultistepScheduler(), Exact(of_betas)
    of_flow.set_timesteps(sigmas=flow_time(noise_level(of_betas._table, of_betas.timesteps)).tolist())
    with as_flow_model(network, of_betas):
        torch.testing.assert_close(sampled(of_flow, network, noise(3, 4)), wanted, rtol=0, atol=1e-6)

    network = Exact()
    with as_v_model(network, of_betas):
        torch.testing.assert_close(sampled(of_betas, network, noise(3, 4)), wanted, rtol=0, atol=1e-6)


def test_there_and_back_is_the_network_itself():
    scheduler = ZeroSNRDDIMScheduler(**SD)
    network, x = Exact(scheduler), noise(1000, 3)
    plain = network(x, torch.arange(1000)).sample
    with as_flow_model(network, scheduler):
        flow = network(x, torch.full((1000,), 500.0)).sample
        with as_v_model(network, scheduler):
            torch.testing.assert_close(network(x, torch.arange(1000)).sample, plain, rtol=1e-7, atol=1e-7)
        assert torch.equal(network(x, torch.full((1000,), 500.0)).sample, flow)
    assert torch.equal(network(x, torch.arange(1000)).sample, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("named", [False, True])
def test_calls_keep_their_form_and_dtype(dtype, named):
    scheduler = ZeroSNRDDIMScheduler(**SD)
    network, x = Exact(scheduler), noise(2, 4, 3, 3, dtype=dtype)
    with as_flow_model(network, scheduler):
        output = network(sample=x, timestep=torch.tensor(700.0)) if named else network(x, 700.0, None)
    assert output.sample.dtype == dtype
    assert output.sample.shape == x.shape
    assert torch.as_tensor(network.asked[0]).ndim == 0


def test_bridges_need_an_end_at_pure_noise_and_v():
    with pytest.raises(ValueError, match=r"rescale_betas_zero_snr=False"):
        as_flow_model(Exact(), ZeroSNRDDIMScheduler(**SD, rescale_betas_zero_snr=False))
    with pytest.raises(ValueError, match=r"prediction_type='sample'; as_v_model needs one with 'v_prediction'"):
        as_v_model(Exact(), ZeroSNRDDIMScheduler(**SD, prediction_type="sample"))
