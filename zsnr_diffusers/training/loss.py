"""From the loss of each sample to what is minimized."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..core import NoiseLevel, flow_level, level_features, loss_weights, uncertainty_loss, variance_preserving
from .config import ObjectiveConfig
from .schedule import Schedule

LOG_VARIANCE_LEARNING_RATE = 1e-2
"""Of Adam for the coefficients of u, which have to go as far as log(loss) in any run, however small its steps."""
_FEATURES = 16


class LogVariance(nn.Module):
    """u, the logarithm of the loss that is to be expected, as a linear function of features of the noise level.

    It starts at 0, where the objective's gradient is the loss's own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(_FEATURES))

    def forward(self, features: Tensor) -> Tensor:
        """u of each row of features, shape [B]."""
        # Not a matrix product, which mixed precision would round.
        return (features * self.coefficients).sum(dim=-1)


class LossWeighting:
    """The objective of each sample, from its loss and timestep, as a configuration says.

    Weights of betas are tables; flow times are no whole numbers, so theirs are computed for each batch.

    Args:
        config: with prediction and weights.
        schedule: whose timesteps are drawn; in flow matching they are 1000 s whatever it is.
        device: where losses come from.
    """

    def __init__(self, config: ObjectiveConfig, schedule: Schedule, device: torch.device) -> None:
        self._config, self._is_flow, self._device = config, config.is_flow, device
        learned = config.loss_weighting == "learned_uncertainty"
        self.log_variance: nn.Module | None = LogVariance() if learned else None
        self.networks = {} if self.log_variance is None else {"log_variance": self.log_variance}
        if not self._is_flow:
            level = schedule.noise_level(torch.arange(len(schedule)), like=torch.empty(0, dtype=torch.float64))
            self._features = self._features_of(level).to(device)
            self._weights = self._weights_of(level).to(device)

    def _features_of(self, level: NoiseLevel) -> Tensor:
        return level_features(level, _FEATURES).float()

    def _weights_of(self, level: NoiseLevel) -> Tensor:
        name = "constant" if self.log_variance is not None else self._config.loss_weighting
        return loss_weights(name, level, self._config.prediction_type, self._config.snr_gamma).float()

    def _at(self, timesteps: Tensor, table: str) -> Tensor:
        """Features or weights at timesteps, on the device."""
        if not self._is_flow:
            found: Tensor = getattr(self, table)[timesteps.to(self._device, non_blocking=True)]
            return found
        level = variance_preserving(flow_level(timesteps.double() / 1000))
        of = self._features_of if table == "_features" else self._weights_of
        return of(level).to(self._device, non_blocking=True)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained beside the network, as the optimizer takes it."""
        if self.log_variance is None:
            return []
        parameters = self.log_variance.parameters()
        return [{"params": parameters, "lr": LOG_VARIANCE_LEARNING_RATE, "weight_decay": 0.0}]

    def prepare(self, accelerator: Accelerator) -> None:
        """Let processes share what is trained; `networks` stays what it was, outside of any wrapper."""
        if self.log_variance is not None:
            self.log_variance = accelerator.prepare(self.log_variance)

    def __call__(self, losses: Tensor, timesteps: Tensor) -> Tensor:
        """What is minimized, shape [B].

        Args:
            losses: of each sample, shape [B].
            timesteps: of each sample, shape [B], best on the CPU, where nobody waits for them.
        """
        if self.log_variance is None:
            return losses * self._at(timesteps, "_weights")
        return uncertainty_loss(losses, self.log_variance(self._at(timesteps, "_features")))
