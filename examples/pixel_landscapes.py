"""The schedule's own share of the flaw: pixels instead of latents, and no text.

    python examples/quickstart.py --mode pixels

Without captions nothing but the noise can tell the network how bright an image shall be, and without an autoencoder
the noise is the image's own. A small UNet2DModel is trained with v-loss on Stable Diffusion's schedule and sampled
as Stable Diffusion is; its weights are then trained on with zero terminal SNR; and another is trained so from scratch.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DDPMPipeline, UNet2DModel
from landscapes import make_landscapes, read_landscapes
from PIL import Image
from quickstart_progress import Advance, Part, quieten_libraries, run_parts
from small_training import minimize
from torch import Tensor

from zsnr_diffusers import ZeroSNRDDIMScheduler
from zsnr_diffusers.core import add_noise, training_target, v_loss
from zsnr_diffusers.evaluation import (
    LuminanceCoverage,
    luminance_coverage,
    mean_luminance,
    plot_luminance,
    sample_grid,
)
from zsnr_diffusers.evaluation.generation import iter_images

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
BATCH_SIZE = 16


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults take some six minutes on two CPU cores."""

    images: int = 1200
    steps: int = 1000
    samples: int = 256
    num_inference_steps: int = 50


@dataclass(frozen=True)
class Arm:
    """One of the networks that are compared.

    Attributes:
        name: in tables.
        zero_snr: whether it is trained on zero terminal SNR.
        base: name of the network that it is trained from; none for new weights.
    """

    name: str
    zero_snr: bool
    base: str = ""

    @property
    def folder(self) -> str:
        """Of its pipeline, in that of all of pixel mode."""
        return self.name.replace(",", "").replace(" ", "-")

    def scheduler(self) -> ZeroSNRDDIMScheduler:
        """Of training and of sampling."""
        spacing = {} if self.zero_snr else {"rescale_betas_zero_snr": False, "timestep_spacing": "leading"}
        return ZeroSNRDDIMScheduler(**BETAS, prediction_type="v_prediction", **spacing)


STOCK = Arm("v-loss, default schedule", False)
ARMS = (STOCK, Arm("fine-tuned to zero SNR", True, STOCK.folder), Arm("zero SNR from scratch", True))


class PixelQuickstart:
    """What is made, in which folder, of which sizes.

    Args:
        folder: where everything goes.
        seed: decides on all randomness.
        sizes: how much of everything.
    """

    def __init__(self, folder: Path, seed: int, sizes: Sizes) -> None:
        self.folder, self.seed, self.sizes = folder, seed, sizes
        self.data, self.pixels = folder / "landscapes-32", folder / "pixels"

    def parts(self) -> list[Part]:
        """Everything that takes time, with the seconds that one core needs for it."""
        sizes = self.sizes
        seconds = sizes.samples * sizes.num_inference_steps / 600
        parts = [Part("drawing landscapes", sizes.images / 1000, self.draw_landscapes, self.data / "metadata.jsonl")]
        for arm in ARMS:
            train, result = functools.partial(self.train, arm), self.pixels / arm.folder / "model_index.json"
            parts.append(Part(f"training: {arm.name}", sizes.steps / 12, train, result))
        for arm in ARMS:
            generate, result = functools.partial(self.generate, arm), self.image_files(arm)[-1].parent
            parts.append(Part(f"images: {arm.name}", seconds, generate, result))
        return parts

    def draw_landscapes(self, advance: Advance) -> None:
        """Draw the training images."""
        make_landscapes(self.data, self.sizes.images, image_size=32, seed=self.seed)

    def train(self, arm: Arm, advance: Advance) -> None:
        """Train a network and save it as a pipeline."""
        unet = UNet2DModel.from_pretrained(self.pixels / arm.base / "unet") if arm.base else build_unet(self.seed)
        learning_rate, seed = (1e-3, self.seed + 1) if arm.base else (2e-3, self.seed)
        steps, scheduler = self.sizes.steps, arm.scheduler()
        images = read_landscapes(self.data)
        train(unet, images, scheduler, steps, learning_rate, seed, arm.name, lambda step: advance(step / steps))
        DDPMPipeline(unet, scheduler).save_pretrained(self.pixels / arm.folder)

    def generate(self, arm: Arm, advance: Advance) -> None:
        """Generate the images of a network."""
        unet = UNet2DModel.from_pretrained(self.pixels / arm.folder / "unet")
        files = self.image_files(arm)
        files[0].parent.mkdir(parents=True, exist_ok=True)
        images = iter_images(
            DDPMPipeline(unet, arm.scheduler()),
            None,
            range(len(files)),
            batch_size=64,
            num_inference_steps=self.sizes.num_inference_steps,
        )
        for i, (image, file) in enumerate(zip(images, files, strict=True)):
            image.save(file)
            advance((i + 1) / len(files))

    def image_files(self, arm: Arm) -> list[Path]:
        """A file for each seed."""
        return [self.pixels / "images" / arm.folder / f"{seed:03}.png" for seed in range(self.sizes.samples)]

    def compare(self) -> dict[str, LuminanceCoverage]:
        """Measure what was generated, print the table, draw the pictures."""
        generated = {arm.name: [Image.open(file) for file in self.image_files(arm)] for arm in ARMS}
        luminance = {name: mean_luminance(pictures) for name, pictures in generated.items()}
        real = mean_luminance(read_landscapes(self.data))
        coverages = {name: luminance_coverage(values, real) for name, values in luminance.items()}
        print(f"\n{table(coverages)}")
        plot_luminance(self.folder / "brightness-pixels.png", luminance, real)
        rows = {**{name: pictures[:9] for name, pictures in generated.items()}, "real images": self.real_images(9)}
        sample_grid(
            [[picture.resize((128, 128), Image.Resampling.LANCZOS) for picture in row] for row in rows.values()],
            list(rows),
            self.folder / "samples-pixels.png",
        )
        print(f"\nPictures: {self.folder / 'brightness-pixels.png'}, {self.folder / 'samples-pixels.png'}")
        return coverages

    def real_images(self, count: int) -> list[Image.Image]:
        """Some of the training images."""
        return [Image.open(file) for file in sorted(self.data.glob("*.png"))[:count]]


