"""What guidance rescale costs on top of a pipeline's own guidance, ours and stock's side by side.

    python examples/benchmarks/guidance_cost.py
    python examples/benchmarks/guidance_cost.py --device cuda --dtype float16

A real StableDiffusionPipeline runs with a network that returns the same tensor at once, so that what is left is the
pipeline's loop, its guidance and the scheduler. Every row runs in turn in each round, so that a drift of the machine's
speed meets all alike. Printed are medians over the rounds: microseconds per step over the row without rescale in the
same round, and their ratio to stock's rescale.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from diffusers import StableDiffusionPipeline
from small_stable_diffusion import build_stable_diffusion

from zsnr_diffusers import ZeroSNRDDIMScheduler, enable_guidance_rescale

Row = Callable[[], float]


def build(device: str, dtype: torch.dtype, batch: int) -> StableDiffusionPipeline:
    """Stable Diffusion whose network costs nothing, for latents of 64 x 64."""
    pipe = build_stable_diffusion(image_size=128)
    pipe.scheduler = ZeroSNRDDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    output = torch.randn(2 * batch, 4, 64, 64, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    pipe.unet.forward = lambda *args, **kwargs: (output,)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, dtype)


def row(pipe: StableDiffusionPipeline, batch: int, steps: int, **arguments: Any) -> Row:
    """Seconds per step of one call."""
    embeds = torch.zeros(batch, 16, pipe.unet.config.cross_attention_dim, device=pipe.device, dtype=pipe.dtype)
    latents = torch.zeros(batch, 4, 64, 64, device=pipe.device, dtype=pipe.dtype)

    def run() -> float:
        start = time.perf_counter()
        pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=embeds,
            latents=latents.clone(),
            num_inference_steps=steps,
            guidance_scale=7.5,
            output_type="latent",
            **arguments,
        )
        if pipe.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    return run


def main() -> None:
    """Print a table per batch size."""
    parser = argparse.ArgumentParser(description="Cost of guidance rescale.", epilog=__doc__)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--steps", type=int, default=50, help="steps of a call (default: 50)")
    parser.add_argument("--rounds", type=int, default=40, help="calls of each row (default: 40)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for batch in args.batch_sizes:
        stock, ours, in_v = (build(args.device, getattr(torch, args.dtype), batch) for _ in range(3))
        enable_guidance_rescale(ours, 0.7)
        enable_guidance_rescale(in_v, 0.7, space="x_0")
        rows = {
            "stock, guidance alone": row(stock, batch, args.steps),
            "stock, guidance_rescale=0.7": row(stock, batch, args.steps, guidance_rescale=0.7),
            "ours, guidance_rescale=0.7": row(ours, batch, args.steps),
            "ours, in the space of x_0": row(in_v, batch, args.steps),
        }
        over: dict[str, list[float]] = {name: [] for name in rows}
        base: list[float] = []
        for round_ in range(args.rounds + 2):
            seconds = [run() for run in rows.values()]
            if round_ >= 2:  # the first two fill caches
                base.append(seconds[0])
                for name, value in zip(rows, seconds, strict=True):
                    over[name].append(value - seconds[0])
        stock_cost = statistics.median(over["stock, guidance_rescale=0.7"])
        print(f"\n{batch}x4x64x64, {args.dtype} on {args.device}, {args.threads} thread(s), {args.steps} steps")
        print(f"{'':32}{'us per step':>14}{'of stock rescale':>18}")
        for name, values in over.items():
            middle = statistics.median(values)
            if name == "stock, guidance alone":
                print(f"{name:32}{statistics.median(base) * 1e6:14.1f}")
            else:
                print(f"{name:32}{'+':>6}{middle * 1e6:8.1f}{middle / stock_cost:17.2f}x")


if __name__ == "__main__":
    main()
