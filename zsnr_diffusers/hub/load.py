"""Load pipelines from folders, Hub repos and single files, with their recorded schedule and guidance."""

import inspect
import sys
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import diffusers
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from ..class_conditional import ClassConditionalPipeline
from ..core.choices import EPSILON_AT_ZERO_SNR, check_guidance_rescale, check_keep_low_frequencies
from ..core.noise import has_zero_terminal_snr
from ..guidance.mixin import apply_guidance
from ..schedulers import ZeroSNRDDIMScheduler
from ..schedulers.base import ZeroSNRScheduler
from ..schedulers.config import is_flow
from ..start import Start, enable_start
from ..start.mixin import apply_start
from .claims import ARCHITECTURE, ARGUMENTS, RESOLVED_FIELDS, scheduler_claim
from .damage import check_folder_weights, explain_load_errors
from .errors import explain_hub_errors
from .files import INDEX, error_context, find_only_variant
from .flow_models import flow_scheduler_for
from .saved_model import SavedModel
from .single_file_pipeline import from_single_file
from .weight_files import with_single_dtype

logger = logging.get_logger(__name__)


def load_pipeline(
    source: Any,
    *,
    guidance_rescale: float | None = None,
    keep_low_frequencies: int | None = None,
    prediction_type: str | None = None,
    rescale_betas_zero_snr: bool | None = None,
    start: Start | str | PathLike[str] | Literal[False] | None = None,
    **kwargs: Any,
) -> Any:
    """Load a pipeline with diffusers' loaders, and apply the prediction type, schedule and guidance recorded for it.

    `SavedModel.open` determines the prediction type and whether the schedule ends in pure noise. A scheduler that
    samples the model correctly is kept. Otherwise, a zero-SNR model gets `ZeroSNRDDIMScheduler`, the paper's sampler,
    which generates the same images as the diffusers scheduler that `save_pipeline` writes. For fewer steps, set
    `pipe.scheduler = ZeroSNRMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="kappa")`. A model
    without zero SNR keeps its scheduler, with its prediction type. A Stable Diffusion model that was fine-tuned to
    flow matching (`flow_prediction`) gets `FlowMatchMultistepScheduler`; pipelines written for flow matching keep
    theirs. A start saved next to the pipeline is enabled (`enable_start`), unless `start` is given. A warning is
    logged if two sources disagree, or if an SD 1.x or SDXL file records nothing and the config of its architecture
    decides.

    Args:
        source: a Hub id, a folder, or a single `.safetensors` file of a Stable Diffusion 1.x, 2.x or SDXL model; or a
            `SavedModel`, whose files are not read again and whose options are kept.
        guidance_rescale: overrides the recorded value; 0 for none.
        keep_low_frequencies: overrides the recorded value; 0 for none. See `enable_guidance_rescale`.
        prediction_type: overrides the detected value; `flow_prediction` for a Stable Diffusion model that was
            fine-tuned to flow matching, which files seldom record.
        rescale_betas_zero_snr: overrides the detected value.
        start: overrides the start saved next to the pipeline, as in `enable_start`; False for none.
        kwargs: as in `DiffusionPipeline.from_pretrained`, or for a file as in `from_single_file`. `config`, a folder
            or Hub id of a pipeline with the same architecture, is required without access to the Hub; if it is a
            folder with weights, an autoencoder or text encoders missing from the file are loaded from there.
            `original_config`, the path of a checkpoint's original YAML file, provides the prediction type, as does a
            YAML file with the same name next to the checkpoint. For a file, `vae` may also be the path or Hub id of an
            autoencoder, or its file. Components that are passed, such as `vae` or `scheduler`, are used unchanged. All
            networks are loaded in one dtype: `dtype`, float32 by default.

    Returns:
        The pipeline, with the class it was saved with.

    Raises:
        OSError: the pipeline, the start, or the config for a file was not found; a Hub error, with the cause.
        ValueError: guidance_rescale outside [0, 1] or an invalid keep_low_frequencies, given or recorded; a start that
            is damaged or for another base; a file that is damaged, of another model, quantized, or lacks a component
            that is not passed; zero SNR for an epsilon model; a Stable Diffusion 2.x file without a recorded
            prediction type; code in a folder or repo, without `trust_remote_code=True`.
        TypeError: guidance_rescale or keep_low_frequencies for a pipeline without guidance; a start for a pipeline
            that does not begin with noise.
    """
    if isinstance(start, str | PathLike):
        start = Start.load(start)  # before loading gigabytes of weights
    check_guidance_rescale(guidance_rescale or 0.0)
    check_keep_low_frequencies(keep_low_frequencies or 0)
    if "scheduler" in kwargs and (prediction_type, rescale_betas_zero_snr) != (None, None):
        raise ValueError(
            "Pass either scheduler, or prediction_type and rescale_betas_zero_snr; a scheduler defines both."
        )
    told: dict[str, Any] = {"prediction_type": prediction_type, "rescale_betas_zero_snr": rescale_betas_zero_snr}
    saved = SavedModel.open(source, only_pipelines=True, **told, **kwargs)
    kwargs = dict(saved.options)
    check_epsilon(saved)
    for conflict in saved.conflicts:
        logger.warning(f"{saved.name}: {conflict}")
    if saved.is_single_file:
        pipe = from_single_file(saved, kwargs)
        if kwargs.get("config") is None:  # same for all models of this architecture
            claim = scheduler_claim(pipe.scheduler.config, ARCHITECTURE)
            saved = replace(saved, claims=(*saved.claims, claim))
            check_epsilon(saved)
        _warn_if_prediction_is_guessed(saved)
    else:
        pipe = _load_folder(saved, kwargs)
    if any(saved.authority(fact) for fact in RESOLVED_FIELDS) and "scheduler" not in kwargs:
        with error_context(saved.name):
            pipe.scheduler = scheduler_for(pipe, saved)
        logger.info(f"{saved.name}: {saved.facts}; sampled by {type(pipe.scheduler).__name__}.")
    if start is None:
        with explain_hub_errors(saved.name):
            pipe = apply_start(pipe, saved.name, saved.index, kwargs)
    elif start:
        pipe = enable_start(pipe, start)
    return apply_guidance(pipe, saved.guidance, guidance_rescale, keep_low_frequencies)


