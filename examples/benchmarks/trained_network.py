r"""How far a trained pipeline's images are, at few steps, from its own at very many.

    python examples/quickstart.py                              # makes quickstart/retrained
    python examples/benchmarks/trained_network.py
    python examples/digits.py                                  # makes digits/zero-snr
    python examples/benchmarks/trained_network.py --pipeline digits/zero-snr --guidance_scale 3
    python examples/detailed_landscapes.py                     # makes detailed/trained
    python examples/benchmarks/trained_network.py --pipeline detailed/trained --prompts_file detailed/prompts.txt \
        --num_prompts 24 --seeds 1 --guidance_scale 3

The quickstart's model as a flow-matching one, trained on as the quickstart trains:

    python -m zsnr_diffusers.training --pretrained_model_name_or_path quickstart/retrained \
        --train_data_dir quickstart/landscapes --output_dir quickstart/flow --prediction_type flow_prediction \
        --max_train_steps 900 --train_batch_size 16 --learning_rate 1e-3 --lr_warmup_steps 50 --ema_decay 0.999 \
        --luminance_images 0
    python examples/benchmarks/trained_network.py --pipeline quickstart/flow --steps 4 6 10 20

The pipeline makes images of texts, or of classes (`ClassConditionalPipeline`), each class as often as the others.
Every sampler starts from the same noise, and none clips. The reference is the same pipeline at 500 steps of DDIM's
equation, solved to order 3 on trailing steps; 500 of DDIM's own, or of Euler's under flow matching, stand beside it,
to show how far references differ. Heun's method calls the network twice in all steps but the last: it takes as many
steps as make n calls, or n + 1 where n is even.
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
from rivals import (
    FlowGradientEstimationScheduler,
    FlowIPNDMScheduler,
    FlowLMSScheduler,
    FlowUniPCBH2Scheduler,
    GradientEstimationScheduler,
    IPNDMScheduler,
    LMSScheduler,
    UniPCBH2Scheduler,
)
from torch import Tensor
from tqdm.auto import tqdm

from zsnr_diffusers import (
    ClassConditionalPipeline,
    FlowMatchEulerScheduler,
    FlowMatchMultistepScheduler,
    ZeroSNRDDIMScheduler,
    ZeroSNRMultistepScheduler,
    load_pipeline,
)
from zsnr_diffusers.cli.generation import read_prompts
from zsnr_diffusers.evaluation.scheduler_comparison import relative_rms
from zsnr_diffusers.schedulers.by_name import in_any_pipeline, reference_scheduler
from zsnr_diffusers.schedulers.config import is_flow

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
FLOW_STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "Euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "Euler, shift 3": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "Euler, beta spacing": ("FlowMatchEulerDiscreteScheduler", {"use_beta_sigmas": True}),
    "Heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M, shift 3": ("DPMSolverMultistepScheduler", {"shift": 3.0}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "UniPC, shift 3": ("UniPCMultistepScheduler", {"shift": 3.0}),
    "UniPC, shift 7": ("UniPCMultistepScheduler", {"shift": 7.0}),
    "UniPC, order 3, shift 1.5": ("UniPCMultistepScheduler", {"shift": 1.5, "solver_order": 3}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "DEIS, shift 3": ("DEISMultistepScheduler", {"shift": 3.0}),
}
"""At the model's own shift unless another is given; UniPC of order 3 is the nearest of stock's to exact denoisers."""
FLOW_RIVALS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LMS, beta": (FlowLMSScheduler, {}),
    "iPNDM, beta": (FlowIPNDMScheduler, {}),
    "gradient estimation, beta": (FlowGradientEstimationScheduler, {"lower_order_final": True}),
    "UniPC bh2, beta": (FlowUniPCBH2Scheduler, {"solver_order": 3}),
    "iPNDM, beta, shift 3": (FlowIPNDMScheduler, {"shift": 3.0}),
    "UniPC bh2, beta, shift 3": (FlowUniPCBH2Scheduler, {"shift": 3.0, "solver_order": 2}),
}
"""At shift 1, as the beta grid has most flow times near both ends already, and at 3, which helps under guidance."""
UNCLIPPED = {"clip_sample": False, "thresholding": False}
Makers = dict[str, Callable[[], Any]]


def samplers(config: Any, calibrated: str | None) -> Makers:
    """Makers of each scheduler, for the model that the config is of; `calibrated` is a folder of `zsnr calibrate`."""
    return flow_samplers(config) if is_flow(config) else beta_samplers(config, calibrated)


def flow_samplers(config: Any) -> Makers:
    """Those of a flow-matching model."""
    facts = FlowMatchMultistepScheduler.from_config(config).config
    steps, shift = {"num_train_timesteps": facts["num_train_timesteps"]}, facts["shift"]

    def stock(name: str, shift: float = shift, **extra: Any) -> Any:
        if name.startswith("FlowMatch"):
            return getattr(diffusers, name)(**steps, shift=shift, **extra)
        model = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
        return getattr(diffusers, name)(**steps, **model, **extra)

    def ours(**extra: Any) -> Callable[[], Any]:
        return lambda: FlowMatchMultistepScheduler.from_config(config, **extra)

    return {
        **{name: lambda cls=cls, extra=extra: stock(cls, **extra) for name, (cls, extra) in FLOW_STOCK.items()},
        **{name: lambda cls=cls, extra=extra: cls(**steps, **extra) for name, (cls, extra) in FLOW_RIVALS.items()},
        "FlowMatchMultistepScheduler": ours(),
        "the same, order 2": ours(solver_order=2),
        "the same, trailing": ours(timestep_spacing="trailing"),
    }


def beta_samplers(config: Any, calibrated: str | None) -> Makers:
    """Those of a model with betas."""
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
        "the same, order 2": lambda: ZeroSNRMultistepScheduler.from_config(config, solver_order=2),
        "the same, trailing": lambda: ZeroSNRMultistepScheduler.from_config(config, timestep_spacing="trailing"),
    }
    if calibrated is not None:
        ours["the same, calibrated"] = lambda: ZeroSNRMultistepScheduler.from_pretrained(calibrated)
    return stock | rivals | ours


def references(config: Any) -> tuple[Any, str, Any]:
    """For very many steps: the scheduler of the reference, and one of order 1 with its name."""
    if is_flow(config):
        first_order = FlowMatchEulerScheduler.from_config(config, timestep_spacing="trailing")
        return reference_scheduler(config), "Euler", first_order
    zero = {"rescale_betas_zero_snr": True}
    return reference_scheduler({**config, **zero}), "DDIM", ZeroSNRDDIMScheduler.from_config(config)


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
        self.config = {**pipe.scheduler.config, **({} if is_flow(pipe.scheduler.config) else UNCLIPPED)}

    def __call__(self, scheduler: Any, steps: int) -> Tensor:
        """Latents, or pixels of a pixel-space model, shape [images, C, H, W], on the CPU."""
        self.pipe.scheduler = in_any_pipeline(scheduler)
        steps = steps // 2 + 1 if "Heun" in type(scheduler).__name__ else steps
        call = {"num_inference_steps": steps, "guidance_scale": self.guidance_scale, "output_type": "latent"}
        images: Tensor = self.pipe(self.conditions, latents=self.noise.clone(), **call).images
        return images.float().cpu()


def errors(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """RMS difference over the standard deviation, geometric mean over images [B, C, H, W]; and of brightness."""
    off = relative_rms(found, exact)
    brightness = (found - exact).mean((2, 3)).square().mean().sqrt() / exact.mean((2, 3)).std()
    return float(off.log().mean().exp()), float(brightness)


def measure(
    sampled: FewStepImages, steps: Sequence[int], calibrated: str | None = None, many: int = 500
) -> dict[str, list[Any]]:
    """Rows of `errors` at each step count, or of the name of what was raised; the reference takes `many`."""
    makers = samplers(sampled.config, calibrated)
    with tqdm(total=2 + len(makers) * len(steps), desc="sampling") as bar:
        reference, simplest, first_order = references(sampled.config)
        exact = sampled(reference, many)
        bar.update()

        def cell(make: Callable[[], Any], n: int) -> Any:
            try:
                return errors(sampled(make(), n), exact)
            except (AssertionError, IndexError, ValueError, RuntimeError) as problem:  # stock's own
                return type(problem).__name__
            finally:
                bar.update()

        table = {f"{simplest}, {many} steps": [cell(lambda: first_order, many)]}
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
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--prompts", nargs="+", help="default: the quickstart's six captions, or all classes")
    chosen.add_argument("--prompts_file", help="one prompt per line")
    parser.add_argument("--num_prompts", type=int, metavar="N", help="only the first N prompts (default: all)")
    parser.add_argument("--seeds", type=int, default=4, help="images per prompt or class (default: 4)")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--reference_steps", type=int, default=500, help="of the reference (default: 500)")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="default: 1, no guidance")
    parser.add_argument("--calibrated", metavar="FOLDER", help="a scheduler of zsnr calibrate, as a row of its own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    if args.pipeline == parser.get_default("pipeline") and not Path(args.pipeline).is_dir():
        parser.error("there is no quickstart/retrained yet: run python examples/quickstart.py, or pass --pipeline.")
    if args.num_prompts is not None and args.num_prompts < 1:
        parser.error(f"--num_prompts {args.num_prompts} must be at least 1.")
    try:
        prompts = read_prompts(args)
    except (OSError, ValueError) as problem:
        parser.error(str(problem))
    pipe = load_pipeline(args.pipeline, guidance_rescale=0.0, keep_low_frequencies=0).to(args.device)
    if isinstance(pipe, ClassConditionalPipeline) and (prompts or args.num_prompts):
        parser.error("this pipeline makes images of classes: leave --prompts, --prompts_file and --num_prompts out.")
    if is_flow(pipe.scheduler.config) and args.calibrated:
        parser.error("this pipeline is of a flow-matching model: leave --calibrated out.")
    pipe.set_progress_bar_config(disable=True)
    sampled = FewStepImages(pipe, (prompts or PROMPTS)[: args.num_prompts], args.seeds, args.guidance_scale)
    table = measure(sampled, args.steps, args.calibrated, args.reference_steps)
    title = f"{args.pipeline}, guidance {args.guidance_scale:g}, {len(sampled.conditions)} images"
    show(table, title, args.steps)


if __name__ == "__main__":
    main()
