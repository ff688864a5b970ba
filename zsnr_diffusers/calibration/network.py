"""The guided network of a pipeline as a plain function of (x_t, t).

The pipeline is called once per batch, up to its first scheduler step: its other UNet inputs do not change afterwards,
and its initial noise follows from the seeds. At this step, the function's output is compared with the pipeline's.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.low_frequencies import guided_prediction
from ..evaluation.generation import iter_images
from ..schedulers import ZeroSNRMultistepScheduler

AGREEMENT = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Tolerance of the relative difference to the pipeline's prediction; the largest part is rounding in guidance."""

CHANGING = ("down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals")
"""UNet arguments that a ControlNet or an adapter computes from x_t."""


class _FirstStep(BaseException):
    """Stops a pipeline's call; no pipeline catches it."""

    def __init__(self, prediction: Tensor, sample: Tensor) -> None:
        self.prediction, self.sample = prediction, sample


class _FirstStepScheduler(ZeroSNRMultistepScheduler):
    """Records the inputs of the first step."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise _FirstStep(model_output, sample)


@dataclass(frozen=True)
class Batch:
    """The record of one pipeline call: its initial noise, and the UNet inputs besides x_t and t."""

    noise: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Guidance(NamedTuple):
    """Guidance settings: arguments of a pipeline's call."""

    guidance_scale: float
    guidance_rescale: float = 0.0
    keep_low_frequencies: int = 0

    def combine(self, unconditional: Tensor, conditional: Tensor) -> Tensor:
        """The guided prediction, as `enable_guidance_rescale` computes it."""
        return guided_prediction(unconditional, conditional, *self)

    def call_kwargs(self, pipe: Any) -> dict[str, Any]:
        """The settings as arguments of a pipeline's call, including zeros, so that no default replaces them.

        Raises:
            ValueError: the pipeline does not support keep_low_frequencies; most diffusers pipelines would silently
                ignore it.
        """
        taken, phi, k = inspect.signature(pipe.__call__).parameters, self.guidance_rescale, self.keep_low_frequencies
        if k > 0 and "keep_low_frequencies" not in taken:
            raise ValueError(
                f"{type(pipe).__name__} has no keep_low_frequencies={k}; first call enable_guidance_rescale(pipe, "
                f"{phi:g}, keep_low_frequencies={k})."
            )
        return {name: value for name, value in self._asdict().items() if value or name in taken}


class GuidedNetwork:
    """The guided prediction of a pipeline's UNet, for samples with individual conditions and seeds.

    Attributes:
        noise: x_T of every sample, shape [N, ...], float32 on the CPU.
        num_train_timesteps: T of the pipeline's schedule.
        dtype: of the UNet, in which it is called; everything outside of it is float32.
        calls: how often the UNet was called.
        on_call: called after each of them.
    """

    def __init__(self, pipe: Any, batches: Sequence[Batch], guidance: Guidance) -> None:
        self._unet, self._device, self._batches = pipe.unet, pipe._execution_device, batches
        self._guidance = guidance
        self.num_train_timesteps = int(pipe.scheduler.config["num_train_timesteps"])
        self.dtype = pipe.unet.dtype
        self.noise = torch.cat([batch.noise for batch in batches])
        self.calls = 0
        self.on_call: Callable[[], Any] = lambda: None

    def __len__(self) -> int:
        return len(self.noise)

    @property
    def uses_guidance(self) -> bool:
        """Whether the guidance scale is above 1, so that the UNet is called on two copies of x_t."""
        return self._guidance.guidance_scale > 1

    @property
    def num_batches(self) -> int:
        """Number of UNet calls that one timestep of all samples takes."""
        return len(self._batches)

    @torch.no_grad()
    def __call__(self, x_t: Tensor, timestep: int) -> Tensor:
        """The guided prediction for x_t, shape [N, ...], at one timestep; float32 on the CPU."""
        parts = torch.split(x_t, [len(batch.noise) for batch in self._batches])
        predictions = [
            self.predict_batch(batch, part, timestep) for batch, part in zip(self._batches, parts, strict=True)
        ]
        return torch.cat(predictions)

    @torch.no_grad()
    def time_calls(self, count: int) -> list[float]:
        """Seconds of so many calls for the first batch, one after another."""
        batch, last, seconds = self._batches[0], self.num_train_timesteps - 1, []
        for _ in range(count):
            started = time.perf_counter()
            self.predict_batch(batch, batch.noise, last)  # returns on the CPU, so a GPU has finished
            seconds.append(time.perf_counter() - started)
        return seconds

    def predict_batch(self, batch: Batch, x_t: Tensor, timestep: int) -> Tensor:
        """The guided prediction for the samples of one batch, float32 on the CPU."""
        x = x_t.to(self._device, self.dtype)
        args, kwargs = _to_device((batch.args, batch.kwargs), self._device)
        t = torch.tensor(timestep, device=self._device)
        output = self._unet(torch.cat([x, x]) if self.uses_guidance else x, t, *args, **kwargs)
        output = output if isinstance(output, Tensor) else output[0]
        self.calls += 1
        self.on_call()
        if self.uses_guidance:
            output = self._guidance.combine(*output.chunk(2))
        return output.float().cpu()


