"""Bridges between models with betas and flow-matching models: use one as the other, exactly, if the SNR ends at zero.

A noise level of betas and a flow level with the same signal-to-noise ratio describe the same sample up to a factor. So
a network of either kind can be used as the other: scale its input, look up its timestep, convert its prediction
(Diff2Flow, arXiv:2506.02221). This includes pure noise only because both begin at an SNR of exactly zero.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .core import NoiseLevel, converted_prediction, flow_level, flow_time, kappa, variance_preserving
from .core.spacing import position
from .schedulers.base import ZeroSNRScheduler
from .schedulers.sampling import compute_dtype

Ask = Callable[[Tensor], tuple[NoiseLevel, Tensor, NoiseLevel]]
"""From the caller's timesteps [B]: the caller's level, the network's timesteps, and the network's level."""


class Bridge:
    """A network that is used as the other kind, until `remove`; also a context manager."""

    def __init__(self, network: nn.Module, ask: Ask, prediction_type: str, wanted: str) -> None:
        """Install the conversion around the network's calls.

        Args:
            network: called as `network(sample, timestep, ...)`, by position or by name; `sample` may be called
                `hidden_states`.
            ask: converts the timesteps of a call.
            prediction_type: what the network returns.
            wanted: the prediction type for the caller.
        """
        self._ask, self._types = ask, (prediction_type, wanted)
        self._seen: list[tuple[Tensor, NoiseLevel, NoiseLevel, torch.dtype]] = []
        self._hooks = [
            network.register_forward_pre_hook(self._convert_inputs, with_kwargs=True, prepend=True),
            network.register_forward_hook(self._convert_output),
        ]

    def remove(self) -> None:
        """Remove the hooks: the network is unchanged again."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> "Bridge":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _convert_inputs(self, network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Forward pre-hook: scale the sample and look up the network's timestep."""
        args, kwargs = list(args), dict(kwargs)
        name = "sample" if "sample" in kwargs else "hidden_states"
        sample = args[0] if args else kwargs[name]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        wide = compute_dtype(sample.dtype)
        times = torch.as_tensor(timestep, device="cpu").double().flatten()
        of_caller, asked, of_network = self._ask(times)
        here, there = (broadcast_level(level, sample, wide) for level in (of_caller, of_network))
        x = sample.to(wide) * (there.sigma / here.sigma)
        self._seen.append((x, there, here, sample.dtype))
        asked = asked.to(sample.device, wide).reshape(torch.as_tensor(timestep).shape)
        for place, key, value in ((0, name, x.to(sample.dtype)), (1, "timestep", asked)):
            if len(args) > place:
                args[place] = value
            else:
                kwargs[key] = value
        return tuple(args), kwargs

    def _convert_output(self, network: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook: convert the network's prediction to the caller's prediction type."""
        x, there, here, dtype = self._seen.pop()
        raw = output[0] if isinstance(output, tuple) else output.sample
        found = converted_prediction(raw.to(x.dtype), x, there, self._types[0], self._types[1], here).to(dtype)
        if isinstance(output, tuple):
            return (found, *output[1:])
        output.sample = found
        return output


def broadcast_level(level: NoiseLevel, sample: Tensor, wide: torch.dtype) -> NoiseLevel:
    """A noise level of numbers or of shape [B], on the sample's device and shaped to multiply a batch of samples."""
    shape = (-1, *[1] * (sample.ndim - 1))
    alpha, sigma = (
        torch.as_tensor(each).to(wide).to(sample.device, non_blocking=True).reshape(shape) for each in level
    )
    return NoiseLevel(alpha, sigma)


def as_flow_model(network: nn.Module, scheduler: ZeroSNRScheduler) -> Bridge:
    """Use a network that was trained with betas as a flow-matching model.

    It then takes samples (1 - s) x_0 + s noise and timesteps 1000 s, and returns noise - x_0, so that
    `FlowMatchMultistepScheduler`, and guiders and trainers for flow models, can use it. A flow time between two
    timesteps becomes a fractional timestep.

    Args:
        network: a UNet or transformer of diffusers.
        scheduler: with its betas and prediction type, at zero terminal SNR.

    Returns:
        The bridge; `remove()` restores the network.

    Raises:
        ValueError: the schedule does not end at an SNR of zero, so it does not contain pure noise.

    Examples:
        >>> import torch
        >>> from zsnr_diffusers import ZeroSNRDDIMScheduler, as_flow_model, build_unet
        >>> unet = build_unet("small-8")
        >>> with torch.no_grad(), as_flow_model(unet, ZeroSNRDDIMScheduler()):
        ...     velocity = unet(torch.zeros(1, 3, 8, 8), torch.tensor(1000.0)).sample
        >>> velocity.shape
        torch.Size([1, 3, 8, 8])
    """
    ask = flow_timestep_lookup(scheduler)
    return Bridge(network, ask, scheduler.config["prediction_type"], "flow_prediction")


def flow_timestep_lookup(scheduler: ZeroSNRScheduler) -> Ask:
    """The function that converts timesteps 1000 s of a flow model to timesteps of a network with betas.

    Args:
        scheduler: with the betas, at zero terminal SNR.

    Raises:
        ValueError: the schedule does not end at an SNR of zero.
    """
    levels = _zero_snr_levels(scheduler)
    places = position(torch.as_tensor(kappa(levels)))

    def ask(timesteps: Tensor) -> tuple[NoiseLevel, Tensor, NoiseLevel]:
        level = flow_level(timesteps / 1000)
        return (
            level,
            _interpolate_timesteps(position(torch.as_tensor(kappa(level))), places),
            variance_preserving(level),
        )

    return ask


def as_v_model(network: nn.Module, scheduler: ZeroSNRScheduler) -> Bridge:
    """Use a flow-matching network as a v-prediction network with betas.

    It then takes samples alpha x_0 + sigma noise and the timesteps of `scheduler`, and returns v = alpha noise - sigma
    x_0, so that every scheduler with zero terminal SNR can sample it.

    Args:
        network: a UNet or transformer of diffusers that takes timesteps 1000 s and returns noise - x_0.
        scheduler: with the betas to use; its prediction type must be `v_prediction`.

    Returns:
        The bridge; `remove()` restores the network.

    Raises:
        ValueError: the schedule does not end at an SNR of zero, or the scheduler expects another prediction.

    Examples:
        >>> import torch
        >>> from zsnr_diffusers import ZeroSNRDDIMScheduler, as_v_model, build_unet
        >>> unet = build_unet("small-8")
        >>> with torch.no_grad(), as_v_model(unet, ZeroSNRDDIMScheduler()):
        ...     v = unet(torch.zeros(1, 3, 8, 8), torch.tensor(999)).sample
        >>> v.shape
        torch.Size([1, 3, 8, 8])
    """
    if (kind := scheduler.config["prediction_type"]) != "v_prediction":
        raise ValueError(f"The scheduler has prediction_type={kind!r}; as_v_model needs one with 'v_prediction'.")
    _zero_snr_levels(scheduler)

    def ask(timesteps: Tensor) -> tuple[NoiseLevel, Tensor, NoiseLevel]:
        level = scheduler.noise_level(timesteps.long(), timesteps)
        s = torch.as_tensor(flow_time(level))
        return level, 1000 * s, flow_level(s)

    return Bridge(network, ask, "flow_prediction", "v_prediction")


def _zero_snr_levels(scheduler: ZeroSNRScheduler) -> NoiseLevel:
    """Noise levels of all timesteps, float64 [T]; refuses a schedule that does not end at zero SNR."""
    if not scheduler.config["rescale_betas_zero_snr"]:
        raise ValueError(
            "A bridge is exact only if the schedule ends at a signal-to-noise ratio of zero, but this scheduler has "
            "rescale_betas_zero_snr=False."
        )
    return scheduler.noise_level(torch.arange(len(scheduler)), torch.empty(1, dtype=torch.float64))


def _interpolate_timesteps(wanted: Tensor, levels: Tensor) -> Tensor:
    """Fractional timesteps of a network with betas for given flow times; `levels` decrease."""
    rising = levels.flip(0)
    above = torch.searchsorted(rising, wanted).clamp(1, len(rising) - 1)
    low, high = rising[above - 1], rising[above]
    share = ((wanted - low) / (high - low)).clamp(0, 1)
    return len(rising) - 1 - (above - 1 + share)