def _warn_if_prediction_is_guessed(saved: SavedModel) -> None:
    """Warn if a single file does not record its prediction type and the config of its architecture decides."""
    if saved.is_guess():
        claim = saved.authority("prediction_type")
        what = f"it is assumed to be {claim.prediction_type}, by {claim.source}" if claim else "its scheduler decides"
        logger.warning(
            f"{saved.name} does not record its prediction type; {what}. Pass prediction_type= if this is wrong."
        )


def check_epsilon(saved: SavedModel) -> None:
    """Refuse zero SNR for an epsilon model, and rescale_betas_zero_snr for a flow-matching model.

    Raises:
        ValueError: zero SNR for an epsilon model, or an explicit request for it with flow matching, which has no such
            flag. Recorded flags of the original base are ignored.
    """
    if saved.rescale_betas_zero_snr and saved.prediction_type == "epsilon":
        raise ValueError(f"{saved.name}: {saved.facts}. {EPSILON_AT_ZERO_SNR}")
    claim = saved.authority("rescale_betas_zero_snr")
    asked = claim is not None and claim.source == ARGUMENTS and bool(claim.rescale_betas_zero_snr)
    if asked and saved.prediction_type == "flow_prediction":
        raise ValueError(
            f"{saved.name}: {saved.facts}. Flow matching starts from zero SNR and has no betas to rescale: leave out "
            "rescale_betas_zero_snr, or pass prediction_type= if this is wrong."
        )


def _load_folder(saved: SavedModel, kwargs: Mapping[str, Any]) -> Any:
    """Load a pipeline from a folder or repo with diffusers' loader, in the only available variant if necessary."""
    source = saved.name
    _check_remote_code(saved, kwargs)
    check_folder_weights(source, Path(source))
    ours = saved.index["_class_name"] == ClassConditionalPipeline.__name__ and "custom_pipeline" not in kwargs
    with explain_hub_errors(source), explain_load_errors(source):
        cls = ClassConditionalPipeline if ours else DiffusionPipeline
        try:
            return cls.from_pretrained(source, **with_single_dtype(kwargs))
        except OSError:
            variant = None if kwargs.get("variant") else find_only_variant(source, kwargs)
            if variant is None:
                raise
            logger.info(f"{source} has weights in only one variant, which is loaded: variant={variant!r}.")
            return cls.from_pretrained(source, **with_single_dtype({**kwargs, "variant": variant}))


