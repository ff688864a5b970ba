"""From a command line and a YAML file to a configuration."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from transformers.hf_argparser import HfArgumentParser

from .config import RunConfig
from .stable_diffusion import TrainingConfig

Config = TypeVar("Config", bound=RunConfig)


def parse_config(
    argv: Sequence[str] | None = None,
    kind: type[Config] = TrainingConfig,  # type: ignore[assignment]
) -> Config:
    """The configuration of a command line; its options come before those of `--config`, and these before `--recipe`.

    Args:
        argv: arguments without the program's name; those of this process by default.
        kind: of run: `TrainingConfig` or `PixelTrainingConfig`.

    Raises:
        SystemExit: an option is unknown or wrong (exit status 2, the message on standard error), or `--help`.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = HfArgumentParser(
        kind,
        prog=kind.program,
        description=kind.description,
        epilog=kind.examples,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for one in (parser, files):
        one.add_argument("--config", help="YAML file of options; those on the command line win.")
        if kind.recipes:
            one.add_argument("--recipe", choices=kind.recipes, help="Options by name; others win over it.")
    given = files.parse_known_args(argv)[0]
    try:
        if kind.recipes and given.recipe:
            parser.set_defaults(**kind.recipes[given.recipe])
        if given.config:
            parser.set_defaults(**_read_yaml(given.config, kind))
        options = vars(parser.parse_args(argv))
        return kind(**{name: value for name, value in options.items() if name not in ("config", "recipe")})
    except TypeError as error:  # of a value that YAML can express and a command line cannot: null, a list
        parser.error(f"--config {given.config}: an option has a value of the wrong type: {error}")
    except ValueError as error:
        parser.error(str(error))
    raise AssertionError("unreachable: parser.error exits")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind each option, and the examples as they are written."""


def _read_yaml(path: str, kind: type[RunConfig]) -> dict[str, Any]:
    """Options of the `--config` file, with their names checked and YAML 1.1's misreadings repaired."""
    if not Path(path).is_file():
        raise ValueError(f"--config {path}: there is no such file.")
    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"--config {path} must hold options, one `name: value` per line.")
    types = get_type_hints(kind)  # HfArgumentParser writes others into the fields
    known = {f.name: types[f.name] for f in dataclasses.fields(kind)}
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"--config {path}: unknown options {', '.join(unknown)}.")
    # YAML 1.1 reads 1e-5 as a string, where a float option means the number, and the precision `no` as false.
    options = {name: float(value) if known[name] is float else value for name, value in options.items()}
    return options | ({"mixed_precision": "no"} if options.get("mixed_precision") is False else {})
