"""Captioned images as training samples."""

import struct
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..data.buckets import assign_to_buckets
from ..data.dataset import Images, Rows, captions_as_list, image_size, read_image
from ..data.held_out import without_rows
from ..data.loader import Batch, TrainingDataset
from ..data.row_values import ImageSizes, RowValues
from ..data.transforms import Crop, Size, compute_crop, resize_and_crop
from .conditioning import Conditioning
from .config import CaptionedDataConfig
from .row_cache import Cache


class CaptionedDataset(TrainingDataset):
    """Images with a caption.

    Args:
        rows: with the columns that `config` names.
        images: from `check_images`.
        config: of the run.
        conditioning: that the UNet is given.
        buckets: sizes that images are brought to, the square first. With `aspect_ratio_buckets` each image takes the
            nearest in shape, and batches have one size.
        latents: (channels, pixels per side of one) of latents.
        num_train_timesteps: T.
        global_batch: samples per optimizer step.
        noise_offset: as in `TrainingDataset`.
        held_out: rows that are kept aside for validation.
    """

    def __init__(
        self,
        rows: Rows,
        images: Images,
        config: CaptionedDataConfig,
        conditioning: Conditioning,
        buckets: Sequence[Size],
        latents: tuple[int, int],
        num_train_timesteps: int,
        global_batch: int = 1,
        noise_offset: float = 0.0,
        held_out: Sequence[int] = (),
    ) -> None:
        self._sizes = images if isinstance(images, ImageSizes) else None
        found = assign_to_buckets(self._sizes, buckets) if config.aspect_ratio_buckets and self._sizes else {}
        self._square, self.resolution = buckets[0], buckets[0][0]
        self._bucket_sizes, self._bucket_of = [*found], _bucket_numbers(found)
        used = {size: without_rows(group, held_out) for size, group in found.items()}
        self.buckets = {size: group for size, group in used.items() if group}
        """Rows that are trained on by the size that their images are brought to, if it is not the square for all."""
        batch, usable_rows = global_batch if self.buckets else 1, without_rows(images, held_out)
        super().__init__(rows, usable_rows, config, self.buckets.values(), batch, noise_offset, held_out)
        self.config, self.conditioning = config, conditioning
        self.latents, self.num_train_timesteps = latents, num_train_timesteps
        self.captions = rows.select_columns([config.caption_column])
        self.caches: dict[str, Cache] = {}
        """Cached values of images (`latents`) and captions (`text`), used instead of them."""
        self.hashes: Mapping[int, bytes] = {}
        """Of the images of rows, if `latents` are stored."""

    def sample(self, index: int, draw: torch.Generator, augment: bool = True) -> Batch:
        """The training sample of a data row; see `TrainingDataset.sample`.

        Returns:
            `pixel_values` uint8 [3, h, w] or what is stored of it, `input_ids` [length] or what is stored of it,
            what `conditioning` says of the crop, `timestep`, and N(0, 1) `noise` and `posterior_noise` in the shape of
            the latents.
        """
        dropped, flipped, which = torch.rand(3, generator=draw).tolist()
        captions = captions_as_list(self.captions[index][self.config.caption_column])
        is_dropped = augment and dropped < self.config.caption_dropout
        caption = "" if is_dropped else captions[int(which * len(captions))]
        mirrored = augment and self.config.random_flip and flipped < 0.5
        crop = self.crop(index, draw if augment and self.config.random_crop else None)
        shape = self.latent_shape(index)
        batch = {
            **self._image_inputs(crop, index, mirrored),
            **self.conditioning.for_crop(crop.hflip() if mirrored else crop),
            "timestep": torch.randint(self.num_train_timesteps, (), generator=draw),
            "noise": torch.randn(shape, generator=draw),
            "posterior_noise": torch.randn(shape, generator=draw),
        }
        if augment and self.config.varies_tags and caption:  # after all else, which is thus the same without
            config = self.config
            caption = vary_tags(caption, config.shuffle_tags, config.keep_tags, config.tag_dropout, draw)
        return {**batch, **self.text_inputs(caption)}

    def crop(self, index: int, draw: torch.Generator | None = None) -> Crop:
        """The crop of a row's image: at the center, or at random if `draw` is passed."""
        place = None if draw is None else torch.rand(2, generator=draw).tolist()
        return compute_crop(self.image_size(index), self.bucket_size(index), place)

    def image_size(self, index: int) -> Size:
        """(height, width) of a row's image."""
        return self._sizes[index] if self._sizes else image_size(self.rows, self.config.image_column, index)

    def first_images(self, count: int) -> Images:
        """The first `count` usable images, of the type of `images`."""
        return self._sizes.first(count) if self._sizes else self.usable_rows[:count]

    def bucket_size(self, index: int) -> Size:
        """Size to which a row's image is resized and cropped."""
        return self._bucket_sizes[self._bucket_of[index]] if self._bucket_sizes else self._square

    def latent_shape(self, index: int) -> tuple[int, int, int]:
        """(channels, height, width) of a row's latents."""
        (height, width), (channels, side) = self.bucket_size(index), self.latents
        return channels, height // side, width // side

    def _image_inputs(self, crop: Crop, index: int, flipped: bool) -> Batch:
        """A row's latent moments from the cache, or else its `pixel_values`; nothing if none are read."""
        if not self.config.reads_images:
            return {}
        if "latents" in self.caches:
            return self.caches["latents"][self.image_cache_key(index, flipped)]
        return {"pixel_values": self.pixel_values(crop, index, flipped)}

    def text_inputs(self, caption: str) -> Batch:
        """A caption's text embeddings from the cache, or else its `input_ids`."""
        input_ids = self.conditioning.tokenize([caption])[0]
        if "text" in self.caches:
            return self.caches["text"][text_cache_key(input_ids)]
        return {"input_ids": input_ids}

    def pixel_values(self, crop: Crop, index: int, flipped: bool) -> Tensor:
        """A crop of a row's image, uint8 [3, h, w]: a quarter of the bytes of floats."""
        pixels = resize_and_crop(read_image(self.rows, self.config.image_column, index, crop.decoded), crop)
        return pixels.flip(-1) if flipped else pixels

    def image_cache_key(self, index: int, flipped: bool) -> bytes:
        """Bytes that identify a row's center-cropped `pixel_values`: file hash, size, flip."""
        return self.hashes[index] + struct.pack("<2I?", *self.bucket_size(index), flipped)

    def all_captions(self, indices: Sequence[int]) -> set[str]:
        """Every possible caption of these data rows, including the empty one of caption dropout."""
        rows = self.captions[list(indices)][self.config.caption_column]
        return {"", *(caption for row in rows for caption in captions_as_list(row))}


