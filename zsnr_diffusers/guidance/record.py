"""How a saved pipeline records its guidance: entries of `model_index.json`, which diffusers' loaders ignore."""

from collections.abc import Mapping
from typing import Any

from ..core.choices import check_guidance_rescale, check_keep_low_frequencies
from ..core.guidance import check_guidance_space

RECORDED = "_guidance_rescale"
"""Entry of `model_index.json` for guidance_rescale. diffusers' loaders ignore names with an underscore."""

RECORDED_SPACE = "_guidance_rescale_space"

RECORDED_LOW_FREQUENCIES = "_guidance_keep_low_frequencies"


def guidance_record(guidance_rescale: float, space: str = "output", keep_low_frequencies: int = 0) -> dict[str, Any]:
    """Config entries that record a pipeline's guidance; settings that are 0 are omitted."""
    record: dict[str, Any] = {}
    if guidance_rescale != 0:
        record = {RECORDED: guidance_rescale} | ({} if space == "output" else {RECORDED_SPACE: space})
    return record | ({RECORDED_LOW_FREQUENCIES: int(keep_low_frequencies)} if keep_low_frequencies else {})


def record_of_pipeline(pipe: Any) -> dict[str, Any]:
    """`guidance_record` of a pipeline's defaults; empty if guidance rescale was never enabled."""
    return guidance_record(
        getattr(pipe, "default_guidance_rescale", 0.0),
        getattr(pipe, "guidance_space", "output"),
        getattr(pipe, "default_keep_low_frequencies", 0),
    )


def recorded_guidance(config: Mapping[str, Any]) -> dict[str, Any]:
    """Guidance settings recorded in a saved pipeline's config, as arguments of `enable_guidance_rescale`.

    Raises:
        ValueError: invalid settings.
    """
    if RECORDED not in config and RECORDED_LOW_FREQUENCIES not in config:
        return {}
    recorded = {
        "guidance_rescale": config.get(RECORDED, 0.0),
        "space": config.get(RECORDED_SPACE, "output"),
        "keep_low_frequencies": config.get(RECORDED_LOW_FREQUENCIES, 0),
    }
    check_guidance_rescale(recorded["guidance_rescale"])
    check_guidance_space(recorded["space"])
    check_keep_low_frequencies(recorded["keep_low_frequencies"])
    return recorded
