"""From text to an image, and from a text and an image to an image, in two ways.

    python examples/quickstart.py && python examples/edit_landscapes.py

The quickstart's retrained model is asked for landscapes from black to white three times. With a text alone. With a
text and an image of another brightness that it starts from, noised: image-to-image, whose strength trades the one for
the other. And with an instruction and an image that it sees while it generates: InstructPix2Pix (Brooks et al. 2023,
arXiv:2211.09800), for which its UNet gets four channels more and is trained on, with v-loss on zero terminal SNR, on
pairs of one scene at two times of day.

Printed for each: how far the brightness is from what was asked, and how much of the image's outlines is kept. Draws
`editing.png`, and leaves the InstructPix2Pix pipeline in `instruct-pix2pix`, both beside the pipeline.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from landscapes import BRIGHTEST, BRIGHTNESS_WORDS, caption, captions, landscape
from numpy.typing import NDArray
from PIL import Image
from quickstart_progress import quieten_libraries
from small_training import minimize
from torch import Tensor

from zsnr_diffusers import (
    ZeroSNRMultistepScheduler,
    ZeroSNRStableDiffusionImg2ImgPipeline,
    ZeroSNRStableDiffusionInstructPix2PixPipeline,
    ZeroSNRStableDiffusionPipeline,
)
from zsnr_diffusers.core import add_noise, training_target, v_loss
from zsnr_diffusers.evaluation import mean_luminance, sample_grid
from zsnr_diffusers.evaluation.luminance import LUMA_WEIGHTS

GUIDANCE_SCALE, IMAGE_GUIDANCE_SCALE, GUIDANCE_RESCALE = 1.5, 1.5, 0.7
STRENGTHS = (0.6, 0.8, 0.9)
BATCH_SIZE, LEARNING_RATE = 16, 1e-3
CONDITION_DROPOUT = 0.05
"""Share of the pairs that are trained without text, without image, without both: each so often (section 3.2.1)."""


@dataclass
class Sizes:
    """How much of everything; the defaults take some five minutes on two CPU cores."""

    pairs: int = 1000
    steps: int = 800
    scenes: int = 16
    num_inference_steps: int = 25


@dataclass
class Task:
    """What is asked for: each of some scenes, in each brightness."""

    sources: list[Image.Image]
    asked: NDArray[np.float64]
    prompts: list[str]
    same_scene: list[Image.Image]
    other_scene: list[Image.Image]


def main(
    pipeline: Path = Path("quickstart/retrained"), seed: int = 0, sizes: Sizes | None = None
) -> dict[str, dict[str, float]]:
    """Train InstructPix2Pix; generate in all settings; print the table, draw the image.

    Args:
        pipeline: the quickstart's retrained model.
        seed: decides on all randomness.
        sizes: how much of everything.

    Returns:
        `error` of the brightness and `kept` outlines of each setting, and of the data, by name.
    """
    sizes = sizes or Sizes()
    if not (pipeline / "model_index.json").exists():
        raise SystemExit(
            f"{pipeline} holds no pipeline; make it by: python examples/quickstart.py --output_dir {pipeline.parent}"
        )
    quieten_libraries()
    # All settings are guided alike, and images that are edited keep no frequencies by default.
    guidance = {"guidance_rescale": GUIDANCE_RESCALE, "keep_low_frequencies": 0}
    base = ZeroSNRStableDiffusionPipeline.from_pretrained(pipeline, **guidance)
    # Even steps in time, so that a strength is a share of it
    base.scheduler = ZeroSNRMultistepScheduler.from_config(base.scheduler.config, timestep_spacing="trailing")
    instructed = train_to_edit(base, sizes, seed)
    instructed.save_pretrained(pipeline.parent / "instruct-pix2pix")

    task = make_task(sizes.scenes, base.unet.config.sample_size * base.vae_scale_factor, seed)
    generated = generate(base, instructed, task, sizes, seed) | {"data: the same scene": task.same_scene}
    bounds = {
        "the same, through the autoencoder": through_autoencoder(base, task.same_scene),
        "data: another scene": task.other_scene,
    }
    figures = print_table(generated | bounds, task)
    path = pipeline.parent / "editing.png"
    draw(path, generated, task)
    print(f"\nPicture: {path}")
    return figures


# The data


def brightness(word: int, share: float = 0.5) -> float:
    """The mean luminance in [-1, 1] that lies at a share of the way through what a word stands for."""
    return BRIGHTEST * (2 * (word + share) / len(BRIGHTNESS_WORDS) - 1)


def instruction(text: str) -> str:
    """What is said to a model that sees the image."""
    return f"make it {text}"


def scene(value: float, seed: int, index: int, image_size: int) -> Image.Image:
    """A scene by its number, at any time of day: brightness leaves the random numbers of `landscape` as they are."""
    return landscape(value, np.random.default_rng([seed, index]), image_size)


def make_pairs(count: int, image_size: int, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """One scene at two times of day, and the instruction that leads from the first to the second.

    Returns:
        Two batches `[count, 3, image_size, image_size]` in [-1, 1], and the texts.
    """
    rng = np.random.default_rng(seed)
    values = rng.uniform(-BRIGHTEST, BRIGHTEST, (2, count))
    before, after = (
        to_tensor([scene(value, seed, index, image_size) for index, value in enumerate(row)]) for row in values
    )
    return before, after, [instruction(caption(value)) for value in values[1]]


def make_task(scenes: int, image_size: int, seed: int) -> Task:
    """Scenes that no pair has, each at some time of day, and what they are to become."""
    rng = np.random.default_rng(seed)
    words = np.repeat(np.arange(len(BRIGHTNESS_WORDS)), scenes)
    sources = [scene(brightness(0, rng.uniform(0, 6)), seed + 1, index, image_size) for index in range(scenes)]
    targets = [brightness(word, rng.random()) for word in words]
    same, other = (
        [scene(value, seed + 1, first + i % scenes, image_size) for i, value in enumerate(targets)]
        for first in (0, scenes)
    )
    asked = np.array([brightness(word) for word in words])
    return Task(sources * len(BRIGHTNESS_WORDS), asked, [captions()[word] for word in words], same, other)


def to_tensor(pictures: list[Image.Image]) -> Tensor:
    """`[n, 3, height, width]` in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1


