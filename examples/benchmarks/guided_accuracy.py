"""How far samplers end from the exact ODE under classifier-free guidance, ours and stock's, at zero terminal SNR.

    python examples/benchmarks/guided_accuracy.py
    python examples/benchmarks/guided_accuracy.py --seed 1 --guidance_scales 5 12 --steps 4 6 15

Unconditional and conditional network are exact for their data (`suites.py`): Gaussians of 64 scales, and mixtures of
which the condition keeps some of the modes. What is integrated is what a pipeline does, x_0 = u + w (c - u). Stock is
every diffusers scheduler that has `rescale_betas_zero_snr`, in every spacing, order and solver type that it offers.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
from sampler_accuracy import Bench, show
from samplers import DEFAULT, USUAL, Sampler, multistep_options, stock_samplers, zero_snr_schedule
from suites import guided_suite
from tqdm import tqdm

from zsnr_diffusers import ZeroSNRMultistepScheduler

OTHERS = [
    Sampler(ZeroSNRMultistepScheduler, multistep_options(*options))
    for options in (("kappa", 3), ("kappa", 1), ("trailing", 2))
]


def compare(bench: Bench, steps: Sequence[int], title: str) -> dict[str, Any]:
    """Ours, the usual of stock, and the best stock configuration at each number of steps."""
    stock = stock_samplers(stochastic=False)
    jobs = [(sampler, n) for n in steps for sampler in (DEFAULT, *OTHERS, *USUAL.values(), *stock)]
    figures = {
        (sampler.label, n): bench.figures(bench.errors(sampler, n))
        for sampler, n in tqdm(jobs, desc=title, leave=False, disable=None)
    }
    best = {n: min((s.label for s in stock), key=lambda label: figures[label, n][0]) for n in steps}
    rows = {s.label: [figures[s.label, n] for n in steps] for s in (DEFAULT, *OTHERS, *USUAL.values())}
    rows["best stock"] = [figures[best[n], n] for n in steps]
    cells = ([name, *("{:.3g} ({:.3g}, {:.3g})".format(*row) for row in values)] for name, values in rows.items())
    show(f"{title}: error over all cases (Gaussians, mixtures)", ["", *(f"n = {n}" for n in steps)], cells)
    return {
        "errors": {name: dict(zip(steps, row, strict=True)) for name, row in rows.items()},
        "best stock": best,
        "ratio": {n: figures[DEFAULT.label, n][0] / figures[best[n], n][0] for n in steps},
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Measure samplers against the exact ODE under classifier-free guidance.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="The error of a case is the RMS difference to the exact guided ODE from the same noise, per dimension "
        "in units of the conditional data's standard deviation there; a figure is the geometric mean over cases, "
        "Gaussians and mixtures half and half. Everything is also in OUTPUT_DIR/report.json.",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the data and the noise")
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0, 3.0, 7.5], metavar="W")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10, 20], metavar="N")
    parser.add_argument("--samples", type=int, default=32, help="of each case")
    parser.add_argument("--output_dir", type=Path, default=Path("guided_accuracy"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each guidance scale, and ours over the best of stock for all of them."""
    args, start = parse(arguments), time.perf_counter()
    schedule = zero_snr_schedule()
    report: dict[str, Any] = {"seed": args.seed, "diffusers": diffusers.__version__}
    for scale in args.guidance_scales:
        suite = guided_suite(schedule, args.seed, args.samples, scale)
        exact = suite.endpoints(1000)
        certainty = float(suite.errors(suite.join(suite.endpoints(500)), exact).max())
        title = f"Guidance {scale:g}, exact to {certainty:.1g}"
        report[f"{scale:g}"] = compare(Bench(suite, exact), args.steps, title)
    show(
        f"{DEFAULT.label} over the best stock configuration, chosen for each cell (below 1: closer)",
        ["guidance", *(f"n = {n}" for n in args.steps)],
        [[f"{scale:g}", *report[f"{scale:g}"]["ratio"].values()] for scale in args.guidance_scales],
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{time.perf_counter() - start:.0f} s; report.json is in {args.output_dir}/")


if __name__ == "__main__":
    main()
