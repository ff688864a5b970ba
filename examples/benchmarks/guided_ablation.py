"""What each part of the multistep sampler does under classifier-free guidance: its error without that part.

    python examples/benchmarks/guided_ablation.py
    python examples/benchmarks/guided_ablation.py --seed 1 --guidance_scales 5 12 --steps 4 6 15

The denoisers are those of `guided_accuracy.py`, exact for their data.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from accuracy_bench import Bench
from accuracy_study import constants
from accuracy_tables import show
from samplers import DEFAULT, Sampler, multistep_options, zero_snr_schedule
from suites import guided_suite
from tqdm import tqdm

from zsnr_diffusers import ZeroSNRMultistepScheduler

DESCRIPTION = "Measure the multistep sampler under classifier-free guidance without each of its parts in turn."


class Unguarded(ZeroSNRMultistepScheduler):
    """High order throughout."""

    def _make_safeguards(self, *args: Any) -> list[Any]:
        return []


def multistep_sampler(*options: Any, cls: type = ZeroSNRMultistepScheduler) -> Sampler:
    """Spacing, order and perhaps corrector."""
    return Sampler(cls, multistep_options(*options))


VARIANTS: dict[str, tuple[dict[str, Any], Sampler]] = {
    "as it is": ({}, DEFAULT),
    "no safeguard": ({}, multistep_sampler("kappa", cls=Unguarded)),
    "long steps trusted": ({"LONGEST": 1e9}, DEFAULT),
    "order 3 not reduced to 2": ({"middle_order_share": torch.zeros_like}, DEFAULT),
    "swings not averaged": ({"previous_output_share": torch.zeros_like}, DEFAULT),
    "no fit to a spectrum": ({"FEW_STEPS": 0}, DEFAULT),
    "few steps over all scales": ({"FEW_STEPS_SCALES": {}}, DEFAULT),
    "no corrector": ({}, multistep_sampler("kappa", None, False)),
    "trailing steps": ({}, multistep_sampler("trailing")),
    "order 1": ({}, multistep_sampler("kappa", 1)),
    "order 2": ({}, multistep_sampler("kappa", 2)),
    "order 3": ({"THIRD_ORDER_STEPS": 1}, DEFAULT),
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.ArgumentDefaultsHelpFormatter, epilog=__doc__
    )
    parser.add_argument("--seed", type=int, default=0, help="of the data and the noise")
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0, 3.0, 7.5], metavar="W")
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 4, 5, 6, 8, 10, 20], metavar="N")
    parser.add_argument("--samples", type=int, default=16, help="of each case")
    return parser.parse_args(arguments)


def errors(bench: Bench, name: str, steps: Sequence[int]) -> list[float]:
    """Of one variant, over all cases."""
    values, sampler = VARIANTS[name]
    with constants(**values):
        return [bench.figures(bench.errors(sampler, n))[0] for n in steps]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each guidance scale."""
    args, schedule = parse(arguments), zero_snr_schedule()
    for scale in args.guidance_scales:
        suite = guided_suite(schedule, args.seed, args.samples, scale)
        bench = Bench(suite, 500)
        names = tqdm(VARIANTS, desc=f"guidance {scale:g}", leave=False, disable=None)
        rows = [[name, *(f"{error:.3g}" for error in errors(bench, name, args.steps))] for name in names]
        show(f"Guidance {scale:g}: error over all cases", ["", *(f"n = {n}" for n in args.steps)], rows)


if __name__ == "__main__":
    main()
