"""The two Markov chains of DDPM as images: q adds noise to real images, p removes it.

Ho et al. 2020 (arXiv:2006.11239), figures 2, 6 and 7. Both use one time axis: noise is added from left to right, and
removed from right to left.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from typing import TYPE_CHECKING, Any

from PIL import Image

from .plots import sample_grid

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Chain:
    """Frames of a chain, in chronological order.

    Attributes:
        times: number of noise steps of each frame, the paper's t: 0 for clean images, T where sampling starts.
            diffusers counts from 0, so its timestep is t - 1.
        samples: x_t, shape [frames, n, C, H, W].
        estimates: the x_0 predicted from each x_t (eq. 15), same shape; at t = 0, x_0 itself. None for a chain that
            adds noise.
    """

    times: tuple[int, ...]
    samples: Tensor
    estimates: Tensor | None = None

    def __repr__(self) -> str:
        shape = list(self.samples.shape[1:])
        return f"Chain of {len(self.times)} frames of {shape}, t = {self.times[0]} to {self.times[-1]}"


def noising_chain(scheduler: Any, images: Tensor, num_frames: int = 9, seed: int = 0) -> Chain:
    """Add noise to images step by step, from t = 0 to T.

    Frames form one chain: each is drawn from the previous one by q(x_t | x_s), the product of the steps in between (Ho
    et al. 2020, eq. 2), so that frames share noise as in a chain of all T steps.

    Args:
        scheduler: any scheduler with `alphas_cumprod`.
        images: x_0, shape [n, C, H, W] in [-1, 1], floating point; float16 and bfloat16 are computed in float32.
        num_frames: evenly spread over [0, T], from 2 to T + 1.
        seed: of the noise.

    Raises:
        ValueError: a scheduler without such a schedule, images with a wrong layout, dtype or range, `num_frames` out
            of range.
    """
    import torch

    from ..core.noise import add_noise, noise_level, transition

    _check_images(images)
    table = _alpha_bar_from_clean(scheduler)
    times = _evenly_spaced_frames(len(table) - 1, num_frames, "timesteps of noise")
    generator = torch.Generator("cpu").manual_seed(seed)
    samples = [images.to(torch.promote_types(images.dtype, torch.float32))]
    for before, now in pairwise(times):
        noise = torch.randn(images.shape, generator=generator).to(samples[-1])
        step = transition(noise_level(table, before), noise_level(table, now))
        samples.append(add_noise(samples[-1], noise, step))
    return Chain(times, torch.stack(samples).to(images.dtype))


def denoising_chain(pipe: Any, num_frames: int = 9, **call_kwargs: Any) -> Chain:
    """Run a pipeline and record its samples and x_0 predictions.

    The pipeline's `scheduler.step` is intercepted during a normal call: the last frame is the call's result, and
    changes by guidance or a callback are part of the chain.

    Args:
        pipe: a pixel-space pipeline, such as `ClassConditionalPipeline`, `DDPMPipeline` or `DDIMPipeline`, whose
            scheduler returns the predicted x_0. A latent pipeline gives a chain of latents.
        num_frames: evenly spread over the steps of the call, from 2 to their number + 1.
        call_kwargs: for the pipeline's call, such as `num_inference_steps`, `generator` and `class_labels`.

    Raises:
        ValueError: a scheduler that does not return x_0, or `num_frames` out of range, both at the first step; a call
            that did not run all steps.
    """
    import torch

    watch = _StepRecorder(pipe.scheduler, num_frames)
    with _observe_steps(pipe.scheduler, watch):
        pipe(**call_kwargs)
    if watch.times[-1:] != [0]:
        raise ValueError(f"{type(pipe).__name__} did not run all steps of its scheduler, so the chain is incomplete.")
    return Chain(tuple(watch.times), torch.stack(watch.samples), torch.stack(watch.estimates))


def chain_picture(chain: Chain, path: str | PathLike[str] | None = None, cell: int = 64) -> Image.Image:
    """Draw a chain: a column per frame from clean images at the left to noise at the right, a row per image.

    For a chain that removes noise, a second block of rows shows its estimates of x_0.

    Args:
        chain: of images with one or three channels; values outside [-1, 1] are clipped.
        path: also save the image to this file.
        cell: smaller images are enlarged to about this size in pixels, by an integer factor without smoothing.

    Raises:
        ValueError: images with an unsupported number of channels.
    """
    order = sorted(range(len(chain.times)), key=lambda frame: chain.times[frame])
    rows, labels = [], []
    for name, frames in (("x_t", chain.samples), ("x_0 as predicted from x_t", chain.estimates)):
        if frames is not None:
            block = [_to_pil_images(frames[frame], cell) for frame in order]
            rows += [list(row) for row in zip(*block, strict=True)]
            labels += [name] + [""] * (len(block[0]) - 1)
    return sample_grid(rows, labels, path, column_labels=[f"t = {chain.times[frame]}" for frame in order])


def _check_images(images: Tensor) -> None:
    """Refuse images that are not floating point [n, C, H, W] in [-1, 1]."""
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images must be floating point, of shape [n, C, H, W]; got {images.dtype}, {list(images.shape)}. From 8 "
            "bits, x / 127.5 - 1."
        )
    if not bool((images.abs() <= 1 + 1e-3).all()):  # also for NaN
        raise ValueError(f"images must lie in [-1, 1], got {images.min():g} to {images.max():g}.")


def _alpha_bar_from_clean(scheduler: Any) -> Tensor:
    """alpha_bar by the paper's t, shape [T + 1]: 1 at t = 0."""
    import torch

    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"{type(scheduler).__name__} has no diffusion schedule (alphas_cumprod) to add noise by.")
    table = scheduler.alphas_cumprod.cpu().double()
    if scheduler.config.get("rescale_betas_zero_snr", False):
        table = torch.cat([table[:-1], torch.zeros(1)])  # stock Euler, DPM++ and UniPC write alpha_bar = 2^-24 here
    return torch.cat([torch.ones(1), table])


