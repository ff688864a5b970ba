"""The schedulers, by the names that people look for; each is a choice of noise over one update rule.

`model_index.json` of a saved pipeline names this module: its path is a file format.
"""

import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from .scheduler_base import ZeroSNRScheduler

# diffusers looks for `SchedulerMixin` in the module that model_index.json names, to learn how to load what is there.
__all__ = ["SchedulerMixin", "ZeroSNRDDIMScheduler", "ZeroSNRDDPMScheduler"]


class ZeroSNRDDIMScheduler(ZeroSNRScheduler):
    """DDIM (Song et al. 2021, arXiv:2010.02502) from pure noise to clean data, at every number of steps.

    Equal to stock's `DDIMScheduler` wherever stock steps to its own next timestep, and to `EulerDiscreteScheduler`.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """x_t to the next visited timestep, or to x_0 from the last one.

        Args:
            model_output: the network's output at `timestep`, shape [B, ...].
            timestep: one of `timesteps`.
            sample: x_t, same shape; float16 and bfloat16 are computed in float32.
            eta: 0 is deterministic, 1 is DDPM; in between the noise of eq. 16.
            use_clipped_model_output: taken for stock pipelines that pass it; the noise always follows the clipped x_0.
            generator: source of the noise, one or one per sample.
            variance_noise: the noise itself instead, same shape.
            return_dict: False returns `(prev_sample, pred_original_sample)`.

        Raises:
            ValueError: before `set_timesteps`, at a timestep not chosen, eta outside [0, 1], both noise sources.
        """
        return self._step(model_output, timestep, sample, eta, generator, variance_noise, return_dict)


class ZeroSNRDDPMScheduler(ZeroSNRScheduler):
    """Ancestral sampling (Ho et al. 2020, arXiv:2006.11239) with the posterior's variance, at every number of steps.

    Equal to stock's `DDPMScheduler` with `variance_type="fixed_small"` and to `EulerAncestralDiscreteScheduler`.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """x_t to the next visited timestep, or to x_0 from the last one; arguments as in `ZeroSNRDDIMScheduler`."""
        return self._step(model_output, timestep, sample, 1.0, generator, variance_noise, return_dict)
