"""Flow-matching models in pipelines: the scheduler they are loaded with, and that of stock they are saved with."""

import inspect
import re
from typing import Any

from ..guidance.mixin import stock_class
from ..schedulers import FlowMatchMultistepScheduler
from ..schedulers.config import FLOW_FACTS, is_flow
from ..schedulers.flow import FlowMatchScheduler
from ..schedulers.stock import flow_settings, stock_scheduler
from .saved_model import SavedModel

_ASKED, _ASKED_BESIDE_A_UNET = ("init_noise_sigma", "scale_noise"), ("scale_model_input", "add_noise")
"""What pipelines ask of a scheduler beside timesteps and steps. Some for transformers ask for the second pair of some
schedulers only."""


def source_code(pipeline_class: Any) -> str:
    """The code of a pipeline's class; empty where it cannot be had."""
    try:
        return "" if pipeline_class is None else inspect.getsource(pipeline_class)
    except (OSError, TypeError):  # no file beside it
        return ""


def asked_of_scheduler(code: str) -> set[str]:
    """Which of these the code of a pipeline asks for."""
    names = _ASKED + (_ASKED_BESIDE_A_UNET if "self.unet(" in code else ())
    return {name for name in names if re.search(rf"self\.scheduler\.{name}\b", code)}


def not_offered(code: str, scheduler: Any) -> list[str]:
    """What it asks for in vain of this scheduler or class: it would raise at the first call."""
    return sorted(name for name in asked_of_scheduler(code) if not hasattr(scheduler, name))


def is_made_for_betas(pipe: Any) -> bool:
    """Whether a pipeline is one of Stable Diffusion's kind, which scales what its network sees."""
    return "scale_model_input" in asked_of_scheduler(source_code(stock_class(type(pipe))))


def flow_scheduler_for(pipe: Any, saved: SavedModel) -> Any:
    """The scheduler of a pipeline whose model is of flow matching.

    Pipelines for such models keep theirs. Those of Stable Diffusion, which stock's own flow schedulers cannot run and
    its others run on timesteps that are cut to whole numbers, get `FlowMatchMultistepScheduler`.

    Raises:
        ValueError: the pipeline has no scheduler.
    """
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        raise ValueError(f"{type(pipe).__name__} has no scheduler, so prediction_type means nothing to it.")
    keeps = isinstance(scheduler, FlowMatchScheduler) or not is_made_for_betas(pipe)
    if is_flow(scheduler.config) and keeps:
        return scheduler
    facts: dict[str, Any] = {key: saved.schedule[key] for key in FLOW_FACTS if key in saved.schedule}
    if not is_flow(scheduler.config):
        facts["prediction_type"] = "flow_prediction"
    return FlowMatchMultistepScheduler.from_config(scheduler.config, **facts)


def stock_scheduler_for(pipe: Any) -> Any:
    """The scheduler of stock that stands in for that of a pipeline, so that it opens without this package.

    Of betas see `stock_scheduler`; one of stock stays. Of flow matching it is `FlowMatchEulerDiscreteScheduler` of the
    same shift where the pipeline can run it, and in those of Stable Diffusion, which cannot, `UniPCMultistepScheduler`
    over flow times.

    Raises:
        ValueError: none is the same model's.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler  # these import scipy

    ours = pipe.scheduler
    if not isinstance(ours, FlowMatchScheduler):
        return stock_scheduler(ours)
    config, code = ours.config, source_code(stock_class(type(pipe)))
    euler = not not_offered(code, FlowMatchEulerDiscreteScheduler())
    needed = (
        {"prediction_type": "flow_prediction"} if euler else {"invert_sigmas": False, "stochastic_sampling": False}
    )
    if foreign := [f"{key}={config[key]!r}" for key, value in needed.items() if config[key] != value]:
        raise ValueError(
            f"{foreign[0]} of {type(ours).__name__} has no stock scheduler to stand in for it in "
            f"{type(pipe).__name__}; set the pipeline's scheduler to one of stock first."
        )
    if euler:
        facts = {key: config[key] for key in FLOW_FACTS if key in config and key != "prediction_type"}
        return FlowMatchEulerDiscreteScheduler(**facts)
    return UniPCMultistepScheduler(**flow_settings(config["shift"], len(ours), config["prediction_type"]))
