import json

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from zsnr_diffusers.training.checkpointing.checkpoint import read_checkpoint, write_checkpoint
from zsnr_diffusers.training.checkpointing.state import TrainingState


class Run:
    """Two networks, an optimizer over both in another order, a moving average."""

    def __init__(self, seed=0, width=4, ema=True, lr=1e-2):
        torch.manual_seed(seed)
        self.networks = {"unet": nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1)), "scale": nn.Linear(1, 1)}
        groups = [{"params": self.networks["scale"].parameters()}, {"params": self.networks["unet"].parameters()}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr)
        self.ema = EMAModel(self.networks["unet"].parameters(), decay=0.9) if ema else None
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        self.state = TrainingState(self.networks, self.optimizer, self.ema, self.scaler)

    def train(self, steps):
        for step in steps:
            batch = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
            loss = self.networks["scale"](self.networks["unet"](batch)).square().mean()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            if self.ema is not None:
                self.ema.step(self.networks["unet"].parameters())
        return self


def save(run, folder):
    return write_checkpoint(folder, 1, run.state.tensors(), run.state.numbers(), 1)


def same(a, b):
    a, b = a.state, b.state
    tensors, others = a.tensors(), b.tensors()
    assert {name: values.keys() for name, values in tensors.items()} == {n: v.keys() for n, v in others.items()}
    return a.numbers() == b.numbers() and all(
        torch.equal(value, others[file][name]) for file, values in tensors.items() for name, value in values.items()
    )


@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_restored_run_goes_on_bit_for_bit(tmp_path, before):
    checkpoint = save(Run().train(range(before)), tmp_path)
    resumed = Run(seed=1)
    resumed.state.restore(*read_checkpoint(checkpoint))
    assert same(resumed.train(range(before, 5)), Run().train(range(5)))
    assert not same(resumed, Run().train(range(4)))


def test_state_is_kept_by_name(tmp_path):
    """Not by place, which changes with the order in which an optimizer is told of its parameters."""
    run = Run().train(range(2))
    checkpoint = save(run, tmp_path)
    turned = Run(seed=1)
    turned.optimizer = torch.optim.AdamW(
        [parameter for network in turned.networks.values() for parameter in reversed(list(network.parameters()))]
    )
    TrainingState(turned.networks, turned.optimizer).restore(*read_checkpoint(checkpoint))
    for name, network in turned.networks.items():
        for parameter, other in zip(network.parameters(), run.networks[name].parameters(), strict=True):
            assert torch.equal(
                turned.optimizer.state[parameter]["exp_avg_sq"], run.optimizer.state[other]["exp_avg_sq"]
            )


def test_what_is_restored_does_not_hold_on_to_the_file(tmp_path):
    checkpoint = save(Run().train(range(2)), tmp_path)
    tensors, numbers = read_checkpoint(checkpoint)
    resumed = Run(seed=1)
    resumed.state.restore(tensors, numbers)
    read = {value.untyped_storage().data_ptr() for values in tensors.values() for value in values.values()}
    held = {
        value.untyped_storage().data_ptr() for values in resumed.state.tensors().values() for value in values.values()
    }
    assert not read & held


def test_settings_of_the_optimizer_are_those_that_the_run_goes_on_with(tmp_path):
    checkpoint = save(Run(lr=1e-2).train(range(2)), tmp_path)
    resumed = Run(lr=1e-4)
    resumed.state.restore(*read_checkpoint(checkpoint))
    assert {group["lr"] for group in resumed.optimizer.param_groups} == {1e-4}


def test_numbers_survive_json():
    numbers = Run().train(range(3)).state.numbers()
    assert numbers["ema_steps"] == 3
    assert numbers["scaler"]["scale"] == 2048.0
    assert json.loads(json.dumps(numbers)) == numbers


def test_a_moving_average_that_was_not_there_starts_from_the_weights(tmp_path):
    run = Run(ema=False).train(range(2))
    resumed = Run(seed=1)
    resumed.state.restore(*read_checkpoint(save(run, tmp_path)))
    averaged = resumed.state.tensors()["ema"]
    assert averaged.keys() == dict(run.networks["unet"].named_parameters()).keys()
    assert all(torch.equal(averaged[name], value) for name, value in run.networks["unet"].named_parameters())
    assert resumed.ema.optimization_step == 0


def test_a_moving_average_that_is_no_longer_wanted_is_left(tmp_path):
    run, resumed = Run().train(range(2)), Run(seed=1, ema=False)
    resumed.state.restore(*read_checkpoint(save(run, tmp_path)))
    assert "ema" not in resumed.state.tensors()


def test_a_checkpoint_of_other_networks_is_refused(tmp_path):
    checkpoint = save(Run().train(range(2)), tmp_path)
    with pytest.raises(ValueError, match=r"belongs to other networks: (?s:.)*size mismatch"):
        Run(width=5).state.restore(*read_checkpoint(checkpoint))
    tensors, numbers = read_checkpoint(checkpoint)
    optimizer = {**tensors["optimizer"], "unet.9.bias.exp_avg": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"belongs to other networks: .*unet.9.bias"):
        Run().state.restore({**tensors, "optimizer": optimizer}, numbers)
    with pytest.raises(ValueError, match=r"belongs to other networks: 'scale'"):
        Run().state.restore({name: v for name, v in tensors.items() if name != "scale"}, numbers)


@pytest.mark.gpu
@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_checkpoint_is_of_no_device(tmp_path, devices):
    first, second = Run(), Run(seed=1)
    for run, device in zip((first, second), devices, strict=True):
        for network in run.networks.values():
            network.to(device)
        run.ema.to(device)
    batch = torch.ones(2, 3, device=devices[0])
    first.networks["scale"](first.networks["unet"](batch)).square().mean().backward()
    first.optimizer.step()
    second.state.restore(*read_checkpoint(save(first, tmp_path)))
    for values, others in zip(first.state.tensors().values(), second.state.tensors().values(), strict=True):
        assert all(torch.equal(value.cpu(), others[name].cpu()) for name, value in values.items())
    assert {value.device.type for value in second.state.tensors()["unet"].values()} == {devices[1]}
