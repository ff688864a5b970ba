"""A LoRA of few steps compared with its teacher: brightness, contrast, and the distance to what the teacher generates.

    python examples/quickstart.py                              # makes quickstart/retrained
    python -m zsnr_diffusers.training --pretrained_model_name_or_path quickstart/retrained \\
        --train_data_dir quickstart/landscapes --output_dir four-steps --distill_steps 4 --lora_rank 16 \\
        --learning_rate 2e-3 --lr_scheduler cosine --lr_warmup_steps 10 --max_train_steps 120 --train_batch_size 16 \\
        --timestep_sampling stratified --caption_dropout 0 --adam_weight_decay 0 --ema_decay 0.95 --luminance_images 0
    python examples/benchmarks/few_steps.py --lora four-steps

Printed for each way to sample: how often the UNet is called for an image, a call with and without the caption being
two; W1, the distance of the brightness of 96 images to the data's, by seeds, and its expected value for a perfect
model; the contrast, the mean standard deviation of luma within an image (the data's is in the last line); and the RMS
difference of pixels, over their standard deviation, to the teacher's images from the same seeds in many steps.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import numpy as np
import numpy.typing as npt
from diffusers import EulerDiscreteScheduler
from landscapes import captions
from PIL import Image

from zsnr_diffusers import ZeroSNRMultistepScheduler, load_lora, load_pipeline
from zsnr_diffusers.evaluation import generate_images, luminance_coverage, mean_luminance
from zsnr_diffusers.evaluation.luminance import LUMA_WEIGHTS

PLAIN = {"guidance_rescale": 0.0, "keep_low_frequencies": 0}
Floats = npt.NDArray[np.float64]


@dataclass
class Sizes:
    """How many images and steps."""

    seeds: int = 16
    """Per prompt and repetition."""
    repetitions: int = 3
    steps: int = 4
    teacher_steps: int = 25
    reference_steps: int = 25


@dataclass
class Way:
    """One way to sample."""

    name: str
    pipe: Any
    scheduler: type[Any]
    num_inference_steps: int
    guidance_scale: float
    guidance: dict[str, Any]

    @property
    def calls(self) -> int:
        """Samples that the UNet sees for an image."""
        return self.num_inference_steps * (2 if self.guidance_scale > 1 else 1)

    def images(self, seeds: range) -> list[Image.Image]:
        """An image for each prompt and seed."""
        spacing = {"timestep_spacing": "kappa"} if self.scheduler is ZeroSNRMultistepScheduler else {}
        self.pipe.scheduler = self.scheduler.from_config(self.pipe.scheduler.config, **spacing)
        return generate_images(
            self.pipe,
            prompts(len(seeds)),
            [*seeds] * len(captions()),
            batch_size=24,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            **self.guidance,
        )


def prompts(seeds: int) -> list[str]:
    """Each caption so many times."""
    return [caption for caption in captions() for _ in range(seeds)]


def main(base: Path, lora: Path, data: Path, guidance_scale: float, sizes: Sizes) -> dict[str, dict[str, float]]:
    """Print the table.

    Args:
        base: the teacher.
        lora: of it.
        data: the images that it was trained on.
        guidance_scale: of the teacher.
        sizes: how many images and steps.

    Returns:
        Mean figures of each way to sample, by name.
    """
    rows = datasets.load_dataset("imagefolder", data_dir=str(data), split="train")
    real = mean_luminance(rows["image"]), list(rows["text"])
    seeds = [range(first, first + sizes.seeds) for first in range(0, sizes.repetitions * sizes.seeds, sizes.seeds)]
    teacher = load_pipeline(base)
    reference = Way("", teacher, ZeroSNRMultistepScheduler, sizes.reference_steps, guidance_scale, {})
    wanted = [pixels(reference.images(part)) for part in seeds]
    print(f"{'':58} calls  W1 by seeds{'':11} floor contrast distance")
    figures = {}
    for way in ways(teacher, load_lora(load_pipeline(base), lora), guidance_scale, sizes):
        figures[way.name] = measure(way, real, wanted, seeds)
    print(f"{'data':58} {'':29}{contrast(rows['image']):14.3f}")
    return figures


def ways(teacher: Any, student: Any, guidance_scale: float, sizes: Sizes) -> Iterator[Way]:
    """The ways to sample that are compared."""
    few, many, w = sizes.steps, sizes.teacher_steps, guidance_scale
    euler, ours = EulerDiscreteScheduler, ZeroSNRMultistepScheduler
    yield Way(f"teacher, Euler, {few} steps, unguided", teacher, euler, few, 1.0, {})
    yield Way(f"teacher, Euler, {few} steps, guidance {w:g}, plain", teacher, euler, few, w, PLAIN)
    yield Way(f"teacher, Euler, {many} steps, guidance {w:g}, plain", teacher, euler, many, w, PLAIN)
    yield Way(f"teacher, Euler, {few} steps, guidance {w:g}", teacher, euler, few, w, {})
    yield Way(f"teacher, Euler, {many} steps, guidance {w:g}", teacher, euler, many, w, {})
    yield Way(f"teacher, ours, {few} steps, guidance {w:g}", teacher, ours, few, w, {})
    yield Way(f"LoRA, Euler, {few} steps", student, euler, few, 1.0, {})


def measure(way: Way, real: tuple[Floats, list[str]], wanted: list[Floats], seeds: list[range]) -> dict[str, float]:
    """Print the figures of a way to sample; their means over repetitions."""
    runs = []
    for part, reference in zip(seeds, wanted, strict=True):
        images = way.images(part)
        found = luminance_coverage(mean_luminance(images), real[0], groups=(prompts(len(part)), real[1]))
        distance = float(np.sqrt(np.square(pixels(images) - reference).mean()) / reference.std())
        runs.append({"w1": found.w1, "floor": found.floor, "contrast": contrast(images), "distance": distance})
    mean = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
    by_seeds = " ".join(f"{run['w1']:.3f}" for run in runs)
    print(
        f"{way.name:58} {way.calls:5}  {by_seeds:22} {mean['floor']:.3f} {mean['contrast']:8.3f} "
        f"{mean['distance']:8.3f}",
        flush=True,
    )
    return mean


def pixels(images: list[Image.Image]) -> Floats:
    """Values in [-1, 1], shape [n, h, w, 3]."""
    return np.stack([np.asarray(image.convert("RGB"), np.float64) for image in images]) / 127.5 - 1


def contrast(images: list[Image.Image]) -> float:
    """Mean standard deviation of luma within an image."""
    return float((pixels(images) @ LUMA_WEIGHTS).std(axis=(1, 2)).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("quickstart/retrained"), help="default: %(default)s")
    parser.add_argument("--lora", type=Path, required=True, help="folder of the LoRA")
    parser.add_argument("--data", type=Path, default=Path("quickstart/landscapes"), help="default: %(default)s")
    parser.add_argument("--guidance_scale", type=float, default=7.5, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=Sizes.seeds, help="per prompt and repetition (default: 16)")
    parser.add_argument("--repetitions", type=int, default=Sizes.repetitions, help="default: 3")
    told = parser.parse_args()
    main(told.base, told.lora, told.data, told.guidance_scale, Sizes(told.seeds, told.repetitions))