def record_guided_network(
    pipe: Any,
    conditions: Sequence[Any] | None,
    seeds: Sequence[int],
    *,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
    keep_low_frequencies: int = 0,
    batch_size: int = 4,
    **call_kwargs: Any,
) -> GuidedNetwork:
    """Create a plain function of (x_t, t) from a pipeline's UNet by recording its inputs.

    Args:
        pipe: text-to-image or class-conditional, with a UNet.
        conditions: a prompt or class label for each seed; None for an unconditional pipeline.
        seeds: one per sample; determines the pipeline's initial noise.
        guidance_scale: w in u + w (c - u); 1 or less is no guidance.
        guidance_rescale: phi of Lin et al. 2023, Algorithm 2.
        keep_low_frequencies: k of `enable_guidance_rescale`.
        batch_size: samples per call of the UNet.
        call_kwargs: for the pipeline's call.

    Raises:
        ValueError: a pipeline without such a UNet, or with other guidance.
    """
    _check_pipeline(pipe)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    guidance = Guidance(guidance_scale, guidance_rescale, keep_low_frequencies)
    call_kwargs |= guidance.call_kwargs(pipe)
    call_kwargs |= {"num_inference_steps": 1, "output_type": "latent"}
    scheduler = _FirstStepScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="kappa", eta=0.0, calibration=None
    )
    batches = []
    for start in range(0, len(seeds), batch_size):
        part = slice(start, start + batch_size)
        prompts = None if conditions is None else conditions[part]
        with _stop_at_first_step(pipe, scheduler) as seen:
            call = call_kwargs_for_batch(call_kwargs, len(seeds[part]))
            next(iter_images(pipe, prompts, seeds[part], batch_size=batch_size, progress=False, **call))
        batches.append(_make_batch(pipe, seen))
        if start == 0:
            _check_prediction_agrees(pipe, GuidedNetwork(pipe, batches, guidance), seen, len(scheduler))
    return GuidedNetwork(pipe, batches, guidance)


