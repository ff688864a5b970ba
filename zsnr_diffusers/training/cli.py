"""Parse a command line and a YAML file into a configuration, and run it."""

from __future__ import annotations

import argparse
import shlex
import signal
from collections.abc import Sequence
from typing import TypeVar

from ..utils.command_line import CommandParser, add_quiet, arguments_as_options
from ..utils.distributed import ProcessError, is_main_process
from ..utils.quiet import quietly
from .config import RunConfig
from .config.command_line import add_options, read_yaml
from .errors import TrainingError
from .stable_diffusion.config import TrainingConfig

Config = TypeVar("Config", bound=RunConfig)

_NO_OPTIONS = ("config", "recipe", "quiet", "command")
"""Arguments that are not fields of a configuration."""


def parse_config(
    argv: Sequence[str] | None = None,
    kind: type[Config] = TrainingConfig,  # type: ignore[assignment]
) -> Config:
    """The configuration of a command line; its options override those of `--config`, which override `--recipe`.

    Args:
        argv: arguments without the program's name; those of this process by default.
        kind: of run: `TrainingConfig` or `PixelTrainingConfig`.

    Raises:
        SystemExit: an option is unknown or wrong (exit status 2, the message on standard error), or `--help`.
    """
    parser = new_config_parser(kind)
    return config_of_arguments(parser.parse_args(argv), kind, parser)


def new_config_parser(kind: type[RunConfig], program: str | None = None) -> CommandParser:
    """The parser of a kind of run: an option for each field of its configuration, `--config` and `--recipe`.

    Args:
        kind: of run.
        program: name of the command in `--help`; by default the kind's own.
    """
    parser = CommandParser(
        prog=program or kind.program,
        usage="%(prog)s [--config FILE] [options]",
        description=kind.description,
        epilog=kind.examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with options; command-line options override it.")
    add_quiet(parser)
    if kind.recipes:
        parser.add_argument("--recipe", choices=kind.recipes, help="named set of options; other options override it.")
    add_options(parser, kind)
    return parser


def config_of_arguments(arguments: argparse.Namespace, kind: type[Config], parser: CommandParser) -> Config:
    """The configuration of parsed arguments, of which only those that were given are there.

    Raises:
        SystemExit: a wrong option, with exit status 2 and the message on standard error.
    """
    given = {name: value for name, value in vars(arguments).items() if name not in _NO_OPTIONS}
    recipe, file = getattr(arguments, "recipe", None), arguments.config
    try:
        options = {**kind.recipes[recipe]} if recipe else {}
        options |= read_yaml(file, kind) if file else {}
        return kind(**{**options, **given})
    except ValueError as error:
        parser.error(arguments_as_options(str(error), parser))


def main(argv: Sequence[str] | None = None, kind: type[RunConfig] = TrainingConfig) -> None:
    """Train according to the command line; see `--help`.

    Args:
        argv: arguments without the program's name; those of this process by default.
        kind: of run: `TrainingConfig` or `PixelTrainingConfig`.

    Raises:
        SystemExit: with a one-line message if the input is invalid or training had to stop; with status 143 or 130
            after SIGTERM or SIGINT.
    """
    parser = new_config_parser(kind)
    train_as_told(parser.parse_args(argv), kind, parser)


def train_as_told(arguments: argparse.Namespace, kind: type[RunConfig], parser: CommandParser) -> None:
    """Train according to parsed arguments; errors refer to command-line options.

    Raises:
        SystemExit: as in `main`.
    """
    config = config_of_arguments(arguments, kind, parser)
    try:
        from .run import train  # torch, diffusers and accelerate: seconds

        with quietly(bool(arguments.quiet)):
            train(config)
        if is_main_process() and not config.dry_run:
            options = config.identity_values()
            base = options["pretrained_model_name_or_path"] if config.trains_adapter else None
            print(_next_steps(config.output_dir, config.train_data_dir, base, options.get("distill_steps")))
    except (ValueError, OSError, ImportError, TrainingError, ProcessError) as error:
        raise SystemExit(f"error: {arguments_as_options(str(error), parser)}") from error
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None


def _next_steps(output_dir: str, images: str | None, base: str | None, few_steps: int | None) -> str:
    """Commands to inspect the result of a run; `base` is the base of a LoRA, `few_steps` those of a distilled one."""
    result, real = shlex.quote(output_dir), shlex.quote(images or "IMAGES")
    source = f"--pipeline {result}" if base is None else f"--pipeline {shlex.quote(base)} --lora {result}"
    source += f" --num_inference_steps {few_steps} --guidance_scale 1" if few_steps else ""
    load = f'load_pipeline("{output_dir}")' if base is None else f'load_lora(pipe, "{output_dir}")'
    return (
        f"next:\n  zsnr audit {result}\n"
        f"  zsnr evaluate --real {real} {source} [--prompts TEXT ...]\n"
        f"  pipe = zsnr_diffusers.{load}"
    )
