"""Training with v-loss on a zero-terminal-SNR schedule, on accelerate: Stable Diffusion, and networks of pixels.

`train(TrainingConfig(...))` and `train(PixelTrainingConfig(...))` in Python, `accelerate launch -m
zsnr_diffusers.training --help` and `accelerate launch -m zsnr_diffusers.training.pixels --help` on the command line.
"""

from collections.abc import Sequence
from importlib.util import find_spec

if missing := [name for name in ("accelerate", "datasets", "yaml") if find_spec(name) is None]:
    raise ImportError(f'Training needs {", ".join(missing)}: python -m pip install "zsnr_diffusers[train]"')

from .command_line import parse_config
from .config import RunConfig
from .loop import TrainingError, train
from .pixels import RECIPES, PixelTrainingConfig
from .stable_diffusion import TrainingConfig

__all__ = ["RECIPES", "PixelTrainingConfig", "TrainingConfig", "TrainingError", "main", "parse_config", "train"]


def main(argv: Sequence[str] | None = None, kind: type[RunConfig] = TrainingConfig) -> None:
    """Train as the command line says; see `--help`.

    Args:
        argv: arguments without the program's name; those of this process by default.
        kind: of run: `TrainingConfig` or `PixelTrainingConfig`.

    Raises:
        SystemExit: with a one-line message where the input is at fault or training had to stop.
    """
    config = parse_config(argv, kind)
    try:
        train(config)
    except (ValueError, OSError, TrainingError) as error:
        raise SystemExit(f"error: {error}") from error
