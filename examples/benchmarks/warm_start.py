"""From epsilon to v: is there a better start than just training on?

    python examples/quickstart.py                              # makes quickstart/flawed
    python examples/benchmarks/warm_start.py

Retraining a model of epsilon begins with weights whose output means something else. Three starts, in the quickstart's
setting, with the trainer's optimizer, average, batches and noise:

- `plain`: v-loss on the weights as they are, what the trainer does.
- `distilled`: over the first steps the target is not v of the noise that was drawn but what the base says of it, its
  epsilon at the timestep of its own schedule with the same signal-to-noise ratio, read as v: an estimate of the same
  posterior mean with less variance. Where alpha is small the base says little (its error of v is 1 / alpha times that
  of epsilon), at and near zero SNR nothing: there the target is the data's.
- `refitted`: the last convolution is set by least squares to the best v that the base's features give, before step 1.

What is not among them is v = (epsilon - sigma x_t) / alpha computed around the network, with training of a difference:
the last convolution of a UNet sees neither x_t, which has passed through normalisation and SiLU by then, nor the
timestep, on which both factors depend, so no weights of a stock network are that start, and what was trained so could
not be shipped as one.

Printed is W1, the distance of the brightness of 96 images to the data's, against steps, and the steps and the CPU
seconds of this process until it stays at or below 0.06; means over seeds. On the quickstart's model (2 seeds, one
thread of an AMD EPYC) neither start pays, so the trainer has no option for them:

    steps            50     75    100    125    150    175    200    250    300    steps and seconds to 0.06
    plain         0.435  0.232  0.090  0.067  0.083  0.067  0.058  0.052  0.031            200       48
    distilled     0.436  0.300  0.111  0.092  0.070  0.057  0.060  0.045  0.037            175       51
    refitted      0.377  0.272  0.108  0.062  0.067  0.078  0.054  0.059  0.047            200       52

Two runs of the trainer itself, plain, differ by 0.04 at 100 steps and 0.03 at 200, which is more than the starts do.
"""

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import numpy as np
import torch
from diffusers import DiffusionPipeline
from landscapes import captions
from matplotlib.figure import Figure
from small_training import minimize
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from zsnr_diffusers import ZeroSNRDDIMScheduler, ZeroSNRMultistepScheduler
from zsnr_diffusers.core import NoiseLevel, add_noise, noise_level, training_target, v_loss, x_0_factors
from zsnr_diffusers.evaluation import generate_images, luminance_coverage, mean_luminance

BATCH, LEARNING_RATE, CAPTION_DROPOUT = 16, 1e-3, 0.1
GOAL = 0.06


def equal_snr_timesteps(base: Tensor, ours: Tensor) -> Tensor:
    """For each timestep of one schedule that of another with the same SNR, fractional; NaN where its SNR ends before.

    Interpolated in the angle whose tangent is sigma / alpha, which is finite at zero SNR.

    Args:
        base: alpha_bar of the schedule that is looked up, shape [T].
        ours: alpha_bar of the other one.
    """
    levels = [noise_level(table.double(), torch.arange(len(table))) for table in (base, ours)]
    angles = [torch.atan2(level.sigma, level.alpha).flatten().numpy() for level in levels]
    places = np.interp(angles[1], angles[0], np.arange(len(base)), right=np.nan)
    return torch.from_numpy(places).float()


def epsilon_as_v(epsilon: Tensor, x_t: Tensor, level: NoiseLevel) -> Tensor:
    """The same prediction as v; alpha above 0."""
    a, b = x_0_factors("epsilon", level)
    return training_target("v_prediction", a * x_t + b * epsilon, epsilon, level)


