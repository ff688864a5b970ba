"""What one place says of a model, and what a scheduler's config and the name of a known repo say."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
from torch import Tensor

from .. import schedulers
from ..core import alpha_bar_table
from ..schedulers.config import betas_list, is_flow, with_defaults
from .known_models import known_model, repo_of

RESOLVED_FIELDS = ("prediction_type", "rescale_betas_zero_snr")

ARGUMENTS = "the arguments"
SCHEDULER, ARCHITECTURE = "the scheduler's config", "the config of this architecture"


@dataclass(frozen=True)
class Claim:
    """What one place says of a model; None where it says nothing."""

    source: str
    prediction_type: str | None = None
    rescale_betas_zero_snr: bool | None = None


def claim_of(source: str, facts: Mapping[str, Any]) -> Claim:
    """The claim of a place that says it by the names of diffusers."""
    zero_snr = facts.get("rescale_betas_zero_snr")
    return Claim(source, facts.get("prediction_type"), None if zero_snr is None else bool(zero_snr))


def known_claim(source: Any) -> Claim:
    """What is known here of the repo that a source is, or is of in the cache."""
    repo = repo_of(source)
    return Claim(f"what is known of {repo}", *known_model(repo))


def scheduler_claim(config: Mapping[str, Any], source: str = SCHEDULER) -> Claim:
    """What a scheduler's config says, in memory or read from its file; an EDM one says nothing."""
    filled = with_defaults(config, cls) if (cls := scheduler_class(config)) else dict(config)
    if is_flow(filled) and filled.get("prediction_type", "flow_prediction") == "flow_prediction":
        return Claim(source, "flow_prediction")
    if "beta_schedule" not in filled:
        return Claim(source)
    zero_snr = filled.get("rescale_betas_zero_snr") or _betas_end_in_noise(filled)
    return claim_of(source, {**filled, "rescale_betas_zero_snr": bool(zero_snr)})


def _betas_end_in_noise(config: Mapping[str, Any]) -> bool:
    """Whether the betas themselves reach zero SNR, so that no flag is needed.

    Epsilon models on the cosine schedule end nearly there too, and are sampled as diffusers does.
    """
    betas = config.get("trained_betas")
    if betas is None or config.get("prediction_type", "epsilon") == "epsilon":
        return False
    return ends_in_noise(alpha_bar_table(trained_betas=betas_list(betas)))


def ends_in_noise(alphas_cumprod: Tensor) -> bool:
    """Whether a schedule ends at zero SNR, which diffusers may write as an alpha_bar of 2^-24."""
    return float(alphas_cumprod[-1]) < 1e-6


def scheduler_class(config: Mapping[str, Any]) -> Any:
    """Of the scheduler that a config names, None where nobody knows it."""
    name = str(config.get("_class_name"))
    found = getattr(schedulers, name, None) or getattr(diffusers, name, None)
    return found if name.endswith("Scheduler") and isinstance(found, type) else None
