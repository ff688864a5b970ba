"""One zero-SNR LoRA for all fine-tunes of a base: does it work on those that it never saw?

    python examples/quickstart.py                              # makes quickstart/flawed and quickstart/retrained
    python examples/benchmarks/lora_transfer.py

The quickstart's flawed model is the base, of epsilon and a stock schedule. It is fine-tuned as most models are, with
epsilon on its own schedule, to landscapes of another season, with the captions of the base or with captions that the
base never saw. Nothing of zero SNR is trained on these. Then each gets, by the weights of others alone:

- `trained LoRA`: a LoRA that the trainer made on the base, from epsilon to v and zero terminal SNR.
- `extracted LoRA`: the difference between the quickstart's retrained model and the base, cut to a rank by
  `extract_lora`.
- `whole difference`: fine-tune + (retrained - base), all weights, biases and norms too (Ilharco et al. 2023,
  arXiv:2212.04089).

Printed for each, without guidance: W1 of the brightness to the data of the fine-tune, with its floor; how much of the
brightness the prompt explains; and the style, 0 that of the base's data and 1 that of the fine-tune's. It is measured
by what sets the seasons apart: the color of the ground against that of the sky, in logits, at equal brightness.

One run: W1 on autumn and winter falls from 0.41 and 0.42 to 0.08 and 0.04 with the extracted LoRA of rank 16, and to
0.21 and 0.11 with the trained one (floor 0.04). The style falls from 0.66 and 0.60 to 0.04 and 0.13, and to 0.29 and
0.19; the retrained model itself has 0.17. With fine-tunes that changed 20% of the weights' norm
instead of 7 to 8% (`--finetune_rate 1e-3`), W1 is 0.08 and 0.10, and 0.05 and 0.20, the style 0.17 and 0.13, and 0.49
and 0.23. With captions that the base never saw W1 is 0.54 or more at the default rate, and 0.23 or more at the other.
"""

import argparse
import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import numpy as np
from diffusers import DiffusionPipeline
from landscapes import captions, make_landscapes
from numpy.typing import NDArray
from PIL import Image
from quickstart_progress import quieten_libraries

from zsnr_diffusers import load_lora, save_lora
from zsnr_diffusers.evaluation import (
    generate_images,
    luminance_coverage,
    mean_luminance,
    prompt_share,
    sample_grid,
)
from zsnr_diffusers.hub import extract_lora
from zsnr_diffusers.training import TrainingConfig, train

Array = NDArray[np.float64]
Figures = dict[str, float]


@dataclass(frozen=True)
class Target:
    """A model to put a LoRA into, and the data that it was trained on.

    Attributes:
        name: of the table's rows, and of its folder.
        season: of `SEASONS`.
        ending: of its captions.
    """

    name: str
    season: str = "summer"
    ending: str = ""


BASE = Target("base")
FINE_TUNES = (
    Target("autumn", "autumn"),
    Target("winter", "winter"),
    Target("winter-captioned", "winter", " in winter"),
)


@dataclass(frozen=True)
class Study:
    """Where everything is, and how much of it.

    Attributes:
        quickstart: the folder of the quickstart.
        output_dir: where everything else goes.
        images: of each fine-tune's data.
        finetune_steps: of each fine-tune.
        finetune_rate: learning rate, likewise.
        lora_steps: of each trained LoRA.
        lora_ranks: of these.
        ranks: to extract.
        pictures: generated per prompt.
        steps: of sampling.
    """

    quickstart: Path
    output_dir: Path
    images: int = 600
    finetune_steps: int = 300
    finetune_rate: float = 2e-4
    lora_steps: int = 600
    lora_ranks: tuple[int, ...] = (4, 16)
    ranks: tuple[int, ...] = (4, 16, 64)
    pictures: int = 8
    steps: int = 20

    @property
    def base(self) -> Path:
        """The folder of the base."""
        return self.quickstart / "flawed"

    @property
    def retrained(self) -> Path:
        """The folder of what was retrained from the base."""
        return self.quickstart / "retrained"

    def model(self, target: Target) -> Path:
        """The folder of a target."""
        return self.base if target == BASE else self.output_dir / target.name

    def data(self, target: Target) -> Path:
        """The folder of what a target was trained on."""
        return self.quickstart / "landscapes" if target == BASE else self.output_dir / f"{target.name}-landscapes"


