"""How far a trained pipeline's pictures are, at few steps, from its own at very many.

    python examples/quickstart.py                              # makes quickstart/retrained
    python examples/benchmarks/trained_network.py

Every sampler starts from the same noise. The reference is the same pipeline at 500 steps of DDIM's equation, solved to
order 3 on trailing steps; DDIM's own 500 steps stand beside it, to show how far references differ. Printed is the RMS
difference of latents over their standard deviation, as a geometric mean over the pictures, and the RMS difference of
the pictures' mean latents, which is their brightness. A geometric mean, because under guidance some pictures start
between two outcomes; which of them a sampler ends in at few steps is chance, and such pictures would decide a mean.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from zsnr_diffusers import ZeroSNRDDIMScheduler, ZeroSNRMultistepScheduler

PROMPTS = [f"a {word} landscape" for word in ("black", "dark", "dim", "grey", "bright", "white")]
STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M, Lu spacing": ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    "DPM++ 2M, Karras spacing": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "UniPC, exponential spacing": ("UniPCMultistepScheduler", {"use_exponential_sigmas": True}),
}


def samplers(config: Any, calibrated: str | None) -> dict[str, Callable[[], Any]]:
    """Makers of each scheduler, for the model that the config is of; `calibrated` is a folder of `zsnr calibrate`."""
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    stock = {
        name: lambda cls=cls, extra=extra: getattr(diffusers, cls).from_config(config, **zero, **extra)
        for name, (cls, extra) in STOCK.items()
    }
    ours = {
        "ZeroSNRMultistepScheduler": lambda: ZeroSNRMultistepScheduler.from_config(config),
        "the same, order 3": lambda: ZeroSNRMultistepScheduler.from_config(config, solver_order=3),
        "the same, trailing": lambda: ZeroSNRMultistepScheduler.from_config(config, timestep_spacing="trailing"),
    }
    if calibrated is not None:
        ours["the same, calibrated"] = lambda: ZeroSNRMultistepScheduler.from_pretrained(calibrated)
    return stock | ours


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description="Few steps against many, ours and stock.", epilog=__doc__)
    parser.add_argument("--pipeline", default="quickstart/retrained", help="folder or Hub id (default: %(default)s)")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, help="default: the quickstart's six captions")
    parser.add_argument("--seeds", type=int, default=4, help="pictures per prompt (default: 4)")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="default: 1, no guidance")
    parser.add_argument("--calibrated", metavar="FOLDER", help="a scheduler of zsnr calibrate, as a row of its own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.pipeline == parser.get_default("pipeline") and not Path(args.pipeline).is_dir():
        parser.error("there is no quickstart/retrained yet: run python examples/quickstart.py, or pass --pipeline.")

    pipe = DiffusionPipeline.from_pretrained(args.pipeline).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config
    prompts = [prompt for prompt in args.prompts for _ in range(args.seeds)]
    size = pipe.unet.config.sample_size
    shape = (len(prompts), pipe.unet.config.in_channels, size, size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(args.device)

    def latents(scheduler: Any, steps: int) -> torch.Tensor:
        pipe.scheduler = scheduler
        call = {"num_inference_steps": steps, "guidance_scale": args.guidance_scale, "output_type": "latent"}
        result: torch.Tensor = pipe(prompts, latents=noise.clone(), **call).images
        return result.float().cpu()

    rows = samplers(config, args.calibrated)
    with tqdm(total=2 + len(rows) * len(args.steps), desc="sampling") as bar:
        exact = latents(
            ZeroSNRMultistepScheduler.from_config(config, timestep_spacing="trailing", solver_order=3), 500
        )
        bar.update()

        def errors(scheduler: Any, steps: int) -> str:
            try:
                x = latents(scheduler, steps)
            except (IndexError, ValueError, RuntimeError) as problem:  # stock's own, at some spacings and step counts
                return f"{type(problem).__name__:>17}"
            finally:
                bar.update()
            off = (x - exact).square().mean((1, 2, 3)).sqrt() / exact.std()
            brightness = (x - exact).mean((2, 3)).square().mean().sqrt() / exact.mean((2, 3)).std()
            return f"{off.log().mean().exp():9.4f}{brightness:8.4f}"

        table = {"DDIM, 500 steps": errors(ZeroSNRDDIMScheduler.from_config(config), 500)}
        for name, make in rows.items():
            table[name] = "".join(errors(make(), steps) for steps in args.steps)
    print(f"\n{args.pipeline}, guidance {args.guidance_scale:g}, {len(prompts)} pictures: error, of brightness")
    print(f"{'':28}" + "".join(f"{f'{steps} steps':>17}" for steps in args.steps))
    for name, cells in table.items():
        print(f"{name:28}{cells}")


if __name__ == "__main__":
    main()
