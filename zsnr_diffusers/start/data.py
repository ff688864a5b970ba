"""Training data of a start: features of captions and low frequencies of images, each computed once and cached."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from diffusers.utils import logging
from PIL import Image, ImageOps
from torch import Tensor

from ..core.dct import dct
from ..utils.extras import import_extra
from ..utils.hashing import file_sha256, state_sha256
from ..utils.images import ImageSource, load_rgb
from .encoding import encode_images, pixel_values
from .latents import pool_prompt

MAX_FREQUENCIES = 6
"""Number of low frequencies per side to keep."""

_VERSION = 1
"""Version of the cached values; increase it when the same weights and inputs give different values."""
_BATCH, _CAPTIONS = 8, 32
"""Batch size for images and captions."""

Rows = dict[str, Tensor]


class RowCache(Protocol):
    """A cache of features of images and captions, by content."""

    def find_missing(self, contents: Sequence[bytes]) -> list[bytes]:
        """The contents that are not cached."""

    def __getitem__(self, content: bytes) -> Rows:
        """The cached values of a content."""

    def write(self, batches: Iterator[tuple[Sequence[bytes], Rows]]) -> None:
        """Store the values computed for each content."""


OpenCache = Callable[[str, Mapping[str, Any]], RowCache]
"""Opens a cache, given the name of its content and everything its rows depend on."""


class MemoryCache:
    """An in-memory `RowCache` for the duration of a fit."""

    def __init__(self, name: str, facts: Mapping[str, Any]) -> None:
        self._rows: dict[bytes, Rows] = {}

    def find_missing(self, contents: Sequence[bytes]) -> list[bytes]:
        """As `RowCache.find_missing`."""
        return [content for content in dict.fromkeys(contents) if content not in self._rows]

    def __getitem__(self, content: bytes) -> Rows:
        return self._rows[content]

    def write(self, batches: Iterator[tuple[Sequence[bytes], Rows]]) -> None:
        """As `RowCache.write`."""
        for contents, rows in batches:
            for i, content in enumerate(contents):
                self._rows[content] = {name: values[i] for name, values in rows.items()}


def features_of_captions(
    pipe: Any, texts: Sequence[tuple[str, ...]], open_cache: OpenCache, progress: bool
) -> tuple[Tensor, Tensor]:
    """Features of the captions of each image [N, F], float64, and factors [F] that normalize each kind of feature."""
    distinct = [*dict.fromkeys(caption for some in texts for caption in some)]
    if not distinct:
        return torch.zeros(len(texts), 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    encoders = {name: state_sha256(getattr(pipe, name, None)) for name in ("text_encoder", "text_encoder_2")}
    cache = open_cache("prompts", {"version": _VERSION, **encoders})
    keys = {caption: caption.encode() for caption in distinct}
    missing = {key.decode(): key for key in cache.find_missing([*keys.values()])}
    cache.write(_encode_captions(pipe, missing, progress))
    cache.find_missing([*keys.values()])
    rows = {caption: cache[key] for caption, key in keys.items()}
    states, pooled = (
        torch.stack([torch.stack([rows[caption][kind] for caption in some]).double().mean(dim=0) for some in texts])
        for kind in ("states", "pooled")
    )
    # States and pooled states differ in size and number; each kind should have equal weight.
    scales = [torch.full(part.shape[1:], 1 / _total_deviation(part), dtype=part.dtype) for part in (states, pooled)]
    return torch.cat([states, pooled], dim=1), torch.cat(scales)


def _total_deviation(features: Tensor) -> float:
    """Square root of the variance of features [N, F], summed over F; 1 if it is zero."""
    return float((features - features.mean(dim=0)).square().mean(dim=0).sum().sqrt()) or 1.0


@torch.no_grad()
def _encode_captions(
    pipe: Any, captions: Mapping[str, bytes], progress: bool
) -> Iterator[tuple[Sequence[bytes], Rows]]:
    """Features of captions as the pipeline itself encodes prompts, in batches for a cache."""
    texts = [*captions]
    with _bar(len(texts), "captions", progress) as bar, _without_truncation_warnings():
        for at in range(0, len(texts), _CAPTIONS):
            some = texts[at : at + _CAPTIONS]
            encoded = pipe.encode_prompt(
                prompt=some, device=pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            features = pool_prompt(encoded)
            if features is None:
                raise ValueError(f"{type(pipe).__name__}.encode_prompt returns no text embeddings [B, tokens, width].")
            if bad := [text for text, one in zip(some, features, strict=True) if not bool(one.isfinite().all())]:
                raise ValueError(
                    f"The text encoders return values that are not finite for {bad[0]!r}: load them in float32."
                )
            width = encoded[0].shape[-1]
            yield [captions[text] for text in some], {"states": features[:, :width], "pooled": features[:, width:]}
            bar.update(len(some))


def amplitudes_of_images(
    pipe: Any, images: Sequence[ImageSource], pixels: int, open_cache: OpenCache, progress: bool
) -> Tensor:
    """Amplitudes of the lowest frequencies of every image's latents, [N, C, K, K]."""
    facts = {"version": _VERSION, "vae": state_sha256(pipe.vae), "resolution": pixels, "frequencies": MAX_FREQUENCIES}
    scaling = {key: str(pipe.vae.config.get(key)) for key in ("scaling_factor", "shift_factor", "latents_mean")}
    cache = open_cache("low-frequencies", facts | scaling)
    keys = [_content_key(images[i]) for i in range(len(images))]
    first = {key: i for i, key in reversed([*enumerate(keys)])}
    missing = {key: first[key] for key in cache.find_missing(keys)}
    cache.write(_encode_all(pipe, images, missing, pixels, progress))
    cache.find_missing(keys)
    return torch.stack([cache[key]["amplitudes"] for key in keys])


