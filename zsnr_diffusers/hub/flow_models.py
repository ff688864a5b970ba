"""Flow-matching models in pipelines: the scheduler they are loaded with, and the diffusers scheduler they are saved
with.
"""

import inspect
import re
from typing import Any

from ..guidance.mixin import stock_class
from ..schedulers import FlowMatchMultistepScheduler
from ..schedulers.config import FLOW_FACTS, is_flow
from ..schedulers.flow import FlowMatchScheduler
from ..schedulers.stock import stock_scheduler, unipc_flow_config
from .saved_model import SavedModel

_ASKED, _ASKED_BESIDE_A_UNET = ("init_noise_sigma", "scale_noise"), ("scale_model_input", "add_noise")
"""Scheduler attributes that pipelines use besides timesteps and `step`. Some transformer pipelines use the second pair
only with some schedulers.
"""


def pipeline_source_code(pipeline_class: Any) -> str:
    """Source code of a pipeline's class; empty if unavailable."""
    try:
        return "" if pipeline_class is None else inspect.getsource(pipeline_class)
    except (OSError, TypeError):  # no source file
        return ""


def required_scheduler_attributes(code: str) -> set[str]:
    """Scheduler attributes besides timesteps and `step` that a pipeline's source code uses."""
    names = _ASKED + (_ASKED_BESIDE_A_UNET if "self.unet(" in code else ())
    return {name for name in names if re.search(rf"self\.scheduler\.{name}\b", code)}


def missing_scheduler_attributes(code: str, scheduler: Any) -> list[str]:
    """Attributes that a pipeline's source code uses but this scheduler lacks, sorted; the first call would raise."""
    return sorted(name for name in required_scheduler_attributes(code) if not hasattr(scheduler, name))


def is_made_for_betas(pipe: Any) -> bool:
    """Whether a loaded pipeline was written for schedulers with betas, so that a flow model needs a compatible
    scheduler.
    """
    return "scale_model_input" in required_scheduler_attributes(pipeline_source_code(stock_class(type(pipe))))


def flow_scheduler_for(pipe: Any, saved: SavedModel) -> Any:
    """The scheduler to load a flow-matching model's pipeline with.

    Pipelines for such models keep theirs. Stable Diffusion pipelines get `FlowMatchMultistepScheduler`: they cannot
    run diffusers' flow schedulers, and diffusers' other schedulers truncate timesteps to integers.

    Raises:
        ValueError: the pipeline has no scheduler.
    """
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        raise ValueError(f"{type(pipe).__name__} has no scheduler, so prediction_type has no meaning for it.")
    keeps = isinstance(scheduler, FlowMatchScheduler) or not is_made_for_betas(pipe)
    if is_flow(scheduler.config) and keeps:
        return scheduler
    facts: dict[str, Any] = {key: saved.schedule[key] for key in FLOW_FACTS if key in saved.schedule}
    if not is_flow(scheduler.config):
        facts["prediction_type"] = "flow_prediction"
    return FlowMatchMultistepScheduler.from_config(scheduler.config, **facts)


def stock_scheduler_for(pipe: Any) -> Any:
    """The diffusers scheduler to save a pipeline with, so that it opens without this package.

    For models with betas see `stock_scheduler`; a diffusers scheduler is kept. For flow matching it is
    `FlowMatchEulerDiscreteScheduler` with the same shift if the pipeline supports it, and `UniPCMultistepScheduler`
    with flow times in Stable Diffusion pipelines, which do not.

    Raises:
        ValueError: no diffusers scheduler samples this model.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler  # these import scipy

    ours = pipe.scheduler
    if not isinstance(ours, FlowMatchScheduler):
        return stock_scheduler(ours)
    config, code = ours.config, pipeline_source_code(stock_class(type(pipe)))
    euler = not missing_scheduler_attributes(code, FlowMatchEulerDiscreteScheduler())
    needed = (
        {"prediction_type": "flow_prediction"} if euler else {"invert_sigmas": False, "stochastic_sampling": False}
    )
    if foreign := [f"{key}={config[key]!r}" for key, value in needed.items() if config[key] != value]:
        raise ValueError(
            f"{foreign[0]} of {type(ours).__name__} has no equivalent diffusers scheduler in {type(pipe).__name__}; "
            "replace the pipeline's scheduler with a diffusers scheduler first."
        )
    if euler:
        facts = {key: config[key] for key in FLOW_FACTS if key in config and key != "prediction_type"}
        return FlowMatchEulerDiscreteScheduler(**facts)
    return UniPCMultistepScheduler(**unipc_flow_config(config["shift"], len(ours), config["prediction_type"]))
