"""How far a trained pipeline's images are, at few steps, from its own at very many.

    python examples/quickstart.py                              # makes quickstart/retrained
    python examples/benchmarks/trained_network.py
    python examples/digits.py                                  # makes digits/zero-snr
    python examples/benchmarks/trained_network.py --pipeline digits/zero-snr --guidance_scale 3

The pipeline makes images of texts, or of classes (`ClassConditionalPipeline`), each class as often as the others.
Every sampler starts from the same noise, and none clips. The reference is the same pipeline at 500 steps of DDIM's
equation, solved to order 3 on trailing steps; 500 of DDIM's own stand beside it, to show how far references differ.
Printed is the RMS difference of latents (of pixels, for classes) over their standard deviation, as a geometric mean
over the images, and the RMS difference of the images' mean latents, which is their brightness. A geometric mean,
because under guidance some images start between two outcomes; which of them a sampler ends in at few steps is
chance, and such images would decide a mean.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from rivals import GradientEstimationScheduler, IPNDMScheduler, LMSScheduler, UniPCBH2Scheduler
from torch import Tensor
from tqdm.auto import tqdm

from zsnr_diffusers import ClassConditionalPipeline, ZeroSNRDDIMScheduler, ZeroSNRMultistepScheduler, load_pipeline

PROMPTS = [f"a {word} landscape" for word in ("black", "dark", "dim", "grey", "bright", "white")]
STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {"set_alpha_to_one": True}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M, Lu spacing": ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    "DPM++ 2M, Karras spacing": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "UniPC, exponential spacing": ("UniPCMultistepScheduler", {"use_exponential_sigmas": True}),
}
RIVALS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LMS, beta": (LMSScheduler, {}),
    "iPNDM, beta": (IPNDMScheduler, {}),
    "iPNDM, exponential": (IPNDMScheduler, {"timestep_spacing": "exponential"}),
    "gradient estimation, beta": (GradientEstimationScheduler, {"lower_order_final": True}),
    "UniPC bh2, beta": (UniPCBH2Scheduler, {"solver_order": 3}),
}
UNCLIPPED = {"clip_sample": False, "thresholding": False}


def samplers(config: Any, calibrated: str | None) -> dict[str, Callable[[], Any]]:
    """Makers of each scheduler, for the model that the config is of; `calibrated` is a folder of `zsnr calibrate`."""
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    stock = {
        name: lambda cls=cls, extra=extra: getattr(diffusers, cls).from_config(config, **zero, **extra)
        for name, (cls, extra) in STOCK.items()
    }
    rivals = {
        name: lambda cls=cls, extra=extra: cls.from_config(config, **{"timestep_spacing": "beta", **extra})
        for name, (cls, extra) in RIVALS.items()
    }
    ours = {
        "ZeroSNRMultistepScheduler": lambda: ZeroSNRMultistepScheduler.from_config(config),
        "the same, order 3": lambda: ZeroSNRMultistepScheduler.from_config(config, solver_order=3),
        "the same, trailing": lambda: ZeroSNRMultistepScheduler.from_config(config, timestep_spacing="trailing"),
    }
    if calibrated is not None:
        ours["the same, calibrated"] = lambda: ZeroSNRMultistepScheduler.from_pretrained(calibrated)
    return stock | rivals | ours


class FewStepImages:
    """What a pipeline makes of the same noise by different samplers."""

    def __init__(self, pipe: Any, prompts: Sequence[str] | None, per_condition: int, guidance_scale: float) -> None:
        """Choose the conditions, `prompts` or all classes, and draw the noise."""
        self.pipe, self.guidance_scale = pipe, guidance_scale
        conditions: Sequence[Any] = prompts or PROMPTS
        if isinstance(pipe, ClassConditionalPipeline):
            conditions = range(pipe.unet.config.num_class_embeds - 1)  # the last is no class
        self.conditions = [condition for condition in conditions for _ in range(per_condition)]
        size = pipe.unet.config.sample_size
        shape = (len(self.conditions), pipe.unet.config.in_channels, size, size)
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(pipe.device)
        self.config = {**pipe.scheduler.config, **UNCLIPPED}

    def __call__(self, scheduler: Any, steps: int) -> Tensor:
        """Latents, or pixels of a model of pixels, shape [images, C, H, W], on the CPU."""
        self.pipe.scheduler = scheduler
        call = {"num_inference_steps": steps, "guidance_scale": self.guidance_scale, "output_type": "latent"}
        images: Tensor = self.pipe(self.conditions, latents=self.noise.clone(), **call).images
        return images.float().cpu()


def errors(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """RMS difference over the standard deviation, geometric mean over images [B, C, H, W]; and of brightness."""
    off = (found - exact).square().mean((1, 2, 3)).sqrt() / exact.std()
    brightness = (found - exact).mean((2, 3)).square().mean().sqrt() / exact.mean((2, 3)).std()
    return float(off.log().mean().exp()), float(brightness)


def measure(
    sampled: FewStepImages, steps: Sequence[int], calibrated: str | None = None, many: int = 500
) -> dict[str, list[Any]]:
    """Rows of `errors` at each number of steps, or of the name of what was raised; the reference takes `many`."""
    makers = samplers(sampled.config, calibrated)
    with tqdm(total=2 + len(makers) * len(steps), desc="sampling") as bar:
        exact = sampled(
            ZeroSNRMultistepScheduler.from_config(sampled.config, timestep_spacing="trailing", solver_order=3), many
        )
        bar.update()

        def cell(make: Callable[[], Any], n: int) -> Any:
            try:
                return errors(sampled(make(), n), exact)
            except (IndexError, ValueError, RuntimeError) as problem:  # stock's own, at some spacings and step counts
                return type(problem).__name__
            finally:
                bar.update()

        table = {f"DDIM, {many} steps": [cell(lambda: ZeroSNRDDIMScheduler.from_config(sampled.config), many)]}
        table |= {name: [cell(make, n) for n in steps] for name, make in makers.items()}
    return table


def show(table: dict[str, list[Any]], title: str, steps: Sequence[int]) -> None:
    """Print the rows."""
    print(f"\n{title}: error, of brightness")
    print(f"{'':28}" + "".join(f"{f'{n} steps':>17}" for n in steps))
    for name, cells in table.items():
        texts = (f"{cell:>17}" if isinstance(cell, str) else f"{cell[0]:9.4f}{cell[1]:8.4f}" for cell in cells)
        print(f"{name:28}" + "".join(texts))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description="Few steps against many, ours and others'.", epilog=__doc__)
    parser.add_argument("--pipeline", default="quickstart/retrained", help="folder or Hub id (default: %(default)s)")
    parser.add_argument("--prompts", nargs="+", help="default: the quickstart's six captions, or all classes")
    parser.add_argument("--seeds", type=int, default=4, help="images per prompt or class (default: 4)")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--reference_steps", type=int, default=500, help="of the reference (default: 500)")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="default: 1, no guidance")
    parser.add_argument("--calibrated", metavar="FOLDER", help="a scheduler of zsnr calibrate, as a row of its own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    if args.pipeline == parser.get_default("pipeline") and not Path(args.pipeline).is_dir():
        parser.error("there is no quickstart/retrained yet: run python examples/quickstart.py, or pass --pipeline.")
    pipe = load_pipeline(args.pipeline, guidance_rescale=0.0).to(args.device)
    if isinstance(pipe, ClassConditionalPipeline) and args.prompts:
        parser.error("this pipeline makes images of classes: leave --prompts out.")
    pipe.set_progress_bar_config(disable=True)
    sampled = FewStepImages(pipe, args.prompts, args.seeds, args.guidance_scale)
    table = measure(sampled, args.steps, args.calibrated, args.reference_steps)
    title = f"{args.pipeline}, guidance {args.guidance_scale:g}, {len(sampled.conditions)} images"
    show(table, title, args.steps)


if __name__ == "__main__":
    main()
