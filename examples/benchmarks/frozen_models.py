"""What an epsilon model that will not be retrained can be given in place of training, and what each remedy is worth.

    python examples/quickstart.py                              # makes quickstart/flawed
    python examples/benchmarks/frozen_models.py

Four questions, a table each; `--only` asks some of them:

- `levels`: where does the error of the quickstart's flawed model arise? Latents of real images are noised to a
  level, and the model takes them from there.
- `plain`: a start (`fit_start`) beside a trained first step, on the same model. The first step is a LoRA that sees
  pure noise and the prompt, and learns x_0: v at a signal-to-noise ratio of 0. It is used for the first network call
  alone.
- `detailed`: the same for captions that say more than the brightness: season, color and side of the light, how much
  of the image is sky. The flawed model is fine-tuned to them first, with epsilon on its own schedule.
- `adapters`: a LoRA and a ControlNet, trained on the flawed model as it is, with and without a start.

Every image has a seed of its own. With the same 16 for each prompt their choice matters: with a start W1 is 0.065 with
seeds 0 to 15, 0.055, 0.033 and 0.035 with the next three sets, and 0.039 with all 64.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
)
from frozen_training import (
    BATCH,
    Data,
    edges,
    first_step_by,
    load,
    started_by,
    train_controlnet,
    train_epsilon,
    train_first_step,
)
from landscapes import BRIGHTEST, BRIGHTNESS_WORDS, all_details, landscape, make_landscapes
from numpy.typing import NDArray
from PIL import Image
from quickstart_progress import quieten_libraries
from small_stable_diffusion import build_stable_diffusion, train_vae
from torch import Tensor, nn

from zsnr_diffusers import enable_start
from zsnr_diffusers.evaluation import luminance_coverage, prompt_share
from zsnr_diffusers.evaluation.luminance import LUMA_WEIGHTS
from zsnr_diffusers.start import StartReport, fit_start
from zsnr_diffusers.start.encoding import encode_images
from zsnr_diffusers.utils.hashing import state_sha256

Array = NDArray[np.float64]
Figures = dict[str, float]

QUALITIES = ("brightness", "color", "left to right", "top to bottom")


@dataclass(frozen=True)
class Study:
    """Where everything is, and how much of it.

    Attributes:
        quickstart: the folder of the quickstart.
        output_dir: where everything else goes.
        images: of each data set that is made here.
        finetune_steps: of the model of detailed captions.
        first_steps: of a trained first step.
        adapter_steps: of the LoRA and of the ControlNet.
        pictures: generated for each row of a table.
        steps: of sampling.
    """

    quickstart: Path
    output_dir: Path
    images: int = 1200
    finetune_steps: int = 900
    first_steps: int = 400
    adapter_steps: int = 300
    pictures: int = 192
    steps: int = 25

    @property
    def flawed(self) -> Path:
        """The folder of the quickstart's flawed model."""
        return self.quickstart / "flawed"


