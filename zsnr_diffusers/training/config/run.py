"""One dataclass per kind of run defines the configuration, the command line and the YAML file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .data import ONE_SOURCE, DataConfig
from .objective import ObjectiveConfig
from .output import OutputConfig
from .steps import ComputeConfig, OptimizationConfig


@dataclass
class NetworkConfig(ComputeConfig, OptimizationConfig):
    """How a network is computed and its weights are updated."""


@dataclass
class StepsConfig(NetworkConfig, ObjectiveConfig):
    """Options that the trainer reads: computation, updates, and objective of a step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_weighting == "learned_uncertainty" and self.optimizer != "adamw":
            raise ValueError(
                f"--loss_weighting=learned_uncertainty has a learning rate of its own, for adamw, and --optimizer="
                f"{self.optimizer}: leave out one of them."
            )


@dataclass
class TaskConfig(ObjectiveConfig, DataConfig):
    """Options that every task reads: the data, and what a network learns from them."""


@dataclass
class RunConfig(OutputConfig, StepsConfig, TaskConfig):
    """Options common to all runs. Options are listed from the last parent class to the first.

    Raises:
        ValueError: an option is out of range, unknown or missing; the message names it and the remedy.
    """

    program: ClassVar[str]
    """Name of the command in `--help`."""
    description: ClassVar[str]
    examples: ClassVar[str]
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Options by recipe name."""

    @property
    def trains_adapter(self) -> bool:
        """Whether a LoRA or DoRA is trained instead of the complete network."""
        return False

    @property
    def gpu_gigabytes(self) -> float | None:
        """Memory of each GPU, 1e9 bytes, into which a step has to fit; None if nothing is known of it."""
        return None

    def describe_preset(self) -> dict[str, str]:
        """A line of the plan about a set of options that was chosen by name; empty without one."""
        return {}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.has_data or self.measure):
            raise ValueError(ONE_SOURCE)
