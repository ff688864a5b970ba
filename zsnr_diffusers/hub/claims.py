"""What one source records about a model: arguments, a scheduler's config, or the table of known repos."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers

from .. import schedulers
from ..core import alpha_bar_table
from ..core.noise import has_zero_terminal_snr
from ..schedulers.config import betas_list, is_flow, with_defaults
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
    filled = with_defaults(config, cls) if (cls := scheduler_class(config)) else dict(config)
    if is_flow(filled) and filled.get("prediction_type", "flow_prediction") == "flow_prediction":
        return Claim(source, "flow_prediction")
    if "beta_schedule" not in filled:
        return Claim(source)
    zero_snr = filled.get("rescale_betas_zero_snr") or _betas_have_zero_terminal_snr(filled)
    return claim_from_config(source, {**filled, "rescale_betas_zero_snr": bool(zero_snr)})


def _betas_have_zero_terminal_snr(config: Mapping[str, Any]) -> bool:
    """Whether a config's `trained_betas` already reach zero SNR, so that no flag is needed.

    Epsilon models with the cosine schedule almost reach it too, and are sampled as diffusers does.
    """
    betas = config.get("trained_betas")
    if betas is None or config.get("prediction_type", "epsilon") == "epsilon":
        return False
    return has_zero_terminal_snr(alpha_bar_table(trained_betas=betas_list(betas)))


def scheduler_class(config: Mapping[str, Any]) -> Any:
    """The scheduler class, ours or diffusers', that a config names; None if unknown."""
    name = str(config.get("_class_name"))
    found = getattr(schedulers, name, None) or getattr(diffusers, name, None)
    return found if name.endswith("Scheduler") and isinstance(found, type) else None
