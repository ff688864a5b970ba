"""See the paper's claim happen, in minutes on a laptop and without a download.

    python examples/quickstart.py                 # a small Stable Diffusion with captions
    python examples/quickstart.py --mode pixels   # no text, no autoencoder: the schedule's own share

A Stable Diffusion of stock classes is trained as Stable Diffusion was (epsilon, a schedule that never reaches pure
noise, sampled from a timestep that is not the last). It generates medium grey whatever the prompt asks for. The same
weights are then trained on, as `finetune_stable_diffusion.py` would, in two ways: with v-loss on the same flawed
schedule, and with v-loss on zero terminal SNR. Beside them stands the flawed model as it is, with a start: the low
frequencies that it expects in x_T, fitted to the same images in seconds. All four generate the same prompts from the
same seeds.

Everything lands in `--output_dir`; its README.md says what is what. Run it again and it goes on where it was.
"""

import argparse
import functools
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# Before torch is imported. Threads of such small networks meet thousands of times a second: two of them train no
# faster than one on idle cores, and many times more slowly where another program wants a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# transformers and diffusers announce, on import, what they would do with libraries that nobody here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import datasets
from diffusers import DiffusionPipeline
from landscapes import captions, make_landscapes
from PIL import Image
from quickstart_progress import Advance, Part, quieten_libraries, run_parts
from quickstart_report import (
    REAL,
    Figures,
    by_prompt,
    draw_before_after,
    draw_samples,
    overall_figures,
    overall_table,
    prompt_table,
    short,
    verdict,
    write_readme,
)
from small_stable_diffusion import build_stable_diffusion, train_vae_on_landscapes
from small_training import train_stable_diffusion

from zsnr_diffusers import enable_start, load_pipeline
from zsnr_diffusers.evaluation import mean_luminance, plot_luminance
from zsnr_diffusers.evaluation.generation import iter_images
from zsnr_diffusers.start import START_FILE, StartReport, fit_start

GUIDANCE_RESCALE = 0.7
START_NOISE = 1.0
"""All of the noise at low frequencies, as in training: W1 is lower than without, and the prompt still decides."""

COMMON_SEEDS = 3
"""The first images of each prompt have the seeds of the other prompts' first images; they are in the pictures."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults take minutes on two CPU cores."""

    images: int = 1200
    vae_steps: int = 400
    flawed_steps: int = 480
    retrained_steps: int = 400
    images_per_prompt: int = 32
    num_inference_steps: int = 10


@dataclass(frozen=True)
class Arm:
    """One of the pipelines that are compared.

    Attributes:
        name: as in `quickstart_report`.
        folder: of the pipeline, in the output folder.
        base: what it is trained from, likewise; none where nothing is trained.
        prediction_type: that is trained.
        rescale_betas_zero_snr: whether the schedule is.
    """

    name: str
    folder: str
    base: str = ""
    prediction_type: str = "v_prediction"
    rescale_betas_zero_snr: bool = False

    @property
    def images(self) -> str:
        """The folder of its images, in that of all images."""
        return self.folder if self.base else f"{self.folder}-with-start"


ARMS = (
    Arm("flawed: epsilon, default schedule", "flawed", "untrained", "epsilon"),
    Arm("with a start: the same weights", "flawed"),
    Arm("v-loss: on the default schedule", "v-stock-schedule", "flawed"),
    Arm("retrained: v-loss, zero terminal SNR", "retrained", "flawed", rescale_betas_zero_snr=True),
)


