"""One dataclass per kind of run is the configuration, the command line and the YAML file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .data import ONE_SOURCE, DataConfig
from .objective import ObjectiveConfig
from .output import OutputConfig
from .steps import ComputeConfig, OptimizationConfig


@dataclass
class NetworkConfig(ComputeConfig, OptimizationConfig):
    """How a network is computed, and what is done with its weights."""


@dataclass
class StepsConfig(NetworkConfig, ObjectiveConfig):
    """All that the trainer reads: how a step is computed, what it changes and what it is asked."""


@dataclass
class RunConfig(OutputConfig, StepsConfig, DataConfig):
    """What every run depends on, whatever it trains. Options are listed from the last parent to the first.

    Raises:
        ValueError: an option is out of range, unknown or missing; the message names it and the remedy.
    """

    program: ClassVar[str]
    """What `--help` calls the command."""
    description: ClassVar[str]
    examples: ClassVar[str]
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Options by the name of a recipe."""

    @property
    def trains_adapter(self) -> bool:
        """Whether a LoRA or DoRA is trained, and not the whole network."""
        return False

    @property
    def gpu_gigabytes(self) -> float | None:
        """Memory of each GPU, 1e9 bytes, into which a step has to fit; None if nothing is known of it."""
        return None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.has_data or self.measure):
            raise ValueError(ONE_SOURCE)
