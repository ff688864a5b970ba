"""The diffusers scheduler that is saved with a pipeline, so that it samples correctly without this package."""

import inspect
from typing import Any

import diffusers

from .flow import FlowMatchScheduler


def unipc_flow_config(
    shift: float, num_train_timesteps: int, prediction_type: str = "flow_prediction"
) -> dict[str, Any]:
    """The config of diffusers' `UniPCMultistepScheduler` for a flow-matching model, in pipelines written for betas.

    Among the schedulers that these pipelines support, it is the only one that starts at pure noise up to 1e-6, visits
    evenly spaced flow times before the shift, and ends at the data. The network receives truncated timesteps.
    """
    return {
        "num_train_timesteps": num_train_timesteps,
        "prediction_type": prediction_type,
        "use_flow_sigmas": True,
        "flow_shift": float(shift),
        "final_sigmas_type": "zero",
        "steps_offset": 1,  # not used in flow time; Stable Diffusion pipelines warn about other values
    }


def is_flow_stand_in(scheduler: Any) -> bool:
    """Whether a scheduler is diffusers' UniPC with exactly `unipc_flow_config`, which replaces one of ours."""
    if type(scheduler).__name__ != "UniPCMultistepScheduler":  # accessing the class would import scipy
        return False
    config = scheduler.config
    stand_in = type(scheduler)(**unipc_flow_config(config["flow_shift"], config["num_train_timesteps"]))
    return all(config.get(key) == value for key, value in stand_in.config.items() if not key.startswith("_"))


def stock_scheduler(scheduler: Any, **changes: Any) -> Any:
    """The diffusers scheduler that replaces one of ours with betas; a diffusers scheduler is returned unchanged.

    For zero terminal SNR it is Euler, which equals DDIM but takes each next level from its own timesteps and so is
    correct at every step count, unlike diffusers' DDIM (which steps to t - T // n). A pixel-space model needs a
    clipped x_0, which Euler does not support: it gets `DDPMScheduler`, correct wherever diffusers' trailing spacing
    is, which is all but 62 of 1 to 1000 step counts. Without zero SNR it is diffusers' DDIM, correct if the step count
    divides T; Euler would start with slightly less noise than in training.

    Args:
        scheduler: of this package or of diffusers.
        changes: changed config values.

    Raises:
        ValueError: its schedule has an SNR shift, which diffusers' schedulers do not support.
    """
    if type(scheduler).__module__.startswith("diffusers."):
        return type(scheduler).from_config(scheduler.config, **changes) if changes else scheduler
    config = {**scheduler.config, **changes}
    if (shift := config.get("snr_shift_scale", 1)) != 1:
        raise ValueError(
            f"snr_shift_scale={shift} of {type(scheduler).__name__} has no equivalent diffusers scheduler here; "
            "replace the pipeline's scheduler with a diffusers scheduler first."
        )
    if config.get("clip_sample") or config.get("thresholding"):
        cls: Any = diffusers.DDPMScheduler
    else:
        cls = diffusers.EulerDiscreteScheduler if config.get("rescale_betas_zero_snr") else diffusers.DDIMScheduler
        # Euler reads neither, but DDIM does if a user switches to it, and pipelines warn about an offset other than 1.
        config |= {"steps_offset": 1, "set_alpha_to_one": True}
    known = {name for each in (cls, diffusers.DDIMScheduler) for name in inspect.signature(each).parameters}
    return cls.from_config({name: value for name, value in config.items() if name in known})


def stock_flow_scheduler(scheduler: FlowMatchScheduler, takes_generator: bool = False) -> Any:
    """The diffusers scheduler that samples a flow-matching model in pipelines written for betas.

    diffusers' flow schedulers have no `init_noise_sigma`, which these pipelines need. UniPC with flow times works and
    starts from pure noise. It accepts no `generator`, which some pipelines pass (`DDPMPipeline`): these get DPM++ 2M,
    which starts at flow time 0.999. Both pass 1000 s rounded down to an integer to the network, so they miss
    single-point data by up to 0.002.

    Args:
        scheduler: of the model; its `shift` becomes `flow_shift`.
        takes_generator: whether its step must accept `generator`.

    Raises:
        ValueError: the model's time runs from noise to data, or it does not predict noise - x_0.
    """
    config = scheduler.config
    if config["invert_sigmas"] or config["prediction_type"] != "flow_prediction":
        raise ValueError(
            f"invert_sigmas={config['invert_sigmas']}, prediction_type={config['prediction_type']!r}: no diffusers "
            "scheduler samples such a flow model in a pipeline written for betas."
        )
    cls: Any = diffusers.DPMSolverMultistepScheduler if takes_generator else diffusers.UniPCMultistepScheduler
    return cls(**unipc_flow_config(scheduler.shift, len(scheduler)))
