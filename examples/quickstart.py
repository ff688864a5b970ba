"""See the paper's claim happen, in minutes on a laptop and without a download.

    python examples/quickstart.py                 # a small Stable Diffusion with captions
    python examples/quickstart.py --mode pixels   # no text, no autoencoder: the schedule's own share

A Stable Diffusion of stock classes is trained as Stable Diffusion was (epsilon, a schedule that never reaches pure
noise, sampled from a timestep that is not the last). It generates medium grey whatever the prompt asks for. The same
weights are then trained on, as `finetune_stable_diffusion.py` would, in two ways: with v-loss on the same flawed
schedule, and with v-loss on zero terminal SNR. Beside them stands the flawed model as it is, with a start: the low
frequencies that it expects in x_T, fitted to the same images in seconds. All four generate the same prompts from the
same seeds.

Everything lands in `--output_dir`: each pipeline with its checkpoints and logs, `before_after.png`, `samples.png` and
`brightness.png`.
Run it again and it goes on where it was.
"""

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# transformers and diffusers announce, on import, what they would do with libraries that nobody here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import datasets
import diffusers
import numpy as np
import transformers
from diffusers import DiffusionPipeline
from landscapes import captions, make_landscapes, read_landscapes
from PIL import Image, ImageDraw, ImageFont, ImageOps
from small_stable_diffusion import build_stable_diffusion, train_vae

from zsnr_diffusers import enable_start, load_pipeline
from zsnr_diffusers.evaluation import (
    generate_images,
    luminance_coverage,
    mean_luminance,
    plot_luminance,
    prompt_share,
    sample_grid,
)
from zsnr_diffusers.start import START_FILE, StartReport, fit_start
from zsnr_diffusers.training import TrainingConfig, train

GUIDANCE_SCALE, GUIDANCE_RESCALE = 1.5, 0.7
SEEDS_SHOWN = 5


@dataclass
class Arm:
    """One of the pipelines that are compared."""

    name: str
    folder: Path
    base: Path
    prediction_type: str
    rescale_betas_zero_snr: bool
    steps: int
    start: Path | None = None
    """In place of training."""

    @property
    def guidance_rescale(self) -> float:
        """Part of the fix, so no part of what is compared with it."""
        return GUIDANCE_RESCALE if self.rescale_betas_zero_snr else 0.0


@dataclass
class Sizes:
    """How much of everything; the defaults take some six minutes on two CPU cores."""

    images: int = 1200
    vae_steps: int = 400
    flawed_steps: int = 900
    retrained_steps: int = 900
    seeds: int = 16
    num_inference_steps: int = 25


def main(
    output_dir: Path = Path("quickstart"), seed: int = 0, sizes: Sizes | None = None
) -> dict[str, dict[str, float]]:
    """Train, sample, compare.

    Args:
        output_dir: where everything goes.
        seed: decides on all randomness.
        sizes: how much of everything.

    Returns:
        The overall figures of each row of the table, by name.
    """
    sizes = sizes or Sizes()
    quieten_libraries()
    data = output_dir / "landscapes"
    if not (data / "metadata.jsonl").exists():
        make_landscapes(data, sizes.images, seed=seed)
    untrained = prepare_base(output_dir, data, seed, sizes)

    flawed, stock, retrained = (output_dir / name for name in ("flawed", "v-stock-schedule", "retrained"))
    arms = [
        Arm("flawed: epsilon, stock schedule", flawed, untrained, "epsilon", False, sizes.flawed_steps),
        Arm("v-loss on the stock schedule", stock, flawed, "v_prediction", False, sizes.retrained_steps),
        Arm("retrained: v-loss, zero SNR", retrained, flawed, "v_prediction", True, sizes.retrained_steps),
    ]
    for arm in arms:
        print(f"\n== {arm.name}")
        train(
            TrainingConfig(
                pretrained_model_name_or_path=str(arm.base),
                train_data_dir=str(data),
                output_dir=str(arm.folder),
                prediction_type=arm.prediction_type,
                rescale_betas_zero_snr=arm.rescale_betas_zero_snr,
                max_train_steps=arm.steps,
                train_batch_size=16,
                learning_rate=1e-3,
                lr_warmup_steps=50,
                ema_decay=0.999,
                checkpointing_steps=300,
                luminance_images=0,  # measured when all is done
                dataloader_num_workers=0,  # so small a network is faster than what they would cost
                guidance_rescale=arm.guidance_rescale,
                seed=seed,
                resume=True,
            )
        )
    print("\n== flawed, with a start")
    start = fit_start_of(flawed, data, output_dir / START_FILE)
    arms.insert(1, Arm("flawed, with a start: nothing trained", flawed, flawed, "epsilon", False, 0, start))
    return compare(output_dir, data, arms, sizes)


