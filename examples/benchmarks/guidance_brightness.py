r"""What guidance does to brightness, and what each remedy does about it.

    python examples/quickstart.py                               # makes quickstart/retrained
    python examples/benchmarks/guidance_brightness.py

The quickstart's retrained model, which starts at zero SNR, generates the same prompts from the same seeds at each
guidance scale, once for each remedy:

- guidance rescale (Lin et al. 2023, arXiv:2305.08891, section 3.4);
- diffusers' guiders: adaptive projected guidance as its authors use it (Sadat et al. 2024, arXiv:2410.02416),
  guidance in the middle three fifths of the steps (Kynkaanniemi et al. 2024, arXiv:2404.07724), CFG-Zero* without its
  zeroed step (Fan et al. 2025, arXiv:2503.18886), and frequency-decoupled guidance (Sadat et al. 2025,
  arXiv:2506.19713), its lower half at half the extrapolation, which is its authors' ratio for SDXL, or at none;
- dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487), which is made for pixels;
- `keep_low_frequencies`, without guidance rescale, after it, which is what this package does, and before it.

Printed are, a table each and a column per guidance scale:

- W1, the Wasserstein distance of mean luminance to the data's, and what it is on average for a perfect model;
- the share of pixel values that are clipped, because the autoencoder puts them outside of black to white;
- detail, the standard deviation of luma without its lowest 8 x 8 frequencies, over that of the data;
- the share of the variance of mean luminance that is between prompts;
- the kernel distance to the data (Binkowski et al. 2018, arXiv:1801.01401), times 1000, in features of the model's own
  autoencoder: its latents, averaged over squares of 4 x 4.

`--figure` draws the same seeds at the largest of the usual scales, 7.5.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import diffusers
import torch
from diffusers import guiders
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from landscapes import captions, read_landscapes

from zsnr_diffusers import KeepLowFrequenciesGuidance, ZeroSNRDDIMScheduler, load_pipeline
from zsnr_diffusers.core import low_pass
from zsnr_diffusers.evaluation import (
    kernel_distance,
    luminance_coverage,
    mean_luminance,
    prompt_share,
    sample_grid,
)
from zsnr_diffusers.evaluation.luminance import LUMA_WEIGHTS

GUIDANCE_SCALES = (1.0, 1.5, 3.0, 5.0, 7.5, 12.0)
NUM_INFERENCE_STEPS = 25
SHOWN_SCALE, SHOWN_K, SEEDS_SHOWN = 7.5, 4, 2
KEPT = (1, 2, 3, 4, 6)
UNGUIDED = 1 + 1e-6
"""A guidance scale of none; at exactly 1 diffusers' frequency-decoupled guidance repeats the level above."""


@dataclass(frozen=True)
class Remedy:
    """Arguments of the pipeline's call at a guidance scale, and whether the scheduler thresholds x_0."""

    arguments: Callable[[float], dict[str, Any]] = lambda scale: {}
    thresholding: bool = False


def guided_by(name: str, *scales: Callable[[float], Any], **settings: Any) -> Remedy:
    """A remedy that is a guider of diffusers, a new one for every call; the scale is its first argument."""
    (make,) = scales or (lambda scale: scale,)
    return Remedy(lambda scale: {"guider": getattr(guiders, name)(make(scale), **settings)})


def remedies() -> dict[str, Remedy]:
    """All that are compared, by name."""
    apg = {"adaptive_projected_guidance_momentum": -0.5, "eta": 0.0}
    decoupled = "FrequencyDecoupledGuidance"
    return {
        "none": Remedy(),
        "guidance_rescale=0.7": Remedy(lambda scale: {"guidance_rescale": 0.7}),
        "adaptive projected guidance": guided_by("AdaptiveProjectedGuidance", **apg),
        "guidance in the middle steps": guided_by("ClassifierFreeGuidance", start=0.2, stop=0.8),
        "CFG-Zero*": guided_by("ClassifierFreeZeroStarGuidance", zero_init_steps=0),
        "frequency-decoupled, half": guided_by(decoupled, lambda scale: [scale, (1 + scale) / 2]),
        "frequency-decoupled, none": guided_by(decoupled, lambda scale: [scale, UNGUIDED]),
        "dynamic thresholding": Remedy(thresholding=True),
        **{f"keep_low_frequencies={k}": Remedy(lambda scale, k=k: {"keep_low_frequencies": k}) for k in KEPT},
        **{
            f"rescale 0.7, then keep {k}": Remedy(
                lambda scale, k=k: {"keep_low_frequencies": k, "guidance_rescale": 0.7}
            )
            for k in (2, 4)
        },
        "keep 4, then rescale 0.7": Remedy(
            lambda scale: {"guider": KeepLowFrequenciesGuidance(scale, 4), "guidance_rescale": 0.7}
        ),
    }


