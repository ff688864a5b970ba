"""Captioned images as training batches that depend on nothing but the seed and their place in the run.

A run is one endless sequence of samples. The sample at a position, with all its randomness (which image, which
caption, flip, dropout, timestep, noise), is a function of (seed, position) alone. So a run gives the same weights
wherever it was interrupted, with however many workers, and however its global batch is divided over processes and
accumulation.
"""

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from ..images import ImageError, find_images, load_rgb
from .config import TrainingConfig

Batch = dict[str, Tensor]


def open_images(config: TrainingConfig) -> datasets.Dataset:
    """The rows of a configuration's data: an image column that is not decoded yet, and a caption column.

    Raises:
        ValueError: no images, no captions, or columns of other names.
        OSError: no such folder or data set.
    """
    if config.train_data_dir:
        where, rows = f"--train_data_dir={config.train_data_dir}", _open_folder(config)
    else:
        where = f"--dataset_name={config.dataset_name}"
        rows = datasets.load_dataset(config.dataset_name, split="train")
    for option in ("image_column", "caption_column"):
        if getattr(config, option) not in rows.column_names:
            raise ValueError(
                f"{where} has the columns {', '.join(rows.column_names)}; --{option}={getattr(config, option)!r} is "
                "not one of them."
            )
    rows = rows.select_columns([config.image_column, config.caption_column])
    # We decode, since Pillow's RGB of 16-bit and transparent images is not what they show.
    return rows.cast_column(config.image_column, datasets.Image(decode=False))


def _open_folder(config: TrainingConfig) -> datasets.Dataset:
    folder = Path(str(config.train_data_dir))
    images = find_images(folder)
    if not images:
        raise ValueError(f"--train_data_dir={folder} holds no images.")
    if not any((folder / f"metadata.{ending}").is_file() for ending in ("jsonl", "csv", "parquet")):
        raise ValueError(
            f"--train_data_dir={folder} holds {len(images)} images but no captions: add a metadata.jsonl with one "
            f'line per image, {{"file_name": "{images[0].relative_to(folder)}", "{config.caption_column}": "..."}}.'
        )
    return datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")


def check_images(rows: datasets.Dataset, config: TrainingConfig, progress: bool = True) -> list[int]:
    """Indices of the rows whose image can be read; every image is decoded once, before training starts.

    Raises:
        ValueError: an image cannot be read and `--on_bad_image` is `fail`, or none can.
    """

    def complaint(index: int) -> str | None:
        try:
            _read(rows, config.image_column, index)
        except ImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        complaints = list(
            tqdm(
                pool.map(complaint, range(len(rows))), "checking images", len(rows), disable=not progress, unit="image"
            )
        )
    bad = [text for text in complaints if text]
    if bad:
        shown = "\n  ".join([*bad[:20], *([f"and {len(bad) - 20} more"] if len(bad) > 20 else [])])
        report = f"{len(bad)} of {len(rows)} images cannot be read:\n  {shown}"
        if config.on_bad_image == "fail":
            raise ValueError(f"{report}\nMend or remove them, or leave them out with --on_bad_image skip.")
        tqdm.write(report)
    good = [index for index, text in enumerate(complaints) if not text]
    if not good:
        raise ValueError("No image is left to train on.")
    return good


def _read(rows: datasets.Dataset, column: str, index: int) -> Image.Image:
    image = rows[index][column] or {"bytes": b"", "path": None}
    source = image["bytes"] if image["bytes"] is not None else image["path"]
    return load_rgb(source, name=image["path"] or f"of row {index}")


def generator(*key: int) -> torch.Generator:
    """A generator whose state is a hash of the key, so that neighbouring keys have unrelated streams."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


class Samples(Dataset[Batch]):
    """The endless sequence of training samples, by position.

    Args:
        rows: from `open_images`.
        good: indices of the rows to use, from `check_images`.
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
        self.rows, self.good, self.config = rows, good, config
        self.tokenizer, self.resolution = tokenizer, resolution
        self.latent_shape, self.num_train_timesteps = latent_shape, num_train_timesteps

    @functools.lru_cache(maxsize=2)  # noqa: B019  lives as long as the run
    def _order(self, epoch: int) -> list[int]:
        order = torch.randperm(len(self.good), generator=generator(self.config.seed, 0, epoch))
        return [self.good[i] for i in order.tolist()]

    def __getitem__(self, position: int) -> Batch:
        """The sample at a position.

        Returns:
            `pixel_values` [3, h, w] in [-1, 1], `input_ids` [length], `timestep`, and N(0, 1) `noise` and
            `posterior_noise` in the shape of the latents.
        """
        epoch, place = divmod(position, len(self.good))
        index, draw = self._order(epoch)[place], generator(self.config.seed, 1, position)
        dropped, flipped, which = torch.rand(3, generator=draw).tolist()
        caption = (
            "" if dropped < self.config.caption_dropout else _one(self.rows[index][self.config.caption_column], which)
        )
        image = _read(self.rows, self.config.image_column, index)
        return {
            "pixel_values": _to_pixels(image, self.resolution, self.config.random_flip and flipped < 0.5),
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


def _to_pixels(image: Image.Image, resolution: int, flip: bool) -> Tensor:
    """Shorter side to `resolution`, centre crop, [-1, 1]."""
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + resolution, top + resolution))))
    pixels = pixels.permute(2, 0, 1).float() / 127.5 - 1
    return pixels.flip(-1) if flip else pixels


class Positions(Sampler[list[int]]):
    """Which positions of the sequence each forward pass of this process takes.

    A step's global batch is a contiguous range, cut into forward passes and those into processes.

    Args:
        config: of the run.
        first_step: optimizer steps already made.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, config: TrainingConfig, first_step: int, rank: int, world_size: int) -> None:
        self.batch_size, self.rank, self.world_size = config.train_batch_size, rank, world_size
        self.passes = range(
            first_step * config.gradient_accumulation_steps,
            config.max_train_steps * config.gradient_accumulation_steps,
        )

    def __len__(self) -> int:
        return len(self.passes)

    def __iter__(self) -> Iterator[list[int]]:
        for forward_pass in self.passes:
            first = (forward_pass * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))


def load_batches(samples: Samples, positions: Positions, config: TrainingConfig) -> DataLoader[Batch]:
    """Batches of samples; all randomness is in the samples, so none is drawn from torch's global generator."""
    return DataLoader(
        samples,
        batch_sampler=positions,
        num_workers=config.dataloader_num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
