"""Pipelines out of folders, Hub repos and single files, with what these say of their model."""

import contextlib
import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from safetensors import SafetensorError

from .checkpoint_layout import SD_2, UNET, VAE, Layout, layout_of_keys
from .class_conditional import ClassConditionalPipeline
from .core.guidance import check_guidance_rescale
from .core.predictions import EPSILON_AT_ZERO_SNR
from .guidance import with_guidance
from .hub_errors import from_the_hub
from .lora_files import holds_lora
from .model_facts import FACTS, ModelFacts, ends_in_noise, find_model_facts, is_single_file, scheduler_claim
from .repo_files import INDEX, named, read_json, saved_config
from .scheduler_base import ZeroSNRScheduler
from .schedulers import ZeroSNRDDIMScheduler
from .single_file import Header, read_header

logger = logging.get_logger(__name__)

_WHATEVER = (LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError)
"""What a wrong value in a network's config leads to."""


def load_pipeline(
    source: Any,
    *,
    guidance_rescale: float | None = None,
    prediction_type: str | None = None,
    rescale_betas_zero_snr: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Load a pipeline by diffusers' own loaders, with what is recorded of its model and its guidance.

    What the model predicts, and whether its schedule ends in pure noise, is asked where `find_model_facts` asks. A
    scheduler that does this rightly stays. A zero-SNR model with any other gets `ZeroSNRDDIMScheduler`, the paper's
    sampler, which paints the pictures of the stock scheduler that `save_pipeline` writes; for fewer steps,
    `pipe.scheduler = ZeroSNRMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="kappa")`. A model
    without zero SNR keeps its scheduler, with its prediction type. Where two places disagree, there is a warning.

    Args:
        source: a Hub id, a folder, or a single `.safetensors` file of a Stable Diffusion 1.x, 2.x or XL.
        guidance_rescale: phi instead of what is recorded; 0 for none.
        prediction_type: instead of what is found.
        rescale_betas_zero_snr: likewise.
        kwargs: as in `DiffusionPipeline.from_pretrained`, or for a file as in `from_single_file`: `config`, a folder
            or Hub id of a pipeline of the same architecture, is needed where the Hub cannot be reached. A `scheduler`
            that is given stays as it is.

    Returns:
        The pipeline, of the class that it was saved as.

    Raises:
        OSError: there is no pipeline, or no config for a file; what the Hub refuses, with the reason.
        ValueError: phi outside [0, 1], given or recorded; a damaged file, or one of another model; zero SNR of a model
            that predicts epsilon; a Stable Diffusion 2.x file that does not say what it predicts; code in a folder or
            repo, without `trust_remote_code=True`.
        TypeError: phi for a pipeline without guidance.
    """
    check_guidance_rescale(guidance_rescale or 0.0)
    if "scheduler" in kwargs and (prediction_type, rescale_betas_zero_snr) != (None, None):
        raise ValueError("Pass either scheduler or prediction_type and rescale_betas_zero_snr; a scheduler says both.")
    facts = find_model_facts(
        source, prediction_type=prediction_type, rescale_betas_zero_snr=rescale_betas_zero_snr, **kwargs
    )
    check_zero_snr(source, facts)
    for conflict in facts.conflicts:
        logger.warning(f"{source}: {conflict}")
    if is_single_file(source):
        pipe = _from_single_file(source, facts, kwargs)
        if kwargs.get("config") is None:  # whatever is of this architecture has the same
            claim = scheduler_claim(pipe.scheduler.config, "diffusers' config for this architecture")
            facts = ModelFacts((*facts.claims, claim), facts.schedule, facts.guidance)
            check_zero_snr(source, facts)
    else:
        pipe = _from_pretrained(source, kwargs)
    if any(facts.authority(fact) for fact in FACTS) and "scheduler" not in kwargs:
        with named(source):
            pipe.scheduler = scheduler_with_facts(pipe, facts)
        logger.info(f"{source}: {facts}; sampled by {type(pipe.scheduler).__name__}.")
    return with_guidance(pipe, facts.guidance, guidance_rescale)


def check_zero_snr(source: Any, facts: ModelFacts) -> None:
    """Refuse facts that no model can have.

    Raises:
        ValueError: zero SNR of a model that predicts epsilon.
    """
    if facts.rescale_betas_zero_snr and facts.prediction_type == "epsilon":
        raise ValueError(f"{source}: {facts}. {EPSILON_AT_ZERO_SNR}")


def _from_pretrained(source: Any, kwargs: dict[str, Any]) -> Any:
    config = saved_config(source, **kwargs)
    _check_runs_no_code(source, config, kwargs)
    ours = config["_class_name"] == ClassConditionalPipeline.__name__ and "custom_pipeline" not in kwargs
    with from_the_hub(source), naming_damage(source):
        return (ClassConditionalPipeline if ours else DiffusionPipeline).from_pretrained(source, **kwargs)


@contextlib.contextmanager
def naming_damage(source: Any) -> Iterator[None]:
    """Name the source, and the file if it is found, where diffusers raises whatever damaged files lead to.

    Raises:
        OSError, ValueError: with the name.
    """
    try:
        yield
    except (OSError, ValueError, SafetensorError, *_WHATEVER) as error:
        if isinstance(error, torch.OutOfMemoryError) or (
            isinstance(error, OSError | ValueError) and str(source) in str(error)
        ):
            raise
        for file in sorted(Path(source).glob("*/*.safetensors")):
            read_header(file)
        for file in sorted(Path(source).glob("*/config.json")):
            read_json(file)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{source} cannot be loaded: {reason}") from error


def _check_runs_no_code(source: Any, index: Mapping[str, Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse a folder that brings code or names a module of its own, unless told.

    Older versions of diffusers, which ask this of Hub repos, run what is in a folder unasked.
    """
    folder = Path(source)
    if kwargs.get("trust_remote_code") or not folder.is_dir():
        return
    for part, entry in index.items():
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
            what = f"brings code, {file}," if file.is_file() else f"names the module {library!r} for its {part},"
            raise ValueError(
                f"{source} {what} which loading it would run. Read it, and if you trust it, pass "
                "trust_remote_code=True."
            )


def _from_single_file(source: Any, facts: ModelFacts, kwargs: dict[str, Any]) -> Any:
    header = read_header(source)
    if holds_lora(header):
        raise ValueError(
            f"{source} is a LoRA, which goes into a pipeline of its base: load_lora(pipe, {str(source)!r})."
        )
    layout, first = layout_of_keys(header.shapes), header.shapes.get(f"{UNET}input_blocks.0.0.weight", [])
    name = layout.pipelines.get(first[1]) if layout and len(first) == 4 else None
    if layout is None or name is None:
        raise ValueError(
            f"{source} is no Stable Diffusion 1.x, 2.x or XL with its text encoders, for text to image or inpainting; "
            "load it by from_single_file of its pipeline's class in diffusers."
        )
    _check_dtypes(source, header, layout)
    if layout is SD_2 and facts.prediction_type is None:
        raise ValueError(
            f"{source} does not say what it predicts, and of {layout.name} there are models of both kinds: pass "
            "prediction_type='v_prediction' (2.0 and 2.1 at 768 pixels) or 'epsilon' (2-base and 2.1-base)."
        )
    config = kwargs.get("config")
    kwargs = {**kwargs, "config": None if config is None else os.fspath(config)}
    try:
        with naming_damage(source):
            return getattr(diffusers, name).from_single_file(os.fspath(source), **kwargs)
    except OSError as error:
        if config is not None:
            raise
        raise OSError(
            f"{source} holds weights alone, and what else a pipeline needs could not be had from the Hub. "
            f"Pass config=, a folder or Hub id of a {layout.name} pipeline. {str(error).splitlines()[0]}"
        ) from error


def _check_dtypes(source: Any, header: Header, layout: Layout) -> None:
    """Refuse weights that diffusers would cast to numbers that nobody trained."""
    prefixes = tuple(filter(None, (UNET, VAE, layout.clip, layout.open_clip)))
    for key, dtype in header.dtypes.items():
        if key.startswith(prefixes) and key.endswith((".weight", ".bias")) and not dtype.startswith(("F", "BF")):
            raise ValueError(f"{source} holds {key} as {dtype}, which are no weights in floating point.")


def scheduler_with_facts(pipe: Any, facts: ModelFacts) -> Any:
    """The pipeline's scheduler if it agrees with the facts, or else one that does.

    Raises:
        ValueError: the pipeline has none with betas.
    """
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or "beta_schedule" not in scheduler.config:
        raise ValueError(
            f"{type(pipe).__name__} has no scheduler with betas, so {', '.join(FACTS)} mean nothing to it."
        )
    config, zero_snr = scheduler.config, facts.rescale_betas_zero_snr
    wanted = dict(facts.schedule) | {fact: value for fact in FACTS if (value := getattr(facts, fact)) is not None}
    own = scheduler_claim(config)
    found = {**config, **{fact: getattr(own, fact) for fact in FACTS}}
    agrees = all(found.get(key, False) == value for key, value in wanted.items())
    if agrees and (not zero_snr or _starts_from_noise(scheduler)):
        return scheduler
    cls = ZeroSNRDDIMScheduler if zero_snr and not isinstance(scheduler, ZeroSNRScheduler) else type(scheduler)
    if zero_snr and config.get("timestep_spacing") == "leading":
        wanted["timestep_spacing"] = "trailing"
    accepted = inspect.signature(cls.__init__).parameters
    return cls.from_config(config, **{key: value for key, value in wanted.items() if key in accepted})


def _starts_from_noise(scheduler: Any) -> bool:
    """Whether a scheduler does what its flag says: some know none, and leading steps never visit the last timestep."""
    leading = scheduler.config.get("timestep_spacing") == "leading"
    own_steps = "original_inference_steps" in scheduler.config  # of distilled models, whatever the spacing
    return ends_in_noise(scheduler.alphas_cumprod) and (own_steps or not leading)
