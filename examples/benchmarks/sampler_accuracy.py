"""How far samplers end from the exact probability-flow ODE, ours and stock's, at zero terminal SNR.

    python examples/benchmarks/sampler_accuracy.py
    python examples/benchmarks/sampler_accuracy.py --seed 1 --study --all
    python examples/benchmarks/sampler_accuracy.py --flow
    python examples/benchmarks/sampler_accuracy.py --flow --skrample      # after pip install skrample==0.7.0

The network is replaced by one that is exact for its data (`suites.py`), on Stable Diffusion's schedule with
v-prediction, so every difference is the sampler's. Data are Gaussians from fine detail to brightness, and mixtures of
Gaussians. Stock is every diffusers scheduler that has `rescale_betas_zero_snr`, in every spacing, order and solver
type that it offers. Beside it stand the strongest samplers of other programs (`rivals.py`).
"""

import argparse
import math
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accuracy_sde
import diffusers
import torch
from accuracy_bench import Bench, add_options
from accuracy_comparison import Comparison, compare, report_errors, show_errors, show_ratios
from accuracy_flow import compare_flow
from accuracy_plots import plot_errors, plot_recovered
from accuracy_study import study
from accuracy_tables import save, show, show_failures, triple
from samplers import (
    DEFAULT,
    USUAL,
    Sampler,
    multistep_options,
    sample,
    skrample_flow_samplers,
    zero_snr_schedule,
)
from suites import LARGEST, SMALLEST, Gaussian, Suite, ode_suite
from torch import Tensor
from tqdm import tqdm

from zsnr_diffusers import ZeroSNRDDIMScheduler, ZeroSNRMultistepScheduler

CURVE = (3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 30, 50)
BRIGHTNESS = (4, 10, 20, 50)


def compare_trailing(bench: Bench, steps: Sequence[int], stock: Sequence[Sampler], report: dict[str, Any]) -> None:
    """Everyone on the same steps: the update rule without the spacing's part."""
    ours = [Sampler(ZeroSNRMultistepScheduler, multistep_options("trailing", order)) for order in (None, 2)]
    stock = [
        sampler
        for sampler in stock
        if sampler.options["timestep_spacing"] == "trailing" and not any(k.startswith("use_") for k in sampler.options)
    ]
    header = ["n", "default", "order 2", "best stock", "ratio", "ratio, stock to clean data", f"best of {len(stock)}"]
    rows = []
    for n in tqdm(steps, desc="trailing steps", leave=False, disable=None):
        figures = {sampler.label: bench.figures(bench.errors(sampler, n))[0] for sampler in (*ours, *stock)}
        default, order2 = (figures[sampler.label] for sampler in ours)
        nearest = min((s.label for s in stock), key=lambda label: figures[label])
        clean = min(figures[s.label] for s in stock if s.reaches_clean_data)
        rows.append([n, default, order2, figures[nearest], default / figures[nearest], default / clean, nearest])
    show("Trailing steps only: ZeroSNRMultistep with corrector, and stock", header, rows)
    report["trailing"] = [dict(zip([*header[:6], "label"], row, strict=True)) for row in rows]


def compare_curves(bench: Bench, found: Comparison, report: dict[str, Any]) -> None:
    """Ours, notable stock and the best of others at many step counts."""
    others = [Sampler(ZeroSNRMultistepScheduler, multistep_options(*o)) for o in (("kappa", 2), ("trailing",))]
    rivals = {s.label: s for s in found.winners(found.rivals)}.values()
    samplers = [DEFAULT, *others, *found.notable(found.stock), *rivals]
    errors = bench.all_errors(samplers, CURVE, "curves")
    report["curves"] = {s.label: [bench.figures(errors[s.label, n])[0] for n in CURVE] for s in samplers}


def recovered(alpha_bar: Tensor, steps: Sequence[int], report: dict[str, Any]) -> None:
    """Recovered over true standard deviation of Gaussian modes, by scale; the largest scale is brightness."""
    scales = torch.logspace(math.log10(SMALLEST), math.log10(LARGEST), 57, dtype=torch.float64)
    suite = Suite([Gaussian("", scales)], [torch.ones(1, len(scales), dtype=torch.float64)], alpha_bar)
    trailing: dict[str, Any] = {"timestep_spacing": "trailing"}
    samplers = {
        "ours (kappa)": DEFAULT,
        "ours (trailing)": Sampler(ZeroSNRMultistepScheduler, trailing),
        "our DDIM": Sampler(ZeroSNRDDIMScheduler, trailing),
        **USUAL,
    }
    found = {name: {n: _ratios(sampler, suite, scales, n) for n in steps} for name, sampler in samplers.items()}
    show(
        f"Brightness: recovered over true standard deviation of a mode of scale {LARGEST:g}",
        ["", *(f"n = {n}" for n in steps)],
        [[name, *(values[-1] for values in by_n.values())] for name, by_n in found.items()],
    )
    report["recovered"] = {"scales": scales.tolist(), "ratios": found}


