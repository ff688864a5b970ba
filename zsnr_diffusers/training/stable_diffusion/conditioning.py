"""What a UNet is conditioned on, as far as no network is needed to compute it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.loader import Batch
from ..data.transforms import Crop


class Conditioning:
    """The caption alone, as token ids.

    Args:
        tokenizers: of the text encoders.
    """

    def __init__(self, tokenizers: Sequence[Any]) -> None:
        self.tokenizers = tokenizers

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Token ids of captions by all tokenizers, concatenated, int64 [n, tokenizers * length]."""
        ids = [
            tokenizer(
                list(captions),
                max_length=tokenizer.model_max_length,
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer in self.tokenizers
        ]
        return torch.cat(ids, dim=1)

    def for_crop(self, crop: Crop) -> Batch:
        """UNet inputs that depend on an image's crop; none here."""
        return {}


class SizeConditioning(Conditioning):
    """The caption, and the size and crop of the image (Podell et al. 2023, arXiv:2307.01952, section 2.2)."""

    def for_crop(self, crop: Crop) -> Batch:
        """`time_ids` [6]: original size, top left and size of the crop; heights before widths, as in diffusers."""
        return {"time_ids": torch.tensor([*crop.original, crop.top, crop.left, *crop.size], dtype=torch.float32)}
