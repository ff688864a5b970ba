import pytest
import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from training_runs import same, trained

from zsnr_diffusers.training import TrainingConfig
from zsnr_diffusers.training.ema import MovingAverage


@pytest.fixture
def unet():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    return UNet2DModel(4, **blocks, layers_per_block=1, norm_num_groups=4).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(("decay", "warmup"), [(0.9, True), (0.9999, True), (0.75, False)])
def test_the_average_is_that_of_diffusers(unet, decay, warmup):
    parameters = list(unet.parameters())
    ours = MovingAverage(parameters, decay, warmup, unet)
    stock = EMAModel(parameters, decay=decay, min_decay=0.0 if warmup else decay)
    for _ in range(30):
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn_like(parameter))
        ours.step(parameters)
        stock.step(parameters)
        assert ours.cur_decay_value == stock.cur_decay_value
        for average, wanted in zip(ours.shadow_params, stock.shadow_params, strict=True):
            torch.testing.assert_close(average, wanted, rtol=1e-5, atol=1e-6)  # a few roundings of float32 a step
    assert ours.state_dict().keys() == stock.state_dict().keys()


def test_averages_and_weights_change_places_without_a_copy(unet):
    parameters = list(unet.parameters())
    ema = MovingAverage(parameters, 0.9, True, unet)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(1)

    def storages(tensors):
        return [(tensor.data_ptr(), tensor.stride()) for tensor in tensors]

    weights, averages = storages(parameters), storages(ema.shadow_params)
    with ema.swapped_in(parameters):
        assert (storages(parameters), storages(ema.shadow_params)) == (averages, weights)
        assert all(a is b for a, b in zip(unet.parameters(), parameters, strict=True))
    with pytest.raises(KeyError), ema.swapped_in(parameters):
        raise KeyError
    assert (storages(parameters), storages(ema.shadow_params)) == (weights, averages)


@pytest.mark.parametrize("warmup", [True, False])
def test_an_average_that_is_updated_now_and_then_reaches_as_far_back(unet, warmup):
    """Of weights that change at every third step it is the same, and it moves as often."""
    parameters = list(unet.parameters())
    every, third = (MovingAverage(parameters, 0.95, warmup, unet, interval) for interval in (1, 3))
    for step in range(1, 13):
        with torch.no_grad():
            for parameter in parameters if step % 3 == 1 else ():
                parameter.add_(torch.randn_like(parameter))
        before = [average.clone() for average in third.shadow_params]
        every.step(parameters)
        third.step(parameters)
        moved = not all(torch.equal(a, b) for a, b in zip(before, third.shadow_params, strict=True))
        assert moved == (step % 3 == 0)
        assert third.optimization_step == every.optimization_step
        if moved:
            for average, wanted in zip(third.shadow_params, every.shadow_params, strict=True):
                torch.testing.assert_close(average, wanted, rtol=1e-5, atol=1e-6)  # three roundings against one


def test_an_average_on_the_host_is_the_same(unet, monkeypatch):
    """Two devices cannot be had here; what is done where there are two is done on one."""
    parameters = list(unet.parameters())
    here, there = (MovingAverage(parameters, 0.9, True, unet) for _ in range(2))
    monkeypatch.setattr(there, "_is_elsewhere", lambda parameters: True)
    for _ in range(3):
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn_like(parameter))
        here.step(parameters)
        there.step(parameters)
    averages = [one.clone() for one in here.shadow_params]
    weights, places = [one.detach().clone() for one in parameters], [one.data_ptr() for one in parameters]
    assert all(map(torch.equal, averages, there.shadow_params))
    with there.swapped_in(parameters):
        assert all(map(torch.equal, parameters, averages))
    assert all(map(torch.equal, parameters, weights))
    assert all(map(torch.equal, there.shadow_params, averages))
    assert [one.data_ptr() for one in parameters] == places


@pytest.mark.parametrize("changes", [{"ema_update_interval": 3}, {"ema_device": "cpu"}])
def test_a_run_with_such_an_average_is_resumed_bit_for_bit(options, tmp_path, changes):
    options |= changes
    whole = trained(TrainingConfig(**{**options, "output_dir": str(tmp_path / "whole")}))
    trained(TrainingConfig(**{**options, "max_train_steps": 2}))
    assert same(trained(TrainingConfig(**{**options, "resume": True})), whole)
    every = trained(TrainingConfig(**{**options, "ema_update_interval": 1, "output_dir": str(tmp_path / "every")}))
    assert same(every, whole) == ("ema_device" in changes)
