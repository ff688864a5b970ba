"""Inputs and targets of a training step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bridges import broadcast_level, flow_timestep_lookup
from ..core import NoiseLevel, add_noise, converted_prediction, training_target
from ..schedulers.base import ZeroSNRScheduler
from ..schedulers.config import is_flow
from ..schedulers.sampling import compute_dtype
from .config import ObjectiveConfig
from .schedule import Schedule, betas_alpha_bar

_PARTS = 10
"""Of all timesteps, each with a fixed one in its middle."""


@dataclass(frozen=True)
class NoisedBatch:
    """A noised batch, and how the network's output is compared."""

    x_t: Tensor
    """Shape [B, ...]."""
    timestep: Tensor
    """What the network is told, shape [B]."""
    target: Tensor
    convert_output: Callable[[Tensor], Tensor]
    """From the network's output to what `target` is of."""


class Objective:
    """A network that predicts what it is trained for, on its own levels.

    Args:
        schedule: whose timesteps are drawn; its prediction type is the target.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.prediction_type = schedule, str(schedule.config["prediction_type"])
        self.num_train_timesteps = len(schedule)
        self.has_flow_times = is_flow(schedule.config)
        """Whether timesteps are 1000 s of flow times s, read on the host; betas are a table on the device."""

    def fixed_timesteps(self) -> Tensor:
        """The middle of each tenth of all timesteps, and the last one, shape [11]; float32 of flow times."""
        count = self.num_train_timesteps
        middles = [(2 * part + 1) * count // (2 * _PARTS) for part in range(_PARTS)]
        if self.has_flow_times:
            return torch.tensor([*middles, count], dtype=torch.float32)
        return torch.tensor([*middles, count - 1])

    def noised_batch(
        self, x_0: Tensor, noise: Tensor, timesteps: Tensor, on_device: Tensor | None = None
    ) -> NoisedBatch:
        """Noise clean samples to their timesteps and make the training target.

        Args:
            x_0: clean samples, shape [B, ...], float32.
            noise: N(0, 1), same shape.
            timesteps: as drawn, shape [B], preferably on the CPU, to avoid a synchronization.
            on_device: the same on the device of `x_0`, if available.
        """
        on_device = timesteps.to(x_0.device, non_blocking=True) if on_device is None else on_device
        level = self.schedule.noise_level(timesteps if self.has_flow_times else on_device, like=x_0)
        target = training_target(self.prediction_type, x_0, noise, level)
        return NoisedBatch(add_noise(x_0, noise, level), on_device, target, lambda output: output)


class BridgedObjective(Objective):
    """A network with betas that is trained as the exactly equivalent flow model; see `bridges`.

    Timesteps are 1000 s. The network gets its own level with the same SNR, and its output is converted.

    Args:
        betas: of the network, at zero terminal SNR.
    """

    def __init__(self, betas: ZeroSNRScheduler) -> None:
        super().__init__(betas)
        self._ask, self.num_train_timesteps, self.has_flow_times = flow_timestep_lookup(betas), 1000, True

    def noised_batch(
        self, x_0: Tensor, noise: Tensor, timesteps: Tensor, on_device: Tensor | None = None
    ) -> NoisedBatch:
        """See `Objective.noised_batch`."""
        of_flow, asked, of_network = self._ask(timesteps.double().cpu())
        wide = compute_dtype(x_0.dtype)
        here, there = (broadcast_level(level, x_0, wide) for level in (of_flow, of_network))
        x_t = add_noise(x_0, noise, there)
        target = training_target("flow_prediction", x_0, noise, here)
        told = asked.float().to(x_0.device, non_blocking=True)
        return NoisedBatch(x_t, told, target, lambda output: self._convert_to_flow(output, x_t, there, here))

    def _convert_to_flow(self, output: Tensor, x_t: Tensor, there: NoiseLevel, here: NoiseLevel) -> Tensor:
        """The network's v output as the flow prediction of the same sample."""
        return converted_prediction(output.to(x_t.dtype), x_t, there, self.prediction_type, "flow_prediction", here)


def create_objective(config: ObjectiveConfig, schedule: Schedule, betas: ZeroSNRScheduler | None) -> Objective:
    """The training objective of a configuration.

    Args:
        config: of the run.
        schedule: of the network.
        betas: of the base, at zero terminal SNR; None of a flow-matching one.

    Raises:
        ValueError: flow times are to be those of betas, and there are none.
    """
    if config.flow_time_sampling == "snr":
        betas_alpha_bar(betas)
    if config.flow_through_bridge and isinstance(schedule, ZeroSNRScheduler):
        return BridgedObjective(schedule)
    return Objective(schedule)
