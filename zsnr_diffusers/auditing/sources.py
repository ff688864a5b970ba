"""What the checks need to know about a model, in memory or saved."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusers import SchedulerMixin

from ..guidance.mixin import stock_class
from ..guidance.record import record_of_pipeline, recorded_guidance
from ..hub.claims import ARGUMENTS, RESOLVED_FIELDS, SCHEDULER
from ..hub.files import SCHEDULER_CONFIG
from ..hub.layouts import SD_1, SD_2, SDXL, OriginalFormat, detect_layout, unet_in_channels
from ..hub.saved_model import SCHEDULER_FILE, SavedModel
from ..hub.single_file import SD_BETAS
from ..schedulers import FlowMatchMultistepScheduler, ZeroSNRDDIMScheduler
from ..schedulers.config import OWN_SPACING
from ..start.start import RECORDED_START

_BETAS = {key: SD_BETAS[key] for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")}
_LEADING = {**_BETAS, "timestep_spacing": "leading", "steps_offset": 1}
_PUBLISHED: dict[str, dict[str, Any]] = {
    SD_1.name: {
        "_class_name": "PNDMScheduler",
        **_LEADING,
        "prediction_type": "epsilon",
        "skip_prk_steps": True,
        "set_alpha_to_one": False,
    },
    SD_2.name: {
        "_class_name": "DDIMScheduler",
        **_LEADING,
        "prediction_type": "v_prediction",
        "clip_sample": False,
        "set_alpha_to_one": False,
    },
    SDXL.name: {
        "_class_name": "EulerDiscreteScheduler",
        **_LEADING,
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False,
    },
}
"""The pipeline that diffusers' `from_single_file` builds from a checkpoint's layout, whatever its keys record."""

_WEIGHTS_ALONE = {"vae": True, "text_encoder": True}
"""Components of the pipeline that a weights file becomes."""

_AUTOENCODERS = {"vae", "vqvae", "movq", "vqgan", "vae_decoder"}


@dataclass(frozen=True)
class Source:
    """What an audit knows about a model.

    Attributes:
        name: for messages.
        config: the scheduler's config as saved, or as it would be saved, including `_class_name`.
        index: content of `model_index.json`, or its equivalent for a pipeline in memory; empty for a scheduler alone.
        assigned: attributes assigned to the config of a scheduler in memory, which would not be saved.
        live: the scheduler itself, if it is in memory.
        pipeline: the pipeline itself, if it is in memory.
        saved: what its files record, if it is saved.
        path: of the scheduler's config file in a local folder; for a LoRA without one, where it would be.
        prediction_type: prediction type of the network, if known from other sources than the config.
        zero_snr: whether it was trained at zero terminal SNR, if known from other sources.
        guidance_rescale: as recorded.
        keep_low_frequencies: as recorded.
        lora: whether it is a LoRA.
        published: whether there is no config next to the weights, so that `config` is the one its architecture was
            published with, or the one that `load_pipeline` and `load_lora` derive from a file's metadata.
        marked: whether a weights file records its prediction type.
    """

    name: str
    config: dict[str, Any]
    index: dict[str, Any] = field(default_factory=dict)
    assigned: dict[str, Any] = field(default_factory=dict)
    live: Any = None
    pipeline: Any = None
    saved: SavedModel | None = None
    path: Path | None = None
    prediction_type: str | None = None
    zero_snr: bool | None = None
    guidance_rescale: float | None = None
    keep_low_frequencies: int = 0
    lora: bool = False
    published: bool = False
    marked: bool = False

    @property
    def latent(self) -> bool | None:
        """Whether the model works in the latents of an autoencoder; None if unknown."""
        if not self.index:
            return None
        return any(_is_component_saved(self.index.get(part)) for part in _AUTOENCODERS)

    @property
    def guided(self) -> bool:
        """Whether generation is conditioned on text or an image, and so uses a large guidance scale."""
        return any(key.startswith(("text_encoder", "image_encoder")) for key in self.index)

    @property
    def has_start(self) -> bool:
        """Whether a start is enabled, or saved next to the pipeline."""
        return getattr(self.pipeline, "default_start", None) is not None or RECORDED_START in self.index

    @property
    def has_weights(self) -> bool:
        """Whether this is a pipeline, in memory or saved, whose network can be called."""
        return self.pipeline is not None or "scheduler" in self.index


def _is_component_saved(part: Any) -> bool:
    """Whether an entry of `model_index.json` is a component; [None, None] is none."""
    return part is not None and part != [None, None]


def read_source(
    source: Any, prediction_type: str | None = None, zero_snr: bool | None = None, **places: Any
) -> Source:
    """Read what an audit needs: the scheduler's config, and what is known about the model's training.

    Args:
        source: a pipeline, a scheduler, a config with its `_class_name`, a folder, a `.safetensors` file or a Hub id,
            or one of the last three as a `SavedModel`.
        prediction_type: what the caller knows, which overrides what a file records.
        zero_snr: likewise.
        places: `HUB_KWARGS`, for a Hub id.

    Raises:
        OSError: the source does not exist or has no scheduler.
        TypeError: an unsupported source.
        ValueError: an invalid file; or a model whose architecture exists with both prediction types, and neither the
            file nor the caller gives one.
    """
    if isinstance(source, SchedulerMixin):
        found = _source_from_scheduler(source, type(source).__name__)
    elif isinstance(source, Mapping):
        found = Source(str(source.get("_class_name", "config")), _without_private_keys(source))
    elif isinstance(getattr(source, "scheduler", None), SchedulerMixin):
        found = _source_from_pipeline(source)
    else:
        _check_path_exists(source)
        saved = SavedModel.open(source, prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr, **places)
        return _source_from_saved_model(saved)
    return replace(found, prediction_type=prediction_type, zero_snr=zero_snr)


def _check_path_exists(source: Any) -> None:
    """Refuse a source that cannot be audited, or a path that does not exist; anything else may be a Hub id."""
    if not isinstance(source, str | Path | SavedModel):
        raise TypeError(
            f"Cannot audit {source!r}: pass a pipeline, a scheduler, its config, a folder, a .safetensors file or a "
            "Hub id."
        )
    if isinstance(source, SavedModel) or (path := Path(source)).exists():
        return
    if isinstance(source, Path) or path.suffix in (".safetensors", ".ckpt", ".json") or path.is_absolute():
        raise OSError(f"{source} does not exist.")


def _without_private_keys(config: Mapping[Any, Any]) -> dict[str, Any]:
    """A scheduler's config without the keys that diffusers adds for internal use."""
    kept = ("_class_name", OWN_SPACING)
    return {str(key): value for key, value in config.items() if key in kept or not str(key).startswith("_")}