def vary_tags(caption: str, shuffle: bool, keep: int, dropout: float, draw: torch.Generator) -> str:
    """A caption of comma-separated tags, shuffled or with some of them dropped.

    Args:
        caption: of tags; spaces around them do not matter.
        shuffle: whether they change places.
        keep: tags at the beginning that stay as they are.
        dropout: probability of dropping each other tag.
        draw: the random generator.
    """
    tags = [tag for tag in map(str.strip, caption.split(",")) if tag]
    first, others = tags[:keep], tags[keep:]
    order = torch.randperm(len(others), generator=draw).tolist() if shuffle else range(len(others))
    stays = (torch.rand(len(others), generator=draw) >= dropout).tolist()
    return ", ".join([*first, *(others[place] for place in order if stays[place])])


def _bucket_numbers(buckets: Mapping[Size, Sequence[int]]) -> Mapping[int, int]:
    """The number of the bucket of each row."""
    rows = np.concatenate([np.asarray(found, np.int64) for found in buckets.values()] or [np.empty(0, np.int64)])
    numbers = np.repeat(np.arange(len(buckets), dtype=np.int16), [*map(len, buckets.values())])
    order = np.argsort(rows)
    return RowValues(rows[order], numbers[order])


def text_cache_key(input_ids: Tensor) -> bytes:
    """Bytes that identify a caption to the text encoders: its token ids."""
    return input_ids.numpy().tobytes()
