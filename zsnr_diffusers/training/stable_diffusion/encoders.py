"""The frozen autoencoder and text encoders: their inputs, results, and cache keys."""

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...utils.hashing import state_sha256
from ..data.dataset import to_model_range
from ..data.transforms import RESIZE_METHOD
from .row_cache import Rows
from .samples import CaptionedDataset, text_cache_key

VERSION = 2
"""Version of the results; increase it when the same weights and inputs give different results."""


class FrozenEncoder(ABC):
    """A frozen encoder network.

    Args:
        network: of the pipeline.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    """What an input is, in words."""
    batch_size: ClassVar[int]
    """Inputs that are computed at once to be stored."""

    def __init__(self, network: Any) -> None:
        self.network = network.requires_grad_(False).eval()
        self.facts: dict[str, Any] = {}
        """What the results that are stored depend on, once that was asked for."""

    def arithmetic_dtype(self, half: torch.dtype | None) -> torch.dtype | None:
        """Dtype to compute in under mixed precision `half`; None for the network's own."""
        return half

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network's weights."""
        return next(self.network.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the network's weights."""
        return next(self.network.parameters()).device

    def move(self, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
        """Bring the network to a device and, unless None, a dtype."""
        self.network.to(device, dtype)

    def cache_facts(self, dtype: torch.dtype | None) -> dict[str, Any]:
        """All that cached results depend on besides the input; `dtype` is the arithmetic's, None for the network's."""
        return {
            "version": VERSION,
            "network": type(self.network).__name__,
            "weights": state_sha256(self.network),
            "config": self._config_facts(),
            "dtype": str(dtype or self.dtype),
        }

    @abstractmethod
    def __call__(self, inputs: Tensor) -> Rows:
        """What is stored of a batch of inputs, without gradients."""

    @abstractmethod
    def _config_facts(self) -> dict[str, str]:
        """Settings of the network that affect its results, besides the weights."""

    @abstractmethod
    def unique_inputs(self, samples: CaptionedDataset, indices: list[int]) -> dict[bytes, Any]:
        """Keys for `load` of every distinct input from these data rows, by content."""

    @abstractmethod
    def input_shape(self, samples: CaptionedDataset, key: Any) -> Hashable:
        """A value that is equal for inputs of one shape, which can be batched."""

    @abstractmethod
    def values_per_row(self, samples: CaptionedDataset, key: Any) -> int:
        """Number of values that are cached for an input."""

    @staticmethod
    @abstractmethod
    def load(samples: CaptionedDataset, key: Any) -> Tensor:
        """Load an encoder's input by its key."""


class Autoencoder(FrozenEncoder):
    """Images uint8 [B, 3, h, w] to the moments of their latents: `mean` and `std` [B, C, h', w'].

    Args:
        vae: an AutoencoderKL.
        uses_force_upcast: compute in float32 instead of float16 if the network's config requires it, since SDXL's
            overflows.
    """

    name, label, batch_size = "latents", "image", 8

    def __init__(self, vae: Any, uses_force_upcast: bool) -> None:
        super().__init__(vae)
        self.needs_float32 = uses_force_upcast and bool(vae.config.force_upcast)
        """In float16."""

    def arithmetic_dtype(self, half: torch.dtype | None) -> torch.dtype | None:
        """float32 instead of float16, if that would overflow."""
        return torch.float32 if half == torch.float16 and self.needs_float32 else half

    def move(self, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
        """See `FrozenEncoder.move`; on a CPU in the layout in which its convolutions take a seventh less time."""
        layout = torch.channels_last if torch.device(device).type == "cpu" else torch.preserve_format
        self.network.to(device, dtype, memory_format=layout)

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Rows:
        """Moments, in the network's dtype."""
        pixels = to_model_range(inputs.to(self.device, non_blocking=True)).to(self.dtype)
        moments = self.network.encode(pixels).latent_dist
        return {"mean": moments.mean, "std": moments.std}

    def cache_facts(self, dtype: torch.dtype | None) -> dict[str, Any]:
        """The base's facts, and how images are resized and cropped."""
        return {**super().cache_facts(dtype), "fit": RESIZE_METHOD}

    def _config_facts(self) -> dict[str, str]:
        """The autoencoder's settings, without those of scaling, which is applied when latents are read."""
        # Latents are scaled and shifted when they are read.
        ours = {"scaling_factor", "shift_factor", "latents_mean", "latents_std"}
        return {k: str(v) for k, v in self.network.config.items() if not k.startswith("_") and k not in ours}

    def unique_inputs(self, samples: CaptionedDataset, indices: list[int]) -> dict[bytes, Any]:
        """(row, flipped) of every image, by the hash of its file, from `samples.hashes`, and its size."""
        flips = (False, True) if samples.config.random_flip else (False,)
        return {samples.image_cache_key(index, flip): (index, flip) for index in indices for flip in flips}

    def input_shape(self, samples: CaptionedDataset, key: Any) -> Hashable:
        """Size of the row's bucket."""
        return samples.bucket_size(key[0])

    def values_per_row(self, samples: CaptionedDataset, key: Any) -> int:
        """Number of values in mean and standard deviation of a row's latents."""
        return 2 * math.prod(samples.latent_shape(key[0]))

    @staticmethod
    def load(samples: CaptionedDataset, key: Any) -> Tensor:
        """A row's image, center-cropped, uint8 [3, h, w]."""
        index, flipped = key
        return samples.pixel_values(samples.crop(index), index, flipped)


class TextEncoder(FrozenEncoder):
    """Token ids [B, length] to the encoder's states: `text` [B, length, D].

    Args:
        text_encoder: a CLIPTextModel.
        length: tokens of a caption.
        chunks: into which they are cut, each encoded by itself; the states follow each other.
        clip_skip: number of skipped last layers, as in the pipeline's call; None for none.
    """

    name, label, batch_size = "text", "caption", 32

    def __init__(self, text_encoder: Any, length: int, chunks: int = 1, clip_skip: int | None = None) -> None:
        super().__init__(text_encoder)
        self.length, self.chunks, self.clip_skip = length, chunks, clip_skip

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Rows:
        """States, in the network's dtype."""
        ids = self._cut(inputs.to(self.device, non_blocking=True))
        if self.clip_skip is None:
            return {"text": self._join(self.network(ids)[0])}
        states = self.network(ids, output_hidden_states=True).hidden_states[-(self.clip_skip + 1)]
        # As the pipeline does: what is skipped are layers, not the norm behind them.
        return {"text": self._join(self.network.text_model.final_layer_norm(states))}

    def _cut(self, ids: Tensor) -> Tensor:
        """Token ids [B, length] as chunks [B * chunks, length / chunks]."""
        return ids.reshape(len(ids) * self.chunks, -1)

    def _join(self, states: Tensor) -> Tensor:
        """States of chunks as those of captions, [B, length, D]."""
        return states.reshape(len(states) // self.chunks, self.length, -1)

    def _text_encoders(self) -> list[Any]:
        """The text encoders that compute the states."""
        return [self.network]

    def _config_facts(self) -> dict[str, str]:
        """The text encoders' settings, without those that versions of transformers add by themselves."""
        # Not what other versions of transformers write there of themselves.
        theirs = {"transformers_version", "architectures", "dtype", "torch_dtype"}
        facts = {
            f"{place}{name}": str(value)
            for place, encoder in zip(("", "2."), self._text_encoders(), strict=False)
            for name, value in encoder.config.to_dict().items()
            if not name.startswith("_") and name not in theirs
        }
        ours = {"chunks": (self.chunks, 1), "clip_skip": (self.clip_skip, None)}
        return facts | {name: str(value) for name, (value, usual) in ours.items() if value != usual}

    def unique_inputs(self, samples: CaptionedDataset, indices: list[int]) -> dict[bytes, Any]:
        """Token ids of every caption, by content."""
        ids = samples.conditioning.tokenize(sorted(samples.all_captions(indices)))
        return {content: content for content in map(text_cache_key, ids)}

    def input_shape(self, samples: CaptionedDataset, key: Any) -> Hashable:
        """The length of all captions in tokens."""
        return self.length

    def values_per_row(self, samples: CaptionedDataset, key: Any) -> int:
        """Number of values in a caption's text embeddings."""
        return self.length * sum(encoder.config.hidden_size for encoder in self._text_encoders())

    @staticmethod
    def load(samples: CaptionedDataset, key: Any) -> Tensor:
        """A caption's token ids from their bytes, int64 [length]."""
        return torch.frombuffer(bytearray(key), dtype=torch.int64)


class TextEncoderPair(TextEncoder):
    """Token ids [B, 2 length] to the result of `StableDiffusionXLPipeline.encode_prompt`.

    That is `text` [B, length, D + D'], the states before the last of both encoders, and `pooled` [B, E], the second's
    output for the whole caption.

    Args:
        text_encoder: a CLIPTextModel.
        text_encoder_2: a CLIPTextModelWithProjection.
        length: tokens of a caption by one of both.
        empty: token ids [2 length] of no caption, where the pipeline has `force_zeros_for_empty_prompt`: zeros are
            given for them, so that dropped captions train what the pipeline guides away from.
        chunks: as in `TextEncoder`; the second's output is that of the first chunk.
        clip_skip: number of skipped layers before the last, as in the pipeline's call; None for none.
    """

    def __init__(
        self,
        text_encoder: Any,
        text_encoder_2: Any,
        length: int,
        empty: Tensor | None,
        chunks: int = 1,
        clip_skip: int | None = None,
    ) -> None:
        super().__init__(nn.ModuleList([text_encoder, text_encoder_2]), length, chunks, clip_skip)
        self.empty = empty

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Rows:
        """States and pooled output, in the networks' dtype."""
        ids = inputs.to(self.device, non_blocking=True).chunk(2, dim=1)
        outputs = [
            encoder(self._cut(half), output_hidden_states=True)
            for encoder, half in zip(self.network, ids, strict=True)
        ]
        layer = -2 - (self.clip_skip or 0)
        rows = {
            "text": torch.cat([self._join(output.hidden_states[layer]) for output in outputs], dim=-1),
            "pooled": outputs[1].text_embeds[:: self.chunks],
        }
        if self.empty is not None:
            # Not by an index of truth values, whose number the host would have to wait for.
            said = (inputs != self.empty.to(inputs.device, non_blocking=True)).any(dim=1)
            said = said.to(self.device, non_blocking=True)
            rows = {name: values.where(said.reshape(-1, *[1] * (values.ndim - 1)), 0) for name, values in rows.items()}
        return rows

    def _text_encoders(self) -> list[Any]:
        """XL's two text encoders."""
        return list(self.network)

    def _config_facts(self) -> dict[str, str]:
        """Settings of both text encoders, and whether no caption means zeros."""
        return {**super()._config_facts(), "zeros": str(self.empty is not None)}

    def values_per_row(self, samples: CaptionedDataset, key: Any) -> int:
        """Number of values in a caption's states and pooled output."""
        return super().values_per_row(samples, key) + int(self.network[1].config.projection_dim)
