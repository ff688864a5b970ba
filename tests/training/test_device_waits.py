"""Where a step waits for the device: one without numbers stands for a GPU, so every wait can be told.

On the meta device all operations work and nothing can be read. On a GPU, a copy to it that is not `non_blocking`, and
whatever reads a number, waits until all that was queued is done.
"""

import itertools
import sys

import pytest
import torch
from accelerate import Accelerator
from packaging import version
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import launched, shown

from zsnr_diffusers.schedulers import ZeroSNRDDPMScheduler
from zsnr_diffusers.training import TrainingConfig, optimization
from zsnr_diffusers.training import run as run_module
from zsnr_diffusers.training import trainer as trainer_module
from zsnr_diffusers.training.kinds import open_task
from zsnr_diffusers.training.objective import BridgedObjective
from zsnr_diffusers.training.pixels import PixelTrainingConfig

pytestmark = pytest.mark.skipif(
    version.parse(torch.__version__) < version.parse("2.7"), reason="fused AdamW refuses the meta device there"
)

DEVICE = torch.device("meta")
COPIES = {torch.ops.aten._to_copy.default: 3, torch.ops.aten.copy_.default: 2}
"""Operators that copy between devices, and the place of `non_blocking` among their arguments."""


class Watch(TorchDispatchMode):
    """Notes in their order the copies to the device that a host would have waited for, and all that are made."""

    def __init__(self):
        super().__init__()
        self.events, self.copied = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in COPIES:
            source = args[1] if function is torch.ops.aten.copy_.default else args[0]
            place = COPIES[function]
            free = args[place] if len(args) > place else (kwargs or {}).get("non_blocking", False)
            if source.device != result.device:
                self.copied.append(source)
                self.events += [] if free else [f"waits for a copy of {tuple(source.shape)} to {result.device}"]
        return result


class Read:
    """In place of `HostCopy`: numbers of a step on a device that has none."""

    numbers = (0.5, 0.5, 0.0)

    def __init__(self, tensor):
        assert tensor.device == DEVICE
        assert tensor.shape == (3,)
        watch.events.append("metrics leave")

    def tolist(self):
        watch.events.append("waits for metrics")
        return list(self.numbers)


watch = Watch()


@pytest.fixture
def trainer(monkeypatch):
    """A function from a configuration to a trainer on a device that is not there, and its batches."""

    def create(config):
        accelerator, processes = launched(config)
        task, _ = open_task(config)
        samples = task.samples(range(4), config.global_batch(1))
        task.plan_cache(accelerator, processes, samples, shown(config))
        if getattr(config, "cache", "none") != "none":
            task.embedding_cache.populate(accelerator, processes, samples)
            monkeypatch.setattr(task, "prepare", lambda *args: samples)
        monkeypatch.setattr(Accelerator, "device", DEVICE)
        monkeypatch.setattr(optimization, "_SKIPS_ON", ("meta",))
        monkeypatch.setattr(trainer_module, "HostCopy", Read)
        monkeypatch.setattr(
            "zsnr_diffusers.training.optimizers._get_fused_kernels_supported_devices", lambda: ["meta"]
        )
        adam = sys.modules[torch.optim.Adam.__module__]  # the package has a function of its name
        monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *args, **kwargs: None)
        task.unet.to(DEVICE)  # parameters come to a GPU as they are, but to this device as new ones
        made = run_module.create_trainer(config, accelerator, processes, task, samples)
        made.optimization.inner.register_step_pre_hook(lambda *args: watch.events.append("update"))
        return made

    return create


def second_step(trainer):
    """What happens in a step; in the first tables come to the device."""
    with trainer.batches(trainer.step + 2) as batches:
        trainer.train_step(batches)
        watch.events.clear()
        watch.copied.clear()
        with watch:
            trainer.train_step(batches)
    return watch.events


ONCE = ["metrics leave", "update", "waits for metrics"]
"""Of a step that waits for the device once, when the update is queued already."""

FLOW = {"prediction_type": "flow_prediction"}


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("cache", ["none", "both"])
def test_a_step_waits_once_after_the_update(options, trainer, cache, passes):
    made = trainer(TrainingConfig(**options, cache=cache, gradient_accumulation_steps=passes))
    assert second_step(made) == ONCE


@pytest.mark.full
@pytest.mark.parametrize("cache", ["none", "both"])
def test_nor_does_xl_wait_for_size_and_crop(xl_options, trainer, cache):
    assert second_step(trainer(TrainingConfig(**xl_options, cache=cache, caption_dropout=0.5))) == ONCE


@pytest.mark.parametrize("changes", [FLOW, {"loss_weighting": "soft_min_snr_floored"}])
def test_nor_for_timesteps_and_nothing_comes_twice(options, trainer, changes):
    made = trainer(TrainingConfig(**options, **changes, cache="both"))
    assert second_step(made) == ONCE
    drawn = [one for one in watch.copied if one.shape == (options["train_batch_size"],)]
    assert drawn
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(drawn, 2))


def test_nor_for_what_a_bridge_looks_up():
    objective = BridgedObjective(ZeroSNRDDPMScheduler())
    x_0 = noise = torch.zeros(2, 4, 8, 8, device=DEVICE)
    watch.events.clear()
    with watch:
        asked = objective.noised_batch(x_0, noise, torch.tensor([10.0, 999.5]))
        target = asked.convert_output(asked.x_t)
    assert watch.events == []
    assert asked.timestep.device == target.device == DEVICE


@pytest.mark.parametrize("learned", [False, True])
def test_nor_do_networks_of_pixels(trainer, image_folder, small_run, learned):
    more = {"loss_weighting": "learned_uncertainty"} if learned else {}
    config = PixelTrainingConfig(**small_run, train_data_dir=str(image_folder), resolution=16, unet="small-16", **more)
    assert second_step(trainer(config)) == ONCE


def test_a_copy_that_waits_and_a_number_that_is_read_are_noticed(options, trainer, monkeypatch):
    made = trainer(TrainingConfig(**options, cache="both"))
    x_0 = made.task.x_0
    monkeypatch.setattr(made.task, "x_0", lambda batch: x_0(batch) * torch.ones(2).to(DEVICE).mean())
    assert second_step(made) == ["waits for a copy of (2,) to meta", *ONCE]
    monkeypatch.setattr(made.task, "x_0", lambda batch: x_0(batch) * x_0(batch).max().item())
    with pytest.raises(RuntimeError, match="meta"):
        second_step(made)
