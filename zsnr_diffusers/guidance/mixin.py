"""Guidance rescale, and any guider of diffusers, in any pipeline that guides; no `__call__` is copied.

The mixin wraps a pipeline's call. While it runs, `intercept` watches what the denoiser predicts and changes what goes
into the scheduler's step.
"""

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..core.guidance import check_guidance_rescale, check_guidance_space
from ..utils.added_mixins import add_mixin, plain_class, remove_mixin
from .intercept import GuidanceInterceptor, GuidanceSettings, warn_once
from .layout import find_denoisers

Pipeline = TypeVar("Pipeline")

DEFAULT_GUIDANCE_RESCALE = 0.7
"""The paper's choice at guidance scale 7.5 (Lin et al. 2023, arXiv:2305.08891, section 3.4)."""

RECORDED = "_guidance_rescale"
"""Where `model_index.json` holds phi. Stock loaders ignore names with an underscore."""

RECORDED_SPACE = "_guidance_rescale_space"


class GuidanceRescaleMixin:
    """Gives a diffusers pipeline `guidance_rescale`; stands before the pipeline's class among the bases.

    ```python
    class MyPipeline(GuidanceRescaleMixin, StableDiffusionImg2ImgPipeline): ...
    ```

    A call takes two more arguments beside the pipeline's own, for this call alone:

    - `guidance_rescale`: phi of Lin et al. 2023, Algorithm 2, 0 to 1. At 0 the pipeline is stock's, bit for bit.
    - `guider`: combines the predictions in place of the pipeline, see `enable_guidance_rescale`.

    Without them `default_guidance_rescale` and `default_guider` hold. A saved pipeline has the name of its stock
    class, so that it opens without this package, and phi beside it, which `load_pipeline` and the `from_pretrained`
    of a class with this mixin apply again.
    """

    default_guidance_rescale: float = 0.0
    default_guider: Any = None
    guidance_space: str = "output"
    strict_guidance: bool = False
    saved_under_stock_name = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if GuidanceRescaleMixin in cls.__bases__:  # a class further down inherits a call that is wrapped already
            check_has_guidance(cls)
            cls.__call__ = _wrap_call(cls.__call__)  # type: ignore[method-assign]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load as stock does; then `guidance_rescale`, if given, or what was recorded, becomes the default.

        Args:
            pretrained_model_name_or_path: as in diffusers.
            kwargs: as in diffusers, and `guidance_rescale`.

        Raises:
            ValueError: phi outside [0, 1], given or recorded.
        """
        given = kwargs.pop("guidance_rescale", None)
        check_guidance_rescale(given or 0.0)
        recorded = recorded_guidance(cls.load_config(pretrained_model_name_or_path, **kwargs))  # type: ignore[attr-defined]
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        return apply_guidance(pipe, recorded, given)

    def to_json_string(self) -> str:
        """The pipeline's config under the name of its stock class, with guidance rescale and space recorded."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config["_class_name"] = stock_class(type(self)).__name__
        config |= guidance_record(self.default_guidance_rescale, self.guidance_space)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _wrap_call(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a pipeline's `__call__` to take and apply `guidance_rescale` and `guider`."""
    stock_on = [
        name
        for name, parameter in inspect.signature(call).parameters.items()
        if name.endswith("guidance_rescale") and isinstance(parameter.default, float) and parameter.default > 0
    ]
    off = dict.fromkeys(stock_on, 0.0)  # what stock does unless it is told not to

    @functools.wraps(call)
    def __call__(  # noqa: N807
        self: Any, *args: Any, guidance_rescale: float | None = None, guider: Any = None, **kwargs: Any
    ) -> Any:
        phi = self.default_guidance_rescale if guidance_rescale is None else guidance_rescale
        guider = self.default_guider if guider is None else guider
        check_guidance_rescale(phi)
        if guider is not None:
            check_guider(guider, phi)
            warn_about_zero_init(guider, self)
        if phi == 0 and guider is None:
            return call(self, *args, **(kwargs if guidance_rescale is None else off | kwargs))
        with GuidanceInterceptor(self, GuidanceSettings(phi, self.guidance_space, guider, self.strict_guidance)):
            return call(self, *args, **off | kwargs)

    __call__.__signature__ = _add_guidance_parameters(inspect.signature(call))  # type: ignore[attr-defined]
    return __call__


def _add_guidance_parameters(signature: inspect.Signature) -> inspect.Signature:
    """A pipeline call's signature with `guidance_rescale` and `guider` added where missing."""
    parameters = list(signature.parameters.values())
    ours = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in ("guidance_rescale", "guider")
        if name not in signature.parameters
    ]
    takes_any = bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    return signature.replace(
        parameters=[*parameters, *ours] if not takes_any else [*parameters[:-1], *ours, parameters[-1]]
    )


def stock_class(pipeline_class: type) -> type:
    """The class under whose name a pipeline is saved.

    That of an enabled pipeline before it was enabled; of a class with a mixin of ours, the one of diffusers that it is
    built on, or else itself.
    """
    pipeline_class = plain_class(pipeline_class)
    if not hasattr(pipeline_class, "saved_under_stock_name"):
        return pipeline_class
    stock = next(base for base in pipeline_class.__mro__ if base.__module__.startswith("diffusers."))
    return pipeline_class if stock.__name__ == "DiffusionPipeline" else stock


