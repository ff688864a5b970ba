"""Checks before a pipeline's guidance is changed: it must use guidance, and a guider must support it."""

import inspect
from typing import Any

from ..core.noise import has_zero_terminal_snr
from .intercept import warn_once


def has_guidance(pipeline_class: type) -> bool:
    """Whether a pipeline class has classifier-free guidance: a scale in its call, or a guider among its components."""
    call = inspect.signature(pipeline_class.__call__).parameters
    components = inspect.signature(pipeline_class).parameters
    return "guider" in components or any("guidance_scale" in name or "cfg_scale" in name for name in call)


def check_has_guidance(pipeline_class: type) -> None:
    """Refuse a pipeline class without classifier-free guidance.

    Raises:
        TypeError: with the reason.
    """
    if not has_guidance(pipeline_class):
        raise TypeError(f"{pipeline_class.__name__} has no classifier-free guidance that could be rescaled.")


def check_guider(guider: Any, guidance_rescale: float = 0.0, keep_low_frequencies: int = 0) -> None:
    """Refuse a guider that does not work with the two predictions of a pipeline.

    Raises:
        TypeError: it does not have the interface of diffusers' guiders, or needs additional forward passes.
        ValueError: both it and the pipeline would rescale, or keep low frequencies.
    """
    name = type(guider).__name__
    if not callable(guider) or not hasattr(guider, "set_state") or not hasattr(guider, "prepare_inputs"):
        raise TypeError(
            f"guider={guider!r} does not have the interface of diffusers.guiders, such as ClassifierFreeGuidance."
        )
    needed = [*(getattr(guider, "_input_predictions", None) or ())]
    if any(prediction not in ("pred_cond", "pred_uncond") for prediction in needed):
        raise TypeError(f"{name} needs the predictions {', '.join(needed)}; a pipeline provides only the first two.")
    if any("prepare_models" in vars(base) for base in type(guider).__mro__ if base.__name__ != "BaseGuidance"):
        raise TypeError(
            f"{name} needs an additional forward pass with a modified network, which a pipeline does not make."
        )
    for setting, ours, effect in (
        ("guidance_rescale", guidance_rescale, "which would rescale twice"),
        ("keep_low_frequencies", keep_low_frequencies, "of which only the larger would have an effect"),
    ):
        theirs = getattr(guider, setting, 0)
        if ours > 0 and theirs > 0:
            raise ValueError(f"{name} has {setting}={theirs} and the pipeline {ours}, {effect}; set one of them to 0.")


def warn_about_zero_init(guider: Any, pipe: Any) -> None:
    """Warn that CFG-Zero*'s zeroed first steps discard the brightness, which a zero-SNR model determines there."""
    steps = getattr(guider, "zero_init_steps", 0)
    table = getattr(getattr(pipe, "scheduler", None), "alphas_cumprod", None)
    if steps and table is not None and has_zero_terminal_snr(table):
        warn_once(
            pipe,
            f"{type(guider).__name__} replaces the first prediction with zero (zero_init_steps={steps}). With a "
            "zero-SNR schedule, this prediction determines how dark or bright the image is: pass zero_init_steps=0.",
        )
