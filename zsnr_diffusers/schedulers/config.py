"""Separate the model settings in a diffusers scheduler's config from the sampler settings."""

import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.utils import logging

logger = logging.get_logger(__name__)

MODEL_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "snr_shift_scale",
    "original_inference_steps",
)
"""Config keys that describe the *model*; all others describe a sampler, and a new sampler sets its own."""

FLOW_FACTS = (
    "num_train_timesteps",
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "shift_terminal",
    "time_shift_type",
    "invert_sigmas",
    "stochastic_sampling",
    "prediction_type",
)
"""The same for flow-matching models."""

_FACTS_OF_SOME = {"variance_type": ("fixed_small", "fixed_large")}
"""Further keys that some samplers here keep if they have one of these values."""

_OUR_CHOICES = ("rescale_betas_zero_snr", "timestep_spacing")

_LOG_SIGMA = "it spaces steps in log(sigma), which is infinite at zero SNR; use timestep_spacing='kappa' instead"
_OTHER_SAMPLERS: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_karras_sigmas": ((True,), _LOG_SIGMA),
    "use_exponential_sigmas": ((True,), _LOG_SIGMA),
    "use_beta_sigmas": ((True,), _LOG_SIGMA),
    "use_lu_lambdas": ((True,), _LOG_SIGMA),
    "interpolation_type": (("log_linear",), "timesteps are integers here, so no interpolation is needed"),
    "algorithm_type": (
        ("sde-dpmsolver", "sde-dpmsolver++"),
        "to add noise at every step, pass eta=1.0 to ZeroSNRMultistepScheduler",
    ),
    "variance_type": (
        ("fixed_large", "fixed_large_log"),
        "noise follows the posterior's variance, which is also correct with few steps; only ZeroSNRDDPMScheduler has "
        "fixed_large",
    ),
}
"""Settings of diffusers samplers that change their result and have no counterpart here: values and reason."""

_OTHER_MODELS: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_flow_sigmas": ((True,), "flow-matching models have no betas; FlowMatchMultistepScheduler samples them"),
    "prediction_type": (
        ("flow_prediction",),
        "flow-matching models have no betas; FlowMatchMultistepScheduler samples them",
    ),
    "timestep_type": (("continuous",), "models with continuous noise levels have no timesteps to space"),
    "variance_type": (("learned", "learned_range"), "models that predict a variance are not supported"),
}


_CALIBRATED_FOR = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "snr_shift_scale"),
    *("rescale_betas_zero_snr", "prediction_type", "timestep_spacing", "solver_order", "corrector", "eta"),
)
"""Config keys that a calibration depends on."""

LARGEST_T = 100_000
DEFAULT_T = 1000

DEFAULTS = "_use_default_values"
"""Config key in which diffusers records values left at their default, which another class's `from_config` replaces
with its own default.
"""

OWN_SPACING = "_own_timestep_spacing"
"""Config key for a spacing that diffusers does not support; diffusers' classes keep it unread."""


class SchedulerConfig(FrozenDict):
    """A config that equals another one with the same values, regardless of order and of which were defaults."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        mine, others = ({k: v for k, v in config.items() if k != DEFAULTS} for config in (self, other))
        return mine == others

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]


def normalize_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values to register instead of the arguments of one of our schedulers, so that its config can be saved.

    Betas become a list and set T, unless T was passed; a spacing that diffusers does not support is replaced by the
    closest one.
    """
    changes: dict[str, Any] = {}
    if config["trained_betas"] is not None:
        betas = torch.as_tensor(config["trained_betas"], dtype=torch.float64).flatten().tolist()
        changes["trained_betas"] = betas
        if config["num_train_timesteps"] == DEFAULT_T:
            changes["num_train_timesteps"] = len(betas)
    return changes | normalize_spacing(config)


def normalize_spacing(config: Mapping[str, Any]) -> dict[str, Any]:
    """Config values that store `kappa` spacing: the closest one in diffusers, and ours under `OWN_SPACING`."""
    kappa = config["timestep_spacing"] == "kappa"
    return {"timestep_spacing": "trailing", OWN_SPACING: "kappa"} if kappa else {}


def own_spacing(config: Mapping[str, Any]) -> str:
    """The timestep spacing of a scheduler's config, including `kappa`."""
    return str(config.get(OWN_SPACING, config["timestep_spacing"]))


