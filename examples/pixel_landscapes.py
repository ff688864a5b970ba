"""The schedule's own share of the flaw: pixels instead of latents, and no text.

    python examples/quickstart.py --mode pixels

Without captions nothing but the noise can tell the network how bright an image shall be, and without an autoencoder
the noise is the image's own. A small UNet2DModel is trained with v-loss on Stable Diffusion's schedule and sampled
as Stable Diffusion is; its weights are then trained on with zero terminal SNR; and another is trained so from scratch.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMPipeline, UNet2DModel
from landscapes import make_landscapes, read_landscapes
from small_training import minimize
from torch import Tensor

from zsnr_diffusers import ZeroSNRDDIMScheduler
from zsnr_diffusers.core import add_noise, training_target, v_loss
from zsnr_diffusers.evaluation import (
    LuminanceCoverage,
    generate_images,
    luminance_coverage,
    mean_luminance,
    plot_luminance,
    sample_grid,
)

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
BATCH_SIZE = 16


@dataclass
class Sizes:
    """How much of everything; the defaults take some six minutes on two CPU cores."""

    images: int = 1200
    steps: int = 1000
    samples: int = 256
    num_inference_steps: int = 50


def main(output_dir: Path, seed: int = 0, sizes: Sizes | None = None) -> dict[str, LuminanceCoverage]:
    """Train three ways, sample, compare.

    Args:
        output_dir: where the data, `brightness-pixels.png` and `samples-pixels.png` go.
        seed: decides on all randomness.
        sizes: how much of everything.

    Returns:
        The luminance coverage of each, by name.
    """
    sizes = sizes or Sizes()
    images = read_landscapes(make_landscapes(output_dir / "landscapes-32", sizes.images, image_size=32, seed=seed))
    stock = ZeroSNRDDIMScheduler(
        **BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=False, timestep_spacing="leading"
    )
    zero_snr = ZeroSNRDDIMScheduler(**BETAS, prediction_type="v_prediction")

    networks = {}
    flawed = train(build_unet(seed), images, stock, sizes.steps, 2e-3, seed, "stock schedule")
    networks["v-loss, stock schedule"] = flawed, stock
    weights = {name: value.clone() for name, value in flawed.state_dict().items()}
    tuned = build_unet(seed)
    tuned.load_state_dict(weights)
    networks["fine-tuned to zero SNR"] = (
        train(tuned, images, zero_snr, sizes.steps, 1e-3, seed + 1, "fine-tuning"),
        zero_snr,
    )
    networks["zero SNR from scratch"] = (
        train(build_unet(seed), images, zero_snr, sizes.steps, 2e-3, seed, "from scratch"),
        zero_snr,
    )

    real = mean_luminance(images)
    generated = {
        name: generate_images(
            DDPMPipeline(unet, scheduler),
            None,
            range(sizes.samples),
            batch_size=64,
            num_inference_steps=sizes.num_inference_steps,
        )
        for name, (unet, scheduler) in networks.items()
    }
    luminance = {name: mean_luminance(pictures) for name, pictures in generated.items()}
    coverages = {name: luminance_coverage(values, real) for name, values in luminance.items()}
    print(f"\nMean luminance per image (-1 black, 1 white), {sizes.samples} images each")
    print(f"{'':24} {'W1':>6} {'floor':>6} {'p5':>6} {'p95':>6}")
    for name, coverage in coverages.items():
        ours = coverage.generated
        print(f"{name:24} {coverage.w1:6.3f} {coverage.floor:6.3f} {ours.p5:6.2f} {ours.p95:6.2f}")
    print(f"{'data':24} {'':6} {'':6} {coverage.real.p5:6.2f} {coverage.real.p95:6.2f}")
    plot_luminance(output_dir / "brightness-pixels.png", luminance, real)
    sample_grid([p[:10] for p in generated.values()], list(generated), output_dir / "samples-pixels.png", cell=64)
    print(f"Images: {output_dir / 'brightness-pixels.png'}, {output_dir / 'samples-pixels.png'}")
    return coverages


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

    minimize(unet, loss_of_a_batch, steps, learning_rate, name)
    return unet
