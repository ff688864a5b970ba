"""What one scheduler step costs, ours and stock's side by side.

    python examples/benchmarks/step_cost.py
    python examples/benchmarks/step_cost.py --device cuda --batch_sizes 1 8 --compile

The floor is one linear combination of two tensors, a x + b v, in two operations. Every row is measured in turn in each
round, so that a drift of the machine's speed meets all alike; printed are medians over the rounds, and their ratio to
the floor's. Fresh noise, where a sampler draws it, is part of its step.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import diffusers
import torch

import zsnr_diffusers

MODEL = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "v_prediction"}
STOCK = {**MODEL, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
ROWS: dict[str, Callable[[], Any]] = {
    "ZeroSNRDDIM": lambda: zsnr_diffusers.ZeroSNRDDIMScheduler(**MODEL),
    "DDIM": lambda: diffusers.DDIMScheduler(clip_sample=False, **STOCK),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(**STOCK),
    "ZeroSNRMultistep, order 1": lambda: zsnr_diffusers.ZeroSNRMultistepScheduler(
        solver_order=1, corrector=False, **MODEL
    ),
    "ZeroSNRMultistep, order 2, corrector": lambda: zsnr_diffusers.ZeroSNRMultistepScheduler(solver_order=2, **MODEL),
    "ZeroSNRMultistep, order 3, corrector": lambda: zsnr_diffusers.ZeroSNRMultistepScheduler(**MODEL),
    "DPM++ 2M": lambda: diffusers.DPMSolverMultistepScheduler(**STOCK),
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(**STOCK),
    "ZeroSNRDDPM": lambda: zsnr_diffusers.ZeroSNRDDPMScheduler(**MODEL),
    "DDPM": lambda: diffusers.DDPMScheduler(clip_sample=False, **STOCK),
}


def sampling(
    scheduler: Any, sample: torch.Tensor, output: torch.Tensor, steps: int, compiled: bool
) -> Callable[[], None]:
    """A run of so many steps with one fixed network output, timesteps as a pipeline passes them."""
    step = torch.compile(scheduler.step) if compiled else scheduler.step

    def run() -> None:
        scheduler.set_timesteps(steps, device=sample.device)
        x, timesteps = sample, list(scheduler.timesteps)
        synchronize(sample.device)
        start = time.perf_counter()
        for timestep in timesteps:
            x = step(output, timestep, x, return_dict=False)[0]
        synchronize(sample.device)
        run.seconds = (time.perf_counter() - start) / steps  # type: ignore[attr-defined]

    return run


def floor(sample: torch.Tensor, output: torch.Tensor, steps: int) -> Callable[[], None]:
    """So many times a x + b v."""

    def run() -> None:
        synchronize(sample.device)
        start = time.perf_counter()
        for _ in range(steps):
            torch.add(sample * 0.3, output, alpha=0.2)
        synchronize(sample.device)
        run.seconds = (time.perf_counter() - start) / steps  # type: ignore[attr-defined]

    return run


def synchronize(device: torch.device) -> None:
    """Wait for a GPU, which runs ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Print a table per batch size."""
    parser = argparse.ArgumentParser(description="Cost of one scheduler step.", epilog=__doc__)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=20, help="steps of a run (default: 20)")
    parser.add_argument("--rounds", type=int, default=40, help="runs of each row (default: 40)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="put torch.compile around each step")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for batch in args.batch_sizes:
        shape = (batch, 4, 64, 64)
        sample, output = torch.randn(2, *shape).to(args.device, getattr(torch, args.dtype))
        runs = {"a x + b v": floor(sample, output, args.steps)}
        runs |= {name: sampling(make(), sample, output, args.steps, args.compile) for name, make in ROWS.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for round_ in range(args.rounds + 2):
            for name, run in runs.items():
                run()
                if round_ >= 2:  # the first two fill caches
                    seconds[name].append(run.seconds)  # type: ignore[attr-defined]
        base = statistics.median(seconds["a x + b v"])
        print(f"\n{'x'.join(map(str, shape))}, {args.dtype} on {args.device}, {args.threads} thread(s)")
        print(f"{'':38}{'us per step':>12}{'of the floor':>14}")
        for name, values in seconds.items():
            middle = statistics.median(values)
            print(f"{name:38}{middle * 1e6:12.1f}{middle / base:13.1f}x")


if __name__ == "__main__":
    main()