def drop_outdated_calibration(
    config: Mapping[str, Any], overrides: Mapping[str, Any], cls: type[Any]
) -> dict[str, Any]:
    """`{"calibration": None}`, after a warning, if an override changes a setting that a calibration depends on.

    Args:
        config: of a scheduler.
        overrides: changed values; if they include a calibration, it is not checked.
        cls: scheduler class of both.
    """
    if not config.get("calibration") or "calibration" in overrides:
        return {}
    before = {**with_defaults(config, cls), "timestep_spacing": own_spacing(with_defaults(config, cls))}
    same = {
        key: overrides[key] == before[key] for key in _CALIBRATED_FOR if key in overrides.keys() - {"trained_betas"}
    }
    if "trained_betas" in overrides:
        same["trained_betas"] = betas_list(overrides["trained_betas"]) == betas_list(before["trained_betas"])
    changed = [key for key, kept in same.items() if not kept]
    if not changed:
        return {}
    logger.warning(
        f"The calibration of {', '.join(map(str, config['calibration']))} steps is dropped: it was fitted for "
        f"{changed[0]}={before[changed[0]]!r}. Fit it again with zsnr calibrate."
    )
    return {"calibration": None}


def with_defaults(config: Mapping[str, Any], cls: type[Any]) -> dict[str, Any]:
    """A scheduler's config, with defaults of class `cls` for what it omits."""
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty} | dict(config)


def _class_name_of(config: Mapping[str, Any]) -> str:
    """The scheduler class that a config names, for error messages."""
    return str(config.get("_class_name", "This config"))


def with_class_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's config, with defaults of the diffusers class that it names for what it omits.

    A file may omit defaults of its class, and diffusers' classes have different defaults (such as LCM's betas and
    DDIM's).
    """
    stock = getattr(diffusers, _class_name_of(config), None)
    return dict(config) if stock is None else with_defaults(config, stock)


def check_variance_preserving(config: Mapping[str, Any]) -> None:
    """Refuse a config of a model without a beta schedule that could end at zero SNR.

    Raises:
        ValueError: a config with flow matching, EDM, continuous timesteps, or a predicted variance.
    """
    foreign = {key for key in config if not key.startswith("_")} - {*MODEL_KEYS, *_OUR_CHOICES}
    if is_flow(config) and "beta_schedule" not in config:
        raise ValueError(
            f"{_class_name_of(config)} is for flow-matching models, which have no betas; use "
            "FlowMatchMultistepScheduler."
        )
    if foreign and "beta_schedule" not in config:
        raise ValueError(
            f"{_class_name_of(config)} has no betas: it is not variance-preserving, and only variance-preserving "
            "schedules can reach zero SNR."
        )
    for key, (values, reason) in _OTHER_MODELS.items():
        if config.get(key) in values:
            raise ValueError(f"{_class_name_of(config)} has {key}={config[key]!r}: {reason}.")


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's config is for a flow-matching model; a config in memory does not name its class."""
    shifted = "beta_schedule" not in config and "shift" in config
    said = bool(config.get("use_flow_sigmas")) or config.get("prediction_type") == "flow_prediction"
    return shifted or said or "FlowMatch" in _class_name_of(config)


