"""The stock scheduler that a pipeline is shipped with, so that it samples correctly where this package is not."""

import inspect
from typing import Any

from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler


def stock_scheduler(scheduler: Any, **changes: Any) -> Any:
    """The scheduler of stock that stands in for one of ours; a scheduler of stock stays what it is.

    For zero terminal SNR it is Euler, stock's DDIM by another name: it takes each next level from its own timesteps
    and so is right at every number of steps, which stock's DDIM is not (it steps to t - T // n). A model of pixels
    needs its x_0 clipped, which Euler does not do: it gets `DDPMScheduler`, right at every number of steps at which
    stock's trailing spacing is, all but 62 of 1 to 1000. Without zero SNR it is stock's DDIM, right where the number
    of steps divides T: Euler would start from a little less noise than the model was trained at.

    Args:
        scheduler: of this package or of diffusers.
        changes: what of its config shall be another value.

    Raises:
        ValueError: its schedule has an SNR shift, which these do not know.
    """
    if type(scheduler).__module__.startswith("diffusers."):
        return type(scheduler).from_config(scheduler.config, **changes) if changes else scheduler
    config = {**scheduler.config, **changes}
    if (shift := config.get("snr_shift_scale", 1)) != 1:
        raise ValueError(
            f"snr_shift_scale={shift} of {type(scheduler).__name__} has no stock scheduler to stand in for it here; "
            "set the pipeline's scheduler to one of stock first."
        )
    if config.get("clip_sample") or config.get("thresholding"):
        cls: Any = DDPMScheduler
    else:
        cls = EulerDiscreteScheduler if config.get("rescale_betas_zero_snr") else DDIMScheduler
        # Euler reads neither; DDIM does when somebody swaps it in, and pipelines warn of an offset other than 1.
        config |= {"steps_offset": 1, "set_alpha_to_one": True}
    known = {name for each in (cls, DDIMScheduler) for name in inspect.signature(each).parameters}
    return cls.from_config({name: value for name, value in config.items() if name in known})