def table(coverages: Mapping[str, LuminanceCoverage]) -> str:
    """The coverage of each network, in 80 columns."""
    count = next(iter(coverages.values())).generated.n
    lines = [
        f"Mean luminance per image, from -1 (black) to 1 (white); {count} images each\n",
        f"{'':38}{'W1':>6}{'5% to 95%':>17}",
    ]
    for name, coverage in coverages.items():
        ours = coverage.generated
        lines.append(f"{name:38}{coverage.w1:6.3f}{f'{ours.p5:.2f} to {ours.p95:.2f}':>17}")
    real = coverage.real
    lines.append(f"{'real images':38}{coverage.floor:6.3f}{f'{real.p5:.2f} to {real.p95:.2f}':>17}")
    return "\n".join(
        [
            *lines,
            "\nW1: Wasserstein distance to the real images; in their own row, what a perfect",
            "model would show with as many images.",
        ]
    )


def main(output_dir: Path, seed: int = 0, sizes: Sizes | None = None) -> dict[str, LuminanceCoverage]:
    """Train three ways, sample, compare.

    Args:
        output_dir: where the data, `pixels/`, `brightness-pixels.png` and `samples-pixels.png` go.
        seed: decides on all randomness.
        sizes: how much of everything.

    Returns:
        The luminance coverage of each, by name.
    """
    quieten_libraries()
    quickstart = PixelQuickstart(output_dir, seed, sizes or Sizes())
    run_parts(quickstart.parts(), output_dir / "progress-pixels.json", {"seed": seed, **asdict(quickstart.sizes)})
    return quickstart.compare()


def build_unet(seed: int) -> UNet2DModel:
    """About a million parameters for images of 32 x 32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=32,
            block_out_channels=(16, 32, 64, 64),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D",) * 4,
            up_block_types=("UpBlock2D",) * 4,
        )


def train(
    unet: UNet2DModel,
    images: Tensor,
    schedule: ZeroSNRDDIMScheduler,
    steps: int,
    learning_rate: float,
    seed: int,
    name: str,
    on_step: Callable[[int], None] | None = None,
) -> UNet2DModel:
    """Plain v-loss training of an unconditional network; its averaged weights are left in it."""
    generator = torch.Generator().manual_seed(seed)

    def loss_of_a_batch() -> Tensor:
        x_0 = images[torch.randint(len(images), (BATCH_SIZE,), generator=generator)]
        noise = torch.randn(x_0.shape, generator=generator)
        timesteps = torch.randint(len(schedule), (BATCH_SIZE,), generator=generator)
        level = schedule.noise_level(timesteps, like=x_0)
        output = unet(add_noise(x_0, noise, level), timesteps).sample
        return v_loss(output, training_target("v_prediction", x_0, noise, level)).mean()

    minimize(unet, loss_of_a_batch, steps, learning_rate, name, on_step=on_step)
    return unet
