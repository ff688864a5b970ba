"""EMA of the weights in training."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn


class MovingAverage(EMAModel):
    """diffusers' `EMAModel`, updated in one pass over the weights and swapped in without copying them.

    Args:
        parameters: to average, in this order.
        decay: of the average.
        warmup: increase the decay to its value, as (1 + t) / (10 + t).
        network: the network of the parameters.
        update_interval: steps between updates, each with the decay of all steps since the last, so that the averaging
            period does not depend on it.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], decay: float, warmup: bool, network: Any, update_interval: int = 1
    ) -> None:
        super().__init__(
            parameters,
            decay=decay,
            min_decay=0.0 if warmup else decay,
            model_cls=type(network),
            model_config=network.config,
        )
        self._interval = update_interval

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Count a step, and update the average if due."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        if self.optimization_step % self._interval:
            return
        first = self.optimization_step - self._interval + 1
        weight = 1 - math.prod(self.get_decay(step) for step in range(first, self.optimization_step + 1))
        weights: list[Tensor] = list(parameters)
        if self._is_elsewhere(weights):
            for parameter, averaged in zip(weights, self.shadow_params, strict=True):
                averaged.lerp_(parameter.to(averaged.device), weight)
        else:
            # The parent class's difference would be another copy of the network.
            torch._foreach_lerp_(self.shadow_params, weights, weight)

    @contextlib.contextmanager
    def swapped_in(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """A context in which the parameters hold the average, and the average the parameters."""
        self._swap(parameters)
        try:
            yield
        finally:
            self._swap(parameters)

    @torch.no_grad()
    def _swap(self, parameters: Sequence[nn.Parameter]) -> None:
        """Exchange the storage of the parameters and of their average, or their numbers if one is on the host."""
        elsewhere = self._is_elsewhere(parameters)
        for parameter, averaged in zip(parameters, self.shadow_params, strict=True):
            if elsewhere:
                weights = parameter.to(averaged.device, copy=True)
                parameter.copy_(averaged)
                averaged.copy_(weights)
            else:
                parameter.data, averaged.data = averaged.data, parameter.data

    def _is_elsewhere(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the average is on another device than the parameters."""
        pairs = zip(parameters, self.shadow_params, strict=True)
        return any(parameter.device != averaged.device for parameter, averaged in pairs)
