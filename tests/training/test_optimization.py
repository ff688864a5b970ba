"""Steps that are left out by a flag on the device, beside such as the host leaves out."""

import pytest
import torch
from torch import nn
from training_runs import launched

from zsnr_diffusers.training import TrainingConfig, optimizers
from zsnr_diffusers.training import optimization as optimization_module
from zsnr_diffusers.training.optimization import Optimization

LEFT_OUT = {2: float("nan"), 4: float("inf")}
"""Steps, and what spoils their gradients."""


def optimized(config, on_device, scaler, spoil):
    """What becomes of a small network and the optimizer's state of it."""
    accelerator, _ = launched(config)
    accelerator.scaler = scaler
    network = nn.Linear(3, 1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
        network.bias.zero_()
    optimization = Optimization([{"params": network.parameters()}], config, accelerator)
    assert optimization.skips_on_device
    if scaler is not None:
        optimization.optimizer.scaler = scaler
    for step in range(6):
        loss = network(torch.full((2, 3), step + 1.0)).square().mean()
        (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.unscale_(optimization.inner)
        if spoil and step in LEFT_OUT:
            network.weight.grad.mul_(LEFT_OUT[step])
        finite = step not in LEFT_OUT
        optimization.set_step(step)
        if on_device:
            optimization.update_unless(torch.tensor(float(not finite)))
        else:
            optimization.update(finite)
        assert network.weight.grad is None
    state = optimization.inner.state_dict()["state"]
    return [*network.parameters(), *(value for one in state.values() for value in one.values())], scaler


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)


@pytest.mark.parametrize(("scaled", "spoil"), [(False, True), (False, False), (True, False)])
def test_what_the_device_leaves_out_is_what_the_host_would(config, scaled, spoil):
    """Also where the loss alone is not finite, of which a scaler of gradients knows nothing."""
    host, host_scaler = optimized(config, False, scaler() if scaled else None, spoil)
    device, device_scaler = optimized(config, True, scaler() if scaled else None, spoil)
    assert all(torch.equal(one, other) for one, other in zip(host, device, strict=True))
    assert {value.item() for value in device if value.ndim == 0} == {4.0}  # steps made
    if scaled:
        assert host_scaler.state_dict() == device_scaler.state_dict()


def test_an_optimizer_that_reads_no_flag_is_told_by_the_host(options):
    pytest.importorskip("bitsandbytes")
    config = TrainingConfig(**options, use_8bit_adam=True)
    accelerator, _ = launched(config)
    assert not Optimization([{"params": nn.Linear(3, 1).parameters()}], config, accelerator).skips_on_device


def test_parameters_that_are_kept_on_the_host_are_not_flagged_by_the_device(config, monkeypatch):
    accelerator, _ = launched(config)
    monkeypatch.setattr(type(accelerator), "device", torch.device("meta"))
    monkeypatch.setattr(optimization_module, "_SKIPS_ON", ("meta",))
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["cpu", "meta"])
    for device in ("cpu", "meta"):
        groups = [{"params": nn.Linear(3, 1, device=device).parameters()}]
        assert Optimization(groups, config, accelerator).skips_on_device == (device == "meta")
