"""Options: fields of a dataclass with a default, a range and a text for `--help`."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import yaml

from ...utils.command_line import did_you_mean, nearest


class Range(NamedTuple):
    """Allowed values of a number; None is always allowed."""

    holds: Callable[[Any], bool]
    must: str


POSITIVE = Range(lambda value: value > 0, "must be above 0")
NOT_NEGATIVE = Range(lambda value: value >= 0, "must not be negative")
SHARE = Range(lambda value: 0 <= value <= 1, "must lie in [0, 1]")

IDENTITY = "identity"
"""Marks options that cannot change when a run is resumed."""


def option(default: Any, text: str) -> Any:
    """A dataclass field for an option with its default and `--help` text; its type carries range and `IDENTITY`."""
    metadata = {"help": text}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Options:
    """A dataclass of options, each checked against its range and choices.

    Parts of a configuration inherit from it and check the compatibility of their options in `__post_init__`, after
    their parent's.

    Raises:
        ValueError: an option is out of range or unknown.
    """

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self), include_extras=True)
        for one in dataclasses.fields(self):
            _check_option(one.name, kinds[one.name], getattr(self, one.name))

    @classmethod
    def identity(cls) -> list[str]:
        """Names of options that cannot change when a run is resumed."""
        hints = get_type_hints(cls, include_extras=True)
        return [name for name, kind in hints.items() if IDENTITY in getattr(kind, "__metadata__", ())]

    def identity_values(self) -> dict[str, Any]:
        """Values of the options that cannot change when a run is resumed, by name."""
        return {name: getattr(self, name) for name in self.identity()}

    def to_yaml(self, changed_only: bool = False) -> str:
        """The run's options as YAML for `--config`.

        Args:
            changed_only: omit options at their default.
        """
        values = dataclasses.asdict(self)
        if changed_only:
            defaults = {one.name: _default(one) for one in dataclasses.fields(self)}
            values = {name: value for name, value in values.items() if value != defaults[name]}
        return yaml.safe_dump(values, sort_keys=False)


def _default(one: "dataclasses.Field[Any]") -> Any:
    """The default value of an option."""
    return one.default if one.default_factory is dataclasses.MISSING else one.default_factory()


def _check_option(name: str, kind: Any, value: Any) -> None:
    """Refuse a value outside an option's choices or range."""
    if value is None:
        return
    if (choices := _literal_choices(kind)) and value not in choices:
        names = [*map(str, choices)]
        meant = did_you_mean(nearest(str(value), names))
        raise ValueError(f"--{name}={value!r} is unknown; choose one of {', '.join(names)}{meant or '.'}")
    for limit in getattr(kind, "__metadata__", ()):
        if isinstance(limit, Range) and not limit.holds(value):
            raise ValueError(f"--{name}={value} {limit.must}.")


def _literal_choices(kind: Any) -> tuple[Any, ...]:
    """Values of a `Literal` option, including optional ones; argparse checks only the command line."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return next(filter(None, map(_literal_choices, get_args(kind))), ()) if get_origin(kind) is not None else ()
