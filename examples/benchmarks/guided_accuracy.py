"""How far samplers end from the exact ODE under classifier-free guidance, ours and stock's, at zero terminal SNR.

    python examples/benchmarks/guided_accuracy.py
    python examples/benchmarks/guided_accuracy.py --seed 1 --guidance_scales 5 12 --steps 4 6 15
    python examples/benchmarks/guided_accuracy.py --guidance_rescale 0.7

Unconditional and conditional network are exact for their data (`suites.py`): Gaussians of 64 scales, and mixtures of
which the condition keeps some of the modes. What is integrated is what a pipeline does, x_0 = u + w (c - u), rescaled
if asked for. Stock is every diffusers scheduler that has `rescale_betas_zero_snr`, in every spacing, order and solver
type that it offers. Beside it stand the strongest samplers of other programs (`rivals.py`).
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
from accuracy_bench import KINDS, Bench, Triple, add_options, best, candidates, ratios, single_best
from accuracy_plots import plot_guided
from accuracy_tables import save, show, triple
from samplers import DEFAULT, USUAL, Sampler, multistep_options, zero_snr_schedule
from suites import guided_suite

from zsnr_diffusers import ZeroSNRMultistepScheduler

OTHERS = [
    Sampler(ZeroSNRMultistepScheduler, multistep_options(*options))
    for options in (("kappa", 2), ("kappa", 1), ("trailing",))
]
NAMED = [DEFAULT, *OTHERS, *USUAL.values()]

Cell = tuple[float, int]
"""Guidance scale and step count."""


class Groups(NamedTuple):
    """Whom ours are compared with."""

    stock: list[Sampler]
    rivals: list[Sampler]

    @property
    def by_name(self) -> dict[str, list[Sampler]]:
        """Those of which the best is chosen for each cell."""
        return {"best stock": self.stock, "best rival": self.rivals, "best of anyone": [*self.stock, *self.rivals]}


def measure(args: argparse.Namespace, groups: Groups, report: dict[str, Any]) -> dict[tuple[str, Cell], Triple]:
    """Figures of all samplers at all guidance scales; prints a table for each as soon as it is known."""
    figures: dict[tuple[str, Cell], Triple] = {}
    samplers = list({s.label: s for s in (*NAMED, *groups.stock, *groups.rivals)}.values())
    for scale in args.guidance_scales:
        suite = guided_suite(zero_snr_schedule(), args.seed, args.samples, scale, args.guidance_rescale)
        bench = Bench(suite, args.exact_steps)
        title = f"Guidance {scale:g}" + f", rescale {args.guidance_rescale:g}" * (args.guidance_rescale > 0)
        for (label, n), errors in bench.all_errors(samplers, args.steps, title).items():
            figures[label, (scale, n)] = bench.figures(errors)
        report[f"{scale:g}"] = tabulate(
            figures, groups, [(scale, n) for n in args.steps], f"{title}, exact to {bench.certainty:.1g}"
        )
    return figures


def tabulate(
    figures: dict[tuple[str, Cell], Triple], groups: Groups, cells: Sequence[Cell], title: str
) -> dict[str, Any]:
    """Print one guidance scale: ours, the usual of stock, and the best of each group at each step count."""
    steps = [n for _, n in cells]
    winners = {name: [best(figures, among, cell).label for cell in cells] for name, among in groups.by_name.items()}
    rows = {s.label: [figures[s.label, cell] for cell in cells] for s in NAMED}
    for name, labels in winners.items():
        rows[name] = [figures[label, cell] for label, cell in zip(labels, cells, strict=True)]
    texts = ([name, *map(triple, values)] for name, values in rows.items())
    show(f"{title}: error over all cases (Gaussians, mixtures)", ["", *(f"n = {n}" for n in steps)], texts)
    found: dict[str, Any] = {name: dict(zip(steps, labels, strict=True)) for name, labels in winners.items()}
    found["errors"] = {name: dict(zip(steps, row, strict=True)) for name, row in rows.items()}
    found["ratio"] = {n: ratios(figures, DEFAULT, groups.stock, (scale, n))[0] for scale, n in cells}
    return found


def compare(
    figures: dict[tuple[str, Cell], Triple], groups: Groups, scales: Sequence[float], steps: Sequence[int]
) -> dict[str, dict[str, dict[int, Triple]]]:
    """Print ours over each group's best of each cell, and over one stock configuration for all cells.

    Returns the ratios of each table, by guidance scale and step count.
    """
    single = single_best(figures, groups.stock, [(scale, n) for scale in scales for n in steps])
    tables, tail = {}, "of all cases (Gaussians, mixtures); below 1: closer"
    for name, among in {**groups.by_name, "single stock": [single]}.items():
        chosen = f", {single.label}, for the whole table" if name == "single stock" else " of each cell"
        tables[name] = {
            f"{scale:g}": {n: ratios(figures, DEFAULT, among, (scale, n)) for n in steps} for scale in scales
        }
        rows = [[scale, *map(triple, by_n.values())] for scale, by_n in tables[name].items()]
        show(f"{DEFAULT.label} over {name}{chosen}, {tail}", ["guidance", *(f"n = {n}" for n in steps)], rows)
    return tables


def summarize(tables: dict[str, dict[str, dict[int, Triple]]]) -> None:
    """The worst ratio over all guidance scales and step counts, for each table and kind of data."""
    print("\nWorst ratio over guidance scales and steps\n" + "-" * 42)
    for name, by_scale in tables.items():
        cells = {(scale, n): values for scale, by_n in by_scale.items() for n, values in by_n.items()}
        worst = [max(cells, key=lambda cell: cells[cell][kind]) for kind in range(len(KINDS))]
        parts = [
            f"{KINDS[i]} {cells[cell][i]:.2f} (guidance {cell[0]}, n = {cell[1]})" for i, cell in enumerate(worst)
        ]
        print(f"over {name}: {'; '.join(parts)}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Measure samplers against the exact ODE under classifier-free guidance.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="The error of a case is the RMS difference to the exact guided ODE from the same noise, per dimension "
        "in units of the conditional data's standard deviation there; a figure is the geometric mean over cases, "
        "Gaussians and mixtures half and half. OUTPUT_DIR/report.json has everything, guided.png the curves.",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the data and the noise")
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0, 3.0, 7.5], metavar="W")
    parser.add_argument(
        "--guidance_rescale",
        type=float,
        default=0.0,
        metavar="PHI",
        help="Lin et al. 2023, Algorithm 2, on the guided v; without the mixtures in two dimensions, where it has no "
        "limit",
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10, 20], metavar="N")
    parser.add_argument("--samples", type=int, default=32, help="of each case")
    add_options(parser)
    parser.add_argument("--output_dir", type=Path, default=Path("guided_accuracy"), help="of report and image")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each guidance scale, and ours over the best of others for all of them."""
    args, start = parse(arguments), time.perf_counter()
    args.steps = sorted(set(args.steps))
    zero_snr_schedule()  # silences stock before its classes are read
    groups = Groups(*candidates(args.candidates))
    report: dict[str, Any] = {
        "seed": args.seed,
        "diffusers": diffusers.__version__,
        "guidance_rescale": args.guidance_rescale,
    }
    figures = measure(args, groups, report)
    report["ratios"] = compare(figures, groups, args.guidance_scales, args.steps)
    summarize(report["ratios"])
    save(args.output_dir, report)
    drawn = [DEFAULT.label, *(s.label for s in USUAL.values()), "best stock", "best rival"]
    curves = {
        f"{scale:g}": {name: [v[0] for v in report[f"{scale:g}"]["errors"][name].values()] for name in drawn}
        for scale in args.guidance_scales
    }
    plot_guided(args.output_dir / "guided.png", curves, args.steps)
    print(f"\n{time.perf_counter() - start:.0f} s; report.json and guided.png are in {args.output_dir}/")


if __name__ == "__main__":
    main()