def flow_model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model settings in a flow-matching scheduler's config; distilled models keep their flow times.

    Raises:
        ValueError: a config of a model with betas, or of neither kind.
    """
    if not is_flow(config):
        raise ValueError(
            f"{_class_name_of(config)} is not for flow-matching models; if it has betas, use "
            "ZeroSNRMultistepScheduler.from_config. For a network fine-tuned to flow matching, pass "
            "prediction_type='flow_prediction'."
        )
    filled = with_class_defaults(config)
    kept = {key: filled[key] for key in FLOW_FACTS if key in filled}
    if "flow_shift" in filled:
        kept["shift"] = filled["flow_shift"]
    if "scale_factors" in filled:  # FlowMatchLCMScheduler's
        kept["stochastic_sampling"] = True
    if kept.get("stochastic_sampling"):
        kept["timestep_spacing"] = "trailing"
    _warn_of_stock_spacings(filled, _class_name_of(config))
    return kept


def _warn_of_stock_spacings(config: Mapping[str, Any], class_name: str) -> None:
    """Log each sigma spacing of a diffusers flow config that our schedulers do not support."""
    for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        if config.get(key):
            logger.warning(f"{key}={config[key]} of {class_name} is not supported: our own spacing is used.")


def model_config(config: Mapping[str, Any], accepted: Collection[str] = MODEL_KEYS) -> dict[str, Any]:
    """The model settings in a diffusers scheduler's config, without the sampler settings.

    A config in memory marks values that were left at their defaults; these marks are ignored.

    Args:
        config: a scheduler's config, in memory or read from its file.
        accepted: parameters of the new sampler.

    Returns:
        The stated and accepted settings.

    Raises:
        ValueError: as `check_variance_preserving`.
    """
    config = {
        "prediction_type": "epsilon",
        **with_class_defaults(config),
    }  # its class has no other spacing, or is unknown
    check_variance_preserving(config)
    kept = [key for key, values in _FACTS_OF_SOME.items() if key in accepted and config.get(key) in values]
    for key, (values, reason) in _OTHER_SAMPLERS.items():
        if config.get(key) in values and key not in kept:
            logger.warning(f"{_class_name_of(config)}: {key}={config[key]!r} is not carried over: {reason}.")
    return {key: config[key] for key in (*MODEL_KEYS, *kept) if key in config and key in accepted}


def _required_type(value: Any, default: Any) -> str | None:
    """The required type of a config value, in words; None if it has the type of its default."""
    if isinstance(default, bool):
        right, wanted = isinstance(value, bool), "true or false"
    elif isinstance(default, int | float):
        right, wanted = value == default or _is_finite_number(value), "a number"  # some defaults are infinite
    elif isinstance(default, str):
        right, wanted = isinstance(value, str), "a text"
    else:
        return None
    return None if right else wanted


def check_config_types(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse scheduler config values with another type than their default, such as the string "false", which is
    truthy.

    Args:
        config: of a scheduler, or a part of one.
        defaults: of its class.

    Raises:
        ValueError: with the value, and what it must be.
    """
    kinds = {"num_train_timesteps": 1000, "beta_schedule": "linear", "prediction_type": "epsilon", **defaults}
    for key in kinds.keys() & config.keys():
        wanted = _required_type(config[key], kinds[key])
        if wanted is not None:
            raise ValueError(f"{_class_name_of(config)}: {key}={config[key]!r} must be {wanted}.")
    T, betas = config.get("num_train_timesteps", 1), config.get("trained_betas")
    if not isinstance(T, int) or not 1 <= T <= LARGEST_T:
        raise ValueError(f"num_train_timesteps={T!r} must be an integer from 1 to {LARGEST_T}.")
    if betas is not None and not all(_is_finite_number(value) for value in betas_list(betas)):
        raise ValueError("trained_betas must be numbers.")
    if not isinstance(distilled := config.get("original_inference_steps"), int | None):
        raise ValueError(f"original_inference_steps={distilled!r} must be an integer.")


def _is_finite_number(value: Any) -> bool:
    """Whether a config value is a finite int or float, but not a bool."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that overflows float
        return False


def betas_list(betas: Any) -> list[Any]:
    """A config's `trained_betas` as a list; [None] if it is neither an array nor a list."""
    found = betas.tolist() if hasattr(betas, "tolist") else betas
    return list(found) if isinstance(found, list | tuple) else [None]


def register_to_config_with_base(base: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """diffusers' `register_to_config` for an `__init__` that declares only the parameters that its class adds.

    Args:
        base: the `__init__` whose parameters come first; calling it is left to the decorated one. If both declare a
            parameter, the decorated one's default is used.
    """

    def decorated(init: Callable[..., None]) -> Callable[..., None]:
        inherited, own = (dict(inspect.signature(function).parameters) for function in (base, init))
        signature = inspect.Signature([*{**inherited, **own}.values()], return_annotation=None)

        @functools.wraps(init)
        def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: N807
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError as error:  # its message names no function
                raise TypeError(f"{init.__qualname__}() {error}") from None
            init(**{name: value for name, value in given.items() if name in own})

        __init__.__signature__ = signature  # type: ignore[attr-defined]
        return register_to_config(__init__)

    return decorated