def _check_remote_code(saved: SavedModel, kwargs: Mapping[str, Any]) -> None:
    """Refuse a folder that contains code or names its own module, without `trust_remote_code=True`.

    Older versions of diffusers require this for Hub repos only, and run code in a folder without asking.
    """
    source, folder = saved.name, saved.folder
    if kwargs.get("trust_remote_code") or folder is None:
        return
    for part, entry in saved.index.items():
        if not isinstance(entry, list) or part in kwargs:
            continue
        if len(entry) != 2 or not all(isinstance(name, str | None) for name in entry):
            raise ValueError(f"{INDEX} of {source}: {part}={entry!r} must be a library and a class.")
        library = entry[0]
        if library is None:
            continue
        file = folder / ("" if part == "_class_name" else part) / f"{library}.py"
        known = library in ("diffusers", "transformers", *sys.modules) or hasattr(diffusers.pipelines, library)
        if file.is_file() or not known:
            what = f"contains code, {file}," if file.is_file() else f"names the module {library!r} for its {part},"
            raise ValueError(
                f"{source} {what} which loading would execute. Review it, and if you trust it, pass "
                "trust_remote_code=True."
            )


def scheduler_for(pipe: Any, saved: SavedModel) -> Any:
    """The pipeline's scheduler if it agrees with what is known about the saved model, or else one that does.

    Unknown properties are kept from the scheduler, so the result is checked as a whole.

    Raises:
        ValueError: the pipeline has no scheduler with betas; the result would predict epsilon at zero SNR.
    """
    scheduler = _resolve_scheduler(pipe, saved)
    claim = scheduler_claim(scheduler.config)
    if claim.rescale_betas_zero_snr and claim.prediction_type == "epsilon":
        raise ValueError(
            f"The scheduler of {type(pipe).__name__} with {saved.facts} would be for an epsilon model at zero SNR. "
            f"{EPSILON_AT_ZERO_SNR}"
        )
    return scheduler


def _resolve_scheduler(pipe: Any, saved: SavedModel) -> Any:
    """`scheduler_for` without checking the result."""
    if saved.prediction_type == "flow_prediction":
        return flow_scheduler_for(pipe, saved)
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or "beta_schedule" not in scheduler.config or is_flow(scheduler.config):
        raise ValueError(
            f"{type(pipe).__name__} has no scheduler with betas, so {', '.join(RESOLVED_FIELDS)} have no meaning for "
            "it."
        )
    config, zero_snr = scheduler.config, saved.rescale_betas_zero_snr
    wanted = dict(saved.schedule) | {
        fact: value for fact in RESOLVED_FIELDS if (value := getattr(saved, fact)) is not None
    }
    own = scheduler_claim(config)
    found = {**config, **{fact: getattr(own, fact) for fact in RESOLVED_FIELDS}}
    agrees = all(found.get(key, False) == value for key, value in wanted.items())
    if agrees and (not zero_snr or _starts_from_noise(scheduler)):
        return scheduler
    cls = ZeroSNRDDIMScheduler if zero_snr and not isinstance(scheduler, ZeroSNRScheduler) else type(scheduler)
    if zero_snr and config.get("timestep_spacing") == "leading":
        wanted["timestep_spacing"] = "trailing"
    accepted = inspect.signature(cls.__init__).parameters
    return cls.from_config(config, **{key: value for key, value in wanted.items() if key in accepted})


def _starts_from_noise(scheduler: Any) -> bool:
    """Whether sampling starts from pure noise: some schedulers ignore the flag; leading spacing misses T-1."""
    leading = scheduler.config.get("timestep_spacing") == "leading"
    own_steps = "original_inference_steps" in scheduler.config  # distilled models, regardless of spacing
    return has_zero_terminal_snr(scheduler.alphas_cumprod) and (own_steps or not leading)
