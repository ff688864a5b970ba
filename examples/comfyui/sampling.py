"""Samplers and spacing of zsnr_diffusers in ComfyUI's terms: sigmas, and networks that return x_0.

ComfyUI knows two kinds of samples. Those of flow models are (1 - s) x_0 + s noise, with sigma = s. All others are
x_0 + sigma noise, whatever the network reads. Divided by 1 + sigma, the latter are samples of flow time
sigma / (1 + sigma) with the same signal-to-noise ratio. So one scheduler, for flow matching, does the steps of both.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

from zsnr_diffusers import FlowMatchMultistepScheduler
from zsnr_diffusers.core import NoiseLevel, flow_time, kappa_times, spaced_timesteps
from zsnr_diffusers.core.spacing import PURE_NOISE


def sample_multistep(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    solver_order: int = 3,
    eta: float = 0.0,
) -> Tensor:
    """`FlowMatchMultistepScheduler` as a sampler function of ComfyUI's `KSAMPLER`.

    Args:
        model: returns x_0 of `(x, sigma)`, sigma of shape [B].
        x: the sample at `sigmas[0]`.
        sigmas: decreasing; a last one of 0 is clean data, another is where the sample is left noisy.
        extra_args: passed to the model; its `seed` seeds the noise of eta > 0.
        callback: called before each step, for previews.
        disable: whether to hide the progress bar.
        solver_order: the highest order, 1 to 3; with fewer than 20 steps at most 2 is used.
        eta: 0 for the ODE, 1 for the SDE.
    """
    from comfy.k_diffusion.sampling import default_noise_sampler

    extra_args = extra_args or {}
    if len(sigmas) <= 1:
        return x
    flow = is_flow(model_sampling_of(model))
    scales = torch.ones_like(sigmas) if flow else 1 + sigmas
    times = [float(s) if flow else flow_time_of_sigma(float(s)) for s in sigmas]
    scheduler, start = scheduler_of_flow_times(times, solver_order, eta)
    noise_sampler = default_noise_sampler(x, seed=extra_args.get("seed"))
    for i in trange(len(sigmas) - 1, disable=disable):
        x_0 = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": x_0})
        noise = noise_sampler(sigmas[i], sigmas[i + 1]) if eta > 0 else None
        timestep = scheduler.timesteps[start + i]
        stepped, _ = scheduler.step(x_0, timestep, x / scales[i], variance_noise=noise, return_dict=False)
        x = stepped * scales[i + 1]
    return x


def scheduler_of_flow_times(
    times: Sequence[float], solver_order: int = 3, eta: float = 0.0
) -> tuple[FlowMatchMultistepScheduler, int]:
    """A scheduler that steps through flow times on predictions of x_0, and the index at which its run starts.

    A run from a noised image, or on a schedule that does not reach pure noise, starts behind flow time 1.
    """
    given = [*times] if times[0] == 1 else [1.0, *times]
    start = len(given) - len(times)
    scheduler = FlowMatchMultistepScheduler(
        prediction_type="sample", timestep_spacing="trailing", solver_order=solver_order, eta=eta
    )
    scheduler.set_timesteps(sigmas=given)
    scheduler.set_begin_index(start)
    return scheduler, start


def flow_time_of_sigma(sigma: float) -> float:
    """Flow time of the same signal-to-noise ratio: 1 for the number that ComfyUI writes for infinity at zero SNR."""
    return 1.0 if sigma >= PURE_NOISE else float(flow_time(NoiseLevel(1.0, sigma)))


def kappa_sigmas(model_sampling: Any, steps: int) -> Tensor:
    """n sigmas and a last 0, even in `zsnr_diffusers.core.spacing.position`: a step where the image changes.

    Of models with a table of sigmas these are entries of the table, its last and noisiest first. At zero SNR ComfyUI
    writes 4519 for infinity there, and so does this.

    Args:
        model_sampling: of a ComfyUI model.
        steps: n, at least 1; at most the length of the table.

    Raises:
        ValueError: more steps than that.
    """
    if is_flow(model_sampling):
        return torch.tensor([*kappa_times(steps), 0.0])
    sigmas = model_sampling.sigmas.double().cpu()
    alphas_cumprod = torch.where(sigmas < PURE_NOISE, 1 / (1 + sigmas**2), 0.0)
    timesteps = spaced_timesteps("kappa", steps, alphas_cumprod)
    return torch.cat([sigmas[timesteps], torch.zeros(1)]).float()


def model_sampling_of(model: Any) -> Any:
    """The `ModelSampling` of what a sampler function of ComfyUI is called with."""
    return model.inner_model.model_patcher.get_model_object("model_sampling")


def is_flow(model_sampling: Any) -> bool:
    """Whether samples are (1 - s) x_0 + s noise."""
    from comfy.model_sampling import CONST

    return isinstance(model_sampling, CONST)
