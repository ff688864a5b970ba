"""A saved model as its files describe it, without its weights: a folder, a Hub repo, a single file or a LoRA.

Several sources may record the prediction type and whether the schedule ends in pure noise, and they may disagree. All
are read in order of precedence, and the first that records something decides.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler

from ..core.choices import check_known_prediction_type
from ..guidance.record import recorded_guidance
from ..schedulers.config import FLOW_FACTS, MODEL_KEYS, check_config_types, with_defaults
from ..schedulers.saved_config import check_saved_config
from ..utils.tables import KeyValues, Part, Report, Text
from .claims import (
    ARCHITECTURE,
    ARGUMENTS,
    RESOLVED_FIELDS,
    SCHEDULER,
    Claim,
    claim_from_config,
    known_model_claim,
    scheduler_claim,
)
from .files import INDEX, SCHEDULER_CONFIG, error_context, hub_kwargs_of, load_json, parse_json_object
from .header import Header, is_single_file, read_header
from .lora_files import LORA_FILE, find_lora_file, holds_lora, load_header
from .marks import buffer_claim, key_claim, metadata_claims, original_config_claim, original_config_path
from .single_file import RECORD

SCHEDULER_FILE = f"scheduler/{SCHEDULER_CONFIG}"
"""Scheduler config in a pipeline's or LoRA's folder."""


@dataclass(frozen=True)
class SavedModel(Report):
    """What is saved about a model besides its weights; each file is read once, and each value checked once.

    Attributes:
        name: path or Hub id.
        index: `model_index.json`; empty if missing.
        scheduler_config: None if missing, or if the caller passed a scheduler.
        scheduler_file: its actual or expected path in the folder or repo.
        header: of a single file or a LoRA; otherwise empty.
        folder: None for a single file and on the Hub.
        weights: the file with this header, None on the Hub.
        is_lora: whether it is a LoRA, not a pipeline.
        claims: of each source, in order of precedence.
        schedule: the noise schedule recorded in a single file, as in a scheduler's config.
        guidance: the recorded guidance, as arguments of `enable_guidance_rescale`.
        options: what it was opened with, as arguments of `load_pipeline`.
    """

    name: str
    index: Mapping[str, Any] = field(default_factory=dict)
    scheduler_config: Mapping[str, Any] | None = None
    scheduler_file: str = SCHEDULER_FILE
    header: Header = field(default_factory=lambda: Header({}, {}, {}))
    folder: Path | None = None
    weights: Path | None = None
    is_lora: bool = False
    claims: tuple[Claim, ...] = ()
    schedule: Mapping[str, Any] = field(default_factory=dict)
    guidance: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        source: Any,
        *,
        prediction_type: str | None = None,
        rescale_betas_zero_snr: bool | None = None,
        only_pipelines: bool = False,
        weight_name: str | None = None,
        **kwargs: Any,
    ) -> "SavedModel":
        """Read a saved model's records without its weights.

        Sources in order of precedence: the arguments, including `original_config`; for a single file, the record of
        `save_pipeline`, the keys `v_pred` and `ztsnr` among the weights (as in ComfyUI and Forge), metadata of
        ModelSpec, ComfyUI, without a prefix and of kohya's sd-scripts, a `.yaml` with the same name, and a schedule
        among the weights that ends at zero SNR; the scheduler's config (for a file: that of `config`, consulted last);
        the table of known Hub repos, also for cached files. The scheduler next to a LoRA is not a claim: an audit
        compares the LoRA with it.

        Args:
            source: Hub id, folder, or path of a `.safetensors` file; or an opened model, to which the arguments are
                added.
            prediction_type: overrides other sources; `flow_prediction` means flow matching.
            rescale_betas_zero_snr: likewise.
            only_pipelines: refuse a folder or repo without a pipeline or without its scheduler's config.
            weight_name: file name of a LoRA in a folder or repo, which is then opened as a file, from the Hub if
                necessary.
            kwargs: as in `load_pipeline`; only Hub arguments, `scheduler`, and for a single file `config` and
                `original_config` are used.

        Raises:
            OSError: the file or repo does not exist.
            ValueError: a file is damaged, a recorded value is invalid, or the schedule is not variance-preserving
                although keys say that the model predicts v.
        """
        if prediction_type is not None:
            check_known_prediction_type(prediction_type)
        if isinstance(source, SavedModel):
            opened = source
            if only_pipelines and not opened.is_single_file:
                _check_pipeline(opened.name, opened.index or None)
        elif weight_name is None:
            opened = _read_source(source, kwargs, only_pipelines)
        else:
            opened = _read_source(find_lora_file(source, weight_name, **hub_kwargs_of(kwargs, "subfolder")), {}, False)
        first, last = [Claim(ARGUMENTS, prediction_type, rescale_betas_zero_snr)], []
        if "scheduler" in kwargs:
            first.append(scheduler_claim(kwargs["scheduler"].config, ARGUMENTS))
        if opened.is_single_file and kwargs.get("original_config") is not None:
            first.append(original_config_claim(kwargs["original_config"]))
        if opened.is_single_file and kwargs.get("config") is not None and "scheduler" not in kwargs:
            last.append(scheduler_claim(_load_scheduler_config(kwargs["config"], SCHEDULER_FILE, kwargs, True) or {}))
        claims = dict.fromkeys((*first, *opened.claims, *last))  # when opened again, an argument may be repeated
        return replace(opened, claims=tuple(claims), options={**opened.options, **kwargs})

    def __repr__(self) -> str:
        return f"SavedModel {self.name}: {self.facts}"

    def parts(self) -> Iterator[Part]:
        """What was found about the model, with the source of each value."""
        yield Text(self.name, "title")
        kind = "LoRA" if self.is_lora else self.index.get("_class_name") or "single file"
        rows = [("kind", str(kind), "")]
        for fact in RESOLVED_FIELDS:
            claim = self.authority(fact)
            rows.append((fact, str(getattr(claim, fact)), claim.source) if claim else (fact, "not said", ""))
        if self.scheduler_config:
            rows.append(("scheduler", str(self.scheduler_config.get("_class_name")), self.scheduler_file))
        rows += [(name, str(value), "") for name, value in self.guidance.items()]
        yield KeyValues(("", "this model", "by"), tuple(rows), aside=" (by {})", indent="  ")
        yield from (Text(conflict, "warning") for conflict in self.conflicts)

    @property
    def is_single_file(self) -> bool:
        """Whether the saved model is a single local file."""
        return self.folder is None and self.weights is not None

    @property
    def prediction_type(self) -> str | None:
        """`epsilon`, `v_prediction`, `sample` or `flow_prediction`, None if not recorded."""
        return claim.prediction_type if (claim := self.authority("prediction_type")) else None

    @property
    def rescale_betas_zero_snr(self) -> bool | None:
        """Whether the model was trained at zero terminal SNR, None if not recorded."""
        return claim.rescale_betas_zero_snr if (claim := self.authority("rescale_betas_zero_snr")) else None

    def authority(self, fact: str) -> Claim | None:
        """The claim that decides one of `RESOLVED_FIELDS`; None if no source records it."""
        return next((claim for claim in self.claims if getattr(claim, fact) is not None), None)

    def without(self, *sources: str) -> "SavedModel":
        """A copy of the saved model without the claims of these sources."""
        return replace(self, claims=tuple(claim for claim in self.claims if claim.source not in sources))

    def is_guess(self) -> bool:
        """Whether neither file nor caller gives the prediction type, so that at most a config decides."""
        claim = self.authority("prediction_type")
        return claim is None or claim.source in (SCHEDULER, ARCHITECTURE)

    @property
    def conflicts(self) -> list[str]:
        """Disagreements between claims, one sentence each; none about values that the caller passed."""
        return [
            f"{fact} is {getattr(first, fact)!r} according to {first.source}, which is used, and "
            f"{getattr(other, fact)!r} according to {other.source}. Pass {fact}= to decide."
            for fact in RESOLVED_FIELDS
            if (first := self.authority(fact)) and first.source != ARGUMENTS
            for other in self.claims
            if getattr(other, fact) not in (None, getattr(first, fact))
        ]

    @property
    def facts(self) -> str:
        """Text with the values of `RESOLVED_FIELDS` and the source of each."""
        return ", ".join(
            f"{fact}={getattr(claim, fact)!r} by {claim.source}" if claim else f"{fact} is not recorded"
            for fact, claim in ((fact, self.authority(fact)) for fact in RESOLVED_FIELDS)
        )


def _check_pipeline(source: Any, index: Mapping[str, Any] | None) -> None:
    """Refuse a folder or repo without a `model_index.json` that names a pipeline class."""
    if index is None:
        raise OSError(
            f"{source} has no pipeline: there is no {INDEX}. For a single file, pass its path, or "
            "huggingface_hub.hf_hub_download(repo, name) if it is on the Hub. Load a LoRA into a pipeline of its "
            "base with load_lora."
        )
    if "_class_name" not in index:
        raise ValueError(f"{INDEX} of {source} names no pipeline class; it needs a '_class_name'.")


def _read_source(source: Any, places: Mapping[str, Any], only_pipelines: bool) -> SavedModel:
    """Read a file, folder or repo as a `SavedModel`, with the claims of its own files."""
    name = os.fspath(source)
    if is_single_file(source):
        return _read_weights_header(name, read_header(source), Path(source))
    index = load_json(source, INDEX, places)
    if only_pipelines:
        _check_pipeline(source, index)  # before anything else is asked for
    folder = Path(source) if Path(source).is_dir() else None
    header = None if index else load_header(source, LORA_FILE, places)
    if header is None:
        with error_context(source):
            guidance = recorded_guidance(index or {})
        opened = SavedModel(name, index or {}, guidance=guidance, claims=(known_model_claim(source),))
    else:
        weights = None if folder is None else folder / LORA_FILE
        opened = replace(_read_weights_header(f"{name}/{LORA_FILE}", header, weights), name=name, is_lora=True)
    opened = replace(opened, folder=folder)
    if "scheduler" in places or (index and index.get("scheduler") in (None, [None, None])):
        return opened  # some pipelines have none
    for name in (SCHEDULER_FILE,) if index else (SCHEDULER_FILE, SCHEDULER_CONFIG):
        if (config := _load_scheduler_config(source, name, places, only_pipelines)) is not None:
            claims = opened.claims if opened.is_lora else (scheduler_claim(config), *opened.claims)
            return replace(opened, scheduler_config=config, scheduler_file=name, claims=claims)
    return opened


def _read_weights_header(name: str, header: Header, file: Path | None) -> SavedModel:
    """A `SavedModel` from a weights file's header, and, if `file` is local, its buffers and the config next to it."""
    record = parse_json_object(header.metadata.get(RECORD, "{}"), source := f"{name}: its metadata {RECORD!r}")
    with error_context(source):
        guidance = recorded_guidance(record)
        check_config_types(record, with_defaults({"rescale_betas_zero_snr": False}, DDIMScheduler))
        check_known_prediction_type(record.get("prediction_type", "epsilon"))
    claims = [claim_from_config(f"metadata {RECORD}", record), key_claim(name, header), *metadata_claims(header)]
    known = dict.fromkeys((*MODEL_KEYS, *FLOW_FACTS))
    schedule = {key: record[key] for key in known if key in record and key not in RESOLVED_FIELDS}
    return SavedModel(
        name,
        header=header,
        weights=file,
        is_lora=holds_lora(header),
        claims=(*claims, *(_claims_of_file(file, header) if file else ())),
        schedule=schedule,
        guidance=guidance,
    )


def _claims_of_file(file: Path, header: Header) -> list[Claim]:
    """Claims of buffers, of the config next to a local weights file, and of known models."""
    beside = original_config_path(file)
    said = [original_config_claim(beside)] if beside.is_file() else []
    return [*said, buffer_claim(file, header), known_model_claim(file)]


def _load_scheduler_config(source: Any, name: str, places: Mapping[str, Any], needed: bool) -> dict[str, Any] | None:
    """Read and check a scheduler's config in a folder or repo; None if it is missing and not required."""
    config = load_json(source, name, places)
    if config is not None:
        with error_context(f"{name} of {source}"):
            check_saved_config(config)
    elif needed:
        raise OSError(f"{source} has no {name}; pass scheduler= to load it with another one.")
    return config
