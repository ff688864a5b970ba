"""From the loss of each sample to what is minimized."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..core import level_features, loss_weights, uncertainty_loss
from ..schedulers.base import ZeroSNRScheduler
from .config import ObjectiveConfig

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

    Args:
        config: with prediction and weights.
        schedule: that is trained on.
        device: where losses come from.
    """

    def __init__(self, config: ObjectiveConfig, schedule: ZeroSNRScheduler, device: torch.device) -> None:
        self.prediction_type = config.prediction_type
        every = torch.arange(len(schedule))
        level = schedule.noise_level(every, like=torch.empty(0, dtype=torch.float64))
        learned = config.loss_weighting == "learned_uncertainty"
        self.log_variance: nn.Module | None = LogVariance() if learned else None
        self.networks = {} if self.log_variance is None else {"log_variance": self.log_variance}
        fixed = "constant" if learned else config.loss_weighting
        self._features = level_features(level, _FEATURES).float().to(device)
        self._weights = loss_weights(fixed, level, config.prediction_type, config.snr_gamma).float().to(device)

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
            timesteps: of each sample, shape [B], on the same device.
        """
        if self.log_variance is None:
            return losses * self._weights[timesteps]
        return uncertainty_loss(losses, self.log_variance(self._features[timesteps]))