def guidance_record(guidance_rescale: float, space: str = "output") -> dict[str, Any]:
    """Config entries by which the mixin keeps a pipeline's guidance rescale and space when saved; none if it is 0."""
    if guidance_rescale == 0:
        return {}
    return {RECORDED: guidance_rescale} | ({} if space == "output" else {RECORDED_SPACE: space})


def recorded_guidance(config: Mapping[str, Any]) -> dict[str, Any]:
    """Guidance settings recorded in a saved pipeline's config, as arguments of `enable_guidance_rescale`.

    Raises:
        ValueError: what it says cannot be applied.
    """
    if RECORDED not in config:
        return {}
    recorded = {"guidance_rescale": config[RECORDED], "space": config.get(RECORDED_SPACE, "output")}
    check_guidance_rescale(recorded["guidance_rescale"])
    check_guidance_space(recorded["space"])
    return recorded


def apply_guidance(pipe: Pipeline, recorded: Mapping[str, Any], guidance_rescale: float | None) -> Pipeline:
    """Enable the guidance rescale recorded for a saved pipeline, or the given phi in its place."""
    given = {} if guidance_rescale is None else {"guidance_rescale": guidance_rescale}
    settings = {**recorded, **given}
    return enable_guidance_rescale(pipe, **settings) if settings else pipe


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


def check_guider(guider: Any, guidance_rescale: float = 0.0) -> None:
    """Refuse a guider that cannot work on the two predictions that a pipeline makes.

    Raises:
        TypeError: it has not the interface of diffusers' guiders, or needs a forward pass of its own.
        ValueError: both it and the pipeline would rescale.
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
    if guidance_rescale > 0 and getattr(guider, "guidance_rescale", 0) > 0:
        raise ValueError(
            f"{name} has guidance_rescale={guider.guidance_rescale} and the pipeline {guidance_rescale}, which would "
            "rescale twice; set one of them to 0."
        )


def warn_about_zero_init(guider: Any, pipe: Any) -> None:
    """Warn that CFG-Zero*'s zeroed first steps delete what a zero-SNR model decides there: the brightness."""
    steps = getattr(guider, "zero_init_steps", 0)
    table = getattr(getattr(pipe, "scheduler", None), "alphas_cumprod", None)
    if steps and table is not None and float(table[-1]) < 1e-6:  # stock writes zero SNR as 2^-24
        warn_once(
            pipe,
            f"{type(guider).__name__} replaces the first prediction by zero (zero_init_steps={steps}). On a zero-SNR "
            "schedule that one decides how dark or bright the image is: pass zero_init_steps=0.",
        )


def enable_guidance_rescale(
    pipe: Pipeline,
    guidance_rescale: float | None = None,
    *,
    space: str = "output",
    guider: Any = None,
    strict: bool = False,
) -> Pipeline:
    """Rescale the guidance of a pipeline from now on, whatever its class offers by itself.

    The pipeline keeps its identity: components, hooks, class name on disk. In a call, `guidance_rescale=` and
    `guider=` override what is given here; the first replaces that of pipelines which have an argument of this name.

    Works where what the pipeline hands to its scheduler is a weighted sum of what its UNet or transformer predicted
    for the step, in one batch or in calls of their own, whatever sign and length the sum is given. Where that turns
    out not to be so, this is said once and nothing is changed.

    Args:
        pipe: a diffusers pipeline with classifier-free guidance.
        guidance_rescale: the paper's phi, 0 to 1 (Lin et al. 2023, arXiv:2305.08891, Algorithm 2); 0.7 unless given,
            0 with a guider.
        space: what is rescaled: the network's `output` (the paper, and stock), or what it says of `v`, of the noise
            (`epsilon`) or of the image (`x_0`).
        guider: an object of `diffusers.guiders`, which combines the predictions in place of the pipeline. Its own
            guidance scale counts; the pipeline's has to be above 1 for there to be two predictions.
        strict: raise a `GuidanceError` rather than say that nothing can be done.

    Returns:
        The same pipeline.

    Raises:
        TypeError: the pipeline has no denoiser or no guidance; the guider needs more than two predictions.
        ValueError: phi outside [0, 1], unknown space, or phi both here and in the guider.
    """
    phi = (0.0 if guider is not None else DEFAULT_GUIDANCE_RESCALE) if guidance_rescale is None else guidance_rescale
    check_guidance_rescale(phi)
    check_guidance_space(space)
    if guider is not None:
        check_guider(guider, phi)
    if not hasattr(pipe, "__dict__") or not find_denoisers(pipe):
        raise TypeError(
            f"{type(pipe).__name__} has neither a UNet nor a transformer whose predictions could be rescaled."
        )
    add_mixin(pipe, GuidanceRescaleMixin)
    chosen = {"default_guidance_rescale": phi, "guidance_space": space}
    vars(pipe).update(chosen, default_guider=guider, strict_guidance=strict)
    return pipe


def disable_guidance_rescale(pipe: Pipeline) -> Pipeline:
    """Undo `enable_guidance_rescale`: the pipeline is of its own class again.

    A pipeline of a class made with `GuidanceRescaleMixin` stays one and guides without rescale by default.

    Returns:
        The same pipeline.
    """
    for name in ("default_guidance_rescale", "guidance_space", "default_guider", "strict_guidance"):
        vars(pipe).pop(name, None)
    if not remove_mixin(pipe, GuidanceRescaleMixin) and isinstance(pipe, GuidanceRescaleMixin):
        pipe.default_guidance_rescale = 0.0
    return pipe
