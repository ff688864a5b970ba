"""Training with v-prediction at zero terminal SNR, using accelerate: Stable Diffusion and pixel-space networks.

`train(TrainingConfig(...))` and `train(PixelTrainingConfig(...))` in Python, `accelerate launch -m
zsnr_diffusers.training --help` and `accelerate launch -m zsnr_diffusers.training.pixels --help` on the command line.
"""

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from .cli import main, parse_config
    from .errors import TrainingError, TrainingInterrupted
    from .pixels import RECIPES, PixelTrainingConfig
    from .run import train
    from .stable_diffusion import TrainingConfig

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "cli": "main parse_config",
        "errors": "TrainingError TrainingInterrupted",
        "pixels": "RECIPES PixelTrainingConfig",
        "run": "train",
        "stable_diffusion": "TrainingConfig",
    },
)

__all__ = [
    "RECIPES",
    "PixelTrainingConfig",
    "TrainingConfig",
    "TrainingError",
    "TrainingInterrupted",
    "main",
    "parse_config",
    "train",
]
