"""Captioned images as training samples."""

from collections.abc import Sequence
from typing import Any

import datasets
import torch
from torch import Tensor

from ..cache import Cache
from ..data import fit, read_image, to_model_range
from ..samples import Batch, Samples
from .config import TrainingConfig


class CaptionedSamples(Samples):
    """Images with a caption.

    Args:
        rows: with the columns that `config` names.
        good: indices of the rows to use.
        config: of the run.
        tokenizer: of the pipeline.
        resolution: pixels per side.
        latent_shape: (channels, height, width) of the latents.
        num_train_timesteps: T.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        good: Sequence[int],
        config: TrainingConfig,
        tokenizer: Any,
        resolution: int,
        latent_shape: tuple[int, int, int],
        num_train_timesteps: int,
    ) -> None:
        super().__init__(rows, good, config)
        self.config, self.tokenizer, self.resolution = config, tokenizer, resolution
        self.latent_shape, self.num_train_timesteps = latent_shape, num_train_timesteps
        self.captions = rows.select_columns([config.caption_column])
        self.caches: dict[str, Cache] = {}
        """What is stored of images (`latents`) and captions (`text`), and given in place of these."""
        self.hashes: dict[int, bytes] = {}
        """Of the images of rows, if `latents` are stored."""

    def sample(self, index: int, draw: torch.Generator) -> Batch:
        """The sample of a row.

        Returns:
            `pixel_values` [3, h, w] in [-1, 1] or what is stored of it, `input_ids` [length] or what is stored of it,
            `timestep`, and N(0, 1) `noise` and `posterior_noise` in the shape of the latents.
        """
        dropped, flipped, which = torch.rand(3, generator=draw).tolist()
        captions = captions_of(self.captions[index][self.config.caption_column])
        caption = "" if dropped < self.config.caption_dropout else captions[int(which * len(captions))]
        return {
            **self._image(index, self.config.random_flip and flipped < 0.5),
            **self._text(caption),
            "timestep": torch.randint(self.num_train_timesteps, (), generator=draw),
            "noise": torch.randn(self.latent_shape, generator=draw),
            "posterior_noise": torch.randn(self.latent_shape, generator=draw),
        }

    def _image(self, index: int, flipped: bool) -> Batch:
        if "latents" in self.caches:
            return self.caches["latents"][self.image_content(index, flipped)]
        return {"pixel_values": self.pixel_values(index, flipped)}

    def _text(self, caption: str) -> Batch:
        input_ids = self.tokenize([caption])[0]
        if "text" in self.caches:
            return self.caches["text"][text_content(input_ids)]
        return {"input_ids": input_ids}

    def pixel_values(self, index: int, flipped: bool) -> Tensor:
        """The image of a row, [3, h, w] in [-1, 1]."""
        image = read_image(self.rows, self.config.image_column, index)
        return to_model_range(fit(image, self.resolution), flipped)

    def image_content(self, index: int, flipped: bool) -> bytes:
        """What `pixel_values` depend on, but for the resolution."""
        return self.hashes[index] + bytes([flipped])

    def all_captions(self, indices: Sequence[int]) -> set[str]:
        """Every caption that these rows can have, the empty one of `caption_dropout` included."""
        rows = self.captions[list(indices)][self.config.caption_column]
        return {"", *(caption for row in rows for caption in captions_of(row))}

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Token ids, int64 [n, length]."""
        tokens = self.tokenizer(
            list(captions),
            max_length=self.tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        ids: Tensor = tokens.input_ids
        return ids


def text_content(input_ids: Tensor) -> bytes:
    """All that a text encoder's output depends on: captions that it reads alike are one."""
    return input_ids.numpy().tobytes()


def captions_of(caption: str | Sequence[str] | None) -> list[str]:
    """The captions of a row, of which one is drawn; of nothing, the empty one."""
    if not caption:
        return [""]
    return [caption] if isinstance(caption, str) else [str(one) for one in caption]
