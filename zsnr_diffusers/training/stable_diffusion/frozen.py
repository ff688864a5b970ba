"""Autoencoder and text encoder, which are not trained: what they compute, of what, and what that depends on."""

import math
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...hashes import state_sha256
from ..cache import Rows
from ..data import FIT, image_sha256
from .samples import CaptionedSamples, text_content

VERSION = 1
"""Raised whenever the same weights and inputs would give something else than before."""


class FrozenPart(ABC):
    """A network that is not trained.

    Args:
        network: of the pipeline.
        row_values: numbers that are stored of an input.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    """What an input is, in words."""
    batch_size: ClassVar[int]
    """Inputs that are computed at once to be stored."""

    def __init__(self, network: Any, row_values: int) -> None:
        self.network, self.row_values = network.requires_grad_(False).eval(), row_values

    def facts(self, dtype: torch.dtype | None) -> dict[str, Any]:
        """All that results depend on besides the input; `dtype` is that of the arithmetic, None the network's."""
        return {
            "version": VERSION,
            "network": type(self.network).__name__,
            "weights": state_sha256(self.network),
            "config": self._config(),
            "dtype": str(dtype or self.network.dtype),
        }

    @abstractmethod
    def __call__(self, inputs: Tensor) -> Rows:
        """What is stored of a batch of inputs, without gradients."""

    @abstractmethod
    def _config(self) -> dict[str, str]:
        """Settings of the network that weights do not tell."""

    @abstractmethod
    def inputs(self, samples: CaptionedSamples, indices: list[int]) -> dict[bytes, Any]:
        """Every input that these rows can give, each once: how `load` knows it, by its content."""

    @staticmethod
    @abstractmethod
    def load(samples: CaptionedSamples, known: Any) -> Tensor:
        """An input."""


class Autoencoder(FrozenPart):
    """Images [B, 3, h, w] in [-1, 1] to the moments of their latents: `mean` and `std` [B, C, h', w'].

    Args:
        vae: an AutoencoderKL.
        latent_shape: (C, h', w').
        resolution: h and w.
    """

    name, unit, batch_size = "latents", "image", 8

    def __init__(self, vae: Any, latent_shape: tuple[int, int, int], resolution: int) -> None:
        super().__init__(vae, 2 * math.prod(latent_shape))
        self.resolution = resolution

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Rows:
        """Moments, in the network's dtype."""
        moments = self.network.encode(inputs.to(self.network.device, self.network.dtype)).latent_dist
        return {"mean": moments.mean, "std": moments.std}

    def facts(self, dtype: torch.dtype | None) -> dict[str, Any]:
        """The size and cut of the images too."""
        return {**super().facts(dtype), "resolution": self.resolution, "fit": FIT}

    def _config(self) -> dict[str, str]:
        # Latents are scaled and shifted when they are read.
        ours = {"scaling_factor", "shift_factor", "latents_mean", "latents_std"}
        return {k: str(v) for k, v in self.network.config.items() if not k.startswith("_") and k not in ours}

    def inputs(self, samples: CaptionedSamples, indices: list[int]) -> dict[bytes, Any]:
        """(row, flipped) of every image, by the hash of its file."""
        column = samples.config.image_column
        with ThreadPoolExecutor() as pool:
            hashes = pool.map(lambda index: image_sha256(samples.rows, column, index), indices)
            samples.hashes = dict(
                zip(indices, tqdm(hashes, "hashing images", len(indices), unit="image"), strict=True)
            )
        flips = (False, True) if samples.config.random_flip else (False,)
        return {samples.image_content(index, flip): (index, flip) for index in indices for flip in flips}

    @staticmethod
    def load(samples: CaptionedSamples, known: Any) -> Tensor:
        """An image."""
        return samples.pixel_values(*known)


class TextEncoder(FrozenPart):
    """Token ids [B, length] to the encoder's states: `text` [B, length, D].

    Args:
        text_encoder: a CLIPTextModel.
        length: tokens of a caption.
    """

    name, unit, batch_size = "text", "caption", 32

    def __init__(self, text_encoder: Any, length: int) -> None:
        super().__init__(text_encoder, length * text_encoder.config.hidden_size)

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Rows:
        """States, in the network's dtype."""
        return {"text": self.network(inputs.to(self.network.device))[0]}

    def _config(self) -> dict[str, str]:
        # Not what other versions of transformers write there of themselves.
        theirs = {"transformers_version", "architectures", "dtype", "torch_dtype"}
        config = self.network.config.to_dict()
        return {k: str(v) for k, v in config.items() if not k.startswith("_") and k not in theirs}

    def inputs(self, samples: CaptionedSamples, indices: list[int]) -> dict[bytes, Any]:
        """The token ids of every caption."""
        ids = samples.tokenize(sorted(samples.all_captions(indices)))
        return {content: content for content in map(text_content, ids)}

    @staticmethod
    def load(samples: CaptionedSamples, known: Any) -> Tensor:
        """Token ids."""
        return torch.frombuffer(bytearray(known), dtype=torch.int64)
