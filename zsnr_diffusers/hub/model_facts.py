"""What a saved pipeline says of its model: what the network predicts, and whether the schedule ends in pure noise.

Several places may say it, and they may disagree. All are asked, in order; the first that says something counts.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DDIMScheduler
from torch import Tensor

from .. import schedulers
from ..core import alpha_bar_table
from ..core.predictions import check_prediction_type
from ..guidance.mixin import recorded_guidance
from ..schedulers.config import MODEL_FACTS, check_types, listed, with_defaults
from .files import SCHEDULER_CONFIG, json_object, named, saved_config, saved_json
from .header import Header, read_header
from .known_models import known_model, repo_of
from .marks import Claim, buffer_claim, config_beside, key_claim, metadata_claims, original_config_claim
from .single_file import RECORD

FACTS = ("prediction_type", "rescale_betas_zero_snr")

ARGUMENTS = "the arguments"
SCHEDULER, ARCHITECTURE = "the scheduler's config", "the config of this architecture"


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a saved model, and who says it.

    Attributes:
        claims: of each place that was asked, in order of precedence.
        schedule: what is recorded of the noise schedule beside the weights of a single file, as in a scheduler's
            config.
        guidance: the guidance that is recorded, as arguments of `enable_guidance_rescale`.
    """

    claims: tuple[Claim, ...]
    schedule: Mapping[str, Any] = field(default_factory=dict)
    guidance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prediction_type(self) -> str | None:
        """`epsilon`, `v_prediction` or `sample`, None where no place says it; other models have others."""
        return next((claim.prediction_type for claim in self._said_by("prediction_type")), None)

    @property
    def rescale_betas_zero_snr(self) -> bool | None:
        """Whether the model was trained to zero terminal SNR, None where no place says it."""
        return next((claim.rescale_betas_zero_snr for claim in self._said_by("rescale_betas_zero_snr")), None)

    def authority(self, fact: str) -> Claim | None:
        """The claim that counts for one of `FACTS`, None where no place says it."""
        return next(self._said_by(fact), None)

    def _said_by(self, fact: str) -> Iterator[Claim]:
        return (claim for claim in self.claims if getattr(claim, fact) is not None)

    def is_guess(self) -> bool:
        """Whether a single file does not say what it predicts, nor the caller, but at most the config beside it."""
        claim = self.authority("prediction_type")
        return claim is None or claim.source in (SCHEDULER, ARCHITECTURE)

    @property
    def conflicts(self) -> list[str]:
        """Disagreements, a sentence each. There is none over what the caller has decided."""
        return [
            f"{fact} is {getattr(first, fact)!r} by {first.source}, which counts, and {getattr(other, fact)!r} by "
            f"{other.source}. Pass {fact}= to decide."
            for fact in FACTS
            if (first := self.authority(fact)) and first.source != ARGUMENTS
            for other in self._said_by(fact)
            if getattr(other, fact) != getattr(first, fact)
        ]

    def __str__(self) -> str:
        return ", ".join(
            f"{fact}={getattr(claim, fact)!r} by {claim.source}" if claim else f"{fact} is not said"
            for fact, claim in ((fact, self.authority(fact)) for fact in FACTS)
        )


def find_model_facts(
    source: Any,
    *,
    prediction_type: str | None = None,
    rescale_betas_zero_snr: bool | None = None,
    config: Any = None,
    original_config: Any = None,
    **kwargs: Any,
) -> ModelFacts:
    """What is said of a saved model, without loading its weights.

    Asked in this order: the arguments, `original_config` among them; of a single file what `save_pipeline` recorded,
    the keys `v_pred` and `ztsnr` among the weights, by which ComfyUI, Forge and others know such models, its
    metadata by ModelSpec's names, ComfyUI's, plain ones and those of kohya's sd-scripts, a `.yaml` of the same name
    beside it, and a schedule among the weights that ends at zero SNR; the scheduler's config, for a file the last that
    is asked; what is known here of some Hub repos, from which a file in the cache is, too.

    Args:
        source: Hub id, folder, or the path of a single `.safetensors` file.
        prediction_type: what the caller knows better.
        rescale_betas_zero_snr: likewise.
        config: folder or Hub id of the pipeline whose config goes with a single file.
        original_config: of a single file, the path of its YAML file, or its content.
        kwargs: of `from_pretrained`; those that say where to look are used, and a `scheduler` that is given.

    Raises:
        OSError: there is no such file or pipeline.
        ValueError: the file is damaged, what is recorded cannot be applied, or the model is of no
            variance-preserving schedule though its keys say that it predicts v.
    """
    if prediction_type is not None:
        check_prediction_type(prediction_type, zero_terminal_snr=False)
    claims = [Claim(ARGUMENTS, prediction_type, rescale_betas_zero_snr)]
    if "scheduler" in kwargs:
        claims.append(scheduler_claim(kwargs["scheduler"].config, ARGUMENTS))
    if is_single_file(source):
        with_scheduler, found = config, _facts_of_single_file(source, original_config)
    else:
        index = saved_config(source, **kwargs)
        with_scheduler = source if index.get("scheduler") not in (None, [None, None]) else None
        with named(source):
            found = ModelFacts((), {}, recorded_guidance(index))
    claims += found.claims
    known = [_known_claim(source)]
    if with_scheduler is not None and "scheduler" not in kwargs:
        # Which class reads it does not matter: the file has one name for all.
        claim = scheduler_claim(_scheduler_config(with_scheduler, kwargs))
        known.insert(1 if is_single_file(source) else 0, claim)  # the config of a file is that of its architecture
    claims += known
    return ModelFacts(tuple(claims), found.schedule, found.guidance)


