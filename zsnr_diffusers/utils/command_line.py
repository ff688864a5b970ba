"""An argument parser that answers a mistake with a suggestion in a line or two."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from .distributed import is_main_process

_TRUE = ("yes", "true", "1", "y", "t")
_FALSE = ("no", "false", "0", "n", "f")
_OPTION_CUTOFF, _VALUE_CUTOFF = 0.6, 0.5  # for difflib's similarity; values are short, such as fp16 for float16


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors suggest the most similar option and point to the help instead of printing the
    usage.

    Options cannot be abbreviated, and may be written with dashes instead of underscores.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self._switches: set[str] = set()

    def add_switch(self, group: Any, name: str, text: str, aliases: Iterable[str] = (), **defaults: Any) -> None:
        """Add `--name [yes|no]` and `--no_name`; without a value it means yes.

        Args:
            group: this parser or a group of it.
            name: without dashes, also the attribute of the parsed arguments.
            text: of the help.
            aliases: other names, which the help does not list.
            defaults: `default`, None if omitted.
        """
        group = group.add_mutually_exclusive_group()
        positive = group.add_argument(
            f"--{name}", nargs="?", const=True, type=parse_switch, metavar="yes|no", help=text, **defaults
        )
        negative = group.add_argument(
            f"--no_{name}", dest=name, action="store_false", help=argparse.SUPPRESS, **{"default": None, **defaults}
        )
        for alias in aliases:
            self.add_alias(positive, alias)
            self.add_alias(negative, f"no_{alias}")
        self._switches |= {f"--{one}" for one in (name, *aliases)}

    def add_alias(self, action: argparse.Action, name: str) -> None:
        """Accept `--name` as an alias of an option that the help does not list."""
        self._option_string_actions[f"--{name}"] = action

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but refuse an unknown option first, since others may be missing because of it."""
        args = list(sys.argv[1:] if args is None else args)
        options = args[: args.index("--")] if "--" in args else args
        written = [self._as_declared(*pair) for pair in zip(options, [*options[1:], ""], strict=False)]
        for arg in written:
            name = arg.partition("=")[0]
            if re.fullmatch(r"--?[A-Za-z]\w*(-\w+)*", name) and name not in self._option_string_actions:
                self.error(f"unknown option {name}{self._did_you_mean_option(name)}")
        return super().parse_known_args([*written, *args[len(options) :]], namespace)

    def _as_declared(self, arg: str, following: str) -> str:
        """An argument with the declared name of its option; a switch without a value means yes."""
        name, equals, value = arg.partition("=")
        declared = "--" + name[2:].replace("-", "_")
        if not name.startswith("--") or declared not in self._option_string_actions:
            return arg
        if declared in self._switches and not equals and following.lower() not in (*_TRUE, *_FALSE):
            return f"{declared}=yes"
        return f"{declared}{equals}{value}"

    def _did_you_mean_option(self, name: str) -> str:
        """Suggestions: options with the same prefix, or else the most similar one."""
        name = "--" + name.strip("-").replace("-", "_")
        shown = [action.option_strings[-1] for action in self._actions if action.option_strings]
        shown = [option for option in dict.fromkeys(shown) if not option.startswith("--no_")]
        begin = [option for option in shown if option.startswith(name)]
        return did_you_mean(begin[:4] or difflib.get_close_matches(name, shown, 1, _OPTION_CUTOFF))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a value that is not one of an option's choices; the error suggests the most similar one."""
        if action.choices is None or value in action.choices:
            return
        choices = [*map(str, action.choices)]
        meant = did_you_mean(difflib.get_close_matches(str(value), choices, 1, _VALUE_CUTOFF))
        name = action.option_strings[0] if action.option_strings else action.metavar
        self.error(f"{name} {value}: choose one of {', '.join(choices)}{meant}")

    def error(self, message: str) -> NoReturn:
        """Print an error instead of the usage, only in the main process, and exit with status 2."""
        text = f"{self.prog}: error: {message}\nhelp: {self.prog} --help\n"
        self.exit(2, text if is_main_process() else None)


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Add --quiet, which is None unless given."""
    parser.add_argument("--quiet", action="store_true", default=None, help="no progress bars and no library messages")


def did_you_mean(candidates: Sequence[str]) -> str:
    """A question at the end of an error message; empty without a candidate."""
    if not candidates:
        return ""
    *first, last = candidates
    return f"; did you mean {', '.join(first)} or {last}?" if first else f"; did you mean {last}?"


def nearest(name: str, known: Iterable[str], most: int = 1) -> list[str]:
    """The known names that are most similar to a name, ignoring case; none if none is similar."""
    by_lower_case = {one.lower(): one for one in known}
    found = difflib.get_close_matches(name.lower(), by_lower_case, most, _OPTION_CUTOFF)
    return [by_lower_case[one] for one in found]


def parse_switch(text: str) -> bool:
    """Convert `yes`, `true` etc. to True, and `no`, `false` etc. to False.

    Raises:
        argparse.ArgumentTypeError: another word.
    """
    if text.lower() in (*_TRUE, *_FALSE):
        return text.lower() in _TRUE
    raise argparse.ArgumentTypeError(f"{text} is neither yes nor no")


def arguments_as_options(text: str, parser: CommandParser) -> str:
    """An error message with Python arguments, such as `overwrite=True`, replaced by the command's options.

    An argument without a corresponding option is removed if it is the last of several remedies, and otherwise kept, as
    are arguments inside a call's parentheses.
    """

    def option(found: re.Match[str]) -> str:
        name, value = found[1], found[2]
        if f"--{name}" not in parser._option_string_actions or value == "None":
            return found[0]
        if value == "False":
            return f"--no_{name}"
        if value is None and f"--{name}" in parser._switches:
            return f"--{name} or --no_{name}"
        return f"--{name}" if value in (None, "True") else f"--{name} {value.strip(chr(39))}"

    def last_remedy(found: re.Match[str]) -> str:
        return found[0] if f"--{found[1]}" in parser._option_string_actions else ""

    text = re.sub(r", or pass (\w+)=[^.;,]*", last_remedy, text)
    return re.sub(r"(?<![-\w.(])(\w+)=(True|False|None|'[^']*'|-?[\d.]*\d)?(?![\w\[-])", option, text)
