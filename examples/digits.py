"""Class to image, from scratch, in minutes on a CPU: handwritten digits with v-prediction and zero terminal SNR.

    python -m pip install -e ".[examples]" && python examples/digits.py

The 1797 digits of 8 x 8 pixels that come with scikit-learn are written as a folder of images, and a class-conditional
network of a million parameters is trained on three quarters of them, once by the recipe of this package and once by
that of DDPM (Ho et al. 2020, arXiv:2006.11239) as stock diffusers has it: epsilon, a schedule that never reaches pure
noise, and a sampler that does not start at the last timestep. A small classifier, trained on the same real digits,
judges a thousand of each: does it see the digit that was asked for, and how far are its features from those of real
ones (Inception Score and Fréchet distance, with this classifier in place of the Inception network)?

Everything lands in `--output_dir`: the pipelines with checkpoints and logs, `digits.png`, and the two Markov chains as
images. Run it again and it goes on where it was.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from PIL import Image
from quickstart_progress import quieten_libraries
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm.auto import tqdm

from zsnr_diffusers import ClassConditionalPipeline, ZeroSNRMultistepScheduler
from zsnr_diffusers.evaluation import (
    CustomFeatures,
    chain_picture,
    denoising_chain,
    frechet_distance,
    generate_images,
    image_features,
    inception_score,
    luminance_coverage,
    mean_luminance,
    noising_chain,
    sample_grid,
)
from zsnr_diffusers.training import PixelTrainingConfig, train
from zsnr_diffusers.utils.images import find_images

Digits: TypeAlias = tuple[list[Image.Image], list[int]]

CLASSES, TEST_DIGITS = 10, 500
GUIDANCE_SCALE = 1.1
CHAIN_STEPS = 1000
CELL = 40
"""Side of a digit in the images, in pixels."""


@dataclass
class Sizes:
    """How much of everything; the defaults take some five minutes on two CPU cores."""

    steps: int = 1600
    batch_size: int = 32
    samples: int = 1000
    num_inference_steps: int = 20
    classifier_epochs: int = 40


@dataclass
class Arm:
    """One of the recipes that are compared."""

    name: str
    folder: str
    prediction_type: str
    rescale_betas_zero_snr: bool
    sampler: Any


ARMS = (
    Arm("v-loss, zero SNR", "zero-snr", "v_prediction", True, ZeroSNRMultistepScheduler),
    Arm("stock recipe", "stock", "epsilon", False, DDIMScheduler),
)


@dataclass
class Row:
    """A row of the table."""

    accuracy: float
    inception_score: float
    frechet_distance: float
    w1: float
    n: int


def main(output_dir: Path = Path("digits"), seed: int = 0, sizes: Sizes | None = None) -> dict[str, Row]:
    """Train twice, sample, judge.

    Args:
        output_dir: where everything goes.
        seed: decides on all randomness.
        sizes: how much of everything.

    Returns:
        The rows of the table, by name.
    """
    sizes = sizes or Sizes()
    quieten_libraries()
    data = write_digits(output_dir / "data", seed)
    real, unseen = read_digits(data / "train"), read_digits(data / "test")
    judge = Judge(real, sizes.classifier_epochs, seed)
    asked = [i % CLASSES for i in range(sizes.samples)]
    rows, generated = {"real digits, not trained on": judge(*unseen)}, {"real": in_turn(*unseen)}
    for arm in ARMS:
        print(f"\n== {arm.name}")
        pipe = trained(arm, output_dir / arm.folder, data / "train", sizes, seed)
        images = generate_images(
            pipe,
            asked,
            range(sizes.samples),
            batch_size=250,
            num_inference_steps=sizes.num_inference_steps,
            guidance_scale=GUIDANCE_SCALE,
        )
        rows[arm.name], generated[arm.name] = judge(images, asked), images
    print_table(rows, sizes)
    pictures = draw(output_dir, generated, in_turn(*real), seed)
    print(f"Images: {', '.join(map(str, pictures))}. The pipelines: {', '.join(arm.folder for arm in ARMS)}")
    return rows


def write_digits(folder: Path, seed: int) -> Path:
    """scikit-learn's digits as PNG files, in `train` and `test` a folder for each digit."""
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(seed).permutation(len(pixels))
    for place, index in enumerate(order):
        part = folder / ("test" if place < TEST_DIGITS else "train") / str(digits.target[index])
        part.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[index]).save(part / f"{index:04d}.png")
    return folder


def read_digits(folder: Path) -> Digits:
    """The digits of a folder, and which they are."""
    images, labels = [], []
    for path in find_images(folder):
        with Image.open(path) as image:
            images.append(image.copy())
        labels.append(int(path.parent.name))
    return images, labels


def in_turn(images: list[Image.Image], labels: list[int]) -> list[Image.Image]:
    """A zero, a one, ..., a nine, a zero, ... as far as there is one of each."""
    by_class = [[image for image, label in zip(images, labels, strict=True) if label == c] for c in range(CLASSES)]
    return [image for row in zip(*by_class, strict=False) for image in row]