def _facts_of_single_file(path: Any, original_config: Any) -> ModelFacts:
    """Of a file that is here, with the config that is given for it and the one that lies beside it."""
    header = read_header(path)
    found = facts_of_file(path, header)
    given = [] if original_config is None else [original_config_claim(original_config)]
    beside = [original_config_claim(file)] if (file := config_beside(path)).is_file() else []
    return replace(found, claims=(*given, *found.claims, *beside, buffer_claim(path, header)))


def facts_of_file(name: Any, header: Header) -> ModelFacts:
    """What a file of weights says, of a model or of a LoRA.

    Args:
        name: of the file, for errors.
        header: of the file.

    Raises:
        ValueError: as in `find_model_facts`.
    """
    record = _record(name, header)
    schedule = {key: record[key] for key in MODEL_FACTS if key in record and key not in FACTS}
    claims = [_claim(f"metadata {RECORD}", record), key_claim(name, header), *metadata_claims(header)]
    return ModelFacts(tuple(claims), schedule, recorded_guidance(record))


def _scheduler_config(source: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    name = f"scheduler/{SCHEDULER_CONFIG}"
    config = saved_json(source, name, kwargs)
    if config is None:
        raise OSError(f"{source} has no {name}; pass scheduler= to load it with one of yours.")
    with named(f"{name} of {source}"):
        cls = scheduler_class(config)
        check_types(config, with_defaults({"rescale_betas_zero_snr": False}, cls) if cls else {})
    return config


def is_single_file(source: Any) -> bool:
    """Whether a source of `load_pipeline` is meant as a file: there is one, or its name ends like one.

    Raises:
        ValueError: it is a file of another kind.
    """
    path = Path(os.fspath(source))
    if path.suffix == ".safetensors" and not path.is_dir():
        return True
    if path.is_file():
        raise ValueError(
            f"{path} is no .safetensors file. A pickled checkpoint (.ckpt, .pt) runs what code it holds when it is "
            "read; get or make a .safetensors of it."
        )
    return False


def scheduler_claim(config: Mapping[str, Any], source: str = SCHEDULER) -> Claim:
    """What a scheduler's config says, in memory or read from its file; a flow-matching or EDM one says nothing."""
    filled = with_defaults(config, cls) if (cls := scheduler_class(config)) else dict(config)
    if "beta_schedule" not in filled:
        return Claim(source)
    zero_snr = filled.get("rescale_betas_zero_snr") or _betas_end_in_noise(filled)
    return _claim(source, {**filled, "rescale_betas_zero_snr": bool(zero_snr)})


def _betas_end_in_noise(config: Mapping[str, Any]) -> bool:
    """Whether the betas themselves reach zero SNR, so that no flag is needed.

    Epsilon models on the cosine schedule end nearly there too, and are sampled as diffusers does.
    """
    betas = config.get("trained_betas")
    if betas is None or config.get("prediction_type", "epsilon") == "epsilon":
        return False
    return ends_in_noise(alpha_bar_table(trained_betas=listed(betas)))


def ends_in_noise(alphas_cumprod: Tensor) -> bool:
    """Whether a schedule ends at zero SNR, which diffusers may write as an alpha_bar of 2^-24."""
    return float(alphas_cumprod[-1]) < 1e-6


def scheduler_class(config: Mapping[str, Any]) -> Any:
    """Of the scheduler that a config names, None where nobody knows it."""
    name = str(config.get("_class_name"))
    found = getattr(schedulers, name, None) or getattr(diffusers, name, None)
    return found if name.endswith("Scheduler") and isinstance(found, type) else None


def _known_claim(source: Any) -> Claim:
    repo = repo_of(source)
    return Claim(f"what is known of {repo}", *known_model(repo))


def _claim(source: str, facts: Mapping[str, Any]) -> Claim:
    zero_snr = facts.get("rescale_betas_zero_snr")
    return Claim(source, facts.get("prediction_type"), None if zero_snr is None else bool(zero_snr))


# -- single files


def _record(path: Any, header: Header) -> dict[str, Any]:
    """What `save_pipeline` wrote."""
    name = f"{os.fspath(path)}: its metadata {RECORD!r}"
    record = json_object(header.metadata.get(RECORD, "{}"), name)
    with named(name):
        recorded_guidance(record)
        check_types(record, with_defaults({"rescale_betas_zero_snr": False}, DDIMScheduler))
        check_prediction_type(record.get("prediction_type", "epsilon"), zero_terminal_snr=False)
    return record
