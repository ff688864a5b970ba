"""The trained parameters of a network: those that require gradients.

With an adapter (LoRA), the base's parameters are frozen, and optimizer, EMA and checkpoints contain only the adapter.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def trainable_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name, in the network's order."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def trainable_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """A network's state dict without frozen parameters, as checkpoints keep it."""
    frozen = dict(network.named_parameters()).keys() - trainable_parameters(network).keys()
    return {name: value for name, value in network.state_dict().items() if name not in frozen}


def load_trainable_state_dict(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `trainable_state_dict` returned into a network.

    Raises:
        KeyError: it is of a network with other names.
        RuntimeError: likewise, with other shapes.
    """
    if differing := sorted(trainable_state_dict(network).keys() ^ state.keys()):
        raise KeyError(", ".join(differing))
    network.load_state_dict(state, strict=False)


def cast_for_training(network: Any, half: torch.dtype | None, full_bf16: bool = False) -> Any:
    """Cast a network, in place: to float32, and frozen layers to the half dtype of mixed precision, if any.

    With `full_bf16` all of it becomes bfloat16.

    autocast would round the weights of linear layers and convolutions for each product; rounded once, they give the
    same numbers, bit for bit, in half of the memory. What it does not round (norms), and weights that are read for
    something else than the product (their norm, by DoRA), stay float32.
    """
    network.to(torch.bfloat16 if full_bf16 else torch.float32)
    if half is not None:
        by_dora = {id(layer.base_layer) for layer in network.modules() if getattr(layer, "lora_magnitude_vector", ())}
        for layer in network.modules():
            product = isinstance(layer, nn.Linear | nn.Conv2d) and id(layer) not in by_dora
            if product and not trainable_parameters(layer):
                layer.to(half)
    return network


def base_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """The state of a network as it was before peft added adapters to it."""
    state = network.state_dict()
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