def _evenly_spaced_frames(last: int, num_frames: int, of: str) -> tuple[int, ...]:
    """Evenly spaced integers from 0 to `last`, one per frame; `of` names the counted items in the error."""
    if not 2 <= num_frames <= last + 1:
        raise ValueError(f"num_frames={num_frames} must lie in [2, {last + 1}]: there are {last} {of}.")
    return tuple(round(last * frame / (num_frames - 1)) for frame in range(num_frames))


class _StepRecorder:
    """Records inputs and outputs of `scheduler.step` at the steps that become frames."""

    def __init__(self, scheduler: Any, num_frames: int) -> None:
        self._scheduler, self._num_frames = scheduler, num_frames
        self._kept: tuple[int, ...] = ()
        self._step = 0
        self.times: list[int] = []
        self.samples: list[Tensor] = []
        self.estimates: list[Tensor] = []

    def __call__(self, timestep: Any, sample: Tensor, output: Any) -> None:
        """Record one step if it is a frame and, after the last one, the result."""
        steps = len(self._scheduler.timesteps)
        if self._step == 0:
            self._kept = _evenly_spaced_frames(steps, self._num_frames, "steps; more with num_inference_steps")
        following, x_0 = _unpack_step_output(self._scheduler, output)
        if self._step in self._kept:
            self._record_frame(int(timestep) + 1, sample, x_0)
        self._step += 1
        if self._step == steps:
            self._record_frame(0, following, following)

    def _record_frame(self, time: int, sample: Tensor, x_0: Tensor) -> None:
        """Keep x_t and the predicted x_0 at the paper's time t as a frame of the chain."""
        self.times.append(time)
        self.samples.append(sample.detach().cpu())
        self.estimates.append(x_0.detach().cpu())


def _unpack_step_output(scheduler: Any, output: Any) -> tuple[Tensor, Tensor]:
    """Next sample and predicted x_0 from what `scheduler.step` returned; refuses schedulers without the latter."""
    if not isinstance(output, tuple):
        output = output.prev_sample, getattr(output, "pred_original_sample", None)
    if len(output) < 2 or output[1] is None:
        raise ValueError(
            f"{type(scheduler).__name__} does not return its predicted x_0; use a scheduler of this package, DDPM or "
            "DDIM."
        )
    return output[0], output[1]


@contextmanager
def _observe_steps(scheduler: Any, watch: Callable[[Any, Any, Any], None]) -> Iterator[None]:
    """Inside the block, call `watch` with timestep, sample and output of each `scheduler.step`."""
    step, own = scheduler.step, vars(scheduler).get("step")

    @functools.wraps(step)  # pipelines inspect its signature
    def watched(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(("model_output", "timestep", "sample"), args, strict=False)), **kwargs}
        # Euler and similar schedulers scale samples; others return the sample unchanged.
        sample = scheduler.scale_model_input(given["sample"], given["timestep"])
        output = step(*args, **kwargs)
        watch(given["timestep"], sample, output)
        return output

    scheduler.step = watched
    try:
        yield
    finally:
        if own is None:
            del scheduler.step
        else:
            scheduler.step = own


def _to_pil_images(images: Tensor, cell: int) -> list[Image.Image]:
    """Convert [n, C, H, W] in [-1, 1] to PIL images, enlarged to about `cell` pixels."""
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels, got {images.shape[1]}; decode latents first.")
    levels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    factor = max(1, round(cell / max(images.shape[2:])))
    pictures = [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in levels]
    return [p.resize((p.width * factor, p.height * factor), Image.Resampling.NEAREST) for p in pictures]
