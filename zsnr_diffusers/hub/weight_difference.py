"""The difference between the weights of a model and of its base."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.text import abbreviate
from .lora_fit import lora_networks

LAYERS = ("linear", "convolution")
"""The kinds of weights that a LoRA changes."""

_LEAST_SIMILARITY = 0.5
"""Lowest cosine similarity between a base and a model trained from it: usually above 0.9, near 0 for unrelated models.
"""


@dataclass(frozen=True)
class WeightDifference:
    """The weights of a network and of its base.

    Attributes:
        trained: the network's weights, by name.
        base: the base's weights.
        kinds: kind of each weight that differs: `linear`, `convolution`, `bias`, `norm`, `embedding` or `other`.
    """

    trained: Mapping[str, Tensor]
    base: Mapping[str, Tensor]
    kinds: Mapping[str, str] = field(default_factory=dict)

    def of(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """The difference of a weight, in float64."""
        trained, base = (one[name].detach().to(device, torch.float64) for one in (self.trained, self.base))
        return trained - base

    def ranks(self) -> dict[str, int]:
        """The highest possible rank of each layer's difference, by weight name."""
        layers = (name for name, kind in self.kinds.items() if kind in LAYERS)
        return {name: min(self.base[name].flatten(1).shape) for name in layers}


def compare_pipelines(trained: Any, base: Any, names: tuple[str, str]) -> dict[str, WeightDifference]:
    """Compare two pipelines' UNets and text encoders; returns differences by component name.

    Args:
        trained: a pipeline.
        base: the pipeline it was trained from.
        names: of the two, for error messages.

    Raises:
        ValueError: the architectures differ, the UNets' layers are equal or unrelated, or weights are not finite.
    """
    networks, bases = lora_networks(trained), lora_networks(base)
    if networks.keys() != bases.keys():
        had = " and ".join(f"{name} has {', '.join(one)}" for name, one in zip(names, (networks, bases), strict=True))
        raise ValueError(f"{had}: their architectures differ.")
    found = {part: _compare_networks(part, networks[part], bases[part], names) for part in bases}
    if not found["unet"].ranks():
        raise ValueError(
            f"The layers of the UNets of {names[0]} and {names[1]} are equal; there is nothing to extract."
        )
    return found


def _compare_networks(part: str, trained: nn.Module, base: nn.Module, names: tuple[str, str]) -> WeightDifference:
    """`compare_pipelines` for one network."""
    both = WeightDifference(dict(trained.named_parameters()), dict(base.named_parameters()))
    shapes, others = ({name: tuple(value.shape) for name, value in one.items()} for one in (both.trained, both.base))
    if unlike := sorted(name for name in {**shapes, **others} if shapes.get(name) != others.get(name)):
        first = unlike[0]
        raise ValueError(
            f"{names[0]} and {names[1]} have different architectures: {len(unlike)} weights of their {part} have "
            f"different names or shapes ({abbreviate(unlike, 3)}). {first} is {shapes.get(first, 'not there')} in the "
            f"former and {others.get(first, 'not there')} in the latter."
        )
    for name, weights in zip(names, (both.trained, both.base), strict=True):
        if broken := sorted(key for key, value in weights.items() if not value.isfinite().all()):
            raise ValueError(f"{name}: {len(broken)} weights of its {part} are not finite ({abbreviate(broken, 3)}).")
    both = replace(both, kinds={name: kind for name, kind in _weight_kinds(base) if both.of(name).any()})
    if (similarity := _similarity(both)) < _LEAST_SIMILARITY:
        raise ValueError(
            f"{names[1]} is not the base of {names[0]}: the cosine between the weights of their {part}s is "
            f"{similarity:.2f}, but above {_LEAST_SIMILARITY} if one was trained from the other."
        )
    return both


def _similarity(both: WeightDifference) -> float:
    """Cosine between the layers of two networks that differ, 1 if none do."""
    sums = torch.zeros(3, dtype=torch.float64)
    for name in both.ranks():
        a, b = (one[name].detach().double().flatten() for one in (both.trained, both.base))
        sums += torch.stack([a @ b, a @ a, b @ b])
    product, *squares = sums.tolist()
    return float(product / (squares[0] * squares[1]) ** 0.5) if all(squares) else 1.0


def _weight_kinds(network: nn.Module) -> Iterator[tuple[str, str]]:
    """Name and kind, as in `WeightDifference`, of each of a network's weights."""
    for prefix, module in network.named_modules():
        kind = "other"
        if isinstance(module, nn.Linear):
            kind = "linear"
        elif isinstance(module, nn.Conv2d) and module.groups == 1:
            kind = "convolution"
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
            kind = "norm"
        elif isinstance(module, nn.Embedding):
            kind = "embedding"
        for name, _ in module.named_parameters(prefix, recurse=False):
            yield name, "bias" if name.endswith("bias") and kind in LAYERS else kind
