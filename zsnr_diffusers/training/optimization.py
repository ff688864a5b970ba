"""The optimizer of a run, and the learning rate of each step."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor

from .config import OptimizationConfig
from .speed import create_adamw

_SKIPS_ON = ("cpu", "cuda")
"""Devices whose fused AdamW can skip a step by a flag in device memory, without synchronizing the host."""


class Optimization:
    """AdamW over groups of parameters, each with a learning rate that the run's schedule multiplies.

    Attributes:
        optimizer: as accelerate wraps it.
        inner: the optimizer itself.
        skips_on_device: whether `update_unless` can be called, else `update`.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], config: OptimizationConfig, accelerator: Accelerator) -> None:
        """Take what the optimizer takes."""
        self.inner = create_adamw(groups, config, accelerator.device)
        self._rates = [group["lr"] for group in self.inner.param_groups]
        # The factor as a function of the step: nothing to save, nothing that counts processes.
        self._factor = get_scheduler(
            config.lr_scheduler,
            self.inner,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        ).lr_lambdas[0]
        self.optimizer: Any = accelerator.prepare(self.inner)
        self._scaler = accelerator.scaler
        on_device = self.inner.param_groups[0]["params"][0].device.type == accelerator.device.type  # or offloaded
        fused = bool(self.inner.defaults.get("fused"))
        self.skips_on_device = fused and on_device and accelerator.device.type in _SKIPS_ON
        self._found_inf: Tensor | None = None
        if self.skips_on_device:
            self.inner.register_step_pre_hook(self._flag_step)

    @property
    def learning_rate(self) -> float:
        """Current learning rate of the network."""
        return float(self.inner.param_groups[0]["lr"])

    def set_step(self, step: int) -> None:
        """Give every group the learning rate of a step, counted from 0."""
        for group, rate in zip(self.inner.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._factor(step)

    def update(self, finite: bool) -> None:
        """Update the weights, unless the gradients are not finite, and forget the gradients."""
        if finite:
            self.optimizer.step()
        elif self._scaler is not None:
            self._scaler.update()  # it insists on one for each time that gradients were unscaled
        self.optimizer.zero_grad()

    def update_unless(self, found_inf: Tensor) -> None:
        """`update` by a flag on the device, 1 for gradients that are not finite, else 0, without synchronization."""
        self._found_inf = found_inf
        self.optimizer.step()
        vars(self.inner).pop("found_inf", None)  # as GradScaler does, which calls the step under float16
        self.optimizer.zero_grad()

    def _flag_step(self, optimizer: Any, *_: Any) -> None:
        """Before a step, pass the flag to torch's fused optimizers, together with GradScaler's own."""
        of_scaler, ours = getattr(optimizer, "found_inf", None), self._found_inf
        optimizer.found_inf = ours if of_scaler is None or ours is None else torch.maximum(ours, of_scaler)
