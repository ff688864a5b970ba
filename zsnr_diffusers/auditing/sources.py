"""What is said of a model in a folder, a Hub repo, a checkpoint file, or an object in memory; no weights are read."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusers import SchedulerMixin

from ..guidance.mixin import guidance_record, recorded_guidance, stock_class
from ..hub.files import INDEX, SCHEDULER_CONFIG, saved_json
from ..hub.header import read_header
from ..hub.known_models import known_model, repo_of
from ..hub.layouts import SD_1, SD_2, SDXL, Layout, in_channels, layout_of
from ..hub.lora_files import LORA_FILE, holds_lora, saved_header
from ..hub.model_facts import FACTS, ModelFacts, facts_of_file, find_model_facts
from ..hub.single_file import SD_BETAS
from ..schedulers import ZeroSNRDDIMScheduler
from ..schedulers.config import OWN_SPACING

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
"""What diffusers' `from_single_file` makes of a checkpoint by its layout, whatever its keys say."""

_WEIGHTS_ALONE = {"vae": True, "text_encoder": True}
"""The parts of what a file of weights becomes."""

_AUTOENCODERS = {"vae", "vqvae", "movq", "vqgan", "vae_decoder"}


@dataclass(frozen=True)
class Source:
    """What was found.

    Attributes:
        name: how to call it.
        config: the scheduler's config as its file has it, or as it would be saved, `_class_name` included.
        index: `model_index.json`, or the like of a pipeline in memory; empty for a scheduler alone.
        assigned: what was assigned on the config of a scheduler in memory, and would not be saved.
        live: the scheduler itself, if it is in memory.
        pipeline: the pipeline itself, likewise.
        path: of the scheduler's config file, in a local folder; where there is none beside a LoRA, of the one to be.
        prediction_type: what the network predicts, where that is known from elsewhere than the config.
        zero_snr: whether it was trained at zero terminal SNR, likewise.
        lora: whether it is a LoRA.
        published: whether the config is not the model's own, but what its architecture was published with, or what
            `load_pipeline` and `load_lora` make of the marks in a file: there is no config beside the weights.
        marked: whether a file of weights says itself what it predicts.
        ambiguous: whether it is of an architecture with models of both kinds, and says nothing.
    """

    name: str
    config: dict[str, Any]
    index: dict[str, Any] = field(default_factory=dict)
    assigned: dict[str, Any] = field(default_factory=dict)
    live: Any = None
    pipeline: Any = None
    path: Path | None = None
    prediction_type: str | None = None
    zero_snr: bool | None = None
    lora: bool = False
    published: bool = False
    marked: bool = False
    ambiguous: bool = False

    @property
    def latent(self) -> bool | None:
        """Whether the model works in the latents of an autoencoder; None if that cannot be told."""
        if not self.index:
            return None
        return any(_is_there(self.index.get(part)) for part in _AUTOENCODERS)

    @property
    def guided(self) -> bool:
        """Whether images are made of a text or an image, and so with a large guidance scale."""
        return any(key.startswith(("text_encoder", "image_encoder")) for key in self.index)

    @property
    def guidance_rescale(self) -> float | None:
        """phi, as it is recorded.

        Raises:
            ValueError: it is none.
        """
        try:
            return recorded_guidance(self.index).get("guidance_rescale")
        except TypeError as error:
            raise ValueError(f"{INDEX} records a guidance rescale that is no number: {error}.") from error

    @property
    def has_weights(self) -> bool:
        """Whether there is a whole pipeline."""
        return self.pipeline is not None or "scheduler" in self.index


def _is_there(part: Any) -> bool:
    return part is not None and part != [None, None]


def read_source(source: Any, **places: Any) -> Source:
    """Find the scheduler's config and what else is said of the model.

    Args:
        source: a pipeline, a scheduler, a config with its `_class_name`, a folder, a `.safetensors` file or a Hub id.
        places: `PLACES`, for a Hub id.

    Raises:
        OSError: there is nothing, or no scheduler in it.
        TypeError: something else.
        ValueError: a file that is not what it should be.
    """
    if isinstance(source, SchedulerMixin):
        return _of_scheduler(source, type(source).__name__)
    if isinstance(source, Mapping):
        return Source(str(source.get("_class_name", "config")), _plain(source))
    if isinstance(getattr(source, "scheduler", None), SchedulerMixin):
        return _of_pipeline(source)
    if not isinstance(source, str | Path):
        raise TypeError(
            f"Cannot audit {source!r}: give a pipeline, a scheduler, its config, a folder, a .safetensors file or a "
            "Hub id."
        )
    path = Path(source)
    if path.is_dir():
        return _of_files(str(source), {})
    if path.is_file():
        return _of_file(path)
    if isinstance(source, Path) or path.suffix in (".safetensors", ".ckpt", ".json") or path.is_absolute():
        raise OSError(f"{source} does not exist.")
    return _of_files(source, places)