def even_prompts(captions: Sequence[str], count: int) -> list[str]:
    """About so many prompts, each caption as often as any other."""
    distinct = sorted(set(captions))
    return [text for text in distinct for _ in range(max(1, count // len(distinct)))]


# What is measured


def qualities(pixels: Tensor) -> Array:
    """Of images [N, 3, H, W] in [-1, 1] what captions speak of, [N, 4]: see `QUALITIES`."""
    rgb = pixels.double().numpy()
    luma = np.einsum("nchw,c->nhw", rgb, LUMA_WEIGHTS)
    half = luma.shape[-1] // 2
    color = rgb[:, 0].mean(axis=(1, 2)) - rgb[:, 2].mean(axis=(1, 2))
    across = luma[:, :, half:].mean(axis=(1, 2)) - luma[:, :, :half].mean(axis=(1, 2))
    down = luma[:, half:].mean(axis=(1, 2)) - luma[:, :half].mean(axis=(1, 2))
    return np.stack([luma.mean(axis=(1, 2)), color, across, down], axis=1)


def as_pixels(images: Sequence[Image.Image]) -> Tensor:
    """PIL images as [N, 3, H, W] in [-1, 1]."""
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def print_row(name: str, images: Sequence[Image.Image], prompts: Sequence[str], real: Data, columns: int) -> Figures:
    """Measure generated images, print W1 and the prompt's share of each quality; the figures by name."""
    ours, theirs = qualities(as_pixels(images)), qualities(real.pixels)
    found: Figures = {}
    for i, quality in enumerate(QUALITIES[:columns]):
        coverage = luminance_coverage(ours[:, i], theirs[:, i], groups=(prompts, real.captions), num_bootstraps=100)
        found[f"{quality} w1"], found[f"{quality} floor"] = coverage.w1, coverage.floor
        found[f"{quality} share"] = prompt_share(ours[:, i], prompts)
        if i == 0:
            found |= {"p5": coverage.generated.p5, "p95": coverage.generated.p95}
    cells = [
        f"{found[f'{quality} w1']:6.3f} ({found[f'{quality} floor']:.3f}) {found[f'{quality} share']:5.2f}"
        for quality in QUALITIES[:columns]
    ]
    print(f"{name:38}{found['p5']:6.2f} to {found['p95']:5.2f}" + "".join(f"{cell:>24}" for cell in cells), flush=True)
    return found


def print_head(title: str, columns: int) -> None:
    """The head of a table."""
    print(f"\n{title}\n{'':38}{'5% to 95%':>14}" + "".join(f"{quality:>24}" for quality in QUALITIES[:columns]))
    print(f"{'':38}{'':14}" + f"{'W1 (floor) share':>24}" * columns, flush=True)


# The tables


def levels(study: Study) -> dict[str, Figures]:
    """From which noise level on the flawed model loses what latents of real images say."""
    pipe, data = load(study.flawed), Data.read(study.quickstart / "landscapes")
    prompts = even_prompts(data.captions, study.pictures)
    drawn = data.draw(prompts)
    latents = torch.cat([encode_images(pipe.vae, part) for part in drawn.pixels.split(BATCH)])
    print_head("From latents of real images", 1)
    rows = {"the autoencoder alone": print_row("the autoencoder alone", decode(pipe, latents), prompts, data, 1)}
    from_image = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    from_image.set_progress_bar_config(disable=True)
    for strength in (0.2, 0.4, 0.6, 0.8, 0.9, 1.0):
        images = generate(study, from_image, prompts, {"image": latents}, strength=strength)
        first = int(from_image.scheduler.timesteps[-int(strength * study.steps)])
        rows[f"noised to t = {first}"] = print_row(f"noised to t = {first}", images, prompts, data, 1)
    return rows


def decode(pipe: Any, latents: Tensor) -> list[Image.Image]:
    """Images of scaled latents."""
    with torch.no_grad():
        parts = [pipe.vae.decode(part / pipe.vae.config.scaling_factor).sample for part in latents.split(BATCH)]
    return pipe.image_processor.postprocess(torch.cat(parts))


def compare_starts(
    study: Study, title: str, folder: Path, data: Data, real: Data, prompts: list[str], columns: int
) -> dict[str, Figures]:
    """A table of no remedy, a start, a trained first step, and a start with the means that this one says."""
    pipe = load(folder)
    start = fit_start(pipe, data.images(), data.captions, progress=False)
    print(StartReport.of(start.report))
    first = train_first_step(pipe, data, study.first_steps)
    print_head(title, columns)

    def row(name: str, started: Any, **of_each: Tensor) -> Figures:
        return print_row(name, generate(study, started, prompts, of_each), prompts, real, columns)

    rows = {"as it is": row("as it is", pipe)}
    with first_step_by(pipe, first):
        rows["first step"] = row("first step", pipe)
    latents = started_by(pipe, start.law, first, prompts, study.steps)
    rows["start by the first step"] = row("start by the first step", pipe, latents=latents)
    rows["start"] = row("start", enable_start(pipe, start))
    return rows


def generate(
    study: Study, pipe: Any, prompts: list[str], of_each: Mapping[str, Tensor] | None = None, **call: Any
) -> list[Image.Image]:
    """An image per prompt, each from a seed of its own, without guidance; `of_each` has an argument for each."""
    images: list[Image.Image] = []
    for at in range(0, len(prompts), BATCH):
        part = slice(at, at + BATCH)
        seeds = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))[part]]
        own = {name: values[part] for name, values in (of_each or {}).items()}
        call |= {"num_inference_steps": study.steps, "guidance_scale": 1.0, "generator": seeds}
        images += pipe(prompts[part], **own, **call).images
    return images


def plain(study: Study) -> dict[str, Figures]:
    """Captions that say the brightness alone."""
    data = Data.read(study.quickstart / "landscapes")
    prompts = even_prompts(data.captions, study.pictures)
    return compare_starts(study, "Captions of brightness", study.flawed, data, data, prompts, 1)


