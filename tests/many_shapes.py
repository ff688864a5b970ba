"""Captioned pictures of many shapes."""

import json

import numpy as np
from PIL import Image

SIZES = [(16, 16), (20, 17), (30, 12), (12, 30), (18, 64), (33, 20), (40, 90), (16, 24), (7, 9), (75, 20)]
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
