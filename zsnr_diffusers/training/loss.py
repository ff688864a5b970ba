"""Convert the loss of each sample to the training objective."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..core import NoiseLevel, flow_level, level_features, loss_weights, uncertainty_loss, variance_preserving
from .config import ObjectiveConfig
from .schedule import Schedule

LOG_VARIANCE_LEARNING_RATE = 1e-2
"""Adam's learning rate for the coefficients of u, which must reach log(loss) in any run."""
_FEATURES = 16


class LogVariance(nn.Module):
    """u, the logarithm of the loss that is to be expected, as a linear function of features of the noise level.

    It starts at 0, where the objective's gradient is the loss's own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(_FEATURES))

    def forward(self, features: Tensor) -> Tensor:
        """u, the expected log loss, for each row of noise-level features, shape [B]."""
        # Not a matrix product, which mixed precision would round.
        return (features * self.coefficients).sum(dim=-1)


class LossWeighting:
    """The objective of each sample, from its loss and timestep, according to a configuration.

    Weights for betas are tables; flow times are not integers, so their weights are computed for each batch.

    Args:
        config: with prediction and weights.
        schedule: whose timesteps are drawn; in flow matching they are 1000 s whatever it is.
        device: where losses come from.
    """

    def __init__(self, config: ObjectiveConfig, schedule: Schedule, device: torch.device) -> None:
        self._config, self._device = config, device
        learned = config.loss_weighting == "learned_uncertainty"
        self.log_variance: nn.Module | None = LogVariance() if learned else None
        self.networks = {} if self.log_variance is None else {"log_variance": self.log_variance}
        self._table: Tensor | None = None
        if not config.is_flow:
            level = schedule.noise_level(torch.arange(len(schedule)), like=torch.empty(0, dtype=torch.float64))
            self._table = self._weights_at_levels(level).to(device)

    def _weights_at_levels(self, level: NoiseLevel) -> Tensor:
        """Loss weights [B] at noise levels, or features [B, features] where weights are learned."""
        if self._config.loss_weighting == "learned_uncertainty":
            return level_features(level, _FEATURES).float()
        config = self._config
        return loss_weights(config.loss_weighting, level, config.prediction_type, config.snr_gamma).float()

    def _weights_at_timesteps(self, timesteps: Tensor, on_device: Tensor | None) -> Tensor:
        """`_weights_at_levels` of timesteps, on the device."""
        if self._table is not None:
            return self._table[timesteps.to(self._device, non_blocking=True) if on_device is None else on_device]
        level = variance_preserving(flow_level(timesteps.double() / 1000))
        return self._weights_at_levels(level).to(self._device, non_blocking=True)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of additional trained parameters; none unless weights are learned."""
        if self.log_variance is None:
            return []
        parameters = self.log_variance.parameters()
        return [{"params": parameters, "lr": LOG_VARIANCE_LEARNING_RATE, "weight_decay": 0.0}]

    def prepare(self, accelerator: Accelerator) -> None:
        """Let accelerate wrap what is trained; `networks` keeps the unwrapped module."""
        if self.log_variance is not None:
            self.log_variance = accelerator.prepare(self.log_variance)

    def __call__(self, losses: Tensor, timesteps: Tensor, on_device: Tensor | None = None) -> Tensor:
        """What is minimized, shape [B].

        Args:
            losses: of each sample, shape [B].
            timesteps: of each sample, shape [B], preferably on the CPU, to avoid a synchronization.
            on_device: the same on the losses' device, if available.
        """
        found = self._weights_at_timesteps(timesteps, on_device)
        return losses * found if self.log_variance is None else uncertainty_loss(losses, self.log_variance(found))