def trained(arm: Arm, folder: Path, data: Path, sizes: Sizes, seed: int) -> ClassConditionalPipeline:
    """The pipeline of an arm, trained or read, with the arm's sampler."""
    train(
        PixelTrainingConfig(
            unet="small-8",
            in_channels=1,
            dropout=0.0,
            train_data_dir=str(data),
            class_column="label",
            output_dir=str(folder),
            prediction_type=arm.prediction_type,
            rescale_betas_zero_snr=arm.rescale_betas_zero_snr,
            max_train_steps=sizes.steps,
            train_batch_size=sizes.batch_size,
            learning_rate=2e-3,
            lr_scheduler="cosine",
            lr_warmup_steps=100,
            ema_decay=0.998,
            checkpointing_steps=400,
            validation_images=0,
            luminance_images=0,
            seed=seed,
            resume=True,
        )
    )
    pipe = ClassConditionalPipeline.from_pretrained(folder)
    pipe.scheduler = arm.sampler.from_config(pipe.scheduler.config)
    return pipe


class Judge:
    """A classifier of real digits, and how far other digits are from those in its features.

    Args:
        real: what it is trained on, and what others are compared with.
        epochs: of training.
        seed: of its training.
    """

    def __init__(self, real: Digits, epochs: int, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            classifier = Classifier()
            fit_classifier(classifier, *map(torch.stack, zip(*map(as_tensors, *real), strict=True)), epochs)
        self.network = CustomFeatures(classifier.eval(), "classifier of digits")
        self.real_luminance = mean_luminance(real[0])
        self.real = image_features(self.network, real[0], progress=False).statistics()

    def __call__(self, images: list[Image.Image], labels: list[int]) -> Row:
        """Compare images of the digits `labels` with real ones."""
        found = image_features(self.network, images, progress=False)
        assert found.logits is not None
        return Row(
            accuracy=float((found.logits.argmax(1) == labels).mean()),
            inception_score=inception_score(found.logits, splits=1).mean,
            frechet_distance=frechet_distance(found.statistics(), self.real),
            w1=luminance_coverage(mean_luminance(images), self.real_luminance).w1,
            n=len(images),
        )


class Classifier(nn.Module):
    """A convolutional network of 8 x 8 pixels; features [n, 64] and logits [n, 10] of uint8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU()),
        )
        self.output = nn.Linear(64, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of images [n, channels, 8, 8], of which the first channel counts."""
        features = self.layers(images[:, :1].float() / 127.5 - 1)
        return features, self.output(features)


def as_tensors(image: Image.Image, label: int) -> tuple[Tensor, Tensor]:
    """uint8 [1, 8, 8], and the label."""
    return torch.from_numpy(np.array(image))[None], torch.tensor(label)


def fit_classifier(classifier: Classifier, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Adam on cross entropy, with noise of a tenth of the range of grey for more variety."""
    optimizer = torch.optim.Adam(classifier.parameters(), 1e-3)
    for _ in tqdm(range(epochs), "training the classifier"):
        for batch in torch.randperm(len(images)).split(64):
            noisy = images[batch].float() + 12.8 * torch.randn(images[batch].shape)
            loss = F.cross_entropy(classifier(noisy)[1], labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def print_table(rows: dict[str, Row], sizes: Sizes) -> None:
    """A row per set of digits."""
    print(f"\nBy a classifier of digits; {sizes.num_inference_steps} steps, guidance {GUIDANCE_SCALE}")
    print(f"{'':28} {'n':>5} {'accuracy':>8} {'IS':>6} {'FD':>6} {'W1 of brightness':>16}")
    for name, row in rows.items():
        figures = f"{row.accuracy:8.3f} {row.inception_score:6.2f} {row.frechet_distance:6.2f} {row.w1:16.3f}"
        print(f"{name:28} {row.n:5} {figures}")


def draw(output_dir: Path, generated: dict[str, list[Image.Image]], real: list[Image.Image], seed: int) -> list[Path]:
    """The digits of each set, and both Markov chains of the first arm."""
    rows = [
        [image.resize((CELL, CELL), Image.Resampling.NEAREST) for image in i[: 2 * CLASSES]]
        for i in generated.values()
    ]
    sample_grid(rows, list(generated), output_dir / "digits.png")
    pipe = ClassConditionalPipeline.from_pretrained(output_dir / ARMS[0].folder)
    pictures = torch.stack([as_tensors(image, 0)[0] for image in real[:4]]).float() / 127.5 - 1
    chain_picture(noising_chain(pipe.scheduler, pictures, seed=seed), output_dir / "noising.png", CELL)
    pipe.set_progress_bar_config(desc="the reverse chain")
    chain = denoising_chain(
        pipe,
        class_labels=[0, 1, 2, 3],
        num_inference_steps=CHAIN_STEPS,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(4)],
    )
    chain_picture(chain, output_dir / "denoising.png", CELL)
    return [output_dir / name for name in ("digits.png", "noising.png", "denoising.png")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("digits"), help="default: digits")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    arguments = parser.parse_args()
    main(arguments.output_dir, arguments.seed)
