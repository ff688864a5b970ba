"""What the defaults of the multistep sampler rest on: each constant varied, its parts in all combinations."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accuracy_bench import Bench
from accuracy_tables import show
from samplers import DEFAULT, Sampler, multistep_options

from zsnr_diffusers import ZeroSNRMultistepScheduler
from zsnr_diffusers.core import multistep, safeguard, spacing, spectrum_fit

MODULES = (spacing, multistep, spectrum_fit, safeguard)

NO_FIT = {"RIDGE": 1e6}
STUDIED: dict[str, Sequence[float]] = {
    "LARGEST_SCALE": (12, 16, 24, 32, 64),
    "SMALLEST_SCALE": (0.005, 0.01, 0.02, 0.05, 0.1),
    "SMALLEST_END_SCALE": (0.02, 0.05, 0.1, 0.2),
    "COARSE_END_SCALE": (0.05, 0.1, 0.2),
    "RIDGE": (1.0, 2.1, 4.2, 8.4, 17.0, NO_FIT["RIDGE"]),
    "THIRD_ORDER_STEPS": (1, 15, 20, 30, 51),
}
STEPS = (4, 5, 7, 10, 15, 20, 30, 50)

Rows = dict[str, tuple[dict[str, float], Sampler]]
"""Constants and a sampler, by what a row is called."""


@contextmanager
def constants(**values: Any) -> Iterator[None]:
    """Other values for what `MODULES` have by these names in the block."""
    saved = []
    for name, value in values.items():
        for module in MODULES:
            if hasattr(module, name):
                saved.append((module, name, getattr(module, name)))
                setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)


def study(bench: Bench, report: dict[str, Any], steps: Sequence[int] = STEPS) -> None:
    """Each constant varied alone; order, corrector and fit in all combinations."""
    report["study"] = {}
    for title, rows in {**_varied(), **_combined()}.items():
        found = {}
        for name, (values, sampler) in rows.items():
            with constants(**values):
                found[name] = [bench.figures(bench.errors(sampler, n)) for n in steps]
        cells = ([name, *(f"{every:.4f} ({mixed:.4f})" for every, _, mixed in row)] for name, row in found.items())
        show(f"{title}: error over all cases (mixtures)", ["", *(f"n = {n}" for n in steps)], cells)
        report["study"][title] = {name: dict(zip(steps, row, strict=True)) for name, row in found.items()}


def _varied() -> dict[str, Rows]:
    """A table for each constant."""
    tables = {}
    for name, values in STUDIED.items():
        default = next(getattr(module, name) for module in MODULES if hasattr(module, name))
        marks = {v: " (default)" if v == default else " (no fit)" if v == NO_FIT["RIDGE"] else "" for v in values}
        tables[name] = {f"{v:g}{marks[v]}": ({name: v}, DEFAULT) for v in values}
    return tables


def _combined() -> dict[str, Rows]:
    """A table for each spacing."""
    tables = {}
    for where, fits in (("kappa", (False, True)), ("trailing", (False,))):  # the fit leaves trailing steps alone
        tables[f"Order, corrector{', fit' * len(fits[1:])}; {where} steps"] = {
            f"order {order}{' + corrector' * corrector}{' + fit' * fit}": (
                {"THIRD_ORDER_STEPS": 1, **({} if fit else NO_FIT)},
                Sampler(ZeroSNRMultistepScheduler, multistep_options(where, order, corrector)),
            )
            for order, corrector, fit in itertools.product((1, 2, 3), (False, True), fits)
        }
    return tables
