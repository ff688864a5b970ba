"""Schedulers that start from pure noise, for models with betas and of flow matching.

`model_index.json` of a saved pipeline names this package: its path is a file format. diffusers loads a scheduler of
ours only if this module is imported, so it is imported with `zsnr_diffusers`; its classes, which need torch and
diffusers, once one of them is asked for.
"""

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    from .classes import (
        FlowMatchEulerScheduler,
        FlowMatchMultistepScheduler,
        ZeroSNRDDIMInverseScheduler,
        ZeroSNRDDIMScheduler,
        ZeroSNRDDPMScheduler,
        ZeroSNRLCMScheduler,
        ZeroSNRMultistepScheduler,
        ZeroSNRPNDMScheduler,
    )

# diffusers looks for `SchedulerMixin` in the module that model_index.json names, to learn how to load what is there.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "classes": (
            "FlowMatchEulerScheduler FlowMatchMultistepScheduler ZeroSNRDDIMInverseScheduler ZeroSNRDDIMScheduler "
            "ZeroSNRDDPMScheduler ZeroSNRLCMScheduler ZeroSNRMultistepScheduler ZeroSNRPNDMScheduler"
        ),
        "sampling": "SchedulerMixin",
    },
)

__all__ = [
    "FlowMatchEulerScheduler",
    "FlowMatchMultistepScheduler",
    "SchedulerMixin",
    "ZeroSNRDDIMInverseScheduler",
    "ZeroSNRDDIMScheduler",
    "ZeroSNRDDPMScheduler",
    "ZeroSNRLCMScheduler",
    "ZeroSNRMultistepScheduler",
    "ZeroSNRPNDMScheduler",
]
