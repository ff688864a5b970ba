"""Guidance rescale, kept low frequencies, and any guider of diffusers, in any pipeline that guides.

No `__call__` is copied.

The mixin wraps a pipeline's call. While it runs, `intercept` records the denoiser's predictions and changes the input
of the scheduler's step.
"""

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..core.choices import DEFAULT_GUIDANCE_RESCALE, check_guidance_rescale, check_keep_low_frequencies
from ..core.guidance import check_guidance_space
from ..utils.added_mixins import add_mixin, plain_class, remove_mixin
from .checks import check_guider, check_has_guidance, warn_about_zero_init
from .intercept import GuidanceInterceptor, GuidanceSettings
from .layout import find_denoisers
from .record import record_of_pipeline, recorded_guidance

Pipeline = TypeVar("Pipeline")


class GuidanceRescaleMixin:
    """Adds `guidance_rescale` to a diffusers pipeline class; list it first among the bases.

    ```python
    class MyPipeline(GuidanceRescaleMixin, StableDiffusionImg2ImgPipeline): ...
    ```

    A call accepts three additional arguments, for this call only:

    - `guidance_rescale`: phi of Lin et al. 2023, Algorithm 2, 0 to 1.
    - `keep_low_frequencies`: k: guidance does not change the lowest k x k frequencies, see `enable_guidance_rescale`.
    - `guider`: combines the predictions instead of the pipeline, see `enable_guidance_rescale`.

    With the first two at 0 and no guider, the pipeline equals diffusers' bit for bit. Without these arguments,
    `default_guidance_rescale`, `default_keep_low_frequencies` and `default_guider` apply. A saved pipeline has the
    name of its diffusers class, so that it opens without this package, and records both settings, which
    `load_pipeline` and the `from_pretrained` of a class with this mixin apply again.
    """

    default_guidance_rescale: float = 0.0
    default_keep_low_frequencies: int = 0
    default_guider: Any = None
    guidance_space: str = "output"
    strict_guidance: bool = False
    saved_under_stock_name = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if GuidanceRescaleMixin in cls.__bases__:  # subclasses inherit a call that is already wrapped
            check_has_guidance(cls)
            cls.__call__ = _wrap_call(cls.__call__)  # type: ignore[method-assign]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load as diffusers does; `guidance_rescale` and `keep_low_frequencies`, given or recorded, become defaults.

        Args:
            pretrained_model_name_or_path: as in diffusers.
            kwargs: as in diffusers, and `guidance_rescale` and `keep_low_frequencies`.

        Raises:
            ValueError: phi outside [0, 1] or k no count, given or recorded.
        """
        given = {name: kwargs.pop(name, None) for name in ("guidance_rescale", "keep_low_frequencies")}
        check_guidance_rescale(given["guidance_rescale"] or 0.0)
        check_keep_low_frequencies(given["keep_low_frequencies"] or 0)
        recorded = recorded_guidance(cls.load_config(pretrained_model_name_or_path, **kwargs))  # type: ignore[attr-defined]
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        return apply_guidance(pipe, recorded, **given)

    def to_json_string(self) -> str:
        """The pipeline's config with the name of its diffusers class and its recorded guidance."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config["_class_name"] = stock_class(type(self)).__name__
        config |= record_of_pipeline(self)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _wrap_call(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a pipeline's `__call__` to take and apply `guidance_rescale`, `keep_low_frequencies` and `guider`."""
    stock_on = [
        name
        for name, parameter in inspect.signature(call).parameters.items()
        if name.endswith("guidance_rescale") and isinstance(parameter.default, float) and parameter.default > 0
    ]
    off = dict.fromkeys(stock_on, 0.0)  # the default in diffusers

    @functools.wraps(call)
    def __call__(  # noqa: N807
        self: Any,
        *args: Any,
        guidance_rescale: float | None = None,
        keep_low_frequencies: int | None = None,
        guider: Any = None,
        **kwargs: Any,
    ) -> Any:
        phi = self.default_guidance_rescale if guidance_rescale is None else guidance_rescale
        k = self.default_keep_low_frequencies if keep_low_frequencies is None else keep_low_frequencies
        guider = self.default_guider if guider is None else guider
        check_guidance_rescale(phi)
        check_keep_low_frequencies(k)
        if guider is not None:
            check_guider(guider, phi, k)
            warn_about_zero_init(guider, self)
        if phi == 0 and k == 0 and guider is None:
            return call(self, *args, **(kwargs if guidance_rescale is None else off | kwargs))
        with GuidanceInterceptor(self, GuidanceSettings(phi, self.guidance_space, guider, self.strict_guidance, k)):
            return call(self, *args, **off | kwargs)

    __call__.__signature__ = _add_guidance_parameters(inspect.signature(call))  # type: ignore[attr-defined]
    return __call__


def _add_guidance_parameters(signature: inspect.Signature) -> inspect.Signature:
    """A pipeline call's signature with this package's arguments added where missing."""
    parameters = list(signature.parameters.values())
    ours = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in ("guidance_rescale", "keep_low_frequencies", "guider")
        if name not in signature.parameters
    ]
    takes_any = bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    return signature.replace(
        parameters=[*parameters, *ours] if not takes_any else [*parameters[:-1], *ours, parameters[-1]]
    )


