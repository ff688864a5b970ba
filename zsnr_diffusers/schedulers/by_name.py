"""Create schedulers by short name."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import diffusers

from ..utils.command_line import did_you_mean, nearest
from . import __all__ as our_names
from . import classes
from .base import ZeroSNRScheduler
from .config import is_flow, with_class_defaults
from .flow import FlowMatchScheduler

SHORT_NAMES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "zsnr": ("ZeroSNRMultistepScheduler", {}),
    "zsnr_3": ("ZeroSNRMultistepScheduler", {"solver_order": 3}),
    "zsnr_sde": ("ZeroSNRMultistepScheduler", {"eta": 1.0}),
    "zsnr_ddim": ("ZeroSNRDDIMScheduler", {}),
    "ddim": ("DDIMScheduler", {"set_alpha_to_one": True}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""Classes with settings, by short name; names that begin with `zsnr` belong to this package."""

_FLOW_CLASSES = {
    "ZeroSNRMultistepScheduler": "FlowMatchMultistepScheduler",
    "ZeroSNRDDIMScheduler": "FlowMatchEulerScheduler",
    "EulerDiscreteScheduler": "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler": "FlowMatchHeunDiscreteScheduler",
}
"""Short names with a different class for flow-matching models."""


def check_scheduler_names(names: Iterable[str]) -> None:
    """Refuse names that are neither in `SHORT_NAMES` nor scheduler classes of this package or diffusers.

    Raises:
        ValueError: with the name and the most similar one.
    """
    stock = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    known = [*SHORT_NAMES, *our_names, *stock]
    for name in names:
        if name not in known:
            short = ", ".join(SHORT_NAMES)
            raise ValueError(
                f"unknown scheduler {name}{did_you_mean(nearest(name, known)) or '.'} Short names are {short}; "
                "scheduler classes of diffusers and this package can be named too."
            )


def scheduler_by_name(name: str, config: Mapping[str, Any]) -> Any:
    """Create a scheduler for a model, for use in the model's pipeline.

    Zero terminal SNR follows the config. A diffusers scheduler gets `timestep_spacing="trailing"`, so that it begins
    at the last timestep, and clips x_0 only if the model's own scheduler does; with flow times it gets the model's
    shift.

    Args:
        name: one of `SHORT_NAMES`, or a class name of diffusers or of this package.
        config: of the model's scheduler.

    Raises:
        ValueError: an unknown name; a scheduler that cannot sample this model.
    """
    check_scheduler_names([name])
    class_name, settings = SHORT_NAMES.get(name, (name, {}))
    if is_flow(config):
        class_name = _FLOW_CLASSES.get(class_name, class_name) if name in SHORT_NAMES else class_name
        return _flow_scheduler(class_name, config, settings)
    cls: Any = getattr(classes, class_name, None) or getattr(diffusers, class_name)
    said = with_class_defaults(config)
    zero, clip = bool(said.get("rescale_betas_zero_snr")), said.get("clip_sample")
    if issubclass(cls, ZeroSNRScheduler):
        return cls.from_config(config, rescale_betas_zero_snr=zero, **settings)
    if class_name.startswith("FlowMatch"):
        raise ValueError(f"{class_name} samples flow-matching models, but this model has betas.")
    parameters = inspect.signature(cls).parameters
    facts = {"rescale_betas_zero_snr": zero, "timestep_spacing": "trailing", "clip_sample": bool(clip)}
    return cls.from_config(config, **{key: facts[key] for key in facts if key in parameters}, **settings)


def _flow_scheduler(class_name: str, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """A scheduler for a flow-matching model, with the model's shift."""
    ours: Any = getattr(classes, class_name, None)
    if ours is not None and issubclass(ours, FlowMatchScheduler):
        return ours.from_config(config, **settings)
    facts = classes.FlowMatchMultistepScheduler.from_config(config).config
    model = {"num_train_timesteps": facts["num_train_timesteps"]}
    if class_name.startswith("FlowMatch"):
        return in_any_pipeline(getattr(diffusers, class_name)(**model, shift=facts["shift"]))
    cls = getattr(diffusers, class_name, None)
    if cls is None or "use_flow_sigmas" not in inspect.signature(cls).parameters:
        raise ValueError(f"{class_name} does not sample flow-matching models.")
    if settings.get("use_karras_sigmas"):
        raise ValueError(f"Karras spacing of {class_name} would replace the flow-matching noise levels.")
    model |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": facts["shift"]}
    return cls(**model, **settings)


def in_any_pipeline(scheduler: Any) -> Any:
    """The same diffusers flow scheduler, with the attributes that pipelines written for betas need."""
    if not hasattr(scheduler, "init_noise_sigma"):
        scheduler.init_noise_sigma = 1.0
    if not hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input = lambda sample, timestep: sample
    return scheduler


def reference_scheduler(config: Mapping[str, Any]) -> Any:
    """The reference scheduler for many steps along a model's ODE: order 3 with trailing spacing.

    Args:
        config: of the model's scheduler.
    """
    name = "FlowMatchMultistepScheduler" if is_flow(config) else "ZeroSNRMultistepScheduler"
    zero = (
        {}
        if is_flow(config)
        else {"rescale_betas_zero_snr": bool(with_class_defaults(config).get("rescale_betas_zero_snr"))}
    )
    return getattr(classes, name).from_config(config, timestep_spacing="trailing", solver_order=3, **zero)
