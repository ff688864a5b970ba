"""Schedulers that start from pure noise, for models with betas and flow-matching models.

`model_index.json` of a saved pipeline names this package: its path is a file format. diffusers loads our schedulers
only if this module is imported, so `zsnr_diffusers` imports it; its classes, which need torch and diffusers, are
imported on first use.
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

CLASSES = tuple(name for name in __all__ if name != "SchedulerMixin")
"""Names of the schedulers."""

# diffusers looks for `SchedulerMixin` in the module that model_index.json names, to find out how to load its classes.
__getattr__, __dir__ = lazy_names(__name__, {"classes": " ".join(CLASSES), "sampling": "SchedulerMixin"})