def _ratios(sampler: Sampler, suite: Suite, scales: Tensor, n: int) -> list[float]:
    try:
        return (sample(sampler.prepared(n), suite)[0] / scales).tolist()
    except Exception:
        return [math.nan] * len(scales)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Measure samplers against the exact probability-flow ODE, with denoisers that are exact.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=textwrap.dedent("""\
            The error of a case is the RMS difference between a sampler's result and the exact ODE's from the same
            noise, per dimension in units of the data's standard deviation there. A sampler's figure is the geometric
            mean over cases, Gaussians and mixtures half and half: 0.1 is off by a tenth of the spread. The weights of
            ZeroSNRMultistep are fitted to Gaussians, so mixtures, which they are not, stand beside it.

            Some of stock's configurations stop at the noise level of timestep 0 (final_sigmas_type="sigma_min") and
            may come closer for it, with that noise left in; "stock to clean data" is the best of the others.
            Samplers of other programs start at an alpha_bar of 4.9e-8, as at 0 their variables do not exist.

            Printed in turn: all samplers in all spacings; trailing steps only; how much of a bright or dark image's
            mean is recovered; the SDE, by energy distance. Everything is also in OUTPUT_DIR/report.json; the images
            are error.png (against the step count) and recovered.png (by scale)."""),
    )
    parser.add_argument("--seed", type=int, default=0, help="of the mixtures and the noise; another one is a test of "
                        "what was chosen on this one (default: 0)")  # fmt: skip
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[5, 10, 20], help="of the main table (default: 5 10 20)"
    )
    parser.add_argument("--samples", type=int, default=128, help="per mixture, for the ODE (default: 128)")
    parser.add_argument(
        "--sde_samples", type=int, default=2000, help="per mixture, for the SDE; 0 skips it (default: 2000)"
    )
    add_options(parser)
    parser.add_argument("--all", action="store_true", help="every step count from 3 to 50 on trailing steps, "
                        "instead of a dozen of them; some minutes more")  # fmt: skip
    parser.add_argument("--flow", action="store_true", help="flow matching in place of Stable Diffusion's schedule: "
                        "the main table alone, against stock's flow samplers at shifts 1, 1.5, 3 and 7")  # fmt: skip
    parser.add_argument("--skrample", action="store_true", help="with --flow, the samplers of that library as well, "
                        "which needs Python 3.12")  # fmt: skip
    parser.add_argument("--study", action="store_true", help="vary spacing scales, order, corrector and fit")
    parser.add_argument("--output_dir", type=Path, default=Path("sampler_accuracy"), help="default: sampler_accuracy/")
    args = parser.parse_args(arguments)
    if args.skrample and not args.flow:
        parser.error("--skrample is of flow matching: pass --flow too.")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables and write report and images."""
    args, start = parse(arguments), time.perf_counter()
    schedule = zero_snr_schedule()
    if args.flow:
        found: dict[str, Any] = {"seed": args.seed, "diffusers": diffusers.__version__}
        args.output_dir.mkdir(parents=True, exist_ok=True)
        steps, image = sorted(set(args.steps)), args.output_dir / "flow.png"
        skrample = skrample_flow_samplers() if args.skrample else []
        compare_flow(args.seed, args.samples, args.exact_steps, steps, found, image, skrample)
        save(args.output_dir, found)
        print(f"\n{time.perf_counter() - start:.0f} s; report.json and flow.png are in {args.output_dir}/")
        return
    bench = Bench(ode_suite(schedule, args.seed, args.samples), args.exact_steps)
    print(
        f"Seed {args.seed}, {len(bench.suite.cases)} cases; "
        f"doubling the steps of the exact ODE moves none of them by more than {bench.certainty:.1g}."
    )
    report: dict[str, Any] = {"seed": args.seed, "diffusers": diffusers.__version__, "exact to": bench.certainty}
    found = compare(bench, sorted(set(args.steps)), args.candidates)
    show_errors(found)
    show_ratios(bench, found, report)
    report_errors(bench, found, report)
    others = len(found.stock) + len(found.rivals)
    show_failures(bench.failures, f"in the main table, of {others * len(found.steps)} runs")
    report["failures"] = list(bench.failures)
    compare_trailing(bench, range(3, 51) if args.all else CURVE, found.stock, report)
    compare_curves(bench, found, report)
    recovered(schedule, BRIGHTNESS, report)
    if args.sde_samples:
        accuracy_sde.compare_sde(schedule, args.seed, args.sde_samples, 20, report)
    if args.study:
        study(bench, report)
    save(args.output_dir, report)
    plot_errors(args.output_dir / "error.png", report["curves"], CURVE)
    plot_recovered(args.output_dir / "recovered.png", report["recovered"], 10)
    summarize(report)
    print(f"\n{time.perf_counter() - start:.0f} s; report.json, error.png and recovered.png are in {args.output_dir}/")


def summarize(report: dict[str, Any]) -> None:
    """The findings in words."""
    trailing = {row["n"]: row["ratio"] for row in report["trailing"]}
    above = sum(ratio > 1 for ratio in trailing.values())
    print("\nSummary: errors over those of others, of all cases (Gaussians, mixtures)\n" + "-" * 70)
    for name, by_n in report["ratios"].items():
        print(f"{DEFAULT.label} over {name}: " + ", ".join(f"{triple(r, '.2f')} at n = {n}" for n, r in by_n.items()))
    low, high = min(trailing.values()), max(trailing.values())
    print(f"On trailing steps over best stock: {low:.2f} to {high:.2f}; above 1 at {above} of {len(trailing)} n")
    if "sde" in report:
        print(accuracy_sde.summary(report))


if __name__ == "__main__":
    main()