def stock_class(pipeline_class: type) -> type:
    """The class under whose name a pipeline is saved.

    For an enabled pipeline, its class before it was enabled; for a class with one of our mixins, its diffusers base
    class, or else itself.
    """
    pipeline_class = plain_class(pipeline_class)
    if not hasattr(pipeline_class, "saved_under_stock_name"):
        return pipeline_class
    stock = next(base for base in pipeline_class.__mro__ if base.__module__.startswith("diffusers."))
    return pipeline_class if stock.__name__ == "DiffusionPipeline" else stock


def apply_guidance(
    pipe: Pipeline,
    recorded: Mapping[str, Any],
    guidance_rescale: float | None = None,
    keep_low_frequencies: int | None = None,
) -> Pipeline:
    """Enable the guidance recorded for a saved pipeline; given values override recorded ones."""
    settings = {"guidance_rescale": guidance_rescale, "keep_low_frequencies": keep_low_frequencies}
    given = {name: value for name, value in settings.items() if value is not None}
    if not recorded and not given:
        return pipe
    own = {name: getattr(pipe, f"default_{name}", 0) for name in settings}
    return enable_guidance_rescale(pipe, **{**own, **recorded, **given})


def enable_guidance_rescale(
    pipe: Pipeline,
    guidance_rescale: float | None = None,
    *,
    keep_low_frequencies: int = 0,
    space: str = "output",
    guider: Any = None,
    strict: bool = False,
) -> Pipeline:
    """Enable guidance rescale for all following calls of a pipeline, even if its class does not support it.

    The pipeline keeps its components, hooks and class name on disk. In a call, `guidance_rescale=`,
    `keep_low_frequencies=` and `guider=` override these settings; the first replaces a pipeline's own argument of this
    name.

    Works if the pipeline passes a weighted sum of its UNet's or transformer's predictions to the scheduler, made in
    one batch or in separate calls, with any sign and scale. Otherwise, a warning is logged once and nothing is
    changed.

    Args:
        pipe: a diffusers pipeline with classifier-free guidance.
        guidance_rescale: the paper's phi, 0 to 1 (Lin et al. 2023, arXiv:2305.08891, Algorithm 2); 0.7 by default, 0
            with a guider.
        keep_low_frequencies: k, at least 0. After guidance and rescale, the lowest k x k frequencies of every image or
            frame become those of the conditional prediction, so that guidance cannot exaggerate brightness and layout;
            see `zsnr_diffusers.core.low_frequencies`. 0 is off. Sound generated with a video is not changed.
        space: where to rescale: the network's `output` (as in the paper and in diffusers), `v`, `epsilon` or `x_0`.
        guider: an object of `diffusers.guiders`, which combines the predictions instead of the pipeline. Its guidance
            scale is used; the pipeline's must be above 1, so that there are two predictions.
        strict: raise a `GuidanceError` instead of a warning if guidance cannot be changed.

    Returns:
        The same pipeline.

    Raises:
        TypeError: the pipeline has no denoiser or no guidance; the guider needs more than two predictions.
        ValueError: guidance_rescale outside [0, 1], an invalid keep_low_frequencies, unknown space, or a setting both
            here and in the guider. A call raises it if keep_low_frequencies is above 0 and predictions have no height
            and width, such as the packed tokens of Flux.
    """
    phi = (0.0 if guider is not None else DEFAULT_GUIDANCE_RESCALE) if guidance_rescale is None else guidance_rescale
    check_guidance_rescale(phi)
    check_keep_low_frequencies(keep_low_frequencies)
    check_guidance_space(space)
    if guider is not None:
        check_guider(guider, phi, keep_low_frequencies)
    if not hasattr(pipe, "__dict__") or not find_denoisers(pipe):
        raise TypeError(
            f"{type(pipe).__name__} has neither a UNet nor a transformer whose predictions could be rescaled."
        )
    add_mixin(pipe, GuidanceRescaleMixin)
    chosen = {"default_guidance_rescale": phi, "default_keep_low_frequencies": int(keep_low_frequencies)}
    vars(pipe).update(chosen, guidance_space=space, default_guider=guider, strict_guidance=strict)
    return pipe


def disable_guidance_rescale(pipe: Pipeline) -> Pipeline:
    """Undo `enable_guidance_rescale`: the pipeline has its own class again.

    A pipeline whose class uses `GuidanceRescaleMixin` keeps it, and by default guides as diffusers does.

    Returns:
        The same pipeline.
    """
    defaults = ("default_guidance_rescale", "default_keep_low_frequencies", "default_guider")
    for name in (*defaults, "guidance_space", "strict_guidance"):
        vars(pipe).pop(name, None)
    if not remove_mixin(pipe, GuidanceRescaleMixin) and isinstance(pipe, GuidanceRescaleMixin):
        pipe.default_guidance_rescale, pipe.default_keep_low_frequencies = 0.0, 0
    return pipe