class Quickstart:
    """What is made, in which folder, of which sizes.

    Args:
        folder: where everything goes.
        seed: decides on all randomness.
        sizes: how much of everything.
    """

    def __init__(self, folder: Path, seed: int, sizes: Sizes) -> None:
        self.folder, self.seed, self.sizes = folder, seed, sizes
        self.data = folder / "landscapes"
        count = sizes.images_per_prompt
        self.prompts = [prompt for prompt in captions() for _ in range(count)]
        self.seeds = [place % count if place % count < COMMON_SEEDS else place for place in range(len(self.prompts))]

    def parts(self) -> list[Part]:
        """Everything that takes time, with the seconds that one core needs for it."""
        sizes, trained = self.sizes, [arm for arm in ARMS if arm.base]
        parts = [
            Part("drawing landscapes", sizes.images / 350, self.draw_landscapes, self.data / "metadata.jsonl"),
            Part("training the autoencoder", sizes.vae_steps / 18, self.train_autoencoder, self.folder / "untrained"),
        ]
        for arm in trained:
            train, result = functools.partial(self.train, arm), self.folder / arm.folder / "model_index.json"
            parts.append(Part(f"training: {short(arm.name)}", self.steps(arm) / 7, train, result))
        parts.append(Part("fitting the start", sizes.images / 150, self.fit_start, self.folder / START_FILE))
        for arm in ARMS:
            seconds = len(self.prompts) * (sizes.num_inference_steps + 3) / 350
            generate, result = functools.partial(self.generate, arm), self.image_files(arm)[-1].parent
            parts.append(Part(f"images: {short(arm.name)}", seconds, generate, result))
        return parts

    def draw_landscapes(self, advance: Advance) -> None:
        """Draw the training images."""
        make_landscapes(self.data, self.sizes.images, seed=self.seed)

    def train_autoencoder(self, advance: Advance) -> None:
        """Save a pipeline with a trained autoencoder and an untrained UNet."""
        pipe = build_stable_diffusion(self.seed)
        train_vae_on_landscapes(pipe.vae, self.data, self.sizes.vae_steps, self.seed, advance)
        pipe.save_pretrained(self.folder / "untrained")

    def steps(self, arm: Arm) -> int:
        """Training steps of an arm."""
        return self.sizes.flawed_steps if arm.base == "untrained" else self.sizes.retrained_steps

    def train(self, arm: Arm, advance: Advance) -> None:
        """Train an arm, as `zsnr train` would."""
        output, steps = self.folder / arm.folder, self.steps(arm)
        train_stable_diffusion(
            output,
            steps,
            lambda step: advance(step / steps),
            pretrained_model_name_or_path=str(self.folder / arm.base),
            train_data_dir=str(self.data),
            cache_dir=str(self.folder / "cache"),
            prediction_type=arm.prediction_type,
            rescale_betas_zero_snr=arm.rescale_betas_zero_snr,
            guidance_rescale=GUIDANCE_RESCALE if arm.rescale_betas_zero_snr else 0.0,
            learning_rate=2e-3,
            checkpointing_steps=300,
            seed=self.seed,
        )
        if arm is ARMS[-1]:
            shutil.rmtree(self.folder / "cache")

    def fit_start(self, advance: Advance) -> None:
        """Fit a start to the images that the flawed model was trained on; no weight of it is changed."""
        rows = self.rows()
        pipe = DiffusionPipeline.from_pretrained(self.folder / "flawed")
        start = fit_start(pipe, list(rows["image"]), list(rows["text"]), noise=START_NOISE)
        print(StartReport.of(start.report))
        start.save(self.folder / START_FILE)

    def generate(self, arm: Arm, advance: Advance) -> None:
        """Generate the images of an arm, without guidance."""
        pipe = load_pipeline(self.folder / arm.folder)
        if not arm.base:
            enable_start(pipe, self.folder / START_FILE)
        files = self.image_files(arm)
        files[0].parent.mkdir(parents=True, exist_ok=True)
        images = iter_images(
            pipe,
            self.prompts,
            self.seeds,
            batch_size=32,
            num_inference_steps=self.sizes.num_inference_steps,
            guidance_scale=1.0,
        )
        for i, (image, file) in enumerate(zip(images, files, strict=True)):
            image.save(file)
            advance((i + 1) / len(files))

    def image_files(self, arm: Arm) -> list[Path]:
        """A file for each prompt and seed."""
        names = [f"{p.replace(' ', '-')}-{seed:03}.png" for p, seed in zip(self.prompts, self.seeds, strict=True)]
        return [self.folder / "images" / arm.images / name for name in names]

    def rows(self) -> datasets.Dataset:
        """The training images with their captions."""
        return datasets.load_dataset("imagefolder", data_dir=str(self.data), split="train")

    def compare(self) -> Figures:
        """Measure what was generated, print the tables, draw the pictures."""
        rows = self.rows()
        real, real_prompts = mean_luminance(rows["image"]), list(rows["text"])
        images = {arm.name: open_images(self.image_files(arm)) for arm in ARMS}
        luminance = {name: mean_luminance(some) for name, some in images.items()}
        figures = overall_figures(luminance, self.prompts, real, real_prompts)
        tables = overall_table(figures, len(self.prompts))
        tables += f"\n\n{prompt_table(luminance, self.prompts, real, real_prompts)}"
        print(f"\n{tables}\n\n{verdict(figures)}")

        blocks = {short(name): by_prompt(some, self.prompts) for name, some in images.items()}
        blocks[REAL] = by_prompt(rows["image"], real_prompts)
        flawed, *_, retrained, originals = blocks.values()
        plot_luminance(self.folder / "brightness.png", luminance, real)
        draw_samples(self.folder / "samples.png", blocks, COMMON_SEEDS)
        draw_before_after(self.folder / "before_after.png", flawed, retrained, originals)
        write_readme(self.folder, tables, len(rows))
        print(f"Pictures, models and what to do with them: {self.folder / 'README.md'}")
        return figures


def open_images(files: Sequence[Path]) -> list[Image.Image]:
    """Images of files, read whole."""
    images = [Image.open(file) for file in files]
    for image in images:
        image.load()
    return images


def main(output_dir: Path = Path("quickstart"), seed: int = 0, sizes: Sizes | None = None) -> Figures:
    """Train, sample, compare.

    Args:
        output_dir: where everything goes.
        seed: decides on all randomness.
        sizes: how much of everything.

    Returns:
        The figures of each row of the table, by name.
    """
    quieten_libraries()
    quickstart = Quickstart(output_dir, seed, sizes or Sizes())
    run_parts(quickstart.parts(), output_dir / "progress.json", {"seed": seed, **asdict(quickstart.sizes)})
    return quickstart.compare()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=["latent", "pixels"], default="latent", help="default: latent")
    parser.add_argument("--output_dir", type=Path, default=Path("quickstart"), help="default: quickstart")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    arguments = parser.parse_args()
    if arguments.mode == "pixels":
        import pixel_landscapes

        pixel_landscapes.main(arguments.output_dir, arguments.seed)
    else:
        main(arguments.output_dir, arguments.seed)
