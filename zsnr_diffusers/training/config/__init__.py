"""The configuration of a run: options, its parts by concern, and the whole, which is the command line and the YAML."""

from .data import Captions, DataConfig, FolderConfig
from .objective import FlowConfig, ObjectiveConfig
from .options import IDENTITY, NOT_NEGATIVE, POSITIVE, SHARE, Options, option
from .output import OutputConfig
from .run import NetworkConfig, RunConfig, StepsConfig, TaskConfig
from .steps import ComputeConfig, OptimizationConfig

__all__ = [
    "IDENTITY",
    "NOT_NEGATIVE",
    "POSITIVE",
    "SHARE",
    "Captions",
    "ComputeConfig",
    "DataConfig",
    "FlowConfig",
    "FolderConfig",
    "NetworkConfig",
    "ObjectiveConfig",
    "OptimizationConfig",
    "Options",
    "OutputConfig",
    "RunConfig",
    "StepsConfig",
    "TaskConfig",
    "option",
]
