"""Captioned images as training samples."""

from collections.abc import Sequence
from typing import Any

import datasets
import torch
from torch import Tensor

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

    def sample(self, index: int, draw: torch.Generator) -> Batch:
        """The sample of a row.

        Returns:
            `pixel_values` [3, h, w] in [-1, 1], `input_ids` [length], `timestep`, and N(0, 1) `noise` and
            `posterior_noise` in the shape of the latents.
        """
        dropped, flipped, which = torch.rand(3, generator=draw).tolist()
        caption = (
            "" if dropped < self.config.caption_dropout else _one(self.rows[index][self.config.caption_column], which)
        )
        image = read_image(self.rows, self.config.image_column, index)
        return {
            "pixel_values": to_model_range(fit(image, self.resolution), self.config.random_flip and flipped < 0.5),
            "input_ids": self._tokenize(caption),
            "timestep": torch.randint(self.num_train_timesteps, (), generator=draw),
            "noise": torch.randn(self.latent_shape, generator=draw),
            "posterior_noise": torch.randn(self.latent_shape, generator=draw),
        }

    def _tokenize(self, caption: str) -> Tensor:
        tokens = self.tokenizer(
            caption,
            max_length=self.tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        ids: Tensor = tokens.input_ids[0]
        return ids


def _one(caption: str | Sequence[str] | None, which: float) -> str:
    """The caption; of a list, the one that `which` in [0, 1) points at; of nothing, the empty one."""
    if not caption:
        return ""
    return caption if isinstance(caption, str) else str(caption[int(which * len(caption))])
