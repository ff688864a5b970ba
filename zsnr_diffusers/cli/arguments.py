"""The commands of `zsnr`, a module each: `add_parser` says what a command takes, `run` does it.

Parsing imports no heavy library; what a command needs is imported once it runs.
"""

import argparse
import contextlib
import re
from collections.abc import Iterator, Mapping
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


def add_claim_options(parser: Any, whose: str, choices: Any) -> None:
    """Add --prediction_type, --zero_snr and --no_zero_snr, which say what a model was trained to."""
    parser.add_argument("--prediction_type", choices=choices, help=f"what {whose} predicts (default: what is found)")
    schedule = parser.add_mutually_exclusive_group()
    schedule.add_argument(
        "--zero_snr", action="store_true", default=None, help="it was trained to zero terminal SNR (default: found)"
    )
    schedule.add_argument("--no_zero_snr", dest="zero_snr", action="store_false", help="it was not")


def add_recorded_guidance_options(parser: Any, default: str) -> None:
    """Add --guidance_rescale and --keep_low_frequencies, which are recorded in what is written."""
    parser.add_argument("--guidance_rescale", type=float, help=f"phi to record (default: {default})")
    parser.add_argument(
        "--keep_low_frequencies",
        type=int,
        metavar="K",
        help=f"lowest K x K frequencies that guidance leaves alone, to record (default: {default})",
    )


def check_target_options(arguments: argparse.Namespace) -> None:
    """Refuse --private without --push_to_hub.

    Raises:
        ValueError: with both.
    """
    if arguments.private and arguments.push_to_hub is None:
        raise ValueError("--private goes with --push_to_hub.")


def add_target_options(parser: Any, what: str) -> None:
    """Add --push_to_hub, --private and --overwrite, for what is written."""
    parser.add_argument(
        "--push_to_hub", metavar="REPO", help=f"upload {what} to this repo of the Hub, which is made if need be"
    )
    parser.add_argument("--private", action="store_true", default=None, help="make that repo a private one")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


_SWITCHES = {
    "rescale_betas_zero_snr=True": "--zero_snr",
    "rescale_betas_zero_snr=False": "--no_zero_snr",
    "rescale_betas_zero_snr=": "--zero_snr or --no_zero_snr",
    "overwrite=True": "--overwrite",
}


@contextlib.contextmanager
def errors_in_options() -> Iterator[None]:
    """A context in which errors of data and files tell to pass options, not Python arguments."""
    try:
        yield
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(replace_arguments_by_options(str(error))) from error


def replace_arguments_by_options(text: str, switches: Mapping[str, str] = _SWITCHES) -> str:
    """An error's text with the Python arguments that it tells to pass replaced by the options of a command."""
    for argument, option in switches.items():
        text = re.sub(rf"(?<=[Pp]ass |. or |.and ){re.escape(argument)}", option, text)
    return re.sub(
        r"(?<=[Pp]ass )(\w+)=(?:'(\w+)')?", lambda found: " ".join(filter(None, ("--" + found[1], found[2]))), text
    )
