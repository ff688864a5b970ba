"""Measure whether the noise at the last timestep affects the prediction (Lin et al. 2023, section 5.2).

At zero terminal SNR, the input at t = T - 1 is pure noise and independent of the image. The best prediction of x_0 is
then the prompt's mean image, for any noise: the ideal model is terminally invariant. A model whose predictions depend
on the noise was not trained there, or its schedule leaks signal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..utils.tables import Part, Report, Table, Text
from .luminance import mean_luminance

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.noise import NoiseLevel


@dataclass(frozen=True)
class TerminalInvariance(Report):
    """How much of the x_0 prediction at t = T - 1 depends on the noise.

    Attributes:
        share: fraction of the predictions' mean square that depends on the noise, over all prompts: 0 for an ideal
            model at zero SNR, 1 if the prediction is only noise.
        shares: the same for each prompt.
        rms: root mean square of the predictions, in units of the latents (or pixels); sqrt(share) * rms depends on the
            noise.
        luminance_std: standard deviation, across noises, of the mean luminance of the decoded predictions,
            root-mean-square over prompts; None if not requested.
        prompts: prompt or class label of each share; (None,) for an unconditional model.
        num_noises: noises per prompt.
        timestep: T - 1.
        alpha: the schedule's alpha there; 0 at zero terminal SNR. If it is larger, even an ideal prediction may depend
            on the noise.
    """

    share: float
    shares: tuple[float, ...]
    rms: float
    luminance_std: float | None
    prompts: tuple[str | int | None, ...]
    num_noises: int
    timestep: int
    alpha: float

    def parts(self) -> Iterator[Part]:
        """Parts of the printed report: a line for the model, and a row for each prompt."""
        head = (
            f"terminal invariance: {self.share:.4f} of the x_0 prediction at t = {self.timestep} (alpha "
            f"{self.alpha:.4f}) depends on the noise; 0 is ideal"
        )
        if self.luminance_std is not None:
            head += f"; its luminance by {self.luminance_std:.4f}"
        yield Text(head)
        shares = zip(self.shares, self.prompts, strict=True)
        if rows := tuple((f"{share:.4f}", str(prompt)) for share, prompt in shares if prompt is not None):
            yield Table((), rows, align="><", indent="  ")


def terminal_invariance(
    pipe: Any,
    prompts: Sequence[str] | Sequence[int] | str | int | None = None,
    num_noises: int = 8,
    seed: int = 0,
    *,
    batch_size: int = 8,
    decode: bool = True,
) -> TerminalInvariance:
    """Run the denoiser once at t = T - 1 on several noise samples per prompt and compare its x_0 predictions.

    Args:
        pipe: a pipeline with a `unet` that predicts epsilon, sample or v: Stable Diffusion, Stable Diffusion XL, or
            one around a `UNet2DModel`. No guidance is applied: the conditional prediction is measured.
        prompts: texts; class labels if the model has classes; None if it is unconditional.
        num_noises: at least 2. Every prompt gets the same noise samples, with CPU seeds `seed`, `seed` + 1, ...
        seed: of the first noise.
        batch_size: noises per call of the denoiser.
        decode: also decode the predictions and report how much their luminance changes.

    Raises:
        ValueError: a pipeline without such a denoiser, invalid prompts, fewer than two noise samples, or an epsilon
            model on a zero-SNR schedule.
    """
    import torch

    _check_pipeline(pipe, num_noises, batch_size)
    conditions = _check_prompts(pipe, prompts)
    timestep, level = _terminal_level(pipe.scheduler)
    noises = _draw_noises(pipe.unet, num_noises, seed)
    changing, total, luminance = [], [], []
    with torch.inference_mode(), eval_mode(pipe.unet):
        for prompt in conditions:
            x_0 = _predict_x_0(pipe, _denoiser_condition(pipe, prompt), noises, timestep, level, batch_size)
            changing.append(float(x_0.var(dim=0, correction=1).mean()))
            total.append(float(x_0.square().mean()))
            if decode:
                luminance.append(np.var(_decoded_luminance(pipe, x_0, batch_size), ddof=1))
    return TerminalInvariance(
        share=_variance_share(sum(changing), sum(total)),
        shares=tuple(_variance_share(c, t) for c, t in zip(changing, total, strict=True)),
        rms=float(np.sqrt(np.mean(total))),
        luminance_std=float(np.sqrt(np.mean(luminance))) if decode else None,
        prompts=tuple(conditions),
        num_noises=num_noises,
        timestep=timestep,
        alpha=float(level.alpha),
    )


def _variance_share(changing: float, total: float) -> float:
    """Fraction of the mean square that depends on the noise, 0 to 1."""
    # E[x^2] = variance + mean^2 with an unbiased variance: pure noise gives 1 on average, so the result is clamped to
    # 1.
    return min(changing / total, 1.0) if total else 0.0


def _check_pipeline(pipe: Any, num_noises: int, batch_size: int) -> None:
    """Refuse pipelines for which terminal invariance is undefined or not implemented."""
    if num_noises < 2 or batch_size < 1:
        raise ValueError(f"need num_noises >= 2 and batch_size >= 1, got {num_noises} and {batch_size}")
    name = type(pipe).__name__
    if not hasattr(pipe, "unet") or not hasattr(pipe.scheduler, "alphas_cumprod"):
        raise ValueError(f"{name} has no unet with a diffusion schedule (alphas_cumprod); terminal SNR is not defined")
    config = pipe.unet.config
    if config.out_channels not in (config.in_channels, 2 * config.in_channels) or config.sample_size is None:
        raise ValueError(
            f"{name}: a unet from {config.in_channels} to {config.out_channels} channels with sample_size "
            f"{config.sample_size} is not supported; use the pipeline that generates from noise alone"
        )


def _check_prompts(pipe: Any, prompts: Sequence[str] | Sequence[int] | str | int | None) -> list[str | int | None]:
    """The prompts as a list; refuses those that are not of the pipeline's type (texts, class labels or None)."""
    kind = _condition_type(pipe)
    values: list[str | int | None] = [prompts] if prompts is None or isinstance(prompts, (str, int)) else [*prompts]
    if not values or not all(isinstance(value, kind) for value in values):
        wanted = {str: "texts", int: "class labels (integers)", type(None): "None: the model is unconditional"}[kind]
        raise ValueError(f"{type(pipe).__name__}: prompts must be {wanted}; got {prompts!r}")
    return values