def prepare(study: Study) -> None:
    """Make data, fine-tunes and LoRAs; what is there of a run already is not trained again."""
    for target in FINE_TUNES:
        data = study.data(target)
        if not (data / "metadata.jsonl").exists():
            make_landscapes(data, study.images, seed=1, season=target.season, ending=target.ending)
        train_from_base(study, data, study.model(target), "epsilon", study.finetune_steps, study.finetune_rate)
    for rank in study.lora_ranks:
        folder = study.output_dir / f"trained-{rank}"
        train_from_base(study, study.data(BASE), folder, "v_prediction", study.lora_steps, 2e-3, lora_rank=rank)
    for rank in study.ranks:
        extracted = extract_lora(study.retrained, study.base, rank, progress=False)
        save_lora(extracted.pipeline, study.output_dir / f"extracted-{rank}")
        print(f"\n{extracted}")


def train_from_base(
    study: Study, data: Path, output_dir: Path, prediction_type: str, steps: int, learning_rate: float, **options: Any
) -> None:
    """Train the base on: with epsilon on its own schedule, or with v on zero terminal SNR."""
    print(f"\n== {output_dir}", flush=True)
    train(
        TrainingConfig(
            pretrained_model_name_or_path=str(study.base),
            train_data_dir=str(data),
            output_dir=str(output_dir),
            prediction_type=prediction_type,
            rescale_betas_zero_snr=prediction_type == "v_prediction",
            max_train_steps=steps,
            train_batch_size=16,
            learning_rate=learning_rate,
            lr_warmup_steps=min(50, steps),
            ema_decay=0.999,
            luminance_images=0,
            dataloader_num_workers=0,
            guidance_rescale=0.0,  # images are made without guidance
            resume=True,
            **options,
        )
    )


def add_difference(target: Any, added: Any, subtracted: Any) -> Any:
    """A pipeline with the difference of two others' UNets added to its own, and the scheduler of the first."""
    pipe = copy.copy(target)
    pipe.unet, pipe.scheduler = copy.deepcopy(target.unet), added.scheduler
    plus, minus = added.unet.state_dict(), subtracted.unet.state_dict()
    own = target.unet.state_dict()
    pipe.unet.load_state_dict({name: value + plus[name] - minus[name] for name, value in own.items()})
    return pipe


def candidates(study: Study, target: Target) -> Iterator[tuple[str, Any]]:
    """What is measured on a target, by name."""
    load, model = DiffusionPipeline.from_pretrained, study.model(target)
    yield "as it is", load(model)
    loras = [("trained", rank) for rank in study.lora_ranks] + [("extracted", rank) for rank in study.ranks]
    for kind, rank in loras:
        yield f"{kind} LoRA, rank {rank}", load_lora(load(model), study.output_dir / f"{kind}-{rank}")
    retrained = load(study.retrained)
    yield "whole difference", add_difference(load(model), retrained, load(study.base))
    if target != BASE:
        yield "the retrained model itself", retrained


def palettes(images: list[Image.Image]) -> Array:
    """Of each image the mean logits of red, green and blue in the lowest quarter less those in the highest: [n, 3]."""
    shares = (np.stack([np.asarray(image.convert("RGB")) for image in images]) + 0.5) / 256
    rows = np.log(shares / (1 - shares)).mean(axis=2)
    quarter = rows.shape[1] // 4
    difference: Array = rows[:, -quarter:].mean(axis=1) - rows[:, :quarter].mean(axis=1)
    return difference


