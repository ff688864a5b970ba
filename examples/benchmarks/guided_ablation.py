"""What each part of the multistep sampler does under classifier-free guidance: its error without that part.

    python examples/benchmarks/guided_ablation.py
    python examples/benchmarks/guided_ablation.py --seed 1 --guidance_scales 5 12 --steps 4 6 15

The denoisers are those of `guided_accuracy.py`, exact for their data.
"""

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from oracles import guided_suite
from sampler_accuracy import Bench, show
from samplers import DEFAULT, Sampler, multistep_options, zero_snr_schedule
from torch import Tensor
from tqdm import tqdm

from zsnr_diffusers import ZeroSNRMultistepScheduler
from zsnr_diffusers.core import multistep, safeguard

DESCRIPTION = "Measure the multistep sampler under classifier-free guidance without each of its parts in turn."


class Unguarded(ZeroSNRMultistepScheduler):
    """High order throughout."""

    def _guard(self, *args: Any) -> list[Any]:
        return []


def never(held: Tensor) -> Tensor:
    """No delay."""
    return torch.zeros_like(held)


def multistep_sampler(*options: Any, cls: type = ZeroSNRMultistepScheduler) -> Sampler:
    """Spacing, order and perhaps corrector."""
    return Sampler(cls, multistep_options(*options))


VARIANTS: dict[str, tuple[Sampler, AbstractContextManager[Any]]] = {
    "as it is": (DEFAULT, nullcontext()),
    "no safeguard": (multistep_sampler("kappa", 2, cls=Unguarded), nullcontext()),
    "long steps trusted": (DEFAULT, patch.object(safeguard, "LONGEST", 1e9)),
    "swings not averaged": (DEFAULT, patch.object(safeguard, "delayed", never)),
    "no fit to a spectrum": (DEFAULT, patch.object(multistep, "FEW_STEPS", 0)),
    "no corrector": (multistep_sampler("kappa", 2, False), nullcontext()),
    "trailing steps": (multistep_sampler("trailing", 2), nullcontext()),
    "order 1": (multistep_sampler("kappa", 1), nullcontext()),
    "order 3": (multistep_sampler("kappa", 3), nullcontext()),
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
    sampler, change = VARIANTS[name]
    with change:
        return [bench.figures(bench.errors(sampler, n))[0] for n in steps]


def main(arguments: Sequence[str] | None = None) -> dict[float, dict[str, list[float]]]:
    """Print a table for each guidance scale; return the errors."""
    args, schedule = parse(arguments), zero_snr_schedule()
    found: dict[float, dict[str, list[float]]] = {}
    for scale in args.guidance_scales:
        suite = guided_suite(schedule, args.seed, args.samples, scale)
        bench = Bench(suite, suite.endpoints(500))
        names = tqdm(VARIANTS, desc=f"guidance {scale:g}", leave=False, disable=None)
        found[scale] = {name: errors(bench, name, args.steps) for name in names}
        show(
            f"Guidance {scale:g}: error over all cases",
            ["", *(f"n = {n}" for n in args.steps)],
            [[name, *(f"{error:.3g}" for error in row)] for name, row in found[scale].items()],
        )
    return found


if __name__ == "__main__":
    main()
