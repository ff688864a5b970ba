"""What a stock scheduler's config says of the model, apart from what it says of a sampler."""

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers.utils import logging

logger = logging.get_logger(__name__)

_MODEL_FACTS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "clip_sample",
    "clip_sample_range",
)
"""What a scheduler config says of the *model*; the rest says how some sampler runs, and a new sampler says it anew."""

_OUR_CHOICES = ("rescale_betas_zero_snr", "timestep_spacing")

_OTHER_SAMPLERS = (
    "thresholding",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
)


def model_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model's facts in the config of any stock scheduler.

    A config in memory marks the values that stock left at its own defaults, and a file may omit them. Both mean
    stock's default, and its classes differ in theirs (LCM's betas are not DDIM's): so marks are ignored, gaps filled.

    Args:
        config: a scheduler's config, in memory or read from its file.

    Returns:
        Those of the facts that it states.

    Raises:
        ValueError: a config of a flow-matching or EDM scheduler, or of a model that predicts its variance.
    """
    name = config.get("_class_name", "This config")
    if hasattr(diffusers, str(name)):
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
        config = {p.name: p.default for p in parameters if p.default is not p.empty} | dict(config)
    foreign = {key for key in config if not key.startswith("_")} - {*_MODEL_FACTS, *_OUR_CHOICES}
    if foreign and "beta_schedule" not in config:
        raise ValueError(
            f"{name} has no betas: it is of no variance-preserving schedule, and only these reach zero SNR."
        )
    if str(config.get("variance_type")).startswith("learned"):
        raise ValueError(
            f"variance_type={config['variance_type']!r}: models that predict a variance are not supported."
        )
    ignored = [key for key in _OTHER_SAMPLERS if config.get(key)]
    if str(config.get("variance_type")).startswith("fixed_large"):
        ignored.append("variance_type")
    if ignored:
        logger.warning(f"{name}: {', '.join(ignored)} belong to another sampler and are not carried over.")
    return {key: config[key] for key in _MODEL_FACTS if key in config}
