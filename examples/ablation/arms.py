"""What is compared: three networks, by what they were trained to, and for each the ways to sample it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from fashion_mnist import CLASSES

from zsnr_diffusers import ClassConditionalPipeline, ZeroSNRMultistepScheduler, build_unet
from zsnr_diffusers.training import PixelTrainingConfig, train

STEPS = (5, 10, 20, 50)
UNGUIDED, GUIDED = 1.0, 3.0
RESCALE = 0.7
KEPT = 4


@dataclass(frozen=True)
class Budget:
    """How much of everything.

    `network` are changes of a preset. `beta_end` makes the last timestep leak as much of the mean of these images as
    Stable Diffusion's schedule, which ends at 0.012, does of 64 x 64 latents: the sum over pixels of alpha_bar / (1 -
    alpha_bar) is the same. Stable Diffusion's own would leak 16 times less of 16 x 16 pixels, and hide the flaw.
    """

    image_size: int
    beta_end: float
    preset: str
    network: tuple[tuple[str, Any], ...]
    train_images: int
    train_steps: int
    train_batch_size: int
    learning_rate: float
    ema_decay: float
    samples: int
    batch_size: int
    classifier_epochs: int = 12
    mixed_precision: str = "no"

    @property
    def betas(self) -> dict[str, Any]:
        """The schedule before it is fixed."""
        return {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": self.beta_end}


BUDGETS = {
    "cpu": Budget(
        image_size=16,
        beta_end=0.005055,
        preset="small-16",
        network=(
            ("block_out_channels", (16, 32, 64)),
            ("down_block_types", ("DownBlock2D",) * 3),
            ("up_block_types", ("UpBlock2D",) * 3),
            ("layers_per_block", 1),
            ("norm_num_groups", 4),
        ),
        train_images=20_000,
        train_steps=700,
        train_batch_size=64,
        learning_rate=2e-3,
        ema_decay=0.998,
        samples=300,
        batch_size=300,
    ),
    # Sized for eight minutes on an H100, and not tried on one.
    "gpu": Budget(
        image_size=32,
        beta_end=0.00843,
        preset="small-32",
        network=(("block_out_channels", (64, 128, 128, 128)),),
        train_images=60_000,
        train_steps=600,
        train_batch_size=256,
        learning_rate=1e-3,
        ema_decay=0.998,
        samples=500,
        batch_size=500,
        mixed_precision="bf16",
    ),
}


@dataclass(frozen=True)
class Arm:
    """A network, by what it was trained to. Epsilon at zero SNR is none: the last timestep would teach nothing.

    There x_t is the noise itself, so the network would learn to copy its input, and sampling it divides by zero: x_0 =
    (x_t - sigma epsilon) / alpha. The trainer refuses it.
    """

    name: str
    prediction_type: str
    zero_snr: bool


ARMS = (
    Arm("epsilon", "epsilon", False),
    Arm("v", "v_prediction", False),
    Arm("v-zero-snr", "v_prediction", True),
)


@dataclass(frozen=True, order=True)
class Cell:
    """A way to sample a network."""

    sampler: str
    steps: int
    guidance_scale: float = GUIDED
    guidance_rescale: float = 0.0
    keep_low_frequencies: int = 0

    @property
    def name(self) -> str:
        """Of the cell's file."""
        rescale, kept = f"{self.guidance_rescale:g}", self.keep_low_frequencies
        return f"{self.sampler}-{self.steps}-w{self.guidance_scale:g}-rescale{rescale}-keep{kept}"


STOCK = ("leading", "trailing")
SAMPLERS = (*STOCK, "ours")
"""diffusers' DDIM as Stable Diffusion ships it, the same from the last timestep, and our multistep sampler."""

MAIN_STEPS = 50
"""Steps of the table of effects; the paper's."""

FEW_STEPS = 10
"""Steps of the comparison of what corrects guidance."""


PARTS = ("main", "unguided", "guided")
"""The cells that decide on the effects, and all others, without guidance and with it; in this order."""


def cells(part: str) -> list[Cell]:
    """The cells of one of `PARTS`."""
    main = [
        Cell(sampler, MAIN_STEPS, w, rescale)
        for w, rescale in ((UNGUIDED, 0.0), (GUIDED, 0.0), (GUIDED, RESCALE))
        for sampler in STOCK
    ]
    main += [Cell(sampler, FEW_STEPS, GUIDED, rescale) for rescale in (0.0, RESCALE) for sampler in SAMPLERS]
    main += [Cell(sampler, FEW_STEPS, GUIDED, rescale, KEPT) for rescale in (0.0, RESCALE) for sampler in SAMPLERS[1:]]
    if part == "main":
        return main
    ways = ((UNGUIDED, 0.0),) if part == "unguided" else ((GUIDED, 0.0), (GUIDED, RESCALE))
    every = [Cell(sampler, n, *way) for n in STEPS for way in ways for sampler in SAMPLERS]
    return [cell for cell in every if cell not in main]


def trained(arm: Arm, folder: Path, data: Path, budget: Budget, seed: int) -> Path:
    """Train an arm, or go on with it, or leave it be if it is done; returns the folder of its pipeline."""
    untrained = folder.parent / f"untrained-{seed}"
    if not (untrained / "model_index.json").exists():
        ClassConditionalPipeline(new_network(budget, seed), DDPMScheduler(**budget.betas)).save_pretrained(untrained)
    train(
        PixelTrainingConfig(
            pretrained_model_name_or_path=str(untrained),
            dataset_name=str(data),
            class_column="label",
            output_dir=str(folder),
            prediction_type=arm.prediction_type,
            rescale_betas_zero_snr=arm.zero_snr,
            max_train_steps=budget.train_steps,
            train_batch_size=budget.train_batch_size,
            learning_rate=budget.learning_rate,
            lr_scheduler="cosine",
            lr_warmup_steps=min(100, budget.train_steps // 10),
            ema_decay=budget.ema_decay,
            mixed_precision=budget.mixed_precision,
            checkpointing_steps=400,
            checkpoints_total_limit=1,
            validation_images=0,
            luminance_images=0,
            seed=seed,
            resume=True,
        )
    )
    return folder


def new_network(budget: Budget, seed: int) -> UNet2DModel:
    """The network that all arms of a seed start from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_unet(
            budget.preset,
            len(CLASSES),
            sample_size=budget.image_size,
            in_channels=1,
            out_channels=1,
            dropout=0.0,
            **dict(budget.network),
        )


def sampler(name: str, arm: Arm, budget: Budget) -> Any:
    """A sampler for an arm. Those of diffusers differ in nothing but where they begin."""
    facts = budget.betas | {"prediction_type": arm.prediction_type, "rescale_betas_zero_snr": arm.zero_snr}
    if name == "ours":
        return ZeroSNRMultistepScheduler(**facts)
    return DDIMScheduler(**facts, clip_sample=False, steps_offset=1, timestep_spacing=name)


def asked_labels(n: int) -> Sequence[int]:
    """The class of each image: all in turn."""
    return [i % len(CLASSES) for i in range(n)]