# InstructPix2Pix


def widen(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same network with as many input channels again, for the latents of an image beside the noisy ones.

    The new weights are zero (Brooks et al. 2023, section 3.2), so that training starts from what the network can do.
    """
    wide = UNet2DConditionModel.from_config(unet.config, in_channels=2 * unet.config.in_channels)
    weights = dict(unet.state_dict())
    weights["conv_in.weight"] = torch.cat([weights["conv_in.weight"], torch.zeros_like(weights["conv_in.weight"])], 1)
    wide.load_state_dict(weights)
    return wide.eval()


def train_to_edit(
    base: ZeroSNRStableDiffusionPipeline, sizes: Sizes, seed: int
) -> ZeroSNRStableDiffusionInstructPix2PixPipeline:
    """Make an InstructPix2Pix of a text-to-image pipeline: widen its UNet and train it on pairs with v-loss."""
    before, after, texts = make_pairs(sizes.pairs, base.unet.config.sample_size * base.vae_scale_factor, seed)
    # The pipeline gives the image's latents unscaled, as in the paper.
    pictures, latents = encode(base, before), encode(base, after) * base.vae.config.scaling_factor
    words = {text: embed(base, text) for text in {"", *texts}}
    embeds = torch.cat([words[text] for text in texts])

    unet = widen(base.unet)
    schedule = base.scheduler
    generator = torch.Generator().manual_seed(seed)

    def loss_of_a_batch() -> Tensor:
        rows = torch.randint(len(latents), (BATCH_SIZE,), generator=generator)
        without_text, without_picture = dropped(BATCH_SIZE, generator)
        text = torch.where(without_text[:, None, None], words[""], embeds[rows])
        picture = torch.where(without_picture[:, None, None, None], 0.0, pictures[rows])
        x_0 = latents[rows]
        noise = torch.randn(x_0.shape, generator=generator)
        timesteps = torch.randint(len(schedule), (BATCH_SIZE,), generator=generator)
        level = schedule.noise_level(timesteps, like=x_0)
        output = unet(torch.cat([add_noise(x_0, noise, level), picture], dim=1), timesteps, text).sample
        return v_loss(output, training_target("v_prediction", x_0, noise, level)).mean()

    minimize(unet, loss_of_a_batch, sizes.steps, LEARNING_RATE, "learning to edit")
    parts = {**base.components, "unet": unet}
    return ZeroSNRStableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)


def dropped(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which of a batch are trained without their text and which without their image."""
    draw = torch.rand(count, generator=generator) / CONDITION_DROPOUT
    return draw < 2, (draw >= 1) & (draw < 3)


@torch.no_grad()
def encode(base: ZeroSNRStableDiffusionPipeline, images: Tensor) -> Tensor:
    """Latents as the autoencoder gives them, without noise."""
    return torch.cat([base.vae.encode(part).latent_dist.mode() for part in torch.split(images, 32)])


@torch.no_grad()
def through_autoencoder(base: ZeroSNRStableDiffusionPipeline, pictures: list[Image.Image]) -> list[Image.Image]:
    """What is left of images in latents, which is about what a model that generates latents can keep."""
    return base.image_processor.postprocess(base.vae.decode(encode(base, to_tensor(pictures))).sample, "pil")


@torch.no_grad()
def embed(base: ZeroSNRStableDiffusionPipeline, text: str) -> Tensor:
    """What the UNet is given of a text, shape [1, tokens, width]."""
    return base.encode_prompt(text, base.device, 1, do_classifier_free_guidance=False)[0]


# Generating, measuring, drawing


def generate(
    base: ZeroSNRStableDiffusionPipeline,
    instructed: ZeroSNRStableDiffusionInstructPix2PixPipeline,
    task: Task,
    sizes: Sizes,
    seed: int,
) -> dict[str, list[Image.Image]]:
    """Images of the task in each setting, from the same seeds."""

    def call(name, pipe, **arguments):
        pipe.set_progress_bar_config(desc=name, leave=False)
        return pipe(
            generator=[torch.Generator().manual_seed(seed + i) for i in range(len(task.prompts))],
            num_inference_steps=sizes.num_inference_steps,
            guidance_scale=GUIDANCE_SCALE,
            guidance_rescale=GUIDANCE_RESCALE,
            **arguments,
        ).images

    generated = {"text-to-image": call("text-to-image", base, prompt=task.prompts)}
    from_image = ZeroSNRStableDiffusionImg2ImgPipeline(**base.components, requires_safety_checker=False)
    for strength in STRENGTHS:
        name = f"image-to-image, strength {strength}"
        generated[name] = call(name, from_image, prompt=task.prompts, image=task.sources, strength=strength)
    generated["InstructPix2Pix"] = call(
        "InstructPix2Pix",
        instructed,
        prompt=[instruction(prompt) for prompt in task.prompts],
        image=task.sources,
        image_guidance_scale=IMAGE_GUIDANCE_SCALE,
    )
    return generated


def outlines(picture: Image.Image) -> NDArray[np.float64]:
    """How steep the logit of the luma is at each pixel: exposure shifts the logit and leaves its edges as they are."""
    luma = np.clip(np.asarray(picture) @ LUMA_WEIGHTS, 0.5, 254.5) / 255
    logit = np.log(luma / (1 - luma))
    return np.hypot(np.diff(logit, axis=0)[:, :-1], np.diff(logit, axis=1)[:-1])


def kept(pictures: list[Image.Image], sources: list[Image.Image]) -> float:
    """Mean correlation of the outlines of images with those of their sources."""
    pairs = zip(pictures, sources, strict=True)
    return float(np.mean([np.corrcoef(*(outlines(p).ravel() for p in pair))[0, 1] for pair in pairs]))


def print_table(generated: dict[str, list[Image.Image]], task: Task) -> dict[str, dict[str, float]]:
    """One row per setting: the mean luminance by what was asked, its error, and what is left of the image."""
    figures = {}
    print("\nMean luminance (-1 black, 1 white) of what was asked for, and of what was generated")
    print("| | " + " | ".join(BRIGHTNESS_WORDS) + " | error | outlines kept |")
    print("|---" * (len(BRIGHTNESS_WORDS) + 3) + "|")
    print("| asked | " + " | ".join(f"{value:.2f}" for value in np.unique(task.asked)) + " | | |")
    for name, pictures in generated.items():
        luminance = mean_luminance(pictures)
        error, share = float(np.abs(luminance - task.asked).mean()), kept(pictures, task.sources)
        figures[name] = {"error": error, "kept": share}
        by_word = luminance.reshape(len(BRIGHTNESS_WORDS), -1).mean(axis=1)
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in by_word) + f" | {error:.3f} | {share:.2f} |")
    print("error: mean distance to what was asked; a word leaves some of it open, as the data shows.")
    print("outlines kept: correlation of the edges with the source's; 0 for unrelated scenes, and blur lowers it.")
    return figures


def draw(path: Path, generated: dict[str, list[Image.Image]], task: Task) -> None:
    """A row per setting for the first scene: its source, then a column per brightness."""
    scenes = len(task.sources) // len(BRIGHTNESS_WORDS)
    blank = Image.new("RGB", task.sources[0].size, "white")
    rows = [[blank if name == "text-to-image" else task.sources[0], *generated[name][::scenes]] for name in generated]
    labels = [name.replace("Pix2Pix", " Pix2Pix") for name in generated]  # too long for a line
    sheet = sample_grid(rows, labels, column_labels=["source", *BRIGHTNESS_WORDS])
    sheet.quantize(256, kmeans=3).save(path, optimize=True)  # a third of the size


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=Path("quickstart/retrained"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    arguments = parser.parse_args()
    main(arguments.pipeline, arguments.seed)
