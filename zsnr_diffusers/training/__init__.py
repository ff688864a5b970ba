"""Training with v-loss on a zero-terminal-SNR schedule, on accelerate: Stable Diffusion, and pixel-space networks.

`train(TrainingConfig(...))` and `train(PixelTrainingConfig(...))` in Python, `accelerate launch -m
zsnr_diffusers.training --help` and `accelerate launch -m zsnr_diffusers.training.pixels --help` on the command line.
"""

import signal
from collections.abc import Sequence
from importlib.util import find_spec

if missing := [name for name in ("accelerate", "datasets", "yaml") if find_spec(name) is None]:
    raise ImportError(f'Training needs {", ".join(missing)}: python -m pip install "zsnr_diffusers[train]"')

from ..utils.distributed import ProcessError
from .cli import parse_config
from .config import RunConfig
from .errors import TrainingError, TrainingInterrupted
from .pixels import RECIPES, PixelTrainingConfig
from .run import train
from .stable_diffusion import TrainingConfig

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


def main(argv: Sequence[str] | None = None, kind: type[RunConfig] = TrainingConfig) -> None:
    """Train as the command line says; see `--help`.

    Args:
        argv: arguments without the program's name; those of this process by default.
        kind: of run: `TrainingConfig` or `PixelTrainingConfig`.

    Raises:
        SystemExit: with a one-line message where the input is at fault or training had to stop; with status 143 or
            130 after SIGTERM or SIGINT.
    """
    config = parse_config(argv, kind)
    try:
        train(config)
    except (ValueError, OSError, ImportError, TrainingError, ProcessError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
