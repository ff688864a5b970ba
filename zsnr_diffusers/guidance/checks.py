"""What has to hold before a pipeline's guidance is changed: it guides, and a guider can work on what it predicts."""

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
    """Refuse a guider that cannot work on the two predictions that a pipeline makes.

    Raises:
        TypeError: it has not the interface of diffusers' guiders, or needs a forward pass of its own.
        ValueError: both it and the pipeline would rescale, or keep low frequencies.
    """
    name = type(guider).__name__
    if not callable(guider) or not hasattr(guider, "set_state") or not hasattr(guider, "prepare_inputs"):
        raise TypeError(
            f"guider={guider!r} has not the interface of diffusers.guiders, such as ClassifierFreeGuidance."
        )
    needed = [*(getattr(guider, "_input_predictions", None) or ())]
    if any(prediction not in ("pred_cond", "pred_uncond") for prediction in needed):
        raise TypeError(f"{name} needs the predictions {', '.join(needed)}; a pipeline makes the first two alone.")
    if any("prepare_models" in vars(base) for base in type(guider).__mro__ if base.__name__ != "BaseGuidance"):
        raise TypeError(f"{name} changes the network for a forward pass of its own, which a pipeline does not make.")
    for setting, ours, effect in (
        ("guidance_rescale", guidance_rescale, "which would rescale twice"),
        ("keep_low_frequencies", keep_low_frequencies, "of which the larger would act"),
    ):
        theirs = getattr(guider, setting, 0)
        if ours > 0 and theirs > 0:
            raise ValueError(f"{name} has {setting}={theirs} and the pipeline {ours}, {effect}; set one of them to 0.")


def warn_about_zero_init(guider: Any, pipe: Any) -> None:
    """Warn that CFG-Zero*'s zeroed first steps delete what a zero-SNR model decides there: the brightness."""
    steps = getattr(guider, "zero_init_steps", 0)
    table = getattr(getattr(pipe, "scheduler", None), "alphas_cumprod", None)
    if steps and table is not None and has_zero_terminal_snr(table):
        warn_once(
            pipe,
            f"{type(guider).__name__} replaces the first prediction by zero (zero_init_steps={steps}). On a zero-SNR "
            "schedule that one decides how dark or bright the image is: pass zero_init_steps=0.",
        )
