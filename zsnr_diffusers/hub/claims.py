"""What one source records about a model: arguments, a scheduler's config, or the table of known repos."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..schedulers.config import is_flow
from ..schedulers.saved_config import ends_in_noise, with_named_defaults
from .known_models import known_model_settings, repo_id_of

RESOLVED_FIELDS = ("prediction_type", "rescale_betas_zero_snr")

ARGUMENTS = "the arguments"
SCHEDULER, ARCHITECTURE = "the scheduler's config", "the config of this architecture"


@dataclass(frozen=True)
class Claim:
    """What one source records about a model; None where it records nothing."""

    source: str
    prediction_type: str | None = None
    rescale_betas_zero_snr: bool | None = None


def claim_from_config(source: str, facts: Mapping[str, Any]) -> Claim:
    """The claim of config-like values with diffusers' names."""
    zero_snr = facts.get("rescale_betas_zero_snr")
    return Claim(source, facts.get("prediction_type"), None if zero_snr is None else bool(zero_snr))


def known_model_claim(source: Any) -> Claim:
    """The claim of the table of known models about a Hub repo, or about the repo of a file in the Hub's cache."""
    repo = repo_id_of(source)
    return Claim(f"the known models' entry for {repo}", *known_model_settings(repo))


def scheduler_claim(config: Mapping[str, Any], source: str = SCHEDULER) -> Claim:
    """The claim of a scheduler's config, in memory or from a file; an EDM config claims nothing."""
    filled = with_named_defaults(config)
    if is_flow(filled) and filled.get("prediction_type", "flow_prediction") == "flow_prediction":
        return Claim(source, "flow_prediction")
    if "beta_schedule" not in filled:
        return Claim(source)
    zero_snr = ends_in_noise(filled)
    return claim_from_config(source, {**filled, "rescale_betas_zero_snr": zero_snr})
