"""How far samplers with fresh noise at every step end from the data, by energy distance."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accuracy_bench import brief, reason
from accuracy_tables import show, show_failures
from samplers import Sampler, multistep_options, sample, stock_samplers
from suites import Suite, mixtures
from torch import Tensor
from tqdm import tqdm

from zsnr_diffusers import ZeroSNRDDPMScheduler, ZeroSNRMultistepScheduler

NOTHING = "data against data"


class Draw(NamedTuple):
    """Noise to sample from, in a suite, and data to compare with, [num, d] for each case."""

    suite: Suite
    data: list[Tensor]
    others: list[Tensor]
    within: list[float]
    """Mean distance in the data."""

    def distance(self, parts: Sequence[Tensor]) -> float:
        """Energy distance of samples to the data over the mean distance in the data, mean over cases.

        2 E|x - d| - E|x - x'| - E|d - d'| over pairs of different draws, which makes it unbiased (Szekely & Rizzo
        2013), and may make it negative. Data against other data shows how much of it is chance.
        """
        terms = zip(parts, self.data, self.within, strict=True)
        return sum((2 * float(torch.cdist(x, d).mean()) - _within(x)) / dd - 1 for x, d, dd in terms) / len(parts)

    def distance_of(self, sampler: Sampler, n: int, seed: int) -> float:
        """What a sampler is off with n steps."""
        x = sample(sampler.prepared(n), self.suite, torch.Generator().manual_seed(seed))
        return self.distance(self.suite.split(x.double()))


def compare_sde(alpha_bar: Tensor, seed: int, num: int, n: int, report: dict[str, Any], repeats: int = 2) -> None:
    """Ours and all of stock, `num` samples of each mixture, in tables and the report."""
    draws = _draws(alpha_bar, seed, num, repeats)
    ours, stock, failures = _ours(), stock_samplers(stochastic=True), []
    found = {NOTHING: [draw.distance(draw.others) for draw in draws]}
    for sampler in tqdm([*ours, *stock], desc="SDE", leave=False, disable=None):
        try:
            found[sampler.label] = [draw.distance_of(sampler, n, i) for i, draw in enumerate(draws)]
        except Exception as problem:  # whatever stock raises is a finding
            failures.append((brief(sampler), reason(problem)))
    labels = dict.fromkeys(s.label for s in (*ours, *_notable(stock, found)))
    show(
        f"SDE, {n} steps: energy distance to the data, of ours, the best 3 of {len(stock)} stock, and the usual ones",
        ["", "mean", *(f"draw {i + 1}" for i in range(repeats))],
        [[label, sum(found[label]) / repeats, *found[label]] for label in (NOTHING, *labels)],
    )
    show_failures(failures, f"in the SDE part, of {len(stock)} runs")
    report["sde"], report["sde failures"] = found, failures


def _draws(alpha_bar: Tensor, seed: int, num: int, repeats: int) -> list[Draw]:
    cases = [case for case in mixtures(seed) if case.means.shape[1] in (2, 8, 32)]
    draws = []
    for repeat in range(repeats):
        generator = torch.Generator().manual_seed(1000 * (seed + 1) + repeat)
        noises = [torch.randn(num, case.means.shape[1], dtype=torch.float64, generator=generator) for case in cases]
        data, others = ([case.draw(num, generator) for case in cases] for _ in range(2))
        draws.append(Draw(Suite(cases, noises, alpha_bar), data, others, list(map(_within, data))))
    return draws


def _ours() -> list[Sampler]:
    return [
        *(
            Sampler(ZeroSNRMultistepScheduler, multistep_options(where, order, eta=1.0))
            for where in ("kappa", "trailing")
            for order in (2, 3, 1)
        ),
        Sampler(ZeroSNRDDPMScheduler, {"timestep_spacing": "trailing"}),
    ]


def _notable(stock: Sequence[Sampler], found: dict[str, list[float]]) -> list[Sampler]:
    """The best 3, and those of order 2 on trailing steps."""
    ranked = sorted((s for s in stock if s.label in found), key=lambda s: (sum(found[s.label]), len(s.label)))
    unique = list({tuple(found[s.label]): s for s in reversed(ranked)}.values())[::-1]
    plain = [
        s for s in unique if s.options["timestep_spacing"] == "trailing" and s.options.get("solver_order", 2) == 2
    ]
    return [*unique[:3], *plain]


def _within(x: Tensor) -> float:
    """Mean distance between different draws."""
    return float(torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)))


def summary(report: dict[str, Any]) -> str:
    """The first of ours and the best of stock, in words."""
    sums = {label: sum(values) for label, values in report["sde"].items() if label != NOTHING}
    first = next(iter(sums))
    nearest = min((label for label in sums if not label.startswith("ZeroSNR")), key=lambda label: sums[label])
    chance = max(abs(value) for value in report["sde"][NOTHING])
    draws = len(report["sde"][NOTHING])
    return (
        f"SDE, energy distance: {sums[first] / draws:.2g} for {first}, {sums[nearest] / draws:.2g} for {nearest}, up "
        f"to {chance:.1g} for {NOTHING}"
    )