@dataclass(frozen=True)
class PaletteCurve:
    """The palette of images by their brightness, since skies change with the hour: a cubic through those of data."""

    coefficients: Array

    @classmethod
    def of(cls, images: list[Image.Image]) -> "PaletteCurve":
        """That of images of all brightnesses."""
        return cls(np.polyfit(mean_luminance(images), palettes(images), 3))

    def at(self, luminance: Array) -> Array:
        """The palettes [n, 3] of images of some brightnesses [n]."""
        return np.stack([np.polyval(column, luminance) for column in self.coefficients.T], axis=1)


def style(images: list[Image.Image], own: PaletteCurve, of_base: PaletteCurve) -> float:
    """How far images are on the way from the palette of the base's data (0) to that of the fine-tune's (1)."""
    luminance = mean_luminance(images)
    start = of_base.at(luminance)
    way = own.at(luminance) - start
    return float(np.sum((palettes(images) - start) * way) / np.sum(way**2)) if way.any() else 0.0


def measure(study: Study, target: Target) -> dict[str, Figures]:
    """Generate with every candidate of a target, print a row for each, draw the images; the figures by candidate."""
    rows, of_base = (
        datasets.load_dataset("imagefolder", data_dir=str(study.data(one)), split="train") for one in (target, BASE)
    )
    real, real_prompts = mean_luminance(rows["image"]), list(rows["text"])
    curves = PaletteCurve.of(rows["image"]), PaletteCurve.of(of_base["image"])
    texts, figures, shown = captions(target.ending), {}, {}
    prompts = [prompt for prompt in texts for _ in range(study.pictures)]
    for name, pipe in candidates(study, target):
        seeds = [*range(study.pictures)] * len(texts)
        call = {"num_inference_steps": study.steps, "guidance_scale": 1.0}
        images = generate_images(pipe, prompts, seeds, batch_size=24, **call)
        luminance = mean_luminance(images)
        coverage = luminance_coverage(luminance, real, groups=(prompts, real_prompts))
        found = {"w1": coverage.w1, "floor": coverage.floor, "share": prompt_share(luminance, prompts)}
        figures[name] = found | {"style": style(images, *curves)}
        cells = "".join(f"{value:8.3f}" for value in figures[name].values())
        print(f"{target.name + ': ' + name:46}{cells}", flush=True)
        shown[name] = images[:: study.pictures]
    shown["data"] = [rows["image"][real_prompts.index(text)] for text in texts]
    sample_grid([*shown.values()], [*shown]).save(study.output_dir / f"{target.name}.png")
    return figures


def main(argv: list[str] | None = None) -> dict[str, dict[str, Figures]]:
    """Train what is not there yet, measure, print the table; the figures by target and candidate."""
    parser = argparse.ArgumentParser(description="A zero-SNR LoRA of a base in its fine-tunes.", epilog=__doc__)
    parser.add_argument("--quickstart", type=Path, default=Path("quickstart"), help="default: %(default)s")
    parser.add_argument("--output_dir", type=Path, default=Path("transfer"), help="default: %(default)s")
    for name in ("images", "finetune_steps", "finetune_rate", "lora_steps", "pictures", "steps"):
        default = getattr(Study, name)
        parser.add_argument(f"--{name}", type=type(default), default=default, help="default: %(default)s")
    for name in ("lora_ranks", "ranks"):
        parser.add_argument(
            f"--{name}", type=int, nargs="+", default=getattr(Study, name), help="default: %(default)s"
        )
    args = parser.parse_args(argv)
    if not (args.quickstart / "retrained" / "model_index.json").exists():
        parser.error(f"{args.quickstart} holds no models: run python examples/quickstart.py, or pass --quickstart.")
    quieten_libraries()
    study = Study(**vars(args))
    prepare(study)
    print(f"\n{'':46}{'W1':>8}{'floor':>8}{'share':>8}{'style':>8}")
    figures = {target.name: measure(study, target) for target in (BASE, *FINE_TUNES)}
    print(
        "W1: distance of brightness to the data; floor: that of a perfect model. share: what the prompt explains of "
        "the brightness.\nstyle: 0 is the base's data, 1 the fine-tune's; to be read beside the fine-tune as it is."
    )
    return figures


if __name__ == "__main__":
    main()