def _plain(config: Mapping[Any, Any]) -> dict[str, Any]:
    """A config without diffusers' own notes in it."""
    kept = ("_class_name", OWN_SPACING)
    return {str(key): value for key, value in config.items() if key in kept or not str(key).startswith("_")}


def _of_scheduler(scheduler: Any, name: str, **more: Any) -> Source:
    config = _plain(scheduler.config) | {"_class_name": type(scheduler).__name__}
    # An attribute of a config is what the running scheduler reads, an item is what is saved.
    attributes = {key: getattr(scheduler.config, key, value) for key, value in config.items() if key != "_class_name"}
    assigned = {key: value for key, value in attributes.items() if repr(value) != repr(config[key])}
    return Source(name, config, assigned=assigned, live=scheduler, **more)


def _of_pipeline(pipe: Any) -> Source:
    name = stock_class(type(pipe)).__name__
    parts = {key: part for key, part in getattr(pipe, "components", vars(pipe)).items() if part is not None}
    phi = getattr(pipe, "default_guidance_rescale", 0.0)
    index = {**dict.fromkeys(parts, True), "_class_name": name, **guidance_record(phi)}
    index.pop("scheduler", None)  # its class is that of the object
    return _of_scheduler(pipe.scheduler, name, index=index, pipeline=pipe)


def _of_files(source: str, places: Mapping[str, Any]) -> Source:
    """Of a folder or Hub repo."""
    index, local = saved_json(source, INDEX, places) or {}, Path(source).is_dir()
    header = None if index else saved_header(source, LORA_FILE, places)
    names = (f"scheduler/{SCHEDULER_CONFIG}", SCHEDULER_CONFIG)
    found = ((name, config) for name in names if (config := saved_json(source, name, places)) is not None)
    name, config = next(found, (names[0], None))
    if config is None and header is None:
        raise OSError(f"{source} holds no scheduler: there is neither {' nor '.join(names)}.")
    path = Path(source, name) if local else None
    if header is None:
        predicts, zero_snr = known_model(repo_of(source))
        return Source(source, config or {}, index, path=path, prediction_type=predicts, zero_snr=zero_snr)
    facts = facts_of_file(f"{source}/{LORA_FILE}", header)
    return _of_weights(source, facts, "LoRA", _PUBLISHED[SDXL.name], config, lora=True, path=path)


def _of_file(path: Path) -> Source:
    header, facts = read_header(path), find_model_facts(path)
    if lora := holds_lora(header):
        return _of_weights(str(path), facts, "LoRA", _made_of(facts, SDXL), lora=lora)
    layout = layout_of(header.shapes) or SDXL
    source = _of_weights(
        str(path),
        facts,
        layout.pipelines.get(in_channels(header.shapes) or 4, layout.pipelines[4]),
        _made_of(facts, layout),
    )
    return replace(source, ambiguous=layout is SD_2 and facts.prediction_type is None)


def _made_of(facts: ModelFacts, layout: Layout) -> dict[str, Any]:
    """The scheduler's config that `load_pipeline` and `load_lora` make of the marks in a file."""
    said = {fact: value for fact in FACTS if (value := getattr(facts, fact)) is not None}
    config = {**_PUBLISHED[layout.name], **facts.schedule, **said}
    if not facts.rescale_betas_zero_snr:
        return config
    return {**_BETAS, **facts.schedule, **said, "_class_name": ZeroSNRDDIMScheduler.__name__}


def _of_weights(
    name: str, facts: ModelFacts, pipeline: str, made: Mapping[str, Any], config: Any = None, **more: Any
) -> Source:
    """Of a file of weights, with the config of a scheduler beside it or with that which is made of its marks."""
    index: dict[str, Any] = {"_class_name": pipeline, **_WEIGHTS_ALONE}
    if facts.guidance:
        index |= guidance_record(facts.guidance["guidance_rescale"], facts.guidance["space"])
    return Source(
        name,
        config or dict(made),
        index,
        prediction_type=facts.prediction_type,
        zero_snr=facts.rescale_betas_zero_snr,
        published=config is None,
        marked=facts.prediction_type is not None,
        **more,
    )
