"""A pipeline with another one's layers but without its weights, used to convert a LoRA."""

import inspect
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from ..schedulers.saved_config import scheduler_class
from .damage import explain_load_errors
from .files import INDEX, load_json
from .saved_model import SCHEDULER_FILE, SavedModel

_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
_NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")


def empty_pipeline(source: Any, dtype: torch.dtype = torch.float32, **places: Any) -> Any:
    """Create the pipeline of a folder or Hub repo from its configs only.

    Each weight tensor is a single expanded zero, so weights take no memory. Without tokenizers, the pipeline cannot
    generate images.

    Args:
        source: folder or Hub id of a pipeline that supports LoRA, or a `SavedModel` of one.
        dtype: of the weights.
        places: arguments of `from_pretrained` that say where to look, such as `revision`.

    Returns:
        The pipeline, on the CPU.

    Raises:
        OSError: there is no such pipeline, or a config is missing.
        ValueError: an unsupported kind of pipeline, or a damaged config.
    """
    saved = SavedModel.open(source, only_pipelines=True, **places)
    source, index = saved.name, saved.index
    kind = str(index.get("_class_name", "single file"))
    cls: Any = getattr(diffusers, kind, None)
    if not hasattr(cls, "load_lora_weights") or "unet" not in index:
        raise ValueError(f"{source} is a {kind}, which is not a UNet pipeline with LoRA support.")
    with explain_load_errors(source):
        parameters = inspect.signature(cls).parameters.values()
        parts: dict[str, Any] = {one.name: None for one in parameters if one.default is one.empty}
        parts |= {name: _build_network(saved, name, dtype) for name in _NETWORKS if index.get(name)}
        parts["scheduler"] = _load_scheduler(saved)
        if "safety_checker" in parts:
            parts["requires_safety_checker"] = False  # avoids a warning that it is missing
        pipe = cls(**parts)
    pipe.register_to_config(_name_or_path=source)
    return pipe


def _load_scheduler(saved: SavedModel) -> Any:
    """The scheduler that a saved model's config names."""
    config = saved.scheduler_config or {}
    cls = scheduler_class(config)
    if cls is None:
        raise ValueError(
            f"{SCHEDULER_FILE} of {saved.name} names {config.get('_class_name')!r}, which is not a known scheduler."
        )
    return cls.from_config(config)


def _build_network(saved: SavedModel, name: str, dtype: torch.dtype) -> nn.Module | None:
    """One of a saved pipeline's networks, with expanded zeros as weights; None if it is not listed."""
    library, class_name = entry = saved.index[name]
    if class_name is None:
        return None
    cls = getattr(_LIBRARIES.get(library), class_name, None)
    if cls is None:
        raise ValueError(
            f"{INDEX} of {saved.name} has {entry} as its {name}, which is not a class of a known library."
        )
    config = load_json(saved.name, file := f"{name}/config.json", saved.options)
    if config is None:
        raise OSError(f"{saved.name} has no {file}.")
    with torch.device("meta"):
        network: nn.Module = (
            cls.from_config(config) if library == "diffusers" else cls(cls.config_class.from_dict(config))
        )
    _fill_with_zeros(network, dtype)
    return network


def _fill_with_zeros(network: nn.Module, dtype: torch.dtype) -> None:
    """Replace a network's meta-device weights with expanded zeros on the CPU."""
    for module in network.modules():
        for key, parameter in module.named_parameters(recurse=False):
            setattr(module, key, nn.Parameter(_expanded_zero(parameter, dtype), requires_grad=False))
        for key, buffer in module.named_buffers(recurse=False):
            setattr(module, key, _expanded_zero(buffer, buffer.dtype))


def _expanded_zero(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A single zero expanded to a tensor's shape, which takes no memory."""
    return torch.zeros((), dtype=dtype).expand(like.shape)
