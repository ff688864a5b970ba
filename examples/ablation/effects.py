"""What each fix gives, in every context that the others make, with intervals over seeds.

A recipe is an arm, a place where sampling begins and a guidance rescale. All seeds are paired: the recipes of a seed
share the first weights, the order of the data and the noise, so effects are differences within a seed.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

import numpy as np
from arms import GUIDED, MAIN_STEPS, RESCALE, UNGUIDED, Cell
from judge import Row
from scipy import stats

Rows: TypeAlias = Mapping[tuple[str, Cell, int], Row]
Recipe: TypeAlias = tuple[str, str, float]
"""Arm, sampler, guidance rescale."""

EPSILON, V, ZERO = "epsilon", "v", "v-zero-snr"
STOCK_RECIPE: Recipe = (EPSILON, "leading", 0.0)
ALL_FIXES: Recipe = (ZERO, "trailing", RESCALE)
_STARTS, _RESCALES = ("leading", "trailing"), (0.0, RESCALE)


@dataclass(frozen=True)
class Interval:
    """Mean over seeds and half the width of its 95 % interval (Student's t); None from one seed."""

    mean: float
    half_width: float | None
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Interval":
        """The interval of values, one per seed."""
        array = np.array(list(values), dtype=np.float64)
        n = len(array)
        half = float(stats.t.ppf(0.975, n - 1) * array.std(ddof=1) / n**0.5) if n > 1 else None
        return cls(float(array.mean()), half, n)

    @property
    def is_clear(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.half_width is not None and abs(self.mean) > self.half_width


@dataclass(frozen=True)
class Fix:
    """One of the fixes: pairs of recipes without and with it, by what else is fixed.

    `alone` is the pair in which nothing else is, `last` that in which all else is; None where the package refuses it.
    """

    name: str
    pairs: tuple[tuple[Recipe, Recipe], ...]
    alone: tuple[Recipe, Recipe] | None
    last: tuple[Recipe, Recipe] | None


def _pairs(arms: Iterable[str], change: Callable[[str, str, float], Recipe]) -> tuple[tuple[Recipe, Recipe], ...]:
    """Recipes and what a change makes of them, where it makes another."""
    recipes = [*product(arms, _STARTS, _RESCALES)]
    return tuple((recipe, change(*recipe)) for recipe in recipes if change(*recipe) != recipe)


FIXES = (
    Fix(
        "v-prediction",
        _pairs([EPSILON], lambda arm, start, phi: (V, start, phi)),
        (STOCK_RECIPE, (V, "leading", 0.0)),
        None,
    ),
    Fix(
        "zero terminal SNR (given v)",
        _pairs([V], lambda arm, start, phi: (ZERO, start, phi)),
        None,
        ((V, "trailing", RESCALE), ALL_FIXES),
    ),
    Fix(
        "from the last timestep",
        _pairs([EPSILON, V, ZERO], lambda arm, start, phi: (arm, "trailing", phi)),
        (STOCK_RECIPE, (EPSILON, "trailing", 0.0)),
        ((ZERO, "leading", RESCALE), ALL_FIXES),
    ),
    Fix(
        "guidance rescale",
        _pairs([EPSILON, V, ZERO], lambda arm, start, phi: (arm, start, RESCALE)),
        (STOCK_RECIPE, (EPSILON, "leading", RESCALE)),
        ((ZERO, "trailing", 0.0), ALL_FIXES),
    ),
)

INTERACTIONS: Mapping[str, tuple[tuple[float, Recipe], ...]] = {
    "v x last timestep": tuple(
        (sign * 0.5, (arm, start, phi))
        for phi in _RESCALES
        for sign, arm, start in (
            (1, V, "trailing"),
            (-1, V, "leading"),
            (-1, EPSILON, "trailing"),
            (1, EPSILON, "leading"),
        )
    ),
    "zero SNR x last timestep": tuple(
        (sign * 0.5, (arm, start, phi))
        for phi in _RESCALES
        for sign, arm, start in ((1, ZERO, "trailing"), (-1, ZERO, "leading"), (-1, V, "trailing"), (1, V, "leading"))
    ),
    "v x rescale": tuple(
        (sign * 0.5, (arm, start, phi))
        for start in _STARTS
        for sign, arm, phi in ((1, V, RESCALE), (-1, V, 0.0), (-1, EPSILON, RESCALE), (1, EPSILON, 0.0))
    ),
    "zero SNR x rescale": tuple(
        (sign * 0.5, (arm, start, phi))
        for start in _STARTS
        for sign, arm, phi in ((1, ZERO, RESCALE), (-1, ZERO, 0.0), (-1, V, RESCALE), (1, V, 0.0))
    ),
    "last timestep x rescale": tuple(
        (sign / 3, (arm, start, phi))
        for arm in (EPSILON, V, ZERO)
        for sign, start, phi in (
            (1, "trailing", RESCALE),
            (-1, "trailing", 0.0),
            (-1, "leading", RESCALE),
            (1, "leading", 0.0),
        )
    ),
}
"""Contrasts of recipes: how much more two fixes give together than their sum, averaged over what else is fixed."""


def cell_of(recipe: Recipe, guidance_scale: float = GUIDED) -> Cell:
    """The cell of a recipe; without guidance there is none to rescale."""
    return Cell(recipe[1], MAIN_STEPS, guidance_scale, 0.0 if guidance_scale == UNGUIDED else recipe[2])


def contrast(
    rows: Rows, terms: Iterable[tuple[float, Recipe]], figure: str, guidance_scale: float = GUIDED
) -> Interval | None:
    """A weighted sum of recipes' figures within each seed; None without a seed that has all."""
    cells = [(weight, recipe[0], cell_of(recipe, guidance_scale)) for weight, recipe in terms]
    seeds = sorted({seed for _, _, seed in rows})
    complete = [seed for seed in seeds if all((arm, cell, seed) in rows for _, arm, cell in cells)]
    values = [sum(weight * getattr(rows[arm, cell, seed], figure) for weight, arm, cell in cells) for seed in complete]
    return Interval.of(values) if values else None


def difference(pair: tuple[Recipe, Recipe], weight: float = 1.0) -> list[tuple[float, Recipe]]:
    """The terms of a figure with a fix less that without it."""
    return [(-weight, pair[0]), (weight, pair[1])]


def main_effect(fix: Fix) -> list[tuple[float, Recipe]]:
    """A fix's effect, averaged over all contexts."""
    return [term for pair in fix.pairs for term in difference(pair, 1 / len(fix.pairs))]


def together() -> list[tuple[float, Recipe]]:
    """All four fixes less none."""
    return difference((STOCK_RECIPE, ALL_FIXES))