@dataclass
class Conversion:
    """The flawed pipeline on its way to v, on latents and captions that are encoded once."""

    pipe: Any
    latents: Tensor
    texts: Tensor
    """Of each row, and one more for no caption."""
    rows: list[int]
    """Which text each latent has."""
    schedule: ZeroSNRDDIMScheduler = field(init=False)

    def __post_init__(self) -> None:
        self.schedule = ZeroSNRDDIMScheduler.from_config(self.pipe.scheduler.config, prediction_type="v_prediction")
        self.teacher = copy.deepcopy(self.pipe.unet).eval().requires_grad_(False)
        base = self.pipe.scheduler.alphas_cumprod
        self.times = equal_snr_timesteps(base, self.schedule.alphas_cumprod)
        self.pipe.scheduler = ZeroSNRMultistepScheduler.from_config(self.schedule.config)

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor, NoiseLevel, Tensor, Tensor, Tensor]:
        """x_0, noise, their level, x_t, timesteps and texts: functions of the seed and the step."""
        draw = torch.Generator().manual_seed(1_000_003 * seed + step)
        rows = torch.randint(len(self.latents), (BATCH,), generator=draw)
        dropped = torch.rand(BATCH, generator=draw) < CAPTION_DROPOUT
        timesteps = torch.randint(len(self.schedule), (BATCH,), generator=draw)
        x_0 = self.latents[rows]
        noise = torch.randn(x_0.shape, generator=draw)
        level = self.schedule.noise_level(timesteps, like=x_0)
        text = self.texts[torch.tensor(self.rows)[rows].where(~dropped, len(self.texts) - 1)]
        return x_0, noise, level, add_noise(x_0, noise, level), timesteps, text

    def loss(self, seed: int, step: int, distilled_from: float | None = None) -> Tensor:
        """v-loss of a batch, against the base's v from an alpha on, if one is given."""
        x_0, noise, level, x_t, timesteps, text = self.batch(seed, step)
        target = training_target("v_prediction", x_0, noise, level)
        if distilled_from is not None:
            known = (self.times[timesteps].isfinite() & (level.alpha.flatten() >= distilled_from)).nonzero()[:, 0]
            there = NoiseLevel(level.alpha[known], level.sigma[known])
            with torch.no_grad():
                epsilon = self.teacher(x_t[known], self.times[timesteps[known]], text[known]).sample
            target[known] = epsilon_as_v(epsilon, x_t[known], there)
        return v_loss(self.pipe.unet(x_t, timesteps, text).sample, target).mean()

    @torch.no_grad()
    def refit(self, seed: int, batches: int = 40, ridge: float = 1e-3) -> None:
        """Set the last convolution to the least-squares solution for v, as far as the features go."""
        convolution, seen = self.pipe.unet.conv_out, []
        hook = convolution.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        products, moments = 0.0, 0.0
        for step in range(batches):
            x_0, noise, level, x_t, timesteps, text = self.batch(seed, -1 - step)
            output = self.pipe.unet(x_t, timesteps, text).sample
            missing = (training_target("v_prediction", x_0, noise, level) - output).flatten(2).double()
            patches = F.unfold(seen.pop(), convolution.kernel_size, padding=convolution.padding).double()
            patches = torch.cat([patches, torch.ones_like(patches[:, :1])], dim=1)
            products = products + torch.einsum("bil,bjl->ij", patches, patches)
            moments = moments + torch.einsum("bil,bol->io", patches, missing)
        hook.remove()
        damping = ridge * products.diagonal().mean() * torch.eye(len(products), dtype=products.dtype)
        change = torch.linalg.solve(products + damping, moments).float()
        convolution.weight += change[:-1].T.reshape(convolution.weight.shape)
        convolution.bias += change[-1]

    def w1(self, real: np.ndarray, real_prompts: list[str], seeds: int) -> float:
        """Of images without guidance, ten steps each."""
        prompts = [prompt for prompt in captions() for _ in range(seeds)]
        images = generate_images(
            self.pipe,
            prompts,
            [*range(seeds)] * len(captions()),
            batch_size=24,
            progress=False,
            num_inference_steps=10,
            guidance_scale=1.0,
        )
        return luminance_coverage(mean_luminance(images), real, groups=(prompts, real_prompts)).w1


STARTS: dict[str, dict[str, Any]] = {"plain": {}, "distilled": {"distilled": True}, "refitted": {"refitted": True}}


def run(
    conversion: Conversion,
    seed: int,
    marks: list[int],
    measure: Callable[[], float],
    args: argparse.Namespace,
    distilled: bool = False,
    refitted: bool = False,
) -> list[tuple[float, float]]:
    """(W1, CPU seconds of training so far) at each mark."""
    unet, found, looking, steps = conversion.pipe.unet, [], 0.0, itertools.count()
    started = time.process_time()
    if refitted:
        conversion.refit(seed)

    def loss() -> Tensor:
        step = next(steps)
        return conversion.loss(seed, step, args.distill_alpha if distilled and step < args.distill_steps else None)

    def look(step: int) -> None:
        nonlocal looking
        now = time.process_time()
        unet.eval()
        found.append((measure(), now - started - looking))
        looking += time.process_time() - now

    minimize(unet, loss, marks[-1], LEARNING_RATE, "training", look, marks)
    return found


