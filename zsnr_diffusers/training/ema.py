"""The moving average of the weights in training."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn


class MovingAverage(EMAModel):
    """diffusers' `EMAModel`, updated in one pass over the weights and swapped in without a copy of them.

    Args:
        parameters: to average, in this order ever after.
        decay: of the average.
        warmup: let the decay rise to its value, as (1 + t) / (10 + t).
        network: that they are of.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float, warmup: bool, network: Any) -> None:
        super().__init__(
            parameters,
            decay=decay,
            min_decay=0.0 if warmup else decay,
            model_cls=type(network),
            model_config=network.config,
        )

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Move the average towards the parameters, all of which require gradients."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        # The parent's difference of the two would be another copy of the network.
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - self.cur_decay_value)

    @contextlib.contextmanager
    def swapped_in(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """A context in which the parameters hold the average, and the average the parameters."""
        self._swap(parameters)
        try:
            yield
        finally:
            self._swap(parameters)

    def _swap(self, parameters: Sequence[nn.Parameter]) -> None:
        """Exchange the storage of the parameters and of their average."""
        for parameter, averaged in zip(parameters, self.shadow_params, strict=True):
            parameter.data, averaged.data = averaged.data, parameter.data