def detailed(study: Study) -> dict[str, Figures]:
    """Captions that say more; prompts are some of them, compared with images that no model has seen."""
    folder, model = study.output_dir / "detailed-landscapes", study.output_dir / "detailed"
    if not (folder / "metadata.jsonl").exists():
        make_landscapes(folder, study.images, seed=0, detailed=True)
    data = Data.read(folder)
    make_detailed_model(study, data, folder, model)
    rng = np.random.default_rng(1)
    scenes = [
        (details, float(brightness))
        for details in all_details()
        for brightness in BRIGHTEST * (2 * (np.arange(6) + rng.random(6)) / 6 - 1)
    ]
    chosen = [scenes[i] for i in rng.permutation(len(scenes))[: max(1, study.pictures // 4)]]
    prompts = [details.caption(brightness) for details, brightness in chosen for _ in range(4)]
    real = fresh_scenes([details for details, _ in chosen], prompts[::4], rng)
    return compare_starts(study, "Detailed captions", model, data, real, prompts, len(QUALITIES))


def fresh_scenes(details: list[Any], prompts: list[str], rng: np.random.Generator, count: int = 16) -> Data:
    """So many new images for each of the captions."""
    images, captions = [], []
    for scene, prompt in zip(details, prompts, strict=True):
        word = BRIGHTNESS_WORDS.index(prompt.split()[1])
        for place in (word + rng.random(count)) / len(BRIGHTNESS_WORDS):
            images.append(landscape(float(BRIGHTEST * (2 * place - 1)), rng, details=scene))
            captions.append(prompt)
    return Data(as_pixels(images), captions)


def make_detailed_model(study: Study, data: Data, folder: Path, model: Path) -> None:
    """Fine-tune the flawed model to detailed captions, with a text encoder that knows their words."""
    base = study.output_dir / "detailed-base"
    if not (base / "model_index.json").exists():
        flawed, pipe = load(study.flawed), build_stable_diffusion(texts=data.captions)
        for part in ("unet", "vae"):
            getattr(pipe, part).load_state_dict(getattr(flawed, part).state_dict())
        train_vae(pipe.vae, data.pixels, 100, learning_rate=1e-3)
        pipe.save_pretrained(base)
    train_epsilon(base, folder, model, study.finetune_steps, 1e-3)


def adapters(study: Study) -> dict[str, Figures]:
    """A LoRA for another season and a ControlNet, made for the flawed model as it is, with and without a start."""
    data, autumn = Data.read(study.quickstart / "landscapes"), study.output_dir / "autumn-landscapes"
    if not (autumn / "metadata.jsonl").exists():
        make_landscapes(autumn, study.images, seed=1, season="autumn")
    lora = study.output_dir / "autumn-lora"
    train_epsilon(study.flawed, autumn, lora, study.adapter_steps, 1e-3, lora_rank=8)
    pipe, with_lora = load(study.flawed), load(study.flawed)
    start = fit_start(pipe, data.images(), data.captions, progress=False)
    with_lora.load_lora_weights(str(lora))
    controlnet = train_controlnet(pipe, data, study.adapter_steps)
    under_control = StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=controlnet, requires_safety_checker=False
    )
    under_control.set_progress_bar_config(disable=True)
    prompts = even_prompts(data.captions, study.pictures)
    shown = {"image": edges(data.draw(prompts).pixels)}
    print_head("Adapters of the flawed model", 1)
    cases = {"LoRA": (with_lora, Data.read(autumn), {}), "ControlNet": (under_control, data, shown)}
    rows = {}
    for name, (adapted, real, of_each) in cases.items():
        networks = [network for network in adapted.components.values() if isinstance(network, nn.Module)]
        before = [state_sha256(network) for network in networks]
        rows[name] = print_row(name, generate(study, adapted, prompts, of_each), prompts, real, 1)
        enable_start(adapted, start)
        rows[f"{name}, start"] = print_row(
            f"{name}, start", generate(study, adapted, prompts, of_each), prompts, real, 1
        )
        changed = before != [state_sha256(network) for network in networks]
        print(f"weights, those of the {name} among them: {'changed' if changed else 'unchanged'}")
    return rows


TABLES: dict[str, Callable[[Study], dict[str, Figures]]] = {
    "levels": levels,
    "plain": plain,
    "detailed": detailed,
    "adapters": adapters,
}


def main(argv: list[str] | None = None) -> dict[str, dict[str, Figures]]:
    """Train what is not there yet, print the tables; the figures by table and row."""
    parser = argparse.ArgumentParser(description="Remedies for epsilon models that stay as they are.", epilog=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quickstart", type=Path, default=Path("quickstart"), help="default: %(default)s")
    parser.add_argument("--output_dir", type=Path, default=Path("frozen"), help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=[*TABLES], default=[*TABLES], help="tables (default: all)")
    for name in ("images", "finetune_steps", "first_steps", "adapter_steps", "pictures", "steps"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Study, name), help="default: %(default)s")
    arguments = vars(parser.parse_args(argv))
    only = arguments.pop("only")
    study = Study(**arguments)
    if not (study.flawed / "model_index.json").exists():
        parser.error(f"{study.flawed} is not a pipeline; run examples/quickstart.py first")
    quieten_libraries()
    study.output_dir.mkdir(parents=True, exist_ok=True)
    return {name: TABLES[name](study) for name in only}


if __name__ == "__main__":
    main()
