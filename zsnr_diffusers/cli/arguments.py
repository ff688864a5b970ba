"""The commands of `zsnr`, a module each: `add_parser` says what a command takes, `run` does it.

Parsing imports no heavy library; what a command needs is imported once it runs.
"""

import argparse
import re
from collections.abc import Mapping
from typing import Any


def new_parser(commands: Any, name: str, text: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Add a command to the subparsers of `zsnr`: `text` is its line in the list, `examples` end its own help."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


_SWITCHES = {
    "rescale_betas_zero_snr=True": "--zero_snr",
    "rescale_betas_zero_snr=False": "--no_zero_snr",
    "rescale_betas_zero_snr=": "--zero_snr or --no_zero_snr",
    "overwrite=True": "--overwrite",
}


def replace_arguments_by_options(text: str, switches: Mapping[str, str] = _SWITCHES) -> str:
    """An error's text with the Python arguments that it tells to pass replaced by the options of a command."""
    for argument, option in switches.items():
        text = re.sub(rf"(?<=[Pp]ass |. or |.and ){re.escape(argument)}", option, text)
    return re.sub(
        r"(?<=[Pp]ass )(\w+)=(?:'(\w+)')?", lambda found: " ".join(filter(None, ("--" + found[1], found[2]))), text
    )
