"""The commands of `zsnr`, a module each: `add_parser` says what a command takes, `run` does it.

Parsing imports no heavy library; what a command needs is imported once it runs.
"""

import argparse
from typing import Any


def new_parser(commands: Any, name: str, text: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A command among the subparsers of `zsnr`: `text` is its line in the list, `examples` end its own help."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser
