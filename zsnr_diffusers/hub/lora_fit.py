"""Whether a LoRA fits a pipeline: diffusers leaves out what does not, and only logs that."""

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from .damage import explain_load_errors
from .header import Header
from .lora_files import number_of_layers, some

_FOREIGN = {
    "base_model.model.": "as peft's save_pretrained writes them, whose strength is in its adapter_config.json: load "
    "it with peft.PeftModel.from_pretrained(network, folder)",
    "lora_transformer_": "of a LoRA of a transformer, such as SD 3 or Flux",
    "transformer.": "of a LoRA of a transformer, such as SD 3 or Flux",
    "diffusion_model.": "by the names of ComfyUI, which diffusers reads for transformers alone",
}
"""Beginnings of names that mean nothing to a pipeline of a UNet, and whose they are."""


def check_loads(pipe: Any, file: Path, header: Header, **kwargs: Any) -> Any:
    """Load a LoRA into a copy of a pipeline without its weights, so that a failure leaves the pipeline as it is.

    Args:
        pipe: the pipeline.
        file: of the LoRA.
        header: of the file.
        kwargs: of `pipe.load_lora_weights`.

    Returns:
        The copy, which makes no images.

    Raises:
        ValueError: the file is damaged, diffusers would leave out a part of it, or not all of its layers are in the
            pipeline.
    """
    layers, bare = number_of_layers(file, header), _without_weights(pipe)
    before, left_out = _adapted_layers(bare), sorted(_left_out(bare, file))
    try:
        load_weights(bare, file, **kwargs)
    except ValueError as error:
        if not left_out:
            raise
        raise ValueError(_misfit(bare, file, header, layers - len(left_out), left_out)) from error
    found = _adapted_layers(bare) - before
    if found != layers and not kwargs.get("hotswap"):
        raise ValueError(_misfit(bare, file, header, found, left_out))
    return bare


def load_weights(pipe: Any, file: Path, **kwargs: Any) -> None:
    """Load a LoRA's weights by diffusers' own loader.

    Raises:
        OSError, ValueError: with the name of the file.
    """
    # The path of the file alone would have older diffusers ask the Hub for its name.
    with explain_load_errors(file):
        pipe.load_lora_weights(os.fspath(file.parent), weight_name=file.name, **kwargs)


def _networks(pipe: Any) -> dict[str, nn.Module]:
    """The parts of a pipeline that may have an adapter."""
    parts = {name: getattr(pipe, name, None) for name in pipe._lora_loadable_modules}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def _without_weights(pipe: Any) -> Any:
    """A copy of a pipeline with the layers and adapters of its networks; of each weight a zero that is repeated."""
    bare, networks = copy.copy(pipe), _networks(pipe)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            setattr(bare, name, copy.deepcopy(part, _stand_ins(part)) if name in networks else None)
    return bare


def _stand_ins(network: nn.Module) -> dict[int, Any]:
    """What a deep copy shall have in place of weights, and of hooks that move them between devices."""
    stand_ins: dict[int, Any] = {}
    for name, weight in network.named_parameters():
        if "lora_" not in name:  # an adapter may be written to
            zeros = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
            stand_ins[id(weight)] = nn.Parameter(zeros, requires_grad=False)
    hooks = (hook for module in network.modules() if (hook := getattr(module, "_hf_hook", None)) is not None)
    return stand_ins | {id(hook): None for hook in hooks}


def _adapted_layers(pipe: Any) -> int:
    names = (name for network in _networks(pipe).values() for name, _ in network.named_parameters())
    return sum(".lora_A." in name for name in names)


def _misfit(pipe: Any, file: Path, header: Header, found: int, left_out: Sequence[str]) -> str:
    keys, layers = sorted(header.shapes), number_of_layers(file, header)
    base = pipe.config.get("_name_or_path") or type(pipe).__name__
    text = f"{file}: {found} of its {layers} layers are in {base}, and diffusers would leave out the rest"
    for prefix, whose in _FOREIGN.items():
        if foreign := [key for key in keys if key.removeprefix("unet.").startswith(prefix)]:
            return f"{text}. Names such as {foreign[0]!r} are {whose}."
    names = f" ({some(left_out)})" if left_out else ""
    known = {f"{part}_{name}" for part, network in _networks(pipe).items() for name, _ in network.named_modules()}
    if {name.replace(".", "_") for name in left_out} & {name.replace(".", "_") for name in known}:
        return (
            f"{text}{names}: diffusers {diffusers.__version__} misreads these names, 0.39 and later do not. "
            "Beside a LoRA that this package wrote lies a file with diffusers' names, which every version reads."
        )
    return f"{text}{names}: it is of another base, or of a kind that diffusers does not know."


def _left_out(pipe: Any, file: Path) -> Iterator[str]:
    """Layers of which no network has one of the same name."""
    networks = _networks(pipe)
    blocks = {"unet_config": networks["unet"].config} if "unet" in networks else {}
    with explain_load_errors(file):
        state = pipe.lora_state_dict(os.fspath(file.parent), weight_name=file.name, **blocks)[0]
    known = {part: {_spelled(name) for name, _ in network.named_modules()} for part, network in networks.items()}
    for layer in {re.sub(r"[._]lora.*", "", key) for key in state}:
        part, _, name = layer.partition(".")
        if part not in known or _spelled(name) not in known[part]:
            yield layer


_SPELLINGS: Mapping[str, str] = {
    **{"processor": "", "text_model": "", "base_layer": "", "to_out.0": "to_out"},
    **{f"self_attn.{part}_proj": f"self_attn.to_{part}" for part in ("q", "k", "v", "out")},
}


def _spelled(name: str) -> str:
    """A layer's name without what differs between versions."""
    for long, short in _SPELLINGS.items():
        name = name.replace(long, short)
    return ".".join(filter(None, name.split(".")))
