"""Tables, pictures and the README of the quickstart.

Rows have names such as "flawed: epsilon, default schedule"; what is before the colon is short enough for a column.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from landscapes import captions
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from zsnr_diffusers.evaluation import luminance_coverage, prompt_share

Array = NDArray[np.float64]
Figures = dict[str, dict[str, float]]
Block = Mapping[str, Sequence[Image.Image]]
"""Images by prompt."""

REAL = "real images"

CELL, GAP, MARGIN, TITLE, FONT_SIZE = 128, 4, 112, 34, 20
"""Of pictures, in pixels: side of an image, space between two, width of the prompts, height of titles and letters."""


def short(name: str) -> str:
    """What a row is called where there is little space."""
    return name.split(":")[0]


def by_prompt(images: Iterable[Image.Image], prompts: Sequence[str]) -> dict[str, list[Image.Image]]:
    """The images of each prompt, in order."""
    found: dict[str, list[Image.Image]] = {prompt: [] for prompt in captions()}
    for image, prompt in zip(images, prompts, strict=True):
        found[prompt].append(image)
    return found


# Tables


def overall_figures(
    luminance: Mapping[str, Array], prompts: Sequence[str], real: Array, real_prompts: Sequence[str]
) -> Figures:
    """Distance to the real images, percentiles and what the prompt explains, of each row and of the real images.

    Args:
        luminance: mean luminance of the images of each row, [n].
        prompts: of these images, n.
        real: mean luminance of the real images, [m].
        real_prompts: their captions, m.

    Returns:
        By row; the distance of the real images is what is expected of a perfect model with n images.
    """
    figures = {}
    for name, values in luminance.items():
        coverage = luminance_coverage(values, real, groups=(prompts, real_prompts))
        ours, share = coverage.generated, prompt_share(values, prompts)
        figures[name] = {"w1": coverage.w1, "p5": ours.p5, "p95": ours.p95, "share": share}
    data, share = coverage.real, prompt_share(real, real_prompts)
    figures[REAL] = {"w1": coverage.floor, "p5": data.p5, "p95": data.p95, "share": share}
    return figures


def overall_table(figures: Figures, count: int) -> str:
    """The figures of so many images of each row, in 80 columns."""
    lines = [
        f"Mean luminance per image, from -1 (black) to 1 (white); {count} images each\n",
        f"{'':38}{'W1':>6}{'5% to 95%':>17}{'by prompt':>12}",
    ]
    for name, row in figures.items():
        width = f"{row['p5']:.2f} to {row['p95']:.2f}"
        lines.append(f"{name:38}{row['w1']:6.3f}{width:>17}{row['share']:12.2f}")
    lines.append(
        "\nW1: Wasserstein distance to the real images; in their own row, what a perfect\n"
        "model would show with as many images. By prompt: fraction of the variance that\n"
        "the prompt explains; the seed decides on the rest."
    )
    return "\n".join(lines)


def prompt_table(
    luminance: Mapping[str, Array], prompts: Sequence[str], real: Array, real_prompts: Sequence[str]
) -> str:
    """Mean luminance of each prompt's images, and their distance to its real ones, in 80 columns."""
    head = f"{'':19}{'real':>6}" + "".join(f"{short(name):>13}" for name in luminance)
    lines = ["Mean luminance by prompt; in parentheses W1 to the real images of that prompt\n", head]
    for prompt in captions():
        truth = real[np.array(real_prompts) == prompt]
        cells = f"{prompt:19}{truth.mean():6.2f}"
        for values in luminance.values():
            ours = values[np.array(prompts) == prompt]
            w1 = luminance_coverage(ours, truth, num_bootstraps=1).w1
            cells += f"{ours.mean():6.2f} ({w1:.2f})"
        lines.append(cells)
    return "\n".join(lines)


def verdict(figures: Figures) -> str:
    """The claim in a paragraph, from the figures of the four rows in their order."""
    flawed, started, stock, retrained, data = figures.values()
    return (
        f"Retrained to zero terminal SNR, the model generates from {retrained['p5']:.2f} to {retrained['p95']:.2f}\n"
        f"(real images: {data['p5']:.2f} to {data['p95']:.2f}), and W1 falls from {flawed['w1']:.3f} to "
        f"{retrained['w1']:.3f}. v-loss on the\ndefault schedule alone gets to {stock['w1']:.3f}; a start, without "
        f"training, to {started['w1']:.3f}."
    )


