"""Captioned landscapes from night to noon, made from nothing.

The flaw of Lin et al. 2023 (arXiv:2305.08891) is easiest to see where brightness is all that varies. The mean
luminance of these images is spread evenly over [-0.95, 0.95]; their captions say in which sixth of it they lie, and
those of the detailed ones also the season, the color of the light, where it comes from, and how wide the sky is.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
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

LIGHTS = {"warm": (0.7, 0.0, -0.9), "clear": (0.0, 0.0, 0.0), "cold": (-0.7, 0.0, 0.7)}
"""What a light adds to the logits of red, green and blue."""

SIDES = {"left": -1.0, "right": 1.0}
"""The side that light comes from, as the sign of x."""

SKIES = {"wide": 0.14, "narrow": -0.18}
"""By how much hills are lower than usual, in heights of the image."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Details:
    """What a caption may say of a landscape beside its brightness; without any, no more is said.

    Attributes:
        season: One of `SEASONS`.
        light: One of `LIGHTS`.
        side: One of `SIDES`.
        sky: One of `SKIES`.
    """

    season: str = "summer"
    light: str = ""
    side: str = ""
    sky: str = ""

    def caption(self, brightness: float) -> str:
        """What a landscape of these details and this mean luminance is called, in 14 words."""
        whole, ending = caption(brightness), f" in {self.light} light from the {self.side} under a {self.sky} sky"
        return whole.replace("landscape", f"{self.season} landscape") + ending

    def exposure(self, x: Array) -> Array:
        """What is added to the logits of a scene, `[h, w, 3]`, where x is the place across, `[h, w]`."""
        color = np.array(LIGHTS.get(self.light, (0.0, 0.0, 0.0)))
        return (3.0 * SIDES.get(self.side, 0.0) * (x - 0.5))[..., None] + color


def all_details() -> list[Details]:
    """All combinations of what a detailed caption says beside the brightness."""
    return [Details(*chosen) for chosen in itertools.product(SEASONS, LIGHTS, SIDES, SKIES)]


def caption(brightness: float, ending: str = "") -> str:
    """What a landscape of this mean luminance, in [-1, 1], is called: "a dark landscape", and how that ends."""
    word = int((brightness / BRIGHTEST + 1) / 2 * len(BRIGHTNESS_WORDS))
    return captions(ending)[min(max(word, 0), len(BRIGHTNESS_WORDS) - 1)]


def captions(ending: str = "") -> list[str]:
    """Every caption there is, from the darkest to the brightest; `ending` is added to each."""
    return [f"a {word} landscape{ending}" for word in BRIGHTNESS_WORDS]


def detailed_captions() -> list[str]:
    """Every caption of a landscape with details, from the darkest to the brightest."""
    middles = [BRIGHTEST * ((2 * i + 1) / len(BRIGHTNESS_WORDS) - 1) for i in range(len(BRIGHTNESS_WORDS))]
    return [details.caption(brightness) for brightness in middles for details in all_details()]


def landscape(
    brightness: float,
    rng: np.random.Generator,
    image_size: int = 64,
    season: str = "summer",
    details: Details | None = None,
) -> Image.Image:
    """Draw sky, sun or moon, hills and, every other time, a lake.

    Args:
        brightness: The mean luminance of the image, in (-1, 1).
        rng: Decides on everything else: colours, shapes, places.
        image_size: Height and width in pixels.
        season: One of `SEASONS`.
        details: In place of the season alone.
    """
    details = details or Details(season)
    day = (brightness + 1) / 2
    y, x = (np.mgrid[:image_size, :image_size] + 0.5) / image_size
    scene = _sky(day, x, y, rng)
    scene = _hills(scene, day, x, y, rng, details)
    if rng.random() < 0.5:
        scene = _lake(scene, x, y, rng)
    return Image.fromarray(np.round(_expose(scene, day, details.exposure(x)) * 255).astype(np.uint8))


def make_landscapes(
    folder: str | Path,
    count: int = 1000,
    image_size: int = 64,
    seed: int = 0,
    season: str = "summer",
    ending: str = "",
    detailed: bool = False,
) -> Path:
    """Write captioned landscapes as an image folder that `datasets` reads.

    Args:
        folder: Where `00000.png`, `00001.png`, ... and `metadata.jsonl` with `file_name` and `text` go; may be new.
        count: How many. Their mean luminances are stratified, so that few of them are already evenly spread.
        image_size: Height and width in pixels.
        seed: The same seed gives the same files.
        season: One of `SEASONS`.
        ending: Of every caption.
        detailed: Whether each has `Details` of its own, all equally often, and says them; in place of season and
            ending.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    strata = (rng.permutation(count) + rng.random(count)) / count
    shuffled = itertools.cycle(np.random.default_rng([seed, 1]).permutation(np.array(all_details(), dtype=object)))
    lines = []
    for index, brightness in enumerate(map(float, BRIGHTEST * (2 * strata - 1))):
        name = f"{index:05d}.png"
        details = next(shuffled) if detailed else None
        landscape(brightness, rng, image_size, season, details).save(folder / name)
        text = details.caption(brightness) if details else caption(brightness, ending)
        lines.append(json.dumps({"file_name": name, "text": text}))
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


def _hills(scene: Array, day: float, x: Array, y: Array, rng: np.random.Generator, details: Details) -> Array:
    """Three ranges, each nearer one lower, darker and less hazy than the one behind it."""
    far = _between(day, [(0.16, 0.22, 0.34), (0.46, 0.34, 0.44), (0.46, 0.55, 0.62)])
    near = np.array(SEASONS[details.season]) + rng.uniform(-0.04, 0.08, 3)
    for depth in (0.0, 0.5, 1.0):
        ridge: Array | float = 0.50 + 0.17 * depth + SKIES.get(details.sky, 0.0) + rng.uniform(-0.05, 0.05)
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


def _expose(scene: Array, day: float, light: Array) -> Array:
    """Add light to the logits of a scene in (0, 1), and shift them until its mean luminance is `day`.

    A shift of logits is what exposure does to film: contrast fades towards black and white, nothing is cut off.
    """
    logits = np.log(scene / (1 - scene)) + light
    exposed = scene
    low, high = -20.0, 20.0
    for _ in range(40):  # by bisection: the mean is monotone in the shift
        shift = (low + high) / 2
        exposed = 1 / (1 + np.exp(-(logits + shift)))
        low, high = (shift, high) if (exposed @ LUMA_WEIGHTS).mean() < day else (low, shift)
    return exposed
