"""Check that a LoRA fits a pipeline: diffusers ignores layers that do not, and only logs this."""

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from ..utils.text import abbreviate
from .damage import explain_load_errors
from .header import Header
from .lora_files import count_lora_layers

_FOREIGN = {
    "base_model.model.": "as peft's save_pretrained writes them, whose strength is in its adapter_config.json: load "
    "it with peft.PeftModel.from_pretrained(network, folder)",
    "lora_transformer_": "of a LoRA for a transformer, such as SD 3 or Flux",
    "transformer.": "of a LoRA for a transformer, such as SD 3 or Flux",
    "diffusion_model.": "in ComfyUI's format, which diffusers reads only for transformers",
}
"""Key prefixes that are invalid in a UNet pipeline, and where they come from."""


def check_lora_loads(pipe: Any, file: Path, header: Header, **kwargs: Any) -> Any:
    """Load a LoRA into a weightless copy of a pipeline, so that a failure leaves the pipeline unchanged.

    Args:
        pipe: the pipeline.
        file: of the LoRA.
        header: of the file.
        kwargs: of `pipe.load_lora_weights`.

    Returns:
        The copy, which cannot generate images.

    Raises:
        ValueError: the file is damaged, diffusers would ignore a part of it, or the pipeline lacks some of its layers.
    """
    layers, bare = count_lora_layers(file, header), _copy_without_weights(pipe)
    before, left_out = _count_adapted_layers(bare), sorted(_unmatched_layers(bare, file))
    try:
        load_lora_file(bare, file, **kwargs)
    except ValueError as error:
        if not left_out:
            raise
        raise ValueError(_misfit_message(bare, file, header, layers - len(left_out), left_out)) from error
    found = _count_adapted_layers(bare) - before
    if found != layers and not kwargs.get("hotswap"):
        raise ValueError(_misfit_message(bare, file, header, found, left_out))
    return bare


def load_lora_file(pipe: Any, file: Path, **kwargs: Any) -> None:
    """Load a LoRA file into a pipeline with diffusers' own loader.

    Raises:
        OSError, ValueError: with the name of the file.
    """
    # With only the file's path, older diffusers would query the Hub for its name.
    with explain_load_errors(file):
        pipe.load_lora_weights(os.fspath(file.parent), weight_name=file.name, **kwargs)


def lora_networks(pipe: Any) -> dict[str, nn.Module]:
    """A pipeline's networks that can have an adapter, by name."""
    parts = {name: getattr(pipe, name, None) for name in pipe._lora_loadable_modules}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def _copy_without_weights(pipe: Any) -> Any:
    """Copy a pipeline with its networks' layers and adapters, but with expanded zeros as weights."""
    bare, networks = copy.copy(pipe), lora_networks(pipe)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            setattr(bare, name, copy.deepcopy(part, _deepcopy_replacements(part)) if name in networks else None)
    return bare


def _deepcopy_replacements(network: nn.Module) -> dict[int, Any]:
    """Deepcopy memo by id that replaces a network's weights with expanded zeros and its offloading hooks with None."""
    stand_ins: dict[int, Any] = {}
    for name, weight in network.named_parameters():
        if "lora_" not in name:  # adapters must be writable
            zeros = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
            stand_ins[id(weight)] = nn.Parameter(zeros, requires_grad=False)
    hooks = (hook for module in network.modules() if (hook := getattr(module, "_hf_hook", None)) is not None)
    return stand_ins | {id(hook): None for hook in hooks}


def _count_adapted_layers(pipe: Any) -> int:
    """Number of layers with a LoRA in a pipeline's networks."""
    names = (name for network in lora_networks(pipe).values() for name, _ in network.named_parameters())
    return sum(".lora_A." in name for name in names)


def _misfit_message(pipe: Any, file: Path, header: Header, found: int, left_out: Sequence[str]) -> str:
    """Error text for a LoRA with only `found` layers in the pipeline, with the likely cause."""
    keys, layers = sorted(header.shapes), count_lora_layers(file, header)
    base = pipe.config.get("_name_or_path") or type(pipe).__name__
    text = f"{file}: {found} of its {layers} layers are in {base}, and diffusers would ignore the rest"
    for prefix, whose in _FOREIGN.items():
        if foreign := [key for key in keys if key.removeprefix("unet.").startswith(prefix)]:
            return f"{text}. Names such as {foreign[0]!r} are {whose}."
    names = f" ({abbreviate([*map(repr, left_out)], 3)})" if left_out else ""
    known = {f"{part}_{name}" for part, network in lora_networks(pipe).items() for name, _ in network.named_modules()}
    if {name.replace(".", "_") for name in left_out} & {name.replace(".", "_") for name in known}:
        return (
            f"{text}{names}: diffusers {diffusers.__version__} misreads these names; 0.39 and later do not. A LoRA "
            "saved by this package comes with a file in diffusers' format, which every version reads."
        )
    return f"{text}{names}: it was trained on another base, or diffusers does not support its format."


def _unmatched_layers(pipe: Any, file: Path) -> Iterator[str]:
    """Layers of a LoRA file that no network of the pipeline has."""
    networks = lora_networks(pipe)
    blocks = {"unet_config": networks["unet"].config} if "unet" in networks else {}
    with explain_load_errors(file):
        state = pipe.lora_state_dict(os.fspath(file.parent), weight_name=file.name, **blocks)[0]
    known = {
        part: {_canonical_layer_name(name) for name, _ in network.named_modules()}
        for part, network in networks.items()
    }
    for layer in {re.sub(r"[._]lora.*", "", key) for key in state}:
        part, _, name = layer.partition(".")
        if part not in known or _canonical_layer_name(name) not in known[part]:
            yield layer


_SPELLINGS: Mapping[str, str] = {
    **{"processor": "", "text_model": "", "base_layer": "", "to_out.0": "to_out"},
    **{f"self_attn.{part}_proj": f"self_attn.to_{part}" for part in ("q", "k", "v", "out")},
}


def _canonical_layer_name(name: str) -> str:
    """A layer's name without the parts that differ between versions of diffusers and transformers."""
    for long, short in _SPELLINGS.items():
        name = name.replace(long, short)
    return ".".join(filter(None, name.split(".")))
