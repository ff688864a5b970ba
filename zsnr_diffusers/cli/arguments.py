"""Arguments that commands of `zsnr` share. Each command is a module: `new_parser` defines its arguments, `run`
executes it.

Parsing imports no heavy library; a command imports what it needs when it runs.
"""

import argparse
from typing import Any

from ..core.choices import PREDICTION_TYPES
from ..utils.command_line import CommandParser, add_quiet

CLAIMS = ("prediction_type", "rescale_betas_zero_snr")
"""What `add_claim_options` adds; each is None unless given."""


def command_parser(name: str, description: str, examples: str) -> CommandParser:
    """The parser of a command, with only --quiet; `examples` are printed at the end of its help."""
    parser = CommandParser(
        f"zsnr {name}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_quiet(parser)
    return parser


def add_claim_options(parser: CommandParser, whose: str, group: Any = None) -> None:
    """Add --prediction_type and --rescale_betas_zero_snr, which describe how a model was trained."""
    group = group or parser
    group.add_argument(
        "--prediction_type", choices=PREDICTION_TYPES, help=f"what {whose} predicts (default: detected)"
    )
    text = "whether it was trained at zero terminal SNR (default: detected)"
    parser.add_switch(group, "rescale_betas_zero_snr", text, aliases=("zero_snr",))


def add_recorded_guidance_options(parser: Any, default: str) -> None:
    """Add --guidance_rescale and --keep_low_frequencies, which are recorded in the output."""
    parser.add_argument(
        "--guidance_rescale", type=float, help=f"guidance rescale (phi) to record (default: {default})"
    )
    parser.add_argument(
        "--keep_low_frequencies",
        type=int,
        metavar="K",
        help=f"number K of low frequencies per side that guidance does not change, to record (default: {default})",
    )


def check_target_options(arguments: argparse.Namespace) -> None:
    """Refuse --private without --push_to_hub.

    Raises:
        ValueError: --private was passed alone.
    """
    if arguments.private and arguments.push_to_hub is None:
        raise ValueError("--private requires --push_to_hub.")


def add_target_options(parser: Any, what: str) -> None:
    """Add --push_to_hub, --private and --overwrite."""
    parser.add_argument(
        "--push_to_hub", metavar="REPO", help=f"upload {what} to this Hub repo, which is created if necessary"
    )
    parser.add_argument("--private", action="store_true", default=None, help="create the Hub repo as private")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
