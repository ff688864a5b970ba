"""Training losses."""

import torch.nn.functional as F
from torch import Tensor


def v_loss(output: Tensor, target: Tensor) -> Tensor:
    """Squared error of each sample, averaged over its elements, in float32.

    With a v target this is Lin et al. 2023 (arXiv:2305.08891), eq. 11, with weight lambda_t = 1, as in the paper: the
    last timestep has the same weight as all others. See `weightings` for other weights.

    Args:
        output: the network's output, shape [B, ...].
        target: training target, same shape.

    Returns:
        float32 tensor of shape [B]; its mean is the loss.

    Raises:
        ValueError: the shapes differ (broadcasting would give a wrong loss).

    Examples:
        >>> import torch
        >>> from zsnr_diffusers.core import v_loss
        >>> v_loss(torch.zeros(2, 3), torch.ones(2, 3)).tolist()
        [1.0, 1.0]
    """
    if output.shape != target.shape:
        raise ValueError(f"output has shape {tuple(output.shape)}, the target {tuple(target.shape)}.")
    return F.mse_loss(output.float(), target.float(), reduction="none").flatten(1).mean(dim=1)
