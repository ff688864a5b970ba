"""The optimizer of a run, and the learning rate of each step."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from .config import OptimizationConfig
from .data.loader import derive_seed
from .optimizers import optimizer_kind, round_stochastically_

_SKIPS_ON = ("cpu", "cuda")
"""Devices whose fused AdamW can skip a step by a flag in device memory, without synchronizing the host."""


class Optimization:
    """An optimizer over groups of parameters, each with a learning rate that the run's schedule multiplies.

    Args:
        groups: of parameters, as the optimizer takes them.
        config: with its settings.
        accelerator: of the run.
        seed: of the random rounding of weights in bfloat16.

    Attributes:
        optimizer: as accelerate wraps it.
        inner: the optimizer itself.
        skips_on_device: whether `update_unless` can be called, else `update`.
        in_backward: whether weights are updated in the backward pass, so that neither is called.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], config: OptimizationConfig, accelerator: Accelerator, seed: int = 0
    ) -> None:
        self.inner = optimizer_kind(config).create(groups, config, accelerator.device)
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
        self._one_by_one, self.in_backward = config.full_bf16, config.fused_backward_pass
        on_device = self.inner.param_groups[0]["params"][0].device.type == accelerator.device.type  # or offloaded
        fused = bool(self.inner.defaults.get("fused"))
        together = not (self._one_by_one or self.in_backward)
        self.skips_on_device = fused and together and on_device and accelerator.device.type in _SKIPS_ON
        self._found_inf: Tensor | None = None
        if self.skips_on_device:
            self.inner.register_step_pre_hook(self._flag_step)
        self._seed = seed
        self._draw = torch.Generator(accelerator.device if self._one_by_one else "cpu")
        self._prepare_single_updates()

    def _prepare_single_updates(self) -> None:
        """Note which group each parameter is in, and have it updated in the backward pass, if it is to be."""
        self._squares: list[Tensor] = []
        self._grouped: list[list[nn.Parameter]] = [group["params"] for group in self.inner.param_groups]
        self._group_of = {one: number for number, group in enumerate(self._grouped) for one in group}
        if self.in_backward:
            for parameter in self._group_of:
                parameter.register_post_accumulate_grad_hook(self._update_in_backward)  # type: ignore[no-untyped-call]

    @property
    def learning_rate(self) -> float:
        """Current learning rate of the network."""
        return float(self.inner.param_groups[0]["lr"])

    def set_step(self, step: int) -> None:
        """Give every group the learning rate of a step, counted from 0, and rounding its random numbers."""
        for group, rate in zip(self.inner.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._factor(step)
        if self._one_by_one:
            self._draw.manual_seed(derive_seed(self._seed, 10, step))

    def update(self, finite: bool) -> None:
        """Update the weights, unless the gradients are not finite, and forget the gradients."""
        if finite and self._one_by_one:
            for parameter in self._group_of:
                self._update_one(parameter)
        elif finite:
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

    def take_norm(self) -> Tensor:
        """Norm of all gradients of the last backward pass in which weights were updated."""
        squares, self._squares = self._squares, []
        return torch.stack(squares).sum().sqrt()

    def _update_in_backward(self, parameter: Any) -> None:
        """Update a weight whose gradient has just come, and forget the gradient."""
        self._squares.append(parameter.grad.float().square().sum())
        self._update_one(parameter)
        parameter.grad = None

    def _update_one(self, parameter: nn.Parameter) -> None:
        """Update one weight by its gradient, in float32 whatever it is kept in."""
        if parameter.grad is None:
            return
        if parameter.dtype != torch.bfloat16:
            self._step_of(parameter)
            return
        kept, gradient = parameter.data, parameter.grad.float()
        parameter.grad = None  # of the other dtype, which a parameter refuses
        parameter.data, parameter.grad = kept.float(), gradient
        self._step_of(parameter)
        round_stochastically_(kept, parameter.data, self._draw)
        parameter.grad = None
        parameter.data = kept

    def _step_of(self, parameter: nn.Parameter) -> None:
        """A step of the optimizer over one weight alone."""
        groups = self.inner.param_groups
        for number, group in enumerate(groups):
            group["params"] = [parameter] if number == self._group_of[parameter] else []
        try:
            self.inner.step()
        finally:
            for group, parameters in zip(groups, self._grouped, strict=True):
                group["params"] = parameters

    def _flag_step(self, optimizer: Any, *_: Any) -> None:
        """Before a step, pass the flag to torch's fused optimizers, together with GradScaler's own."""
        of_scaler, ours = getattr(optimizer, "found_inf", None), self._found_inf
        optimizer.found_inf = ours if of_scaler is None or ours is None else torch.maximum(ours, of_scaler)
