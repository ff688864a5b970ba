import pytest
import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel

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
