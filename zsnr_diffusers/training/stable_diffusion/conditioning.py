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
        chunks: of 75 words and marks each, into which longer captions are cut.
    """

    def __init__(self, tokenizers: Sequence[Any], chunks: int = 1) -> None:
        self.tokenizers, self.chunks = tokenizers, chunks

    @property
    def length(self) -> int:
        """Token ids of a caption by one tokenizer, its marks of beginning and end included."""
        return self.chunks * int(self.tokenizers[0].model_max_length)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Token ids of captions by all tokenizers, concatenated, int64 [n, tokenizers * length].

        What is longer than `length` is cut off. Chunks are as long as the encoder takes, each with its own marks.
        """
        return torch.cat([self._tokenize_by(tokenizer, captions) for tokenizer in self.tokenizers], dim=1)

    def _tokenize_by(self, tokenizer: Any, captions: Sequence[str]) -> Tensor:
        """Token ids of captions by one tokenizer, int64 [n, length]."""
        one = int(tokenizer.model_max_length)
        if self.chunks == 1:
            padded = tokenizer(
                list(captions), max_length=one, padding="max_length", truncation=True, return_tensors="pt"
            )
            ids: Tensor = padded.input_ids
            return ids
        words = tokenizer(
            list(captions), max_length=self.chunks * (one - 2), truncation=True, add_special_tokens=False
        ).input_ids
        rows = torch.full((len(words), self.chunks, one), tokenizer.pad_token_id)
        rows[:, :, 0] = tokenizer.bos_token_id
        for row, found in zip(rows, words, strict=True):
            for number, chunk in enumerate(row):
                part = torch.tensor(found[number * (one - 2) : (number + 1) * (one - 2)], dtype=torch.int64)
                chunk[1 : 1 + len(part)] = part
                chunk[1 + len(part)] = tokenizer.eos_token_id
        return rows.reshape(len(words), -1)

    def for_crop(self, crop: Crop) -> Batch:
        """UNet inputs that depend on an image's crop; none here."""
        return {}


class SizeConditioning(Conditioning):
    """The caption, and the size and crop of the image (Podell et al. 2023, arXiv:2307.01952, section 2.2)."""

    def for_crop(self, crop: Crop) -> Batch:
        """`time_ids` [6]: original size, top left and size of the crop; heights before widths, as in diffusers."""
        return {"time_ids": torch.tensor([*crop.original, crop.top, crop.left, *crop.size], dtype=torch.float32)}
