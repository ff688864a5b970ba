"""Compare schedulers on one model: images from the same noise, and distances to a many-step reference."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from ..utils.extras import import_extra
from .comparison_report import REFERENCE, ComparedSamples, SchedulerComparison
from .generation import generate_images

if TYPE_CHECKING:
    from torch import Tensor

REFERENCE_STEPS = 100


def compare_schedulers(
    pipe: Any,
    schedulers: Sequence[str] = ("zsnr", "ddim", "dpmpp_2m", "unipc", "euler"),
    steps: Sequence[int] = (5, 10, 20),
    prompts: Sequence[str] | Sequence[int] | None = None,
    *,
    seed: int = 0,
    reference_steps: int = REFERENCE_STEPS,
    batch_size: int = 4,
    output_dir: str | PathLike[str] | None = None,
    progress: bool = True,
    **call_kwargs: Any,
) -> SchedulerComparison:
    """Sample the same prompts and seeds by several schedulers at several step counts.

    Each result is compared with a reference: the same pipeline in many steps of order 3 along the probability-flow
    ODE. Schedulers that add noise do not converge to it. If a scheduler fails at a step count, the reason is recorded,
    and the comparison continues.

    Args:
        pipe: any pipeline with a scheduler, which is restored afterwards.
        schedulers: short names or classes, see `zsnr_diffusers.schedulers.by_name`.
        steps: step counts.
        prompts: one image each, class labels for a class-conditional pipeline, None for an unconditional one.
        seed: of the first prompt's noise, incremented for each further one.
        reference_steps: of the reference.
        batch_size: images per call of the pipeline.
        output_dir: save the results to this folder after each scheduler, so that an interruption loses little.
        progress: show a progress bar, with the remaining time, on a terminal.
        call_kwargs: for the pipeline's call, such as `guidance_scale`.

    Returns:
        The comparison; `print` it, or `save` it as an image, a page and JSON.

    Raises:
        ValueError: an unknown scheduler, a step count below 1, a pipeline that does not support the reference
            scheduler, or invalid arguments of its call.
    """
    from ..schedulers.by_name import check_scheduler_names, reference_scheduler, scheduler_by_name

    check_scheduler_names(schedulers)
    if bad := [n for n in (*steps, reference_steps) if n < 1]:
        raise ValueError(f"steps={bad[0]} must be at least 1.")
    conditions: list[Any] = [None] if prompts is None else [*prompts]
    own, config = pipe.scheduler, pipe.scheduler.config
    schedulers, steps = [*dict.fromkeys(schedulers)], sorted(set(steps))
    batches = math.ceil(len(conditions) / batch_size)
    total = batches * (reference_steps + len(schedulers) * sum(steps))
    try:
        with import_extra("tqdm").tqdm(total=total, unit="step", disable=None if progress else True) as bar:
            sampler = _Sampler(pipe, conditions, seed, batch_size, call_kwargs, bar.update)
            reference = _reference(sampler, reference_scheduler(config), reference_steps)
            comparison = SchedulerComparison(
                type(pipe).__name__, tuple(conditions), seed, call_kwargs, reference.compared(reference), []
            )
            for name in schedulers:
                for n in steps:
                    place = bar.n
                    comparison.cells.append(_compare(sampler, name, n, reference, scheduler_by_name, config))
                    # Some fail, others call the network more than once per step.
                    bar.update(place + batches * n - bar.n)
                if output_dir is not None:
                    comparison.save(output_dir)
    finally:
        pipe.scheduler = own
    return comparison


def _reference(sampler: _Sampler, scheduler: Any, steps: int) -> _Samples:
    """The reference samples; refuses a pipeline that supports only other kinds of schedulers."""
    try:
        return sampler(scheduler, steps)
    except TypeError as error:
        ours, pipeline = type(scheduler).__name__, type(sampler.pipe).__name__
        raise ValueError(f"the reference scheduler {ours} does not work in {pipeline}: {error}") from error


def _compare(
    sampler: _Sampler, name: str, steps: int, reference: _Samples, make: Callable[[str, Any], Any], config: Any
) -> ComparedSamples:
    """Sample with one scheduler and compare with the reference; records the reason of a failure."""
    try:
        return sampler(make(name, config), steps).compared(reference, name)
    except Exception as error:  # diffusers raises various exceptions, at some step counts, spacings and pipelines
        text = str(error).strip().splitlines()
        return ComparedSamples(name, steps, error=f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": "))


@dataclass(frozen=True)
class _Samples:
    """Images of a run, the samples before decoding, and the cost."""

    steps: int
    images: list[Any]
    final: Tensor
    seconds: float
    network_calls: int

    def compared(self, reference: _Samples, name: str = REFERENCE) -> ComparedSamples:
        """Distances to the samples of a reference, image by image.

        Raises:
            ValueError: samples that are not finite.
        """
        if not self.final.isfinite().all():
            raise ValueError("the samples are not finite numbers")
        latent = relative_rms(self.final, reference.final)
        pixel = [
            float(np.sqrt(np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean()) / 255)
            for a, b in zip(self.images, reference.images, strict=True)
        ]
        seconds = self.seconds / len(self.images)
        return ComparedSamples(name, self.steps, self.images, latent.tolist(), pixel, seconds, self.network_calls)


def relative_rms(found: Tensor, exact: Tensor) -> Tensor:
    """The RMS difference of samples over the standard deviation of the exact ones, shape [B] of [B, ...]."""
    return (found - exact).flatten(1).square().mean(1).sqrt() / exact.std()


class _Sampler:
    """Calls a pipeline with one scheduler after another, from the same noise."""

    def __init__(
        self,
        pipe: Any,
        conditions: list[Any],
        seed: int,
        batch_size: int,
        call_kwargs: dict[str, Any],
        on_step: Callable[[], Any],
    ) -> None:
        self.pipe, self.conditions, self.batch_size = pipe, conditions, batch_size
        self.seeds = range(seed, seed + len(conditions))
        self.call_kwargs, self.on_step = call_kwargs, on_step

    def __call__(self, scheduler: Any, steps: int) -> _Samples:
        """Images of all conditions, with the last samples of the scheduler, before an autoencoder decodes them."""
        import torch

        self.pipe.scheduler = scheduler
        images, final, start = [], [], time.perf_counter()
        for first in range(0, len(self.conditions), self.batch_size):
            batch = slice(first, first + self.batch_size)
            prompts = None if self.conditions[0] is None else self.conditions[batch]
            # NaN pixels cause a warning when cast, and are detected afterwards.
            with _recorded_steps(scheduler, self.on_step) as recorded, np.errstate(invalid="ignore"):
                images += generate_images(
                    *(self.pipe, prompts, self.seeds[batch]),
                    batch_size=self.batch_size,
                    progress=False,
                    num_inference_steps=steps,
                    **self.call_kwargs,
                )
            final.append(recorded.sample.float().cpu())
        return _Samples(steps, images, torch.cat(final), time.perf_counter() - start, recorded.count)


@dataclass
class _Steps:
    """The number of steps of a scheduler, and the sample returned by the last one."""

    count: int = 0
    sample: Any = None


@contextmanager
def _recorded_steps(scheduler: Any, on_step: Callable[[], Any]) -> Iterator[_Steps]:
    """The steps that a scheduler makes inside the block."""
    step, steps = scheduler.step, _Steps()

    @functools.wraps(step)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        steps.count, steps.sample = steps.count + 1, output[0]
        on_step()
        return output

    scheduler.step = recorded
    try:
        yield steps
    finally:
        del scheduler.step
