"""The stock scheduler that a pipeline is shipped with, so that it samples correctly where this package is not."""

import inspect
from typing import Any

import diffusers

from .flow import FlowMatchScheduler


def unipc_flow_config(
    shift: float, num_train_timesteps: int, prediction_type: str = "flow_prediction"
) -> dict[str, Any]:
    """The config of stock's `UniPCMultistepScheduler` for a flow-matching model, in pipelines made for betas.

    Of stock's schedulers that these pipelines can run, it is the one that starts at pure noise but for 1e-6, visits
    flow times that are even before the shift, and ends at the data. The network gets timesteps that are cut to whole
    numbers.
    """
    return {
        "num_train_timesteps": num_train_timesteps,
        "prediction_type": prediction_type,
        "use_flow_sigmas": True,
        "flow_shift": float(shift),
        "final_sigmas_type": "zero",
        "steps_offset": 1,  # not read in flow time; pipelines of Stable Diffusion warn of another
    }


def is_flow_stand_in(scheduler: Any) -> bool:
    """Whether a scheduler is stock's UniPC with exactly `unipc_flow_config`, which stands in for one of ours."""
    if type(scheduler).__name__ != "UniPCMultistepScheduler":  # the class itself would import scipy
        return False
    config = scheduler.config
    stand_in = type(scheduler)(**unipc_flow_config(config["flow_shift"], config["num_train_timesteps"]))
    return all(config.get(key) == value for key, value in stand_in.config.items() if not key.startswith("_"))


def stock_scheduler(scheduler: Any, **changes: Any) -> Any:
    """The stock scheduler that stands in for one of ours with betas; a stock one stays what it is.

    For zero terminal SNR it is Euler, stock's DDIM by another name: it takes each next level from its own timesteps
    and so is right at every step count, which stock's DDIM is not (it steps to t - T // n). A pixel-space model
    needs its x_0 clipped, which Euler does not do: it gets `DDPMScheduler`, right at every step count at which
    diffusers' trailing spacing is, all but 62 of 1 to 1000. Without zero SNR it is stock's DDIM, right where the step
    count divides T: Euler would start from a little less noise than the model was trained at.

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
        cls: Any = diffusers.DDPMScheduler
    else:
        cls = diffusers.EulerDiscreteScheduler if config.get("rescale_betas_zero_snr") else diffusers.DDIMScheduler
        # Euler reads neither; DDIM does when somebody swaps it in, and pipelines warn of an offset other than 1.
        config |= {"steps_offset": 1, "set_alpha_to_one": True}
    known = {name for each in (cls, diffusers.DDIMScheduler) for name in inspect.signature(each).parameters}
    return cls.from_config({name: value for name, value in config.items() if name in known})


def stock_flow_scheduler(scheduler: FlowMatchScheduler, takes_generator: bool = False) -> Any:
    """The stock scheduler that samples a flow-matching model in pipelines that were written for betas.

    Stock's own flow schedulers have no `init_noise_sigma` and end such a pipeline's call. UniPC over flow times runs
    there and starts from pure noise. It takes no `generator`, which some pipelines pass (`DDPMPipeline`): these get
    DPM++ 2M, which starts at flow time 0.999. Both tell the network 1000 s rounded down to a whole number, so data
    that is one point is missed by up to two thousandths.

    Args:
        scheduler: of the model; its `shift` becomes `flow_shift`.
        takes_generator: whether its step has to take `generator`.

    Raises:
        ValueError: the model counts time from noise to data, or predicts something else than noise - x_0.
    """
    config = scheduler.config
    if config["invert_sigmas"] or config["prediction_type"] != "flow_prediction":
        raise ValueError(
            f"invert_sigmas={config['invert_sigmas']}, prediction_type={config['prediction_type']!r}: no stock "
            "scheduler samples such a flow model in a pipeline written for betas."
        )
    cls: Any = diffusers.DPMSolverMultistepScheduler if takes_generator else diffusers.UniPCMultistepScheduler
    return cls(**unipc_flow_config(scheduler.shift, len(scheduler)))
