"""The configuration of a run on Stable Diffusion: its parts by concern, and the whole."""

from .data import CaptionedDataConfig
from .guidance import DistillationConfig, GuidanceConfig
from .model import LORA_TARGETS, AdapterConfig, BaseConfig
from .output import GuidedOutputConfig
from .run import TrainingConfig
from .task import EncodingConfig, StableDiffusionTaskConfig

__all__ = [
    "LORA_TARGETS",
    "AdapterConfig",
    "BaseConfig",
    "CaptionedDataConfig",
    "DistillationConfig",
    "EncodingConfig",
    "GuidanceConfig",
    "GuidedOutputConfig",
    "StableDiffusionTaskConfig",
    "TrainingConfig",
]