def fit_start_of(base: Path, data: Path, file: Path) -> Path:
    """Fit a start to the images that the base was trained on; no weight of it is changed."""
    rows = datasets.load_dataset("imagefolder", data_dir=str(data), split="train")
    start = fit_start(DiffusionPipeline.from_pretrained(base), list(rows["image"]), list(rows["text"]))
    print(StartReport.of(start.report))
    return start.save(file)


def quieten_libraries() -> None:
    """Leave the terminal to our own progress bars."""
    for library in (datasets, diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()


def prepare_base(output_dir: Path, data: Path, seed: int, sizes: Sizes) -> Path:
    """A pipeline with a trained autoencoder and an untrained UNet."""
    folder = output_dir / "untrained"
    if not (folder / "model_index.json").exists():
        pipe = build_stable_diffusion(seed)
        train_vae(pipe.vae, read_landscapes(data), sizes.vae_steps, seed=seed)
        pipe.save_pretrained(folder)
    return folder


def compare(output_dir: Path, data: Path, arms: list[Arm], sizes: Sizes) -> dict[str, dict[str, float]]:
    """Generate the same prompts from the same seeds with each arm; print the tables, draw the images."""
    rows = datasets.load_dataset("imagefolder", data_dir=str(data), split="train")
    real = mean_luminance(rows["image"])
    real_prompts = list(rows["text"])
    prompts = [prompt for prompt in captions() for _ in range(sizes.seeds)]
    generated: dict[str, list[Image.Image]] = {}
    for arm in arms:
        pipe = load_pipeline(arm.folder)  # with the guidance that training has recorded
        if arm.start is not None:
            enable_start(pipe, arm.start)
        for guidance_scale, how in ((1.0, ""), (GUIDANCE_SCALE, f", guidance {GUIDANCE_SCALE:g}")):
            print(f"generating with {arm.name}{how}")
            generated[arm.name + how] = generate_images(
                pipe,
                prompts,
                [*range(sizes.seeds)] * len(captions()),
                batch_size=24,
                num_inference_steps=sizes.num_inference_steps,
                guidance_scale=guidance_scale,
            )
    luminance = {name: mean_luminance(images) for name, images in generated.items()}
    figures = print_overall(real, real_prompts, luminance, prompts)
    print_per_prompt(real, real_prompts, {arm.name: luminance[arm.name] for arm in arms}, prompts)
    plot_luminance(output_dir / "brightness.png", {arm.name: luminance[arm.name] for arm in arms}, real)
    draw_samples(output_dir / "samples.png", {arm.name: generated[arm.name] for arm in arms}, sizes.seeds)
    draw_before_after(
        output_dir / "before_after.png",
        {
            "before: default noise schedule": by_prompt(generated[arms[0].name], prompts),
            "after: zero terminal SNR": by_prompt(generated[arms[-1].name], prompts),
            "real images": by_prompt(rows["image"], real_prompts),
        },
    )
    print_verdict(figures, [arm.name for arm in arms], output_dir)
    return figures


def by_prompt(images: Iterable[Image.Image], prompts: Sequence[str]) -> dict[str, list[Image.Image]]:
    """The images of each prompt, in order."""
    found: dict[str, list[Image.Image]] = {prompt: [] for prompt in captions()}
    for image, prompt in zip(images, prompts, strict=True):
        found[prompt].append(image)
    return found


def print_overall(real, real_prompts, luminance, prompts) -> dict[str, dict[str, float]]:
    """One row per arm and guidance, and the data's."""
    print(f"\nMean luminance per image (-1 black, 1 white), {len(prompts)} images each")
    print(f"{'':52} {'mean':>6} {'W1':>6} {'floor':>6} {'p5':>6} {'p95':>6} {'by prompt':>13}")
    figures = {}
    for name, values in luminance.items():
        coverage = luminance_coverage(values, real, groups=(prompts, real_prompts))
        share = prompt_share(values, prompts)
        ours = coverage.generated
        figures[name] = {"w1": coverage.w1, "p5": ours.p5, "p95": ours.p95, "share": share}
        print(
            f"{name:52} {ours.mean:6.2f} {coverage.w1:6.3f} {coverage.floor:6.3f} {ours.p5:6.2f} {ours.p95:6.2f} "
            f"{share:13.2f}"
        )
    data, share = coverage.real, prompt_share(real, real_prompts)
    figures["data"] = {"w1": 0.0, "p5": data.p5, "p95": data.p95, "share": share}
    print(f"{'data':52} {data.mean:6.2f} {'':6} {'':6} {data.p5:6.2f} {data.p95:6.2f} {share:13.2f}")
    print("W1: Wasserstein distance to the data; floor: its expected value for a perfect model with as many images.")
    print("Guidance exaggerates what a prompt asks for, so it moves even a perfect model away from the data.")
    print("by prompt: fraction of the variance of brightness that the prompt explains, rather than the seed.")
    return figures


def print_per_prompt(real, real_prompts, luminance, prompts) -> None:
    """Mean and Wasserstein distance of each prompt's images, without guidance."""
    print("\nper prompt, without guidance: mean, 5th to 95th percentile (W1, its floor)")
    names = [*luminance, "data"]
    print(" " * 20 + "".join(f"{name.split(':')[0]:>36}" for name in names))
    for prompt in captions():
        cells, truth = [], real[np.array(real_prompts) == prompt]
        for values in luminance.values():
            coverage = luminance_coverage(values[np.array(prompts) == prompt], truth)
            ours = coverage.generated
            cells.append(
                f"{ours.mean:5.2f}, {ours.p5:5.2f} to {ours.p95:5.2f} ({coverage.w1:.2f}, {coverage.floor:.2f})"
            )
        p5, p95 = np.percentile(truth, [5, 95])
        cells.append(f"{truth.mean():5.2f}, {p5:5.2f} to {p95:5.2f}")
        print(f"{prompt:20}" + "".join(f"{cell:>36}" for cell in cells))


def print_verdict(figures, names, output_dir) -> None:
    """The claim in one paragraph, from the figures."""
    flawed, started, stock, retrained = (figures[name] for name in names)
    data = figures["data"]
    print(
        f"\nRetrained, the model is {flawed['w1'] / retrained['w1']:.1f} times closer to the data's brightness than "
        f"before (W1 {flawed['w1']:.3f} -> {retrained['w1']:.3f}), and v-loss on the stock schedule alone gets to "
        f"{stock['w1']:.3f}.\nIt generates from {retrained['p5']:.2f} to {retrained['p95']:.2f} (the data: "
        f"{data['p5']:.2f} to {data['p95']:.2f}), and the prompt decides {retrained['share']:.0%} of it "
        f"(before: {flawed['share']:.0%}).\nWith a start and its weights as they were, the flawed model gets to W1 "
        f"{started['w1']:.3f}, {started['p5']:.2f} to {started['p95']:.2f}, and the prompt decides "
        f"{started['share']:.0%}.\nImages: before_after.png, samples.png and brightness.png in {output_dir}. "
        f"The pipeline: {output_dir / 'retrained'}"
    )


def draw_samples(path: Path, generated: dict[str, list[Image.Image]], seeds: int) -> None:
    """One block per arm: rows are prompts, columns are seeds."""
    blocks = []
    for name, images in generated.items():
        rows = [images[i : i + min(SEEDS_SHOWN, seeds)] for i in range(0, len(images), seeds)]
        blocks.append((name, sample_grid(rows, captions() if not blocks else None)))
    title = 16
    sheet = Image.new("RGB", (sum(b.width for _, b in blocks), max(b.height for _, b in blocks) + title), "white")
    left = 0
    for name, block in blocks:
        sheet.paste(block, (left, title))
        ImageDraw.Draw(sheet).text((left + block.width - 5 * 68, 2), name, "black")
        left += block.width
    sheet.save(path)


def draw_before_after(
    path: Path, blocks: Mapping[str, Mapping[str, Sequence[Image.Image]]], columns: int = 3, cell: int = 128
) -> None:
    """Draw the darkest, the middle and the brightest prompt, in blocks side by side, each under its title.

    Args:
        path: of the image.
        blocks: by title, the images of each prompt.
        columns: images of a row of a block.
        cell: side of an image, in pixels.
    """
    prompts = [captions()[place] for place in (0, 3, 5)]
    font, gap, margin, top = ImageFont.load_default(size=22), 4, 120, 36
    width = columns * (cell + gap) + 5 * gap
    sheet = Image.new("RGB", (margin + len(blocks) * width, top + len(prompts) * (cell + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, prompt in enumerate(prompts):
        y = top + row * (cell + gap)
        draw.multiline_text((gap, y + cell // 4), prompt.replace(" landscape", "\nlandscape"), "black", font)
        for block, images in enumerate(blocks.values()):
            for column, image in enumerate(images[prompt][:columns]):
                tile = ImageOps.fit(image, (cell, cell), Image.Resampling.BICUBIC)
                sheet.paste(tile, (margin + block * width + column * (cell + gap), y))
    for block, title in enumerate(blocks):
        draw.text((margin + block * width, gap), title, "black", font)
    sheet.save(path)


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
