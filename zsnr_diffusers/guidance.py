"""Guidance rescale for diffusers pipelines, without a copy of any `__call__`.

A pipeline calls its denoiser on a stacked batch [unconditional, conditional] and combines the halves itself, as
`u + w (c - u)`. A forward hook on the denoiser, there only while the pipeline runs, computes the rescaled guided
prediction r and returns [r, r]: the pipeline's own combination of the two is then exactly r.
"""

import functools
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .core import classifier_free_guidance, rescale_guidance
from .core.guidance import check_guidance_rescale

Pipeline = TypeVar("Pipeline")

DEFAULT_GUIDANCE_RESCALE = 0.7
"""The paper's choice at guidance scale 7.5 (Lin et al. 2023, arXiv:2305.08891, section 3.4)."""


class GuidanceRescaleMixin:
    """Gives a diffusers pipeline `guidance_rescale`; stands before the pipeline's class among the bases.

    ```python
    class MyPipeline(GuidanceRescaleMixin, StableDiffusionImg2ImgPipeline): ...
    ```

    A call takes `guidance_rescale=` beside the pipeline's own arguments (Lin et al. 2023, Algorithm 2; 0 to 1);
    without it, the pipeline's `default_guidance_rescale` holds. At 0 nothing is hooked and the pipeline is stock's,
    bit for bit.

    The pipeline's denoiser must see one stacked batch [unconditional, conditional] per step.
    """

    default_guidance_rescale: float = 0.0
    unet: nn.Module

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if GuidanceRescaleMixin in cls.__bases__:  # a class further down inherits a call that is wrapped already
            check_supported(cls)
            cls.__call__ = _rescaled(cls.__call__)  # type: ignore[method-assign]

    def to_json_string(self) -> str:
        """The pipeline's config under the name of its stock class, so that a saved pipeline opens without us."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config["_class_name"] = stock_class(type(self)).__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def _rescaling(self, guidance_rescale: float) -> AbstractContextManager[Any]:
        if guidance_rescale == 0:
            return nullcontext()
        return self.unet.register_forward_hook(functools.partial(_rescale_output, self, guidance_rescale))


def _rescaled(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` with `guidance_rescale` taken out of its arguments and applied by us."""

    @functools.wraps(call)
    def __call__(self: Any, *args: Any, guidance_rescale: float | None = None, **kwargs: Any) -> Any:  # noqa: N807
        phi = self.default_guidance_rescale if guidance_rescale is None else guidance_rescale
        check_guidance_rescale(phi)
        with self._rescaling(phi):
            return call(self, *args, **kwargs)

    return __call__


def _rescale_output(pipe: Any, guidance_rescale: float, unet: nn.Module, inputs: Any, output: Any) -> Any:
    """Forward hook: [u, c] to [r, r] while the pipeline guides, in the shape that the denoiser returned."""
    if not pipe.do_classifier_free_guidance:
        return None
    stacked: Tensor = output[0]
    unconditional, conditional = stacked.chunk(2)
    guided = classifier_free_guidance(unconditional, conditional, pipe.guidance_scale)
    both = torch.cat([rescale_guidance(guided, conditional, guidance_rescale)] * 2)
    return (both, *output[1:]) if isinstance(output, tuple) else type(output)(sample=both)


def stock_class(pipeline_class: type) -> type:
    """The diffusers class that a pipeline class of ours is built on."""
    return next(base for base in pipeline_class.__mro__ if base.__module__.startswith("diffusers."))


def check_supported(pipeline_class: type) -> None:
    """Refuse a pipeline whose denoiser does not see a stacked [unconditional, conditional] batch.

    Raises:
        TypeError: with the reason.
    """
    name = pipeline_class.__name__
    if not hasattr(pipeline_class, "do_classifier_free_guidance") or not hasattr(pipeline_class, "guidance_scale"):
        raise TypeError(f"{name} has no classifier-free guidance that could be rescaled.")
    if hasattr(pipeline_class, "image_guidance_scale"):
        raise TypeError(f"{name} guides with three predictions; guidance rescale knows how to combine two.")


def enable_guidance_rescale(pipe: Pipeline, guidance_rescale: float = DEFAULT_GUIDANCE_RESCALE) -> Pipeline:
    """Rescale the guidance of a pipeline from now on, whatever its class offers by itself.

    The pipeline keeps its identity: components, hooks, class name on disk. `guidance_rescale=` in a call overrides the
    value given here, and replaces that of pipelines which have an argument of this name.

    Args:
        pipe: a diffusers pipeline with classifier-free guidance over one UNet call.
        guidance_rescale: the paper's phi, 0 to 1 (Lin et al. 2023, arXiv:2305.08891, Algorithm 2).

    Returns:
        The same pipeline.

    Raises:
        TypeError: the pipeline does not guide with two predictions from one call.
        ValueError: phi outside [0, 1].
    """
    check_guidance_rescale(guidance_rescale)
    if not isinstance(getattr(pipe, "unet", None), nn.Module):
        raise TypeError(f"{type(pipe).__name__} has no UNet whose predictions could be rescaled.")
    if not isinstance(pipe, GuidanceRescaleMixin):
        stock = type(pipe)
        # Named like its base: the name is what diffusers writes to model_index.json and shows in messages.
        namespace = {"__module__": stock.__module__, "_without_rescale": stock}
        pipe.__class__ = type(stock.__name__, (GuidanceRescaleMixin, stock), namespace)
    pipe.default_guidance_rescale = guidance_rescale  # type: ignore[attr-defined]
    return pipe


def disable_guidance_rescale(pipe: Pipeline) -> Pipeline:
    """Undo `enable_guidance_rescale`: the pipeline is of its own class again.

    A pipeline of a class made with `GuidanceRescaleMixin` stays one and guides without rescale by default.

    Returns:
        The same pipeline.
    """
    stock = getattr(type(pipe), "_without_rescale", None)
    if stock is not None:
        del pipe.default_guidance_rescale  # type: ignore[attr-defined]
        pipe.__class__ = stock
    elif isinstance(pipe, GuidanceRescaleMixin):
        pipe.default_guidance_rescale = 0.0
    return pipe
