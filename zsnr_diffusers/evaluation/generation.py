"""Generate images with any diffusers pipeline, each with its own seed."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from PIL import Image

from ..utils.extras import import_extra


def generate_images(
    pipe: Any,
    prompts: Sequence[str] | Sequence[int] | str | int | None,
    seeds: Sequence[int],
    *,
    batch_size: int = 4,
    progress: bool = True,
    **call_kwargs: Any,
) -> list[Image.Image]:
    """One image per seed, in the order of `seeds`; `iter_images` as a list, with the same arguments."""
    images = iter_images(pipe, prompts, seeds, batch_size=batch_size, progress=progress, **call_kwargs)
    return list(images)


def iter_images(
    pipe: Any,
    prompts: Sequence[str] | Sequence[int] | str | int | None,
    seeds: Sequence[int],
    *,
    batch_size: int = 4,
    progress: bool = True,
    **call_kwargs: Any,
) -> Iterator[Image.Image]:
    """Yield one PIL image per seed, keeping no more than one batch in memory.

    Each image has its own CPU generator, so it does not depend on other images nor, up to rounding, on batch size or
    device.

    Args:
        pipe: any pipeline whose call takes `prompt`, `class_labels` or, if unconditional, `batch_size`.
        prompts: one per seed, or a single one for all; class labels for a class-conditional pipeline; None for an
            unconditional one.
        seeds: one per image.
        batch_size: images per call of the pipeline.
        progress: show a progress bar on a terminal, instead of the pipeline's own.
        call_kwargs: for the pipeline's call, such as `num_inference_steps` and `guidance_scale`.

    Raises:
        ValueError: prompts missing, not supported, or not as many as seeds; an argument that the call does not accept.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    _check_call_kwargs(pipe, accepted, call_kwargs, batch_size)
    conditions = _prompt_per_seed(pipe, accepted, prompts, len(seeds))
    return _generate_batches(
        pipe, conditions, list(seeds), batch_size, progress, {"output_type": "pil", **call_kwargs}
    )


def _check_call_kwargs(pipe: Any, accepted: Any, call_kwargs: dict[str, Any], batch_size: int) -> None:
    """Refuse arguments that the pipeline's call does not take, before the first image is generated."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
        return
    unknown = sorted(set(call_kwargs) - set(accepted))
    if unknown:
        raise ValueError(f"{type(pipe).__name__} does not take {', '.join(unknown)}; omit it")


def _prompt_per_seed(
    pipe: Any, accepted: Any, prompts: Sequence[str] | Sequence[int] | str | int | None, n: int
) -> tuple[str | None, list[Any]]:
    """Name of the call's condition, `prompt`, `class_labels` or None, and its value for each of n images."""
    name = next((name for name in ("prompt", "class_labels") if name in accepted), None)
    if name is None and prompts is not None:
        raise ValueError(f"{type(pipe).__name__} is unconditional and takes no prompts; omit them")
    if name is not None and prompts is None:
        raise ValueError(f"{type(pipe).__name__} needs a {name} for each image; pass prompts")
    values = [prompts] * n if prompts is None or isinstance(prompts, (str, int)) else list(prompts)
    if len(values) != n:
        raise ValueError(f"expected one prompt per seed, or a single string; got {len(values)} for {n} seeds")
    return name, values


def _generate_batches(
    pipe: Any,
    conditions: tuple[str | None, list[Any]],
    seeds: list[int],
    batch_size: int,
    progress: bool,
    call_kwargs: dict[str, Any],
) -> Iterator[Image.Image]:
    """Call the pipeline batch by batch, a CPU generator for each seed, and yield its images."""
    import torch

    name, values = conditions
    disable = None if progress else True  # None: only where the output is a terminal
    with (
        _without_pipeline_progress_bar(pipe),
        import_extra("tqdm").tqdm(total=len(seeds), unit="image", disable=disable) as bar,
    ):
        for start in range(0, len(seeds), batch_size):
            batch = slice(start, start + batch_size)
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[batch]]
            condition = {"batch_size": len(generators)} if name is None else {name: values[batch]}
            output = pipe(**condition, generator=generators, **call_kwargs)
            _warn_if_censored(getattr(output, "nsfw_content_detected", None))
            bar.update(len(generators))
            yield from output.images


def _warn_if_censored(flags: Sequence[bool] | None) -> None:
    """Warn about images that the pipeline's safety checker replaced with black ones."""
    if flags and any(flags):
        warnings.warn(
            f"the pipeline's safety checker replaced {sum(flags)} of {len(flags)} images with black ones, which count "
            "as luminance -1; load the pipeline with safety_checker=None to measure the model",
            stacklevel=3,
        )


@contextmanager
def _without_pipeline_progress_bar(pipe: Any) -> Iterator[None]:
    """Disable the pipeline's own progress bar inside the block."""
    if not hasattr(pipe, "set_progress_bar_config"):
        yield
        return
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
