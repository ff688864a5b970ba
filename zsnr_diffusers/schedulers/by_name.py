"""A scheduler for a model, by the name that people call it."""

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
"""Classes with settings, by short names; those that begin with `zsnr` are of this package."""

_FLOW_CLASSES = {
    "ZeroSNRMultistepScheduler": "FlowMatchMultistepScheduler",
    "ZeroSNRDDIMScheduler": "FlowMatchEulerScheduler",
    "EulerDiscreteScheduler": "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler": "FlowMatchHeunDiscreteScheduler",
}
"""What a short name means for a flow-matching model, where that is another class."""


def check_scheduler_names(names: Iterable[str]) -> None:
    """Refuse names that are neither in `SHORT_NAMES` nor those of scheduler classes, ours or diffusers'.

    Raises:
        ValueError: with the name and the most similar one.
    """
    stock = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    known = [*SHORT_NAMES, *our_names, *stock]
    for name in names:
        if name not in known:
            short = ", ".join(SHORT_NAMES)
            raise ValueError(
                f"there is no scheduler {name}{did_you_mean(nearest(name, known)) or '.'} Short names are {short}; "
                "any scheduler class of diffusers or of this package goes by its own name."
            )


def scheduler_by_name(name: str, config: Mapping[str, Any]) -> Any:
    """Make a scheduler for a model, as one would swap it into the model's pipeline.

    Zero terminal SNR is what the config says. A stock scheduler gets the settings under which it begins at the last
    timestep, `timestep_spacing="trailing"`, and clips x_0 only if the model's own does; over flow times it gets the
    model's shift.

    Args:
        name: one of `SHORT_NAMES`, or of a class of diffusers or of this package.
        config: of the scheduler that the model has, of ours or stock.

    Raises:
        ValueError: an unknown name; a scheduler that cannot sample this model, and what ours say of it.
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
        raise ValueError(f"{class_name} samples flow-matching models, and this one has betas.")
    parameters = inspect.signature(cls).parameters
    facts = {"rescale_betas_zero_snr": zero, "timestep_spacing": "trailing", "clip_sample": bool(clip)}
    return cls.from_config(config, **{key: facts[key] for key in facts if key in parameters}, **settings)


def _flow_scheduler(class_name: str, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """A scheduler for a flow-matching model, at the shift of the model."""
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
        raise ValueError(f"Karras spacing of {class_name} would take the place of flow-matching noise levels.")
    model |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": facts["shift"]}
    return cls(**model, **settings)


def in_any_pipeline(scheduler: Any) -> Any:
    """The same flow scheduler of stock, with what it lacks in pipelines that were written for betas."""
    if not hasattr(scheduler, "init_noise_sigma"):
        scheduler.init_noise_sigma = 1.0
    if not hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input = lambda sample, timestep: sample
    return scheduler


def reference_scheduler(config: Mapping[str, Any]) -> Any:
    """The scheduler that samples a model's ODE in very many steps: of order 3 on trailing steps.

    Args:
        config: of the scheduler that the model has.
    """
    name = "FlowMatchMultistepScheduler" if is_flow(config) else "ZeroSNRMultistepScheduler"
    zero = (
        {}
        if is_flow(config)
        else {"rescale_betas_zero_snr": bool(with_class_defaults(config).get("rescale_betas_zero_snr"))}
    )
    return getattr(classes, name).from_config(config, timestep_spacing="trailing", solver_order=3, **zero)
