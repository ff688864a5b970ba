"""What a saved scheduler config, in memory or from a file, says about a model."""

from collections.abc import Mapping
from typing import Any

import diffusers

from ..core import alpha_bar_table
from ..core.noise import has_zero_terminal_snr
from . import __all__ as our_names
from . import classes
from .config import betas_list, check_config_types, with_defaults


def scheduler_class(config: Mapping[str, Any]) -> Any:
    """The scheduler class, ours or diffusers', that a config names; None if unknown."""
    name = str(config.get("_class_name"))
    found = getattr(classes if name in our_names else diffusers, name, None)
    return found if name.endswith("Scheduler") and isinstance(found, type) else None


def with_named_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config, with defaults of the class that it names, ours or diffusers', for what it omits."""
    cls = scheduler_class(config)
    return with_defaults(config, cls) if cls else dict(config)


def check_saved_config(config: Mapping[str, Any]) -> None:
    """Refuse values of a type that the class which a config names does not accept.

    Raises:
        ValueError: as in `check_config_types`.
    """
    cls = scheduler_class(config)
    check_config_types(config, with_defaults({"rescale_betas_zero_snr": False}, cls) if cls else {})


def ends_in_noise(config: Mapping[str, Any]) -> bool:
    """Whether a complete config has zero terminal SNR, by its flag or by `trained_betas` that reach it by themselves.

    Epsilon models with the cosine schedule almost reach it too, and are sampled as diffusers does.
    """
    if config.get("rescale_betas_zero_snr"):
        return True
    betas = config.get("trained_betas")
    if betas is None or config.get("prediction_type", "epsilon") == "epsilon":
        return False
    trained_betas = betas_list(betas)
    return has_zero_terminal_snr(alpha_bar_table(trained_betas=trained_betas))
