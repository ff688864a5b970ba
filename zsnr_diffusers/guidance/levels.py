"""Noise level and prediction type of a scheduler, of diffusers or of this package."""

from typing import Any

from torch import Tensor

from ..core import NoiseLevel, noise_level
from ..core.flow import flow_level
from ..core.guidance import rescale_guidance_in_space
from ..core.noise import noise_level_of_ratio


def check_scheduler_levels(scheduler: Any) -> None:
    """Refuse to rescale guidance in another space with a scheduler whose noise levels are unknown.

    Raises:
        ValueError: with the remedy.
    """
    # EDM and trigonometric flow have a `sigma_data`, which scales the network's output.
    if not hasattr(scheduler, "alphas_cumprod") and not _is_flow_matching(scheduler):
        raise ValueError(
            f"{type(scheduler).__name__} has neither a variance-preserving schedule nor flow times, so guidance can "
            "only be rescaled in the space of the network's output; leave out space."
        )


def _is_flow_matching(scheduler: Any) -> bool:
    """Whether a scheduler, of diffusers or of this package, samples over flow times."""
    config = scheduler.config
    if config.get("use_flow_sigmas"):
        return True
    return hasattr(scheduler, "sigmas") and not hasattr(scheduler, "alphas_cumprod") and "sigma_data" not in config


def noise_level_at(scheduler: Any, timestep: Any) -> NoiseLevel:
    """Noise level of the network's input at a timestep of a scheduler, of diffusers or of this package."""
    if not hasattr(scheduler, "sigmas"):
        # diffusers moves its table to the samples' device, and not every device supports float64.
        return noise_level(scheduler.alphas_cumprod.cpu().double(), int(timestep))
    index = scheduler.step_index
    sigma = float(scheduler.sigmas[scheduler.index_for_timestep(timestep) if index is None else index])
    if not _is_flow_matching(scheduler):
        return noise_level_of_ratio(sigma)
    if _has_edm_sigmas(scheduler):
        return NoiseLevel(1.0, sigma)
    return flow_level(1 - sigma if scheduler.config.get("invert_sigmas") else sigma)


def _has_edm_sigmas(scheduler: Any) -> bool:
    """Whether a flow-matching scheduler's sigmas are those of x_0 + sigma noise (Cosmos)."""
    return float(scheduler.sigmas.max()) > 1.001  # flow times, whatever their rounding, end at 1


def _prediction_type(scheduler: Any) -> str:
    """Prediction type of the outputs that a scheduler's `step` takes."""
    # A step of flow matching follows d x / d sigma, which is the noise where x = x_0 + sigma noise.
    if _is_flow_matching(scheduler) and _has_edm_sigmas(scheduler):
        return "epsilon"
    found: str = scheduler.config.get("prediction_type", "flow_prediction")
    return found


def rescale_in_space(
    guided: Tensor, conditional: Tensor, phi: float, space: str, sample: Tensor, timestep: Any, scheduler: Any
) -> Tensor:
    """`rescale_guidance_in_space` for the arguments of a call of `scheduler.step`."""
    # Where time is counted from noise to data, the network predicts x_0 - noise.
    sign = -1 if scheduler.config.get("invert_sigmas") else 1
    scaled = getattr(scheduler, "scale_model_input", None)
    return sign * rescale_guidance_in_space(
        sign * guided,
        sign * conditional,
        phi,
        space=space,
        prediction_type=_prediction_type(scheduler),
        x_t=sample if scaled is None else scaled(sample, timestep),
        level=noise_level_at(scheduler, timestep),
    )
