"""The commands of `zsnr`, a module each: `new_parser` says what a command takes, `run` does it.

Parsing imports no heavy library; what a command needs is imported once it runs.
"""

import argparse
from typing import Any

from ..core.choices import PREDICTION_TYPES
from ..utils.command_line import CommandParser, add_quiet

CLAIMS = ("prediction_type", "rescale_betas_zero_snr")
"""What `add_claim_options` adds; each is None unless given."""


def command_parser(name: str, description: str, examples: str) -> CommandParser:
    """The parser of a command, with --quiet alone; `examples` end its help."""
    parser = CommandParser(
        f"zsnr {name}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_quiet(parser)
    return parser


def add_claim_options(parser: CommandParser, whose: str, group: Any = None) -> None:
    """Add --prediction_type and --rescale_betas_zero_snr, which say what a model was trained to."""
    group = group or parser
    group.add_argument(
        "--prediction_type", choices=PREDICTION_TYPES, help=f"what {whose} predicts (default: what is found)"
    )
    text = "whether it was trained at zero terminal SNR (default: what is found)"
    parser.add_switch(group, "rescale_betas_zero_snr", text, aliases=("zero_snr",))


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
