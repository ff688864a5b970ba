"""Retraining Stable Diffusion with v-loss on a zero-terminal-SNR schedule, on accelerate.

`train(TrainingConfig(...))` in Python, `accelerate launch -m zsnr_diffusers.training --help` on the command line.
"""

from importlib.util import find_spec

if missing := [name for name in ("accelerate", "datasets", "yaml") if find_spec(name) is None]:
    raise ImportError(f'Training needs {", ".join(missing)}: python -m pip install "zsnr_diffusers[train]"')

from .config import TrainingConfig, parse_config
from .loop import TrainingError, train

__all__ = ["TrainingConfig", "TrainingError", "main", "parse_config", "train"]


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says; see `--help`.

    Raises:
        SystemExit: with a one-line message where the input is at fault or training had to stop.
    """
    config = parse_config(argv)
    try:
        train(config)
    except (ValueError, OSError, TrainingError) as error:
        raise SystemExit(f"error: {error}") from error