def _encode_all(
    pipe: Any, images: Sequence[ImageSource], places: Mapping[bytes, int], pixels: int, progress: bool
) -> Iterator[tuple[Sequence[bytes], Rows]]:
    """Amplitudes of images, in batches for a cache."""
    keys = [*places]
    with _bar(len(keys), "images", progress) as bar:
        for at in range(0, len(keys), _BATCH):
            some = keys[at : at + _BATCH]
            squares = [_square(load_rgb(images[places[key]]), pixels) for key in some]
            latents = encode_images(pipe.vae, pixel_values(squares))
            for key, one in zip(some, latents, strict=True):
                if not bool(one.isfinite().all()):
                    raise ValueError(
                        f"The autoencoder returns latents that are not finite for image {places[key]} "
                        f"({_name(images[places[key]])}): load the model in float32, or remove this image."
                    )
            scale = (latents.shape[-1] * latents.shape[-2]) ** 0.5
            yield some, {"amplitudes": dct(latents, (MAX_FREQUENCIES, MAX_FREQUENCIES)) / scale}
            bar.update(len(some))


def _square(image: Image.Image, pixels: int) -> Image.Image:
    """The center of an image, as cropped in training."""
    return ImageOps.fit(image, (pixels, pixels), Image.Resampling.LANCZOS)


def _content_key(image: ImageSource) -> bytes:
    """Cache key of an image: the hash of its file or its pixels."""
    if isinstance(image, Image.Image):
        image = load_rgb(image)
        return hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
    return hashlib.sha256(image).digest() if isinstance(image, bytes) else bytes.fromhex(file_sha256(image))


def _name(image: ImageSource) -> str:
    """Name of an image for error messages."""
    return str(image) if not isinstance(image, bytes | Image.Image) else type(image).__name__


def _bar(total: int, unit: str, progress: bool) -> Any:
    """A progress bar that is shown only on a terminal."""
    return import_extra("tqdm").tqdm(desc=f"encoding {unit}", total=total, disable=None if progress else True)


@contextlib.contextmanager
def _without_truncation_warnings() -> Iterator[None]:
    """Hide the warnings of pipelines about captions that their text encoder truncates."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