def _condition_type(pipe: Any) -> type:
    """Type of the pipeline's prompts: text, class label (int), or None if it is unconditional."""
    if hasattr(pipe, "encode_prompt"):
        return str
    return int if getattr(pipe.unet.config, "num_class_embeds", None) else type(None)


def _terminal_level(scheduler: Any) -> tuple[int, NoiseLevel]:
    """The last timestep T - 1, at which invariance to the noise is measured, and its noise level as numbers."""
    from ..core.noise import NoiseLevel, noise_level

    timestep = len(scheduler.alphas_cumprod) - 1
    if scheduler.config.get("rescale_betas_zero_snr", False):
        return timestep, NoiseLevel(0.0, 1.0)  # diffusers' Euler, DPM++ and UniPC store alpha_bar = 2^-24 here
    level = noise_level(scheduler.alphas_cumprod.cpu().double(), timestep)
    return timestep, NoiseLevel(float(level.alpha), float(level.sigma))


def _draw_noises(unet: Any, num_noises: int, seed: int) -> Tensor:
    """Noises of consecutive CPU seeds in the UNet's size, shape [num_noises, C, H, W]."""
    import torch

    size = unet.config.sample_size
    shape = (1, unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(num_noises)]
    return torch.cat([torch.randn(shape, generator=generator) for generator in generators])


@contextmanager
def eval_mode(module: Any) -> Iterator[None]:
    """Put a module into eval mode inside the block, and restore its mode afterwards."""
    was_training = module.training  # dropout would count as dependence on noise
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def _denoiser_condition(pipe: Any, prompt: str | int | None) -> dict[str, Any]:
    """The UNet's keyword arguments for one prompt, with batch size 1."""
    import torch

    device = _execution_device(pipe)
    if prompt is None:
        return {}
    if isinstance(prompt, int):
        return {"class_labels": torch.tensor([prompt], device=device)}
    embeds = pipe.encode_prompt(
        prompt=prompt, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    condition: dict[str, Any] = {"encoder_hidden_states": embeds[0]}
    if pipe.unet.config.addition_embed_type == "text_time":  # SDXL: pooled text, then original size, crop, target size
        size = pipe.unet.config.sample_size
        height, width = (pipe.vae_scale_factor * s for s in ((size, size) if isinstance(size, int) else size))
        time_ids = torch.tensor([[height, width, 0, 0, height, width]], device=device, dtype=embeds[0].dtype)
        condition["added_cond_kwargs"] = {"text_embeds": embeds[2], "time_ids": time_ids}
    return condition


def _execution_device(pipe: Any) -> Any:
    return getattr(pipe, "_execution_device", pipe.unet.device)


def _predict_x_0(
    pipe: Any, condition: dict[str, Any], noises: Tensor, timestep: int, level: NoiseLevel, batch_size: int
) -> Tensor:
    """x_0 predictions at the terminal timestep, float64 on the CPU, shape of `noises`."""
    import torch

    from ..core.predictions import x_0_factors

    t = torch.tensor(timestep, device=_execution_device(pipe))
    predictions = []
    for noise in torch.split(noises, batch_size):
        x_t = noise.to(_execution_device(pipe), pipe.unet.dtype)
        output = pipe.unet(x_t, t, **_repeat_batch(condition, len(x_t))).sample.cpu().double()
        output = output[:, : x_t.shape[1]]  # the remaining channels of a learned-variance model are the variance
        a, b = x_0_factors(pipe.scheduler.config.prediction_type, level)
        predictions.append(a * x_t.cpu().double() + b * output)
    return torch.cat(predictions)


def _repeat_batch(condition: dict[str, Any], batch: int) -> dict[str, Any]:
    """Repeat every tensor of a condition, at any depth, along its first dimension."""
    return {
        key: _repeat_batch(value, batch) if isinstance(value, dict) else value.repeat_interleave(batch, dim=0)
        for key, value in condition.items()
    }


def _decoded_luminance(pipe: Any, x_0: Tensor, batch_size: int) -> Any:
    """Mean luminance of each x_0, decoded by the VAE if there is one, float64 [n]."""
    import torch

    vae = getattr(pipe, "vae", None)
    if vae is None:
        return mean_luminance(_to_rgb(x_0))
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcast:
        vae.float()
    try:
        latents = _denormalize_latents(vae.config, x_0).to(_execution_device(pipe), vae.dtype)
        return np.concatenate(
            [mean_luminance(_to_rgb(vae.decode(batch).sample)) for batch in torch.split(latents, batch_size)]
        )
    finally:
        if upcast:
            vae.half()


def _to_rgb(images: Tensor) -> Tensor:
    """Clamp predicted images to [-1, 1], and repeat a single channel three times."""
    images = images.clamp(-1, 1)
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def _denormalize_latents(config: Any, latents: Tensor) -> Tensor:
    """Undo the normalization of latents in a VAE's config, with a single scale or per channel."""
    import torch

    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        mean, std = (torch.tensor(v, dtype=latents.dtype).view(1, -1, 1, 1) for v in (mean, std))
        return latents * std / config.scaling_factor + mean
    return latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
