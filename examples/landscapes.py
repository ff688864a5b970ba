"""Captioned landscapes from night to noon, made from nothing.

The flaw of Lin et al. 2023 (arXiv:2305.08891) is easiest to see where brightness is all that varies. The mean
luminance of these images is spread evenly over [-0.95, 0.95]; their captions say in which sixth of it they lie.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from zsnr_diffusers.evaluation.luminance import LUMA_WEIGHTS

BRIGHTNESS_WORDS = ("black", "dark", "dim", "grey", "bright", "white")
"""The words of the captions, from the darkest sixth of the landscapes to the brightest."""

BRIGHTEST = 0.95
"""The mean luminance of the brightest landscape, images in [-1, 1]; that of the darkest is its negative."""

SEASONS = {"summer": (0.12, 0.26, 0.10), "autumn": (0.74, 0.34, 0.08), "winter": (0.80, 0.85, 0.91)}
"""The color of the nearest hills, red, green and blue in (0, 1), by the season."""

Array = NDArray[np.float64]


def caption(brightness: float, ending: str = "") -> str:
    """What a landscape of this mean luminance, in [-1, 1], is called: "a dark landscape", and how that ends."""
    word = int((brightness / BRIGHTEST + 1) / 2 * len(BRIGHTNESS_WORDS))
    return captions(ending)[min(max(word, 0), len(BRIGHTNESS_WORDS) - 1)]


def captions(ending: str = "") -> list[str]:
    """Every caption there is, from the darkest to the brightest; `ending` is added to each."""
    return [f"a {word} landscape{ending}" for word in BRIGHTNESS_WORDS]


def landscape(
    brightness: float, rng: np.random.Generator, image_size: int = 64, season: str = "summer"
) -> Image.Image:
    """Draw sky, sun or moon, hills and, every other time, a lake.

    Args:
        brightness: The mean luminance of the image, in (-1, 1).
        rng: Decides on everything else: colours, shapes, places.
        image_size: Height and width in pixels.
        season: One of `SEASONS`.
    """
    day = (brightness + 1) / 2
    y, x = (np.mgrid[:image_size, :image_size] + 0.5) / image_size
    scene = _sky(day, x, y, rng)
    scene = _hills(scene, day, x, y, rng, SEASONS[season])
    if rng.random() < 0.5:
        scene = _lake(scene, x, y, rng)
    return Image.fromarray(np.round(_expose(scene, day) * 255).astype(np.uint8))


def make_landscapes(
    folder: str | Path,
    count: int = 1000,
    image_size: int = 64,
    seed: int = 0,
    season: str = "summer",
    ending: str = "",
) -> Path:
    """Write captioned landscapes as an image folder that `datasets` reads.

    Args:
        folder: Where `00000.png`, `00001.png`, ... and `metadata.jsonl` with `file_name` and `text` go; may be new.
        count: How many. Their mean luminances are stratified, so that few of them are already evenly spread.
        image_size: Height and width in pixels.
        seed: The same seed gives the same files.
        season: One of `SEASONS`.
        ending: Of every caption.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    strata = (rng.permutation(count) + rng.random(count)) / count
    lines = []
    for index, brightness in enumerate(BRIGHTEST * (2 * strata - 1)):
        name = f"{index:05d}.png"
        landscape(float(brightness), rng, image_size, season).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption(float(brightness), ending)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def read_landscapes(folder: str | Path) -> torch.Tensor:
    """The images of a folder of `make_landscapes`, in order: `[count, 3, image_size, image_size]` in [-1, 1]."""
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(Path(folder).glob("*.png"))])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def _mix(a: Array, b: Array, share: Array | float) -> Array:
    """From `a` to `b`; a map `[h, w]` of shares is applied to all three colours."""
    mixed: Array = a + (b - a) * np.asarray(share)[..., None]
    return mixed


def _between(day: float, colours: Sequence[tuple[float, float, float]]) -> Array:
    """The colour at `day` in [0, 1] on the way through `colours`."""
    stops = np.linspace(0, 1, len(colours))
    return np.array([np.interp(day, stops, channel) for channel in zip(*colours, strict=True)])


def _sky(day: float, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """A gradient from night blue over sunset to noon, and a disc with a halo."""
    hour = np.clip(day + rng.normal(0, 0.08), 0, 1)
    zenith = _between(hour, [(0.10, 0.14, 0.34), (0.24, 0.22, 0.46), (0.25, 0.42, 0.70), (0.42, 0.66, 0.90)])
    horizon = _between(hour, [(0.22, 0.30, 0.48), (0.85, 0.45, 0.32), (0.90, 0.74, 0.56), (0.80, 0.88, 0.92)])
    sky = _mix(zenith, horizon, np.clip(y / 0.65, 0, 1) ** 1.3)
    light = _between(hour, [(0.93, 0.95, 0.99), (0.99, 0.80, 0.50), (0.99, 0.95, 0.75), (0.99, 0.99, 0.92)])
    distance = np.hypot(x - rng.uniform(0.12, 0.88), y - rng.uniform(0.10, 0.36))
    radius = rng.uniform(0.05, 0.10)
    sky = _mix(sky, light, 0.45 * np.exp(-((distance / (3 * radius)) ** 2)))
    return _mix(sky, light, _edge(radius - distance, x))


def _hills(
    scene: Array, day: float, x: Array, y: Array, rng: np.random.Generator, ground: tuple[float, float, float]
) -> Array:
    """Three ranges, each nearer one lower, darker and less hazy than the one behind it."""
    far = _between(day, [(0.16, 0.22, 0.34), (0.46, 0.34, 0.44), (0.46, 0.55, 0.62)])
    near = np.array(ground) + rng.uniform(-0.04, 0.08, 3)
    for depth in (0.0, 0.5, 1.0):
        ridge: Array | float = 0.50 + 0.17 * depth + rng.uniform(-0.05, 0.05)
        for waves in (1, 2, 4):
            ridge = ridge + 0.07 / waves * np.sin(2 * np.pi * (waves * x * rng.uniform(0.6, 1.2) + rng.random()))
        scene = _mix(scene, _mix(far, near, depth), _edge(y - ridge, x))
    return scene


def _lake(scene: Array, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Below its shore, water mirrors what is above it."""
    shore = rng.uniform(0.74, 0.84)
    size = len(scene)
    mirrored = np.clip(((2 * shore - y[:, 0]) * size).astype(int) - int(0.35 * size), 0, size - 1)
    water = _mix(scene[mirrored], np.array([0.20, 0.35, 0.50]), 0.35)
    return _mix(scene, water, _edge(y - shore - 0.01 * np.sin(2 * np.pi * (x + rng.random())), x))


def _edge(signed_distance: Array, x: Array) -> Array:
    """1 inside, 0 outside, a soft pixel in between."""
    inside: Array = np.clip(signed_distance * x.shape[1] + 0.5, 0, 1)
    return inside


def _expose(scene: Array, day: float) -> Array:
    """Shift the logits of a scene in (0, 1) until its mean luminance is `day`.

    A shift of logits is what exposure does to film: contrast fades towards black and white, nothing is cut off.
    """
    logits = np.log(scene / (1 - scene))
    exposed = scene
    low, high = -20.0, 20.0
    for _ in range(40):  # by bisection: the mean is monotone in the shift
        shift = (low + high) / 2
        exposed = 1 / (1 + np.exp(-(logits + shift)))
        low, high = (shift, high) if (exposed @ LUMA_WEIGHTS).mean() < day else (low, shift)
    return exposed
