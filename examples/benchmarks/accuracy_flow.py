"""The table of `sampler_accuracy.py --flow`: the same data under flow matching, against everyone's flow samplers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
from accuracy_bench import Bench, Figures, best, ratios, single_best
from accuracy_plots import plot_errors
from accuracy_tables import show, show_failures, triple
from samplers import FLOW_DEFAULT, Sampler, our_flow_samplers, rival_flow_samplers, stock_flow_samplers
from suites import ode_suite

EULER = Sampler(diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, {})
"""What Stable Diffusion 3 is published with."""
LMS = "FlowLMS beta shift 1 order 4"
"""The strongest single one of other programs."""


CURVE = (4, 5, 6, 8, 10, 12, 15, 20, 28)


def compare_flow(
    seed: int,
    samples: int,
    exact_steps: int,
    steps: Sequence[int],
    report: dict[str, Any],
    image: Path,
    skrample: Sequence[Sampler] = (),
) -> None:
    """Print errors and ratios on flow levels, those of skrample's samplers too, and draw the curves of the notable."""
    bench = Bench(ode_suite(None, seed, samples), exact_steps)
    ours, stock, rivals = our_flow_samplers(), stock_flow_samplers(), rival_flow_samplers()
    errors = bench.all_errors([*ours, *stock, *rivals, *skrample], steps, "flow samplers")
    figures = {key: bench.figures(value) for key, value in errors.items()}
    single, lms = single_best(figures, stock, steps), next(s for s in rivals if s.label == LMS)
    header = ["", *(f"n = {n}" for n in steps)]
    singles = [single, lms, *([single_best(figures, skrample, steps)] if skrample else [])]
    rows = [[s.label, *(triple(figures[s.label, n]) for n in steps)] for s in (*ours, EULER, *singles)]
    groups = {"best stock": stock, "best rival": rivals, **({"best of skrample": skrample} if skrample else {})}
    for name, among in groups.items():
        winners = [best(figures, among, n) for n in steps]
        rows.append([name, *(triple(figures[s.label, n]) for s, n in zip(winners, steps, strict=True))])
        report[name] = {n: s.label for s, n in zip(winners, steps, strict=True)}
    show(f"Flow matching, seed {seed}: error over all cases (Gaussians, mixtures), by calls", header, rows)
    compared_with = {
        f"{EULER.label} (stock's default)": [EULER],
        f"one stock configuration for all n, {single.label}": [single],
        "the best stock configuration of each cell": stock,
        lms.label: [lms],
        "the best of anyone of each cell": [*stock, *rivals, *skrample],
    }
    report["ratios"] = {name: compared(figures, among, steps) for name, among in compared_with.items()}
    rows = [[name, *(triple(by_n[n], ".2f") for n in steps)] for name, by_n in report["ratios"].items()]
    show(f"{FLOW_DEFAULT.label} over others: all cases (Gaussians, mixtures); below 1: closer", header, rows)
    report["errors"] = {label: {n: figures[label, n] for n in steps} for label, _ in figures}
    drawn = list({s.label: s for s in (FLOW_DEFAULT, ours[1], EULER, single, lms)}.values())
    found = bench.all_errors(drawn, CURVE, "curves")
    curves = {s.label: [bench.figures(found[s.label, n])[0] for n in CURVE] for s in drawn}
    plot_errors(image, curves, CURVE, "Distance to the exact ODE under flow matching")
    show_failures(bench.failures, f"of {(len(stock) + len(rivals) + len(skrample)) * len(steps)} runs")


def compared(figures: Figures, among: Sequence[Sampler], steps: Sequence[int]) -> dict[int, tuple[float, ...]]:
    """Ours over the nearest of these, by number of calls."""
    return {n: ratios(figures, FLOW_DEFAULT, among, n) for n in steps}
