"""Measure whether a text-to-image model follows prompts for dark and bright images: prompt suites and a score.

Coverage of brightness (`luminance_coverage`) needs real images for the same prompts. A suite does not: each of its
prompts has a target luminance.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..utils.tables import KeyValues, Part, Report
from .luminance import Floats

SUITES = {"brightness": Path(__file__).with_name("brightness.jsonl")}
"""Suites included in the package, by name."""

LEAST_DIFFERENCE = 0.25
"""Prompts with closer target luminances are not ranked, since targets are not more precise."""

NEARLY_BLACK_OR_WHITE = 0.85
"""Absolute target luminance from which clipped pixels are expected."""


@dataclass(frozen=True)
class PromptSuite:
    """Distinct prompts, and the target mean luminance of each, from -1 (black) to 1 (white)."""

    name: str
    prompts: tuple[str, ...]
    luminance: tuple[float, ...]


def load_suite(name: str | PathLike[str]) -> PromptSuite:
    """Read a suite of this package by name, or one from a file.

    A file has JSON Lines, {"text": "a black cat", "luminance": -0.8} on each line; other keys are ignored.

    Raises:
        OSError: neither a suite of this package nor a file.
        ValueError: an invalid line, a duplicate prompt, or equal luminances.
    """
    path = SUITES.get(str(name), Path(name))
    if not path.is_file():
        raise FileNotFoundError(f"suite {str(name)!r} is neither a file nor one of {', '.join(SUITES)}")
    lines = enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1)
    rows = [_read_row(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    prompts, luminance = tuple(text for text, _ in rows), tuple(value for _, value in rows)
    if twice := [text for text in prompts if prompts.count(text) > 1]:
        raise ValueError(f"{path}: the prompt {twice[0]!r} comes {prompts.count(twice[0])} times; remove duplicates")
    if not rows or max(luminance) - min(luminance) < LEAST_DIFFERENCE:
        raise ValueError(
            f"{path} has no luminances that differ by {LEAST_DIFFERENCE} or more, so there is nothing to score"
        )
    return PromptSuite(str(name), prompts, luminance)


def _read_row(line: str, where: str) -> tuple[str, float]:
    """Prompt and luminance of one line."""
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    text, value = (row.get("text"), row.get("luminance")) if isinstance(row, dict) else (None, None)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{where}: expected {{"text": "a black cat", "luminance": -0.8}}, got {line.strip()}')
    if not isinstance(value, int | float) or isinstance(value, bool) or not -1 <= value <= 1:
        raise ValueError(f"{where}: luminance must be a number from -1 (black) to 1 (white), got {value!r}")
    return text, float(value)


@dataclass(frozen=True)
class BrightnessScore(Report):
    """How well the brightness of images follows their prompts.

    Attributes:
        suite: name of the suite.
        prompts: number of its prompts.
        images: number of images.
        adherence: rank correlation between generated and target luminance: the fraction of image pairs in the correct
            order minus the fraction in the reverse order, over pairs whose targets differ by `LEAST_DIFFERENCE` or
            more (Somers' D). 1 is perfect, 0 is a model that ignores the prompt.
        range_covered: fraction of the range from the 5th to the 95th percentile of target luminance that generated
            luminance covers, 0 to 1.
        error: mean absolute difference between a prompt's mean luminance and its target.
        clipped: fraction of pixel values that are 0 or 255, for prompts that do not ask for nearly black or white.
    """

    suite: str
    prompts: int
    images: int
    adherence: float
    range_covered: float
    error: float
    clipped: float

    def parts(self) -> Iterator[Part]:
        """Parts of the printed report: a row for each metric, with its value for a perfect model."""
        yield KeyValues(
            (f"suite {self.suite}", "value", "a perfect model"),
            (
                ("prompt adherence", f"{self.adherence:.3f}", "1; 0 ignores the prompt"),
                ("range covered", f"{self.range_covered:.3f}", "1"),
                ("error of luminance", f"{self.error:.3f}", "0"),
                ("clipped pixel values", f"{self.clipped:.4f}", "0"),
                ("images", str(self.images), f"of {self.prompts} prompts of the suite {self.suite}"),
            ),
        )


def brightness_score(
    suite: PromptSuite, prompts: Sequence[str], luminance: npt.ArrayLike, clipped: npt.ArrayLike
) -> BrightnessScore:
    """Score images of a suite's prompts.

    Args:
        suite: the prompts.
        prompts: prompt of each image, n in total.
        luminance: mean luminance of each image, [n], from `mean_luminance`.
        clipped: fraction of pixel values of each image that are 0 or 255, [n], from `clipped_share`.

    Raises:
        ValueError: different numbers of prompts and images, a prompt that is not in the suite, or a prompt without
            images.
    """
    asked_of = dict(zip(suite.prompts, suite.luminance, strict=True))
    found, shares = np.asarray(luminance, dtype=np.float64), np.asarray(clipped, dtype=np.float64)
    if not len(prompts) == len(found) == len(shares):
        raise ValueError(f"expected a prompt for each image, got {len(prompts)} for {len(found)} and {len(shares)}")
    if unknown := sorted(set(prompts) - set(asked_of)):
        raise ValueError(f"suite {suite.name}: the prompt {unknown[0]!r} is not in it")
    if missing := sorted(set(asked_of) - set(prompts)):
        raise ValueError(f"suite {suite.name}: the prompt {missing[0]!r} has no image")
    asked = np.array([asked_of[prompt] for prompt in prompts])
    means = {prompt: float(found[[one == prompt for one in prompts]].mean()) for prompt in suite.prompts}
    mild = np.abs(asked) < NEARLY_BLACK_OR_WHITE
    return BrightnessScore(
        suite=suite.name,
        prompts=len(suite.prompts),
        images=len(found),
        adherence=_adherence(asked, found),
        range_covered=_range_covered(asked, found),
        error=float(np.mean([abs(means[prompt] - asked_of[prompt]) for prompt in suite.prompts])),
        clipped=float(shares[mild].mean()) if mild.any() else 0.0,
    )


def _adherence(asked: Floats, found: Floats) -> float:
    """Somers' D of generated given target luminance, over pairs that differ by `LEAST_DIFFERENCE` or more."""
    agreement, pairs = 0.0, 0
    for value, luminance in zip(asked, found, strict=True):
        brighter = asked - value >= LEAST_DIFFERENCE - 1e-9  # each pair once
        agreement += float(np.sign(found[brighter] - luminance).sum())
        pairs += int(brighter.sum())
    return agreement / pairs if pairs else 0.0


def _range_covered(asked: Floats, found: Floats) -> float:
    """Fraction of the target range, 5th to 95th percentile, that lies within the generated range."""
    (low, high), (found_low, found_high) = (np.percentile(values, (5, 95)) for values in (asked, found))
    overlap = min(high, found_high) - max(low, found_low)
    return float(np.clip(overlap / (high - low), 0, 1)) if high > low else 0.0
