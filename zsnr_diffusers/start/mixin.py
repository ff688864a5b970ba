"""A start for any pipeline that creates its latents with `prepare_latents`; no `__call__` is copied.

The mixin wraps two methods: `encode_prompt`, to get the prompt's features, and `prepare_latents`, to add the start to
the noise. Everything else in a call (guidance, adapters, ControlNets, callbacks) is unchanged.
"""

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from diffusers.utils import logging
from huggingface_hub import hf_hub_download
from torch import Tensor

from ..core.noise import has_zero_terminal_snr
from ..guidance.mixin import stock_class
from ..utils.added_mixins import add_mixin, remove_mixin
from .base_check import check_base
from .latents import begins_with_noise, check_levels, pool_prompt, put_in_start
from .start import RECORDED_START, START_FILE, Start

logger = logging.get_logger(__name__)

Pipeline = TypeVar("Pipeline")

_PLACES = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
_prompt: "ContextVar[tuple[int, Tensor | None] | None]" = ContextVar("prompt_of_start", default=None)
"""Features of the last prompt that was encoded in this thread, and the pipeline that encoded it."""


class StartMixin:
    """Adds a start to a diffusers pipeline class; list it first among the bases.

    ```python
    class MyPipeline(StartMixin, StableDiffusionPipeline): ...
    ```

    `default_start` is added to the noise of every call that draws its own noise; with None, the pipeline is unchanged,
    bit for bit. A saved pipeline has the name of its diffusers class and includes the start, which `load_pipeline`
    enables again.
    """

    default_start: Start | None = None
    saved_under_stock_name = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if StartMixin in cls.__bases__:  # subclasses inherit methods that are already wrapped
            check_makes_latents(cls)
            for name, wrap in (("encode_prompt", _wrap_encode_prompt), ("prepare_latents", _wrap_prepare_latents)):
                if hasattr(cls, name):
                    setattr(cls, name, wrap(getattr(cls, name)))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load as diffusers does, with the start that was saved next to the pipeline, if any."""
        config = cls.load_config(pretrained_model_name_or_path, **kwargs)  # type: ignore[attr-defined]
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        return apply_start(pipe, pretrained_model_name_or_path, config, kwargs)

    def to_json_string(self) -> str:
        """The pipeline's config with the name of its diffusers class; records whether there is a start."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config["_class_name"] = stock_class(type(self)).__name__
        if self.default_start is not None:
            config[RECORDED_START] = START_FILE
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as diffusers does, with the start next to the pipeline."""
        if self.default_start is not None:  # first, so that it is included in an upload
            self.default_start.save(Path(save_directory, START_FILE))
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


def _wrap_encode_prompt(encode: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a pipeline's `encode_prompt` to store the prompt's features for `prepare_latents`."""

    @functools.wraps(encode)
    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        encoded = encode(self, *args, **kwargs)
        if self.default_start is not None:
            _prompt.set((id(self), pool_prompt(encoded)))
        return encoded

    return encode_prompt


def _wrap_prepare_latents(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a pipeline's `prepare_latents` to add its start to the returned noise."""
    signature = inspect.signature(prepare)

    @functools.wraps(prepare)
    def prepare_latents(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = prepare(self, *args, **kwargs)
        start: Start | None = self.default_start
        if start is None:
            return prepared
        arguments = signature.bind(self, *args, **kwargs)
        arguments.apply_defaults()
        if not begins_with_noise(arguments.arguments):
            return prepared
        owner, features = _prompt.get() or (None, None)
        features = features if owner == id(self) else None
        latents = prepared[0] if isinstance(prepared, tuple) else prepared
        if latents.ndim < 4:  # unCLIP also encodes images with this method
            return prepared
        scheduler = arguments.arguments.get("scheduler", self.scheduler)
        latents = put_in_start(latents, start.law, features, scheduler)
        return (latents, *prepared[1:]) if isinstance(prepared, tuple) else latents

    return prepare_latents


def check_makes_latents(pipeline_class: type) -> None:
    """Refuse a pipeline class without a method `prepare_latents(..., latents=None)`.

    Raises:
        TypeError: with the reason.
    """
    prepare = getattr(pipeline_class, "prepare_latents", None)
    if prepare is None or "latents" not in inspect.signature(prepare).parameters:
        raise TypeError(
            f"{pipeline_class.__name__} does not draw its initial noise: it has no prepare_latents(..., "
            "latents=None). If it starts from an image, its latents already contain the signal."
        )


def enable_start(pipe: Pipeline, start: Start | str | PathLike[str]) -> Pipeline:
    """Add the low frequencies that a model expects to the initial noise of its pipeline, in all following calls.

    A model whose schedule never reaches pure noise, such as Stable Diffusion, infers how dark or bright an image is
    from the signal left in x_T (Lin et al. 2023, arXiv:2305.08891). A start adds the signal that the prompt asks for.
    No weights are changed, and no steps are added.

    Latents that are passed to a call are not changed, nor are calls that start from an image. Any scheduler with betas
    and any step count work, even if the first timestep is not T-1; at zero terminal SNR nothing changes. Negative
    prompts have no effect on the start.

    Args:
        pipe: a diffusers text-to-image or inpainting pipeline with a UNet.
        start: from `fit_start` or `hand_set_start`, or the path of its file.

    Returns:
        The same pipeline.

    Raises:
        TypeError: the pipeline does not draw its initial noise.
        ValueError: the start is damaged or for another base; the scheduler has no betas; the pipeline has no
            `encode_prompt`, which a prompt-dependent start needs.
        OSError: the file does not exist.
    """
    start = start if isinstance(start, Start) else Start.load(start)
    check_makes_latents(type(pipe))
    check_levels(getattr(pipe, "scheduler", None))
    if start.law.num_features and not hasattr(pipe, "encode_prompt"):
        raise ValueError(
            f"{type(pipe).__name__} has no encode_prompt, so it cannot use a start that depends on the prompt. Fit "
            "one without captions (zsnr fit-start --no_captions), or set one by hand (hand_set_start)."
        )
    check_base(start, pipe)
    if has_zero_terminal_snr(pipe.scheduler.alphas_cumprod):  # type: ignore[attr-defined]
        logger.warning(
            f"The schedule of {type(pipe).__name__} ends in pure noise, where a model expects no signal: the start "
            "has little or no effect."
        )
    add_mixin(pipe, StartMixin)
    pipe.default_start = start  # type: ignore[attr-defined]
    return pipe


def apply_start(pipe: Pipeline, source: Any, config: Mapping[str, Any], places: Mapping[str, Any]) -> Pipeline:
    """Enable the start next to a saved pipeline, if its `model_index.json` records one.

    Args:
        pipe: the loaded pipeline.
        source: folder or Hub id.
        config: content of `model_index.json`.
        places: arguments of `from_pretrained`; only `HUB_KWARGS` are used.

    Raises:
        OSError: the file is missing.
        ValueError: as in `enable_start`.
    """
    if RECORDED_START not in config:
        return pipe
    path = Path(source, START_FILE)
    if not path.parent.is_dir():
        known = {key: places[key] for key in _PLACES if key in places}
        path = Path(hf_hub_download(str(source), START_FILE, **known))
    return enable_start(pipe, path)


def disable_start(pipe: Pipeline) -> Pipeline:
    """Undo `enable_start`: the pipeline starts from pure noise again.

    Returns:
        The same pipeline.
    """
    if remove_mixin(pipe, StartMixin):
        vars(pipe).pop("default_start", None)
    elif isinstance(pipe, StartMixin):  # a subclass, which may have its own start
        pipe.default_start = None
    return pipe
