"""What samplers are off, on a suite with a known exact solution, and which of them are nearest."""

import argparse
import math
import re
import traceback
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from samplers import SAME_LEVELS, USUAL, USUAL_RIVALS, Sampler, rival_samplers, sample, stock_samplers
from suites import Suite
from torch import Tensor
from tqdm import tqdm

Triple = tuple[float, float, float]
KINDS = ("all", "Gaussians", "mixtures")
"""What the three figures of a sampler are of."""
Figures = Mapping[tuple[str, Hashable], Triple]
"""By a sampler's label and a column, which is a step count, or guidance scale and step count."""


def brief(sampler: Sampler) -> str:
    """Class and spacing, by which failures are counted."""
    where = [key for key in sampler.options if key.startswith("use_")]
    where += [str(sampler.options.get("timestep_spacing", "flow"))]
    return f"{sampler.cls.__name__}, {where[0]}"


def reason(problem: Exception) -> str:
    """What happened and where, without the numbers that differ from run to run."""
    text = re.sub(r"\d+", "#", str(problem).partition("\n")[0])
    return f"{text or type(problem).__name__} ({traceback.extract_tb(problem.__traceback__)[-1].name})"


class Bench:
    """A suite, its exact solution, and what was found so far."""

    def __init__(self, suite: Suite, exact_steps: int) -> None:
        """Solve the suite's ODE, with half as many steps too, which tells how exactly it is known."""
        self.suite, self.exact = suite, suite.endpoints(exact_steps)
        self.certainty = float(suite.errors(suite.join(suite.endpoints(exact_steps // 2)), self.exact).max())
        self.is_gaussian = torch.tensor([case.is_gaussian for case in suite.cases])
        self.failures: list[tuple[str, str]] = []
        self._known: dict[str | None, Tensor | str] = {}

    def errors(self, sampler: Sampler, n: int) -> Tensor | None:
        """Per case, shape [cases]; None if the sampler fails, which is noted.

        Stock's options that lead to the same noise levels as others, as a spacing beside Karras sigmas does, are run
        once. Ours always are, as the study changes them from below.
        """
        try:
            scheduler, path = sampler.prepared(n), None
            if not sampler.cls.__module__.startswith("zsnr_diffusers"):
                levels = [getattr(scheduler, name, torch.zeros(0)).tolist() for name in ("timesteps", "sigmas")]
                others = [item for item in sampler.options.items() if item[0] in SAME_LEVELS]
                path = str((sampler.cls, float(getattr(scheduler, "init_noise_sigma", 1.0)), levels, others))
            if path is None or path not in self._known:
                self._known[path] = self._run(scheduler)
            known = self._known[path]
        except Exception as problem:  # whatever stock raises is a finding
            known = reason(problem)
        if isinstance(known, str):
            self.failures.append((brief(sampler), known))
            return None
        return known

    def all_errors(
        self, samplers: Sequence[Sampler], steps: Sequence[int], title: str
    ) -> dict[tuple[str, int], Tensor | None]:
        """`errors` of each sampler at each step count, by its label."""
        jobs = tqdm([(s, n) for s in samplers for n in steps], desc=title, leave=False, disable=None)
        return {(sampler.label, n): self.errors(sampler, n) for sampler, n in jobs}

    def _run(self, scheduler: Any) -> Tensor | str:
        try:
            return self.suite.errors(sample(scheduler, self.suite), self.exact)
        except Exception as problem:
            return reason(problem)

    def figures(self, errors: Tensor | None) -> Triple:
        """Geometric means over all cases (Gaussians and mixtures half and half), over Gaussians, over mixtures."""
        if errors is None:
            return math.inf, math.inf, math.inf
        log = errors.clamp(min=1e-12).log()
        flat, mixed = log[self.is_gaussian].mean(), log[~self.is_gaussian].mean()
        return float(((flat + mixed) / 2).exp()), float(flat.exp()), float(mixed.exp())


def best(figures: Figures, among: Sequence[Sampler], column: Hashable, kind: int = 0) -> Sampler:
    """The nearest in a column, over all cases or those of one of `KINDS`."""
    return min(among, key=lambda sampler: figures[sampler.label, column][kind])


def single_best(figures: Figures, among: Sequence[Sampler], columns: Sequence[Hashable]) -> Sampler:
    """The one of the smallest geometric mean over all columns: what a user could choose once and for all."""
    return min(among, key=lambda sampler: sum(math.log(figures[sampler.label, column][0]) for column in columns))


def ratios(figures: Figures, sampler: Sampler, among: Sequence[Sampler], column: Hashable) -> Triple:
    """Its error over that of the nearest of the others, which is chosen for each of `KINDS`; below 1: closer."""
    over_all, gaussians, mixtures = (
        figures[sampler.label, column][kind] / figures[best(figures, among, column, kind).label, column][kind]
        for kind in range(len(KINDS))
    )
    return over_all, gaussians, mixtures


def candidates(which: str) -> tuple[list[Sampler], list[Sampler]]:
    """Stock's samplers and those of others: `all` or the `usual`."""
    if which == "usual":
        return list(USUAL.values()), USUAL_RIVALS
    return stock_samplers(stochastic=False), rival_samplers()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that all studies of accuracy have."""
    parser.add_argument(
        "--candidates",
        choices=("all", "usual"),
        default="all",
        help="whom ours are compared with: every configuration of stock and of others, or the usual ones "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--exact_steps",
        type=int,
        default=1000,
        metavar="N",
        help="of the exact ODE, which is of order 4 (default: %(default)s)",
    )
