"""`zsnr train`: the Stable Diffusion trainer, the same as `python -m zsnr_diffusers.training`."""

from __future__ import annotations

import argparse

from ..training.cli import new_config_parser, train_as_told
from ..training.stable_diffusion.config import TrainingConfig
from ..utils.command_line import CommandParser


def new_parser() -> CommandParser:
    """The parser of `zsnr train`."""
    return new_config_parser(TrainingConfig, "zsnr train")


def run(arguments: argparse.Namespace) -> None:
    """Run `zsnr train`."""
    train_as_told(arguments, TrainingConfig, new_parser())
