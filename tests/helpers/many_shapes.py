"""Captioned images of many shapes."""

import json

import numpy as np
from PIL import Image

SIZES = [(64, 64), (80, 68), (120, 48), (48, 120), (72, 256), (132, 80), (160, 360), (64, 96), (28, 36), (300, 80)]
"""(height, width) of `0.png`, `1.png` ..."""

CAPTIONS = ["a cat", "snow", "a dark landscape", "", "a black landscape", "snow"]
"""Of these in turn."""

_LYING = 5
"""It is stored on its side, and says so."""


def make_shapes(folder):
    """Write them, with their captions; returns the folder."""
    lines = []
    for place, (height, width) in enumerate(SIZES):
        pixels = np.random.default_rng(place).integers(256, size=(height, width, 3), dtype=np.uint8)
        image, exif = Image.fromarray(pixels), Image.Exif()
        if place == _LYING:
            exif[0x0112] = 6
            image = image.transpose(Image.Transpose.ROTATE_90)
        image.save(folder / f"{place}.png", exif=exif)
        lines.append(json.dumps({"file_name": f"{place}.png", "text": CAPTIONS[place % len(CAPTIONS)]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder
