"""Resize and crop images: scale until the image covers the size, then crop.

The crop is determined before reading pixels, since networks can be conditioned on it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Size = tuple[int, int]
"""(height, width) in pixels, of an upright image."""

RESIZE_METHOD = "scaled to cover by Lanczos of at least twice the size, JPEGs decoded no larger, centre crop"
"""What `read_image` and `resize_and_crop` do where no place is drawn; what is computed of the pixels depends on it."""

DECODED = 2.5
"""An image of this multiple of the target size is sufficient: Lanczos gives almost the same pixels as from the full
size.
"""


@dataclass(frozen=True)
class Crop:
    """A crop of an image of size `original`, resized to `scaled`: `size` pixels from `top`, `left`."""

    original: Size
    scaled: Size
    top: int
    left: int
    size: Size

    @property
    def decoded(self) -> Size:
        """Size of the whole image from which the crop can be made."""
        return math.ceil(DECODED * self.scaled[0]), math.ceil(DECODED * self.scaled[1])

    def hflip(self) -> "Crop":
        """The same crop if the whole image is mirrored left to right."""
        return replace(self, left=self.scaled[1] - self.left - self.size[1])


def compute_crop(original: Size, size: Size, place: Sequence[float] | None = None) -> Crop:
    """The crop of `size` from an image scaled until it just covers that size.

    Args:
        original: size of the image.
        size: of the crop.
        place: from the top and from the left, in [0, 1): where both are uniform, so is the crop over all that there
            are. None for the centre.
    """
    scale = max(there / here for here, there in zip(original, size, strict=True))
    height, width = (max(there, round(here * scale)) for here, there in zip(original, size, strict=True))
    room = (height - size[0], width - size[1])
    if place is None:
        top, left = (pixels // 2 for pixels in room)
    else:
        top, left = (int(share * (pixels + 1)) for share, pixels in zip(place, room, strict=True))
    return Crop(original, (height, width), top, left, size)


def resize_and_crop(image: Image.Image, crop: Crop) -> Tensor:
    """Resize an image and cut a crop, uint8 [channels, height, width]."""
    (height, width), (rows, columns) = crop.scaled, crop.size
    if image.size != (width, height):
        # The last row and column of an image decoded at reduced size may cover only a part of a block.
        reduced = 2 ** round(math.log2(crop.original[1] / image.width))
        part = (0, 0, crop.original[1] / reduced, crop.original[0] / reduced)
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=part, reducing_gap=DECODED)
    box = (crop.left, crop.top, crop.left + columns, crop.top + rows)
    return torch.from_numpy(np.array(image.crop(box))).reshape(rows, columns, -1).permute(2, 0, 1).contiguous()
