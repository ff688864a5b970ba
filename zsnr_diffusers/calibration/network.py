"""The guided network of a pipeline as a plain function of (x_t, t).

The pipeline itself is called, once for each batch, up to its first scheduler step: what it passes to its UNet beside
sample and timestep does not change afterwards, and the starting noise is the one that its seeds mean. That what is
computed from them is what the pipeline computes is checked at that step.
"""

from __future__ import annotations

import inspect
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
"""How far the function may be from the pipeline's prediction, relative; the largest is the rounding of guidance."""

CHANGING = ("down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals")
"""Arguments of a UNet that are computed from x_t, by a ControlNet or an adapter."""


class _FirstStep(BaseException):
    """Ends a pipeline's call; no pipeline catches it."""

    def __init__(self, prediction: Tensor, sample: Tensor) -> None:
        self.prediction, self.sample = prediction, sample


class _FirstStepScheduler(ZeroSNRMultistepScheduler):
    """Hands over what its first step is given."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise _FirstStep(model_output, sample)


@dataclass(frozen=True)
class Batch:
    """What one call of the pipeline recorded: the noise it starts from, and what its UNet is told beside x_t and t."""

    noise: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Guidance(NamedTuple):
    """How a network is guided: arguments of a pipeline's call."""

    guidance_scale: float
    guidance_rescale: float = 0.0
    keep_low_frequencies: int = 0

    def combine(self, unconditional: Tensor, conditional: Tensor) -> Tensor:
        """The guided prediction, as `enable_guidance_rescale` makes it."""
        return guided_prediction(unconditional, conditional, *self)

    def call_kwargs(self, pipe: Any) -> dict[str, Any]:
        """These as arguments of a pipeline's call; also those that are 0, so that no default takes their place.

        Raises:
            ValueError: the pipeline does not know low frequencies; most of stock's would take the argument without a
                word.
        """
        taken, phi, k = inspect.signature(pipe.__call__).parameters, self.guidance_rescale, self.keep_low_frequencies
        if k > 0 and "keep_low_frequencies" not in taken:
            raise ValueError(
                f"{type(pipe).__name__} has no keep_low_frequencies={k}; first call "
                f"enable_guidance_rescale(pipe, {phi:g}, keep_low_frequencies={k})."
            )
        return {name: value for name, value in self._asdict().items() if value or name in taken}


class GuidedNetwork:
    """The guided prediction of a pipeline's UNet, for samples that each have a condition and a seed of their own.

    Attributes:
        noise: x_T of every sample, shape [N, ...], float32 on the CPU.
        dtype: of the UNet, in which it is called; everything outside of it is float32.
        calls: how often the UNet was called.
        on_call: called after each of them.
    """

    def __init__(self, pipe: Any, batches: Sequence[Batch], guidance: Guidance) -> None:
        self._unet, self._device, self._batches = pipe.unet, pipe._execution_device, batches
        self._guidance = guidance
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
    """Make a plain function of (x_t, t) from a pipeline's UNet by recording what the pipeline passes to it.

    Args:
        pipe: of text or class to image, with a UNet.
        conditions: a prompt or class label for each seed; None for an unconditional pipeline.
        seeds: one per sample; each is the noise that the pipeline makes of it.
        guidance_scale: w in u + w (c - u); 1 or less is no guidance.
        guidance_rescale: phi of Lin et al. 2023, Algorithm 2.
        keep_low_frequencies: k of `enable_guidance_rescale`.
        batch_size: samples per call of the UNet.
        call_kwargs: for the pipeline's call.

    Raises:
        ValueError: a pipeline that has no such UNet, or guides in another way.
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
    """Arguments of a call, negative prompts repeated: beside a list of prompts some pipelines want a list."""
    negative = {name: [text] * size for name, text in call_kwargs.items() if name.startswith("negative_prompt")}
    return {**call_kwargs, **{name: texts for name, texts in negative.items() if isinstance(texts[0], str)}}


def _check_pipeline(pipe: Any) -> None:
    """Refuse a pipeline without a UNet on betas, or one whose guidance the calibration cannot compute."""
    name = type(pipe).__name__
    if getattr(pipe, "unet", None) is None or "beta_schedule" not in pipe.scheduler.config:
        raise ValueError(
            f"{name} has no UNet on a variance-preserving schedule, as flow-matching models have none; it cannot be "
            "calibrated."
        )
    if getattr(pipe, "default_guider", None) is not None or getattr(pipe, "guidance_space", "output") != "output":
        raise ValueError(
            f"{name} is guided by a guider or rescaled in another space than the network's output; call "
            "disable_guidance_rescale(pipe) first, or enable it without guider and space."
        )


@contextmanager
def _stop_at_first_step(pipe: Any, scheduler: Any) -> Iterator[dict[str, Any]]:
    """End the pipeline's call within at its first scheduler step; yields what UNet and scheduler were given."""
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
    """The starting noise that was recorded, and the UNet's arguments without sample and timestep.

    Raises:
        ValueError: it does not suffice to call the UNet at other steps.
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
            f"{name} passes {what} to its UNet, which depend on an image; calibrate the text-to-image pipeline of "
            "the same UNet, and give its scheduler to this one."
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
    """Refuse a pipeline whose own guided prediction at its first step is not what the network computes."""
    problem = f"{type(pipe).__name__} guides in another way than u + w (c - u)"
    wanted = seen["prediction"]
    copies = 2 if network.uses_guidance else 1
    x = seen["kwargs"].get("sample", seen["args"][0] if seen["args"] else None)
    if len(x) != copies * len(wanted):
        raise ValueError(f"{problem}: {len(x)} predictions for {len(wanted)} samples; it cannot be calibrated.")
    found = network(network.noise, num_train_timesteps - 1)
    if found.shape != wanted.shape:
        raise ValueError(f"{type(pipe).__name__} predicts a variance too; it cannot be calibrated.")
    difference = float((found - wanted).norm() / wanted.norm())
    if not difference <= AGREEMENT.get(network.dtype, 1e-3):
        raise ValueError(f"{problem}: predictions differ by {difference:.2g}; it cannot be calibrated.")