@dataclass(frozen=True)
class Figures:
    """What is measured of one set of images; `floor` is W1 of a perfect model with as many, on average."""

    w1: float
    floor: float
    clipped: float
    detail: float
    prompt_share: float
    distance: float


TITLES = {
    "w1": "W1 of mean luminance to the data",
    "clipped": "pixel values clipped",
    "detail": "standard deviation of detail, over the data's",
    "prompt_share": "share of mean luminance that the prompt explains",
    "distance": "kernel distance to the data, x 1000",
}
FORMATS = {"w1": ".3f", "clipped": ".1%", "detail": ".2f", "prompt_share": ".2f", "distance": ".1f"}


class Generator:
    """A trained pipeline, and the prompts and seeds that every remedy is tried on."""

    def __init__(self, folder: Path, seeds: int) -> None:
        """Load the pipeline without any guidance settings that it has recorded."""
        self.pipe = load_pipeline(folder, guidance_rescale=0.0, keep_low_frequencies=0)
        self.pipe.set_progress_bar_config(disable=True)
        self.prompts = [prompt for prompt in captions() for _ in range(seeds)]
        self.seeds = [seed for _ in captions() for seed in range(seeds)]

    @torch.no_grad()
    def __call__(self, remedy: Remedy, guidance_scale: float) -> Tensor:
        """Images [n, 3, height, width] as decoded: in [-1, 1], and beyond where they will be clipped."""
        config = self.pipe.scheduler.config
        self.pipe.scheduler = ZeroSNRDDIMScheduler.from_config(
            config,
            rescale_betas_zero_snr=bool(config.get("rescale_betas_zero_snr")),  # of a model that was not retrained
            thresholding=remedy.thresholding,
            sample_max_value=float("inf"),
        )
        latents = self.pipe(
            self.prompts,
            generator=[torch.Generator().manual_seed(seed) for seed in self.seeds],
            num_inference_steps=NUM_INFERENCE_STEPS,
            guidance_scale=guidance_scale,
            output_type="latent",
            **remedy.arguments(guidance_scale),
        ).images
        return self.pipe.vae.decode(latents / self.pipe.vae.config.scaling_factor).sample

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Latents of images [n, 3, height, width] in [-1, 1], of variance 1, averaged over squares, [n, d]."""
        means = [self.pipe.vae.encode(part).latent_dist.mean for part in images.split(64)]
        return F.avg_pool2d(torch.cat(means) * self.pipe.vae.config.scaling_factor, 4).flatten(1)

    def to_pil(self, decoded: Tensor) -> list[Image.Image]:
        """Images [n, 3, height, width], with values that may lie outside of [-1, 1]."""
        return self.pipe.image_processor.postprocess(decoded, "pil")


def detail(images: Tensor) -> float:
    """Standard deviation of luma without its lowest 8 x 8 frequencies, images [n, 3, height, width] in [-1, 1]."""
    luma = torch.einsum("nchw,c->nhw", images.double(), torch.from_numpy(LUMA_WEIGHTS))[:, None]
    return float((luma - low_pass(luma, 8)).square().mean().sqrt())


class Data:
    """The images that the model was trained on, and how far others are from them."""

    def __init__(self, folder: Path, generator: Generator) -> None:
        """Read them all, and measure what does not depend on what they are compared with."""
        self.images = read_landscapes(folder)
        self.prompts = list(datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")["text"])
        self.luminance = mean_luminance(self.images)
        self.detail = detail(self.images)
        self.features = generator.features(self.images)
        self._generator = generator

    def compare(self, decoded: Tensor) -> Figures:
        """The figures of generated images."""
        images, prompts = decoded.clamp(-1, 1), self._generator.prompts
        luminance = mean_luminance(images)
        coverage = luminance_coverage(luminance, self.luminance, groups=(prompts, self.prompts))
        return Figures(
            w1=coverage.w1,
            floor=coverage.floor,
            clipped=float((decoded.abs() > 1).float().mean()),
            detail=detail(images) / self.detail,
            prompt_share=prompt_share(luminance, prompts),
            distance=1000 * kernel_distance(self._generator.features(images), self.features).value,
        )


def measure(generator: Generator, data: Data, scales: Sequence[float]) -> dict[str, list[Figures]]:
    """The figures of each remedy, by name, at each guidance scale, without those that a library is missing for."""
    rows: dict[str, list[Figures]] = {}
    unguided = data.compare(generator(Remedy(), 1.0))  # guidance is off, and so is every remedy
    chosen = remedies()
    for name, remedy in tqdm(chosen.items(), desc="generating"):
        try:
            remedy.arguments(2.0)
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        rows[name] = [data.compare(generator(remedy, scale)) if scale > 1 else unguided for scale in scales]
    return rows


def show(rows: Mapping[str, Sequence[Figures]], scales: Sequence[float], images: int) -> None:
    """Print a table for each figure."""
    floor = rows["none"][0].floor
    for figure, title in TITLES.items():
        print(f"\n{title}, {images} images each" + (f"; floor {floor:.3f}" if figure == "w1" else ""))
        print("| guidance | " + " | ".join(f"{scale:g}" for scale in scales) + " |")
        print("|---" * (1 + len(scales)) + "|")
        for name, cells in rows.items():
            print(f"| {name} | " + " | ".join(format(asdict(cell)[figure], FORMATS[figure]) for cell in cells) + " |")


def draw(path: Path, generator: Generator, data: Data) -> None:
    """Draw real images and the same seeds without guidance and with it: a row per prompt."""
    shown = {
        "guidance 1": (Remedy(), 1.0),
        f"guidance {SHOWN_SCALE:g}": (Remedy(), SHOWN_SCALE),
        f"{SHOWN_SCALE:g}, rescale 0.7": (remedies()["guidance_rescale=0.7"], SHOWN_SCALE),
        f"{SHOWN_SCALE:g}, keep {SHOWN_K} x {SHOWN_K}": (remedies()[f"keep_low_frequencies={SHOWN_K}"], SHOWN_SCALE),
    }
    columns = {name: generator.to_pil(generator(*how)) for name, how in shown.items()}
    real = generator.to_pil(data.images)
    per_prompt = len(generator.prompts) // len(captions())
    shown_seeds, rows = min(SEEDS_SHOWN, per_prompt), []
    for i, prompt in enumerate(captions()):
        row = [image for image, text in zip(real, data.prompts, strict=True) if text == prompt][:shown_seeds]
        for images in columns.values():
            row += images[i * per_prompt : i * per_prompt + shown_seeds]
        rows.append(row)
    names = [name if i == 0 else "" for name in ("data", *columns) for i in range(shown_seeds)]
    sample_grid(rows, captions(), path, column_labels=names)


def main(
    quickstart_dir: Path = Path("quickstart"),
    model: str = "retrained",
    seeds: int = 16,
    guidance_scales: Sequence[float] = GUIDANCE_SCALES,
    figure: Path | None = None,
) -> dict[str, list[Figures]]:
    """Generate, measure, print.

    Args:
        quickstart_dir: where the quickstart put its models.
        model: which of them.
        seeds: images per prompt.
        guidance_scales: each at least 1.
        figure: where to draw samples, if at all.

    Returns:
        The figures of each remedy, by name, one for each guidance scale.
    """
    if not (quickstart_dir / model / "model_index.json").exists():
        raise SystemExit(f"{quickstart_dir / model} holds no pipeline; run examples/quickstart.py first.")
    datasets.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    generator = Generator(quickstart_dir / model, seeds)
    data = Data(quickstart_dir / "landscapes", generator)
    rows = measure(generator, data, guidance_scales)
    show(rows, guidance_scales, len(generator.prompts))
    if figure is not None:
        draw(figure, generator, data)
        print(f"\nPicture: {figure}")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart_dir", type=Path, default=Path("quickstart"), help="default: quickstart")
    parser.add_argument("--model", default="retrained", help="a folder in there (default: retrained)")
    parser.add_argument("--seeds", type=int, default=16, help="images per prompt (default: 16)")
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=GUIDANCE_SCALES, help="default: 1 to 12")
    parser.add_argument("--figure", type=Path, help="draw samples into this file")
    arguments = parser.parse_args()
    main(**vars(arguments))