# Pictures


def draw_blocks(path: Path, blocks: Mapping[str, Block], columns: Mapping[str, int], prompts: Sequence[str]) -> None:
    """Draw blocks of images side by side, each under its title, with a row for each prompt.

    Args:
        path: of the picture.
        blocks: by title.
        columns: images of each prompt that are drawn of each block, by title.
        prompts: from top to bottom.
    """
    step, font = CELL + GAP, ImageFont.load_default(size=FONT_SIZE)
    width = MARGIN + sum(columns.values()) * step + 4 * GAP * len(blocks)
    sheet = Image.new("RGB", (width, TITLE + len(prompts) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for row, prompt in enumerate(prompts):
        corner = (GAP, TITLE + row * step + CELL // 3)
        draw.multiline_text(corner, prompt.replace(" landscape", "\nlandscape"), "black", font)
    left = MARGIN
    for title, images in blocks.items():
        draw.text((left, GAP), title, "black", font)
        for column in range(columns[title]):
            for row, prompt in enumerate(prompts):
                some = images[prompt][column : column + 1]  # none where there are fewer
                for image in some:
                    tile = image.resize((CELL, CELL), Image.Resampling.LANCZOS)
                    sheet.paste(tile, (left, TITLE + row * step))
            left += step
        left += 4 * GAP
    sheet.save(path, optimize=True)


def draw_samples(path: Path, blocks: Mapping[str, Block], columns: int = 4) -> None:
    """Draw all prompts of the generated blocks, and a column of the last one, the real images."""
    drawn = {title: columns for title in blocks}
    drawn[[*blocks][-1]] = 1
    draw_blocks(path, blocks, drawn, captions())


def draw_before_after(path: Path, before: Block, after: Block, real: Block, columns: int = 3) -> None:
    """Draw the darkest, a middle and the brightest prompt before and after, and real images."""
    blocks = {"before: default noise schedule": before, "after: zero terminal SNR": after, REAL: real}
    draw_blocks(path, blocks, dict.fromkeys(blocks, columns), [captions()[place] for place in (0, 3, 5)])


# What the folder holds

README = """\
# A small Stable Diffusion, before and after zero terminal SNR

Made by `python examples/quickstart.py` of zsnr_diffusers from {images} generated landscapes.

![before and after](before_after.png)

```
{tables}
```

| file or folder | what it is |
|---|---|
| `before_after.png` | three prompts from the flawed and from the retrained model, and real images |
| `samples.png` | all prompts from all four; rows are prompts, columns are seeds |
| `brightness.png` | histograms of mean luminance |
| `landscapes/` | the training images, with their captions in `metadata.jsonl` |
| `untrained/` | the pipeline with its autoencoder trained and its UNet untrained |
| `flawed/` | trained as Stable Diffusion 1.x was: epsilon, a schedule that never reaches pure noise |
| `start.safetensors` | a start for `flawed/`, fitted in seconds; no weight changes |
| `v-stock-schedule/` | `flawed/` trained on with v-loss on the same schedule: how much does v-loss alone? |
| `retrained/` | `flawed/` trained on with v-loss and zero terminal SNR |
| `images/` | what each generated: prompt and seed are in the names |
| `progress.json`, `progress.log` | settings, and the seconds of each finished part; what training printed |

`--mode pixels` adds `landscapes-32/`, `pixels/`, two pictures and a record of its own.

Each model is a `StableDiffusionPipeline` that opens without zsnr_diffusers:

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("{folder}/retrained")
pipe("a black landscape", num_inference_steps=10).images[0]
```

Next:

```sh
zsnr audit {folder}/flawed
zsnr audit {folder}/retrained
zsnr evaluate --real {folder}/landscapes --generated {folder}/images/retrained
```
"""


def write_readme(folder: Path, tables: str, num_images: int) -> None:
    """Say in the folder what is in it."""
    text = README.format(images=num_images, tables=tables, folder=folder.as_posix())
    (folder / "README.md").write_text(text, encoding="utf-8")
