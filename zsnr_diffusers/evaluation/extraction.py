"""Extract features of images from any source, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from os import PathLike, fspath
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..utils.extras import import_extra
from .feature_statistics import FeatureOrigin, FeatureStatistics
from .features import FeatureNetwork
from .image_stream import ImageReader, list_images

if TYPE_CHECKING:
    import torch

Images: TypeAlias = "str | PathLike[str] | torch.Tensor | Iterable[Image.Image | str | PathLike[str]]"


@dataclass(frozen=True)
class ImageFeatures:
    """Features float32 [n, d] of n images, and logits float32 [n, classes] if the network is a classifier."""

    features: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32] | None
    origin: FeatureOrigin

    def __repr__(self) -> str:
        return "ImageFeatures [{} x {}] of {}".format(*self.features.shape, self.origin)

    @classmethod
    def concatenate(cls, parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """Concatenate the features of at least one part of the images, all from the same network."""
        logits = [part.logits for part in parts if part.logits is not None]
        features = np.concatenate([part.features for part in parts])
        return cls(features, np.concatenate(logits) if logits else None, parts[0].origin)

    def statistics(self) -> FeatureStatistics:
        """Mean and covariance of the features, for `frechet_distance`."""
        return FeatureStatistics.of(self.features, self.origin)


def image_features(
    network: FeatureNetwork, images: Images, *, batch_size: int = 32, progress: bool = True
) -> ImageFeatures:
    """Extract the features of every image, for Fréchet distance, Inception Score and KID.

    Features of 50,000 images by the 2015 Inception network take 0.6 GB; `image_statistics` stores none.

    Args:
        network: such as `InceptionFeatures`.
        images: a folder, searched at any depth in the order of its paths; an iterable of paths or PIL images, such as
            `iter_images`; or a uint8 tensor [n, 3, h, w]. All images must have the same size, and are resized by the
            network. Files are read by `zsnr_diffusers.utils.images`.
        batch_size: images per call of the network.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: no images, images of different sizes, or a tensor with an unsupported layout.
        ImageError: a file that cannot be read.
    """
    batches = _extract_batches(network, images, batch_size, progress)
    return ImageFeatures.concatenate([ImageFeatures(*batch, network.origin) for batch in batches])


def image_statistics(
    network: FeatureNetwork, images: Images, *, batch_size: int = 32, progress: bool = True
) -> FeatureStatistics:
    """Mean and covariance of the features of images, with only a few batches in memory.

    Arguments and errors are those of `image_features`.
    """
    statistics = FeatureStatistics(network.origin)
    for features, _ in _extract_batches(network, images, batch_size, progress):
        statistics.update(features)
    return statistics


def _extract_batches(
    network: FeatureNetwork, images: Images, batch_size: int, progress: bool
) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]]:
    """Yield features [n, d] and logits, or None, of each batch of images."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    batches, total = uint8_batches(images, batch_size)
    count = 0
    disable = None if progress else True  # None: only if the output is a terminal
    with import_extra("tqdm").tqdm(total=total, unit="image", desc=network.origin.network, disable=disable) as bar:
        for batch in batches:
            features, logits = network(batch)
            if features.ndim != 2 or len(features) != len(batch):
                raise ValueError(
                    f"{network.origin.network} returned features of shape {list(features.shape)} for {len(batch)} "
                    "images; expected [n, d]"
                )
            count += len(batch)
            bar.update(len(batch))
            yield _to_numpy(features), None if logits is None else _to_numpy(logits)
    if not count:
        raise ValueError("no images: the iterable is empty")


def uint8_batches(images: Images, batch_size: int, channels: int = 3) -> tuple[Iterator[torch.Tensor], int | None]:
    """Batches uint8 [n, channels, h, w], and the number of images if known in advance.

    Arguments and errors are those of `image_features`; with one channel, images become gray with Pillow's weights.
    """
    if hasattr(images, "detach"):  # a tensor, checked without importing torch
        tensor = _check_uint8_tensor(cast("torch.Tensor", images), channels)
        return (tensor[i : i + batch_size] for i in range(0, len(tensor), batch_size)), len(tensor)
    if isinstance(images, (str, PathLike)):
        images = list_images(fspath(images))
    listed = cast("Iterable[Image.Image | str | PathLike[str]]", images)
    total = len(listed) if isinstance(listed, (list, tuple)) else None
    return _stack_batches(_read_same_size(listed, channels), batch_size), total


def _check_uint8_tensor(images: torch.Tensor, channels: int) -> torch.Tensor:
    """Refuse a tensor that is not uint8 [n, channels, h, w]; returns it."""
    import torch

    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != channels or not len(images):
        raise ValueError(
            f"expected uint8 images of shape [n, {channels}, h, w], n > 0, got {images.dtype} {list(images.shape)}; "
            "convert floating-point images in [-1, 1] with zsnr_diffusers.evaluation.quantize"
        )
    return images


def _read_same_size(
    images: Iterable[Image.Image | str | PathLike[str]], channels: int
) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield images as uint8 [h, w, channels], and refuse one with a different size than the first."""
    for rgb in ImageReader(images, one_size=True):
        yield np.array(rgb) if channels == 3 else np.array(rgb.convert("L"))[..., None]


def _stack_batches(arrays: Iterator[npt.NDArray[np.uint8]], batch_size: int) -> Iterator[torch.Tensor]:
    """Stack images [h, w, c] into tensors [n, c, h, w] of up to `batch_size`."""
    import torch

    while batch := list(islice(arrays, batch_size)):
        yield torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).contiguous()


def _to_numpy(values: torch.Tensor) -> npt.NDArray[np.float32]:
    """Features or logits as float32 on the CPU."""
    return np.asarray(values.detach().float().cpu().numpy())