def call_kwargs_for_batch(call_kwargs: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Arguments of a call, with repeated negative prompts, since some pipelines require lists of equal length."""
    negative = {name: [text] * size for name, text in call_kwargs.items() if name.startswith("negative_prompt")}
    return {**call_kwargs, **{name: texts for name, texts in negative.items() if isinstance(texts[0], str)}}


def _check_pipeline(pipe: Any) -> None:
    """Refuse a pipeline without a UNet trained with betas, or with guidance that the calibration cannot compute."""
    name = type(pipe).__name__
    if getattr(pipe, "unet", None) is None or "beta_schedule" not in pipe.scheduler.config:
        raise ValueError(
            f"{name} has no UNet with a variance-preserving schedule (flow-matching models have none), so so it "
            "cannot be calibrated."
        )
    if getattr(pipe, "default_guider", None) is not None or getattr(pipe, "guidance_space", "output") != "output":
        raise ValueError(
            f"{name} uses a guider, or guidance rescale in another space than the network's output; call "
            "disable_guidance_rescale(pipe) first, or enable it without guider and space."
        )


@contextmanager
def _stop_at_first_step(pipe: Any, scheduler: Any) -> Iterator[dict[str, Any]]:
    """Stop the pipeline's call inside this context at its first scheduler step; yields the inputs of UNet and
    scheduler.
    """
    seen: dict[str, Any] = {"calls": 0}

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(args=args, kwargs=dict(kwargs), calls=seen["calls"] + 1)

    former, hook = pipe.scheduler, pipe.unet.register_forward_pre_hook(record, with_kwargs=True)
    pipe.scheduler = scheduler
    try:
        with torch.no_grad():
            yield seen
    except _FirstStep as step:
        seen.update(prediction=step.prediction.float().cpu(), noise=step.sample.float().cpu())
    finally:
        pipe.scheduler = former
        hook.remove()


def _make_batch(pipe: Any, seen: dict[str, Any]) -> Batch:
    """The recorded initial noise, and the UNet's arguments without sample and timestep.

    Raises:
        ValueError: they are not sufficient to call the UNet at other steps.
    """
    name = type(pipe).__name__
    if seen["calls"] != 1 or "prediction" not in seen:
        raise ValueError(f"{name} does not call its UNet once for each scheduler step, so it cannot be calibrated.")
    kwargs, args = dict(seen["kwargs"]), list(seen["args"])
    x = kwargs.pop("sample") if "sample" in kwargs else args.pop(0)
    if "timestep" in kwargs:
        del kwargs["timestep"]
    else:
        args.pop(0)
    changing = [key for key in CHANGING if kwargs.get(key) is not None]
    if changing or x.shape[1:] != seen["noise"].shape[1:]:
        what = changing[0] if changing else f"{x.shape[1]} channels"
        raise ValueError(
            f"{name} passes {what} to its UNet, which depend on an image; calibrate a text-to-image pipeline with the "
            "same UNet, and use its scheduler here."
        )
    return Batch(seen["noise"], *_to_device((tuple(args), kwargs), "cpu"))


def _to_device(value: Any, device: Any) -> Any:
    """Move tensors, and those in lists, tuples and mappings, to a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to_device(item, device) for key, item in value.items()}
    return type(value)(_to_device(item, device) for item in value) if isinstance(value, list | tuple) else value


def _check_prediction_agrees(
    pipe: Any, network: GuidedNetwork, seen: dict[str, Any], num_train_timesteps: int
) -> None:
    """Refuse a pipeline whose guided prediction at its first step differs from the network's."""
    problem = f"{type(pipe).__name__} does not use u + w (c - u) for guidance"
    wanted = seen["prediction"]
    copies = 2 if network.uses_guidance else 1
    x = seen["kwargs"].get("sample", seen["args"][0] if seen["args"] else None)
    if len(x) != copies * len(wanted):
        raise ValueError(f"{problem}: {len(x)} predictions for {len(wanted)} samples, so it cannot be calibrated.")
    found = network(network.noise, num_train_timesteps - 1)
    if found.shape != wanted.shape:
        raise ValueError(f"{type(pipe).__name__} predicts a variance too, so it cannot be calibrated.")
    difference = float((found - wanted).norm() / wanted.norm())
    if not difference <= AGREEMENT.get(network.dtype, 1e-3):
        raise ValueError(f"{problem}: predictions differ by {difference:.2g}, so it cannot be calibrated.")