def reached(marks: list[int], values: np.ndarray, seconds: np.ndarray) -> str:
    """From which mark on W1 stays at or below the goal."""
    late = np.nonzero(values > GOAL)[0]
    first = late[-1] + 1 if len(late) else 0
    return "never" if first == len(marks) else f"{marks[first]:5} {seconds[first]:8.0f}"


def prepare(flawed: Path, data: Path) -> tuple[Callable[[], Conversion], np.ndarray, list[str]]:
    """A maker of conversions that all start alike, the brightness of the data, and its captions."""
    rows = datasets.load_dataset("imagefolder", data_dir=str(data), split="train")
    pipe = DiffusionPipeline.from_pretrained(flawed)
    prompts = [*captions(), ""]
    with torch.no_grad():
        texts = torch.cat([pipe.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in prompts])
        pixels = torch.stack([torch.from_numpy(np.array(image)) for image in rows["image"]]).permute(0, 3, 1, 2)
        parts = (pixels / 127.5 - 1).split(32)
        latents = (
            torch.cat([pipe.vae.encode(part).latent_dist.mean for part in parts]) * pipe.vae.config.scaling_factor
        )

    def make() -> Conversion:
        own = DiffusionPipeline.from_pretrained(flawed)
        return Conversion(own, latents, texts, [prompts.index(text) for text in rows["text"]])

    return make, mean_luminance(rows["image"]), list(rows["text"])


def plot(path: Path, marks: list[int], figures: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """W1 against steps and against seconds."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, label, place in zip(
        figure.subplots(1, 2, sharey=True), ("steps", "CPU seconds"), (None, 1), strict=True
    ):
        for name, both in figures.items():
            axes.semilogy(marks if place is None else both[1], both[0], ".-", label=name)
        axes.axhline(GOAL, color="black", linewidth=1, linestyle="--")
        axes.set(xlabel=label, ylabel="W1 to the data")
        axes.legend(fontsize="small", frameon=False)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Print the table, draw the plot; W1 and seconds at each mark, by start."""
    parser = argparse.ArgumentParser(description="Starts of a retraining from epsilon to v.", epilog=__doc__)
    parser.add_argument("--flawed", type=Path, default=Path("quickstart/flawed"), help="default: %(default)s")
    parser.add_argument("--data", type=Path, default=Path("quickstart/landscapes"), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=2, help="training runs of each start (default: 2)")
    parser.add_argument("--marks", type=int, nargs="+", default=[50, 75, 100, 125, 150, 175, 200, 250, 300])
    parser.add_argument("--distill_steps", type=int, default=150, help="default: 150")
    parser.add_argument("--distill_alpha", type=float, default=0.25, help="least alpha to distil at (default: 0.25)")
    parser.add_argument("--pictures", type=int, default=16, help="per prompt (default: 16)")
    parser.add_argument("--plot", type=Path, default=Path("warm_start.png"), help="default: %(default)s")
    args = parser.parse_args(argv)
    if not (args.flawed / "model_index.json").exists():
        parser.error(f"there is no {args.flawed} yet: run python examples/quickstart.py, or pass --flawed and --data.")

    make, real, real_prompts = prepare(args.flawed, args.data)
    figures = {}
    for name, options in STARTS.items():
        runs = []
        for seed in tqdm(range(args.seeds), desc=name):
            conversion = make()
            measure = lambda one=conversion: one.w1(real, real_prompts, args.pictures)  # noqa: E731
            runs.append(run(conversion, seed, args.marks, measure, args, **options))
        mean = np.mean(runs, axis=0)
        figures[name] = (mean[:, 0], mean[:, 1])
    print(f"\nW1 to the data, {args.seeds} runs each; {args.flawed}")
    print(f"{'steps':12}" + "".join(f"{mark:7}" for mark in args.marks) + f"{'steps and seconds to':>24} {GOAL}")
    for name, (values, seconds) in figures.items():
        print(f"{name:12}" + "".join(f"{v:7.3f}" for v in values) + f"{reached(args.marks, values, seconds):>24}")
    plot(args.plot, args.marks, figures)
    return figures


if __name__ == "__main__":
    main()
