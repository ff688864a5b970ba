"""Fields of a configuration as options of a command line, and as lines of a YAML file."""

import argparse
import dataclasses
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ...utils.command_line import CommandParser, did_you_mean, nearest, parse_switch
from .options import Options

_ALIASES = {"rescale_betas_zero_snr": ("zero_snr",)}
"""Other spellings of options; the commands had them before one was chosen."""


def add_options(parser: CommandParser, kind: type[Options]) -> None:
    """Add an option for each field of a configuration; omitted options do not appear in the parsed arguments."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        default = field.default if field.default_factory is dataclasses.MISSING else None
        text = field.metadata["help"].replace("%", "%%")
        if default is not None and default != "":
            text += f" (default: {_written(default)})"
        if hints[field.name] is bool:
            parser.add_switch(parser, field.name, text, _ALIASES.get(field.name, ()), default=argparse.SUPPRESS)
            continue
        choices, convert = _value_of(hints[field.name])
        parser.add_argument(
            f"--{field.name}",
            type=convert,
            choices=choices,
            metavar=None if choices else {int: "N", float: "X"}.get(convert, "TEXT"),
            nargs="+" if _is_list(hints[field.name]) else None,
            default=argparse.SUPPRESS,
            help=text,
        )


def _written(default: Any) -> str:
    """A default in command-line syntax."""
    return ("no", "yes")[default] if isinstance(default, bool) else str(default)


def _without_none(hint: Any) -> Any:
    """The type of an option's values where it may also be None."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(one for one in get_args(hint) if one is not type(None))
    return hint


def _is_list(hint: Any) -> bool:
    return get_origin(_without_none(hint)) is list


def _value_of(hint: Any) -> tuple[tuple[Any, ...] | None, Any]:
    """The choices of an option, None where any value of its type will do, and the type of one value."""
    hint = _without_none(hint)
    if get_origin(hint) is Literal:
        return get_args(hint), type(get_args(hint)[0])
    return None, get_args(hint)[0] if get_origin(hint) is list else hint


def read_yaml(path: str, kind: type[Options]) -> dict[str, Any]:
    """Options of a `--config` file, with their names checked and YAML 1.1's misreadings repaired.

    Raises:
        ValueError: the file does not exist, is not YAML, has no options, an unknown name, or a value of a wrong type.
    """
    if not Path(path).is_file():
        raise ValueError(f"--config {path}: no such file.")
    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"--config {path} must contain options, one `name: value` per line.")
    hints = get_type_hints(kind)
    known = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    if unknown := sorted(set(options) - set(known), key=str):
        meant = did_you_mean(nearest(str(unknown[0]), known)) if len(unknown) == 1 else ""
        raise ValueError(f"--config {path}: unknown options {', '.join(map(str, unknown))}{meant or '.'}")
    return {name: _repaired(name, value, known[name], path) for name, value in options.items()}


def _repaired(name: str, value: Any, hint: Any, path: str) -> Any:
    """A value of a YAML file in the type of its option.

    YAML 1.1 reads 1e-5 as a string, where a float option means the number, and the precision `no` as false.
    """
    if name == "mixed_precision" and value is False:
        return "no"
    optional, several = _without_none(hint) is not hint, isinstance(value, list)
    if (value is None and not optional) or (several and not _is_list(hint)) or isinstance(value, dict):
        raise ValueError(f"--config {path}: {name} has a value of the wrong type: {value}")
    convert = parse_switch if hint is bool else _value_of(hint)[1]
    if convert is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, str) or convert is str or _is_list(hint):
        return value
    try:
        return convert(value)
    except (ValueError, argparse.ArgumentTypeError) as error:
        wanted = "an integer" if convert is int else "a number" if convert is float else "yes or no"
        raise ValueError(f"--{name}={value!r} in --config {path} is not {wanted}.") from error
