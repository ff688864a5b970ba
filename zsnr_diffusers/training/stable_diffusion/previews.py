"""Previews that a run makes: prompts, each with its seeds, size and guidance, from a file of one to a line."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

_MOST_SEED = 2**64 - 1


@dataclass(frozen=True)
class Preview:
    """Images of one prompt, a row of a preview.

    Args:
        prompt: of all of them.
        seeds: one for each image.
        settings: arguments of the pipeline's call that differ from those of other previews.
    """

    prompt: str
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    settings: tuple[tuple[str, Any], ...] = ()


class _Field(NamedTuple):
    """What a line may contain in addition to its prompt."""

    read: Callable[[str], Any]
    """From text, as options on a line of a text file are."""
    holds: Callable[[Any], bool]
    must: str


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_side(value: Any) -> bool:
    return _is_whole(value) and value > 0 and value % 8 == 0


def _is_seed(value: Any) -> bool:
    return _is_whole(value) and 0 <= value <= _MOST_SEED


_FIELDS = {
    "negative_prompt": _Field(str, lambda value: isinstance(value, str), "must be a text"),
    "seed": _Field(int, _is_seed, "must be an integer, not negative"),
    "seeds": _Field(
        lambda text: [int(one) for one in text.split(",")],
        lambda value: isinstance(value, list) and value != [] and all(map(_is_seed, value)),
        "must be a list of integers, not negative",
    ),
    "width": _Field(int, _is_side, "must be a multiple of 8 in pixels"),
    "height": _Field(int, _is_side, "must be a multiple of 8 in pixels"),
    "guidance_scale": _Field(float, lambda value: _is_number(value) and value >= 0, "must be a number, not negative"),
    "guidance_rescale": _Field(float, lambda value: _is_number(value) and 0 <= value <= 1, "must lie in [0, 1]"),
    "num_inference_steps": _Field(int, lambda value: _is_whole(value) and value > 0, "must be an integer above 0"),
}

_SHORT = {
    **{"n": "negative_prompt", "d": "seed", "w": "width", "h": "height"},
    **{"l": "guidance_scale", "s": "num_inference_steps"},
}
"""Options on a line of a text file, as kohya's scripts have them."""


def read_previews(path: str) -> list[Preview]:
    """Read a file of previews, JSON Lines where its name ends in .jsonl, else text.

    Raises:
        ValueError: there is no such file, it holds no prompt, or a line is wrong; the message names line and field.
    """
    if not Path(path).is_file():
        raise ValueError(f"--validation_prompts_file={path}: there is no such file.")
    read = _read_json if path.endswith(".jsonl") else _read_text
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            where = f"--validation_prompts_file={path}, line {number}"
            found.append(_check_preview(read(line.strip(), where), where))
    if not found:
        raise ValueError(f"--validation_prompts_file={path} holds no prompt: write one to a line.")
    return found


def _read_json(line: str, where: str) -> dict[str, Any]:
    """What a line of JSON says, by name."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f'{where}: expected {{"prompt": "a black cat", "seed": 1}}, got {line}')
    return values


def _read_text(line: str, where: str) -> dict[str, Any]:
    """What a line of text says, by name: a prompt, and options after it, `a black cat --w 768 --d 1`."""
    prompt, *options = re.split(r"(?:^|\s+)--(\w+)(?:\s+|$)", line)
    values: dict[str, Any] = {"prompt": prompt}
    for option, text in zip(options[::2], options[1::2], strict=True):
        name = _SHORT.get(option, option)
        if name not in _FIELDS:
            known = ", ".join(f"--{short} {long}" for short, long in _SHORT.items())
            raise ValueError(f"{where}: --{option} is not known; there are {known}, and these by their long names.")
        try:
            values[name] = _FIELDS[name].read(text.strip())
        except ValueError:
            raise ValueError(f"{where}: --{option} {text} {_FIELDS[name].must}.") from None
    return values


def _check_preview(values: dict[str, Any], where: str) -> Preview:
    """The preview of a line, whose fields are checked."""
    prompt = values.pop("prompt", None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: prompt must be a text, got {prompt!r}.")
    for name, value in values.items():
        if name not in _FIELDS:
            raise ValueError(f"{where}: {name} is not known; there are prompt, {', '.join(_FIELDS)}.")
        if not _FIELDS[name].holds(value):
            raise ValueError(f"{where}: {name} {_FIELDS[name].must}, got {value!r}.")
    if {"seed", "seeds"} <= values.keys():
        raise ValueError(f"{where} has both seed and seeds; leave out one of them.")
    one, several = values.pop("seed", None), values.pop("seeds", None)
    seeds = Preview.seeds if one is None and several is None else tuple([one] if several is None else several)
    return Preview(prompt, seeds, tuple(values.items()))
