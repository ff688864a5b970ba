"""Images, with classes or without, as training samples."""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..data.dataset import Rows, read_image, to_model_range
from ..data.held_out import without_rows
from ..data.loader import Batch, TrainingDataset
from ..data.transforms import compute_crop, resize_and_crop
from .config import ClassDataConfig

_MOST_BYTES = 2**30
"""Maximum size of decoded images that a process keeps: small networks would otherwise always wait for files."""


class LabelledDataset(TrainingDataset):
    """Images in the network's own size.

    Args:
        rows: with the columns that `config` names.
        usable_rows: indices of the rows to use.
        config: of the run.
        labels: class of each row, 0 to N - 1; None for a network without classes.
        shape: (channels, height, width) of what the network takes.
        num_train_timesteps: T.
        no_class: the label for no class, N.
        noise_offset: as in `TrainingDataset`.
        held_out: rows that are kept aside for validation.
    """

    def __init__(
        self,
        rows: Rows,
        usable_rows: Collection[int],
        config: ClassDataConfig,
        labels: Sequence[int] | None,
        shape: tuple[int, int, int],
        num_train_timesteps: int,
        no_class: int = 0,
        noise_offset: float = 0.0,
        held_out: Sequence[int] = (),
    ) -> None:
        used = without_rows(usable_rows, held_out)
        super().__init__(rows, used, config, noise_offset=noise_offset, held_out=held_out)
        self.config, self.labels, self.no_class = config, labels, no_class
        self.shape, self.num_train_timesteps = shape, num_train_timesteps
        fits = len(rows) * math.prod(shape) <= _MOST_BYTES
        self._remembered = torch.empty(len(rows), *shape, dtype=torch.uint8) if fits else None
        self._known: set[int] = set()

    def _load_pixels(self, index: int) -> Tensor:
        """A data row's image, uint8 [C, h, w]; kept in memory if all of them fit."""
        if self._remembered is not None and index in self._known:
            return self._remembered[index]
        image = read_image(self.rows, self.config.image_column, index)
        crop = compute_crop((image.height, image.width), self.shape[1:])
        pixels = resize_and_crop(image.convert("L") if self.shape[0] == 1 else image, crop)
        if self._remembered is not None:
            self._remembered[index] = pixels
            self._known.add(index)
        return pixels

    def sample(self, index: int, draw: torch.Generator, augment: bool = True) -> Batch:
        """The training sample of a data row; see `TrainingDataset.sample`.

        Returns:
            `pixel_values` [C, h, w] in [-1, 1], `timestep`, N(0, 1) `noise` [C, h, w], and the `class_labels`.
        """
        dropped, flipped = torch.rand(2, generator=draw).tolist()
        pixels, mirrored = self._load_pixels(index), augment and self.config.random_flip and flipped < 0.5
        batch = {
            "pixel_values": to_model_range(pixels.flip(-1) if mirrored else pixels),
            "timestep": torch.randint(self.num_train_timesteps, (), generator=draw),
            "noise": torch.randn(self.shape, generator=draw),
        }
        if self.labels is not None:
            label = self.no_class if augment and dropped < self.config.class_dropout else self.labels[index]
            batch["class_labels"] = torch.tensor(label)
        return batch