def _source_from_scheduler(scheduler: Any, name: str, **more: Any) -> Source:
    """The `Source` of a scheduler in memory, with values assigned to its config kept separate."""
    config = _without_private_keys(scheduler.config) | {"_class_name": type(scheduler).__name__}
    # An attribute of a config is what the running scheduler reads, an item is what is saved.
    attributes = {key: getattr(scheduler.config, key, value) for key, value in config.items() if key != "_class_name"}
    assigned = {key: value for key, value in attributes.items() if repr(value) != repr(config[key])}
    return Source(name, config, assigned=assigned, live=scheduler, **more)


def _source_from_pipeline(pipe: Any) -> Source:
    """The `Source` of a pipeline in memory: its scheduler, components, and recorded guidance rescale."""
    name = stock_class(type(pipe)).__name__
    parts = {key: part for key, part in getattr(pipe, "components", vars(pipe)).items() if part is not None}
    recorded = recorded_guidance(record_of_pipeline(pipe))
    index = {**dict.fromkeys(parts, True), "_class_name": name}
    index.pop("scheduler", None)  # the object determines its class
    return _source_from_scheduler(pipe.scheduler, name, index=index, pipeline=pipe, **_guidance(recorded))


def _guidance(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `Source` for recorded guidance."""
    return {name: recorded[name] for name in ("guidance_rescale", "keep_low_frequencies") if name in recorded}


def _source_from_saved_model(saved: SavedModel) -> Source:
    """The `Source` of a folder, file or repo; its config is compared with other records."""
    known, said = saved.without(SCHEDULER), saved.without(SCHEDULER, ARGUMENTS)
    config, index, of_weights = saved.scheduler_config, dict(saved.index), saved.is_lora or saved.is_single_file
    published = of_weights and config is None
    if of_weights:
        layout = (None if saved.is_lora else detect_layout(saved.header.shapes)) or SDXL
        _check_sd2_prediction_type(known, layout)
        channels = unet_in_channels(saved.header.shapes) or 4
        pipeline = "LoRA" if saved.is_lora else layout.pipelines.get(channels, layout.pipelines[4])
        index = {"_class_name": pipeline, **_WEIGHTS_ALONE}
        if published:
            config = _scheduler_config_from_marks(said, layout) if saved.is_single_file else _PUBLISHED[SDXL.name]
    if config is None:
        raise OSError(f"{saved.name} has no scheduler: there is neither {SCHEDULER_FILE} nor {SCHEDULER_CONFIG}.")
    return Source(
        saved.name,
        dict(config),
        index,
        saved=said,
        path=None if saved.folder is None else saved.folder / saved.scheduler_file,
        prediction_type=known.prediction_type,
        zero_snr=None if known.prediction_type == "flow_prediction" else known.rescale_betas_zero_snr,
        **_guidance(saved.guidance),
        lora=saved.is_lora,
        published=published,
        marked=said.prediction_type is not None,
    )


def _check_sd2_prediction_type(known: SavedModel, layout: OriginalFormat) -> None:
    """Refuse a Stable Diffusion 2.x file that does not record whether it predicts epsilon or v."""
    if layout is SD_2 and known.prediction_type is None:
        raise ValueError(
            f"{known.name} does not record its prediction type, and Stable Diffusion 2.x exists with both: pass "
            "prediction_type='v_prediction' (2.0 and 2.1 at 768 pixels) or prediction_type='epsilon' (2-base and "
            "2.1-base), or prediction_type='flow_prediction' if it was fine-tuned to flow matching."
        )


def _scheduler_config_from_marks(said: SavedModel, layout: OriginalFormat) -> dict[str, Any]:
    """The scheduler config that `load_pipeline` and `load_lora` derive from a file's metadata."""
    if said.prediction_type == "flow_prediction":
        return {
            **said.schedule,
            "prediction_type": "flow_prediction",
            "_class_name": FlowMatchMultistepScheduler.__name__,
        }
    facts = {fact: value for fact in RESOLVED_FIELDS if (value := getattr(said, fact)) is not None}
    if not said.rescale_betas_zero_snr:
        return {**_PUBLISHED[layout.name], **said.schedule, **facts}
    return {**_BETAS, **said.schedule, **facts, "_class_name": ZeroSNRDDIMScheduler.__name__}
