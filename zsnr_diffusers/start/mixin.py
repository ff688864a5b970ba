"""A start in any pipeline that makes its latents by `prepare_latents`; no `__call__` is copied.

The mixin wraps two methods: `encode_prompt`, which says what the prompt is, and `prepare_latents`, into whose noise
the start is put. All else of a call, guidance, adapters, ControlNets, callbacks, is the pipeline's own.
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
"""Features of the last prompt that was encoded in this thread, and by which pipeline."""


class StartMixin:
    """Gives a diffusers pipeline a start; stands before the pipeline's class among the bases.

    ```python
    class MyPipeline(StartMixin, StableDiffusionPipeline): ...
    ```

    `default_start` is put into the noise of every call that begins with noise of its own; None leaves the pipeline as
    it is, bit for bit. A saved pipeline has the name of its stock class and the start beside it, which `load_pipeline`
    enables again.
    """

    default_start: Start | None = None
    saved_under_stock_name = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if StartMixin in cls.__bases__:  # a class further down inherits methods that are wrapped already
            check_makes_latents(cls)
            for name, wrap in (("encode_prompt", _wrap_encode_prompt), ("prepare_latents", _wrap_prepare_latents)):
                if hasattr(cls, name):
                    setattr(cls, name, wrap(getattr(cls, name)))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load as diffusers does, with the start that was saved beside the pipeline, if there is one."""
        config = cls.load_config(pretrained_model_name_or_path, **kwargs)  # type: ignore[attr-defined]
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        return apply_start(pipe, pretrained_model_name_or_path, config, kwargs)

    def to_json_string(self) -> str:
        """The pipeline's config under the name of its stock class; says whether there is a start."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config["_class_name"] = stock_class(type(self)).__name__
        if self.default_start is not None:
            config[RECORDED_START] = START_FILE
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as diffusers does, and the start beside it."""
        if self.default_start is not None:  # first, so that it is pushed with the rest if that was asked for
            self.default_start.save(Path(save_directory, START_FILE))
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


def _wrap_encode_prompt(encode: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a pipeline's `encode_prompt` to keep the features of the prompt for `prepare_latents`."""

    @functools.wraps(encode)
    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        encoded = encode(self, *args, **kwargs)
        if self.default_start is not None:
            _prompt.set((id(self), pool_prompt(encoded)))
        return encoded

    return encode_prompt


def _wrap_prepare_latents(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a pipeline's `prepare_latents` to put its start into the noise that it returns."""
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
        if latents.ndim < 4:  # unCLIP makes embeddings of images by the same method
            return prepared
        scheduler = arguments.arguments.get("scheduler", self.scheduler)
        latents = put_in_start(latents, start.law, features, scheduler)
        return (latents, *prepared[1:]) if isinstance(prepared, tuple) else latents

    return prepare_latents


def check_makes_latents(pipeline_class: type) -> None:
    """Refuse a pipeline class that does not make its latents by a method `prepare_latents(..., latents=None)`.

    Raises:
        TypeError: with the reason.
    """
    prepare = getattr(pipeline_class, "prepare_latents", None)
    if prepare is None or "latents" not in inspect.signature(prepare).parameters:
        raise TypeError(
            f"{pipeline_class.__name__} does not begin with noise of its own: it has no prepare_latents(..., "
            "latents=None). Where it starts from an image, what is left of the image is in its latents already."
        )


def enable_start(pipe: Pipeline, start: Start | str | PathLike[str]) -> Pipeline:
    """Add the low frequencies that a model expects to the initial noise of its pipeline, in all calls from now on.

    A model whose schedule never reaches pure noise, as that of Stable Diffusion, reads how dark or bright its image is
    off what is left of the image in x_T (Lin et al. 2023, arXiv:2305.08891). With a start it finds there what the
    prompt asks for. No weight is changed, and no step is added.

    Latents that are passed to a call are left alone, and so are calls that start from an image. Any scheduler with
    betas and any step count do, also those whose first timestep is not the last; at zero terminal SNR nothing
    changes. Negative prompts have no part in it.

    Args:
        pipe: a diffusers pipeline with a UNet, text-to-image or inpainting.
        start: from `fit_start` or `hand_set_start`, or the path of its file.

    Returns:
        The same pipeline.

    Raises:
        TypeError: the pipeline does not begin with noise of its own.
        ValueError: the start is damaged or of another base; the scheduler has no betas; the pipeline does not say what
            its prompt is, which a start that depends on the prompt needs.
        OSError: there is no such file.
    """
    start = start if isinstance(start, Start) else Start.load(start)
    check_makes_latents(type(pipe))
    check_levels(getattr(pipe, "scheduler", None))
    if start.law.num_features and not hasattr(pipe, "encode_prompt"):
        raise ValueError(
            f"{type(pipe).__name__} has no encode_prompt, so a start that depends on the prompt is of no use in it. "
            "Fit one without captions (zsnr fit-start --no_captions), or set one by hand (hand_set_start)."
        )
    check_base(start, pipe)
    if has_zero_terminal_snr(pipe.scheduler.alphas_cumprod):  # type: ignore[attr-defined]
        logger.warning(
            f"The schedule of {type(pipe).__name__} ends in pure noise, where a model expects no image: the start "
            "changes nothing, or next to nothing."
        )
    add_mixin(pipe, StartMixin)
    pipe.default_start = start  # type: ignore[attr-defined]
    return pipe


def apply_start(pipe: Pipeline, source: Any, config: Mapping[str, Any], places: Mapping[str, Any]) -> Pipeline:
    """Enable the start that lies beside a saved pipeline, if its `model_index.json` says that one does.

    Args:
        pipe: that was loaded.
        source: folder or Hub id.
        config: content of `model_index.json`.
        places: arguments of `from_pretrained`; those that say where to look are used.

    Raises:
        OSError: it is not there.
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
    elif isinstance(pipe, StartMixin):  # a class of its own, which may have a start of its own
        pipe.default_start = None
    return pipe
