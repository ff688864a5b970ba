"""Find the predictions that a pipeline combines in the outputs of its denoisers for a step.

Some pipelines stack them in one batch, others call a denoiser for each. Some pass the complete output to the
scheduler, others only the part that is denoised, or a reshaped one (frames, a grid, a sequence of tokens). A pipeline
uses one of the layouts in this module, which is identified from its result.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn


def find_denoisers(pipe: Any) -> list[nn.Module]:
    """The UNets among a pipeline's components, compiled or not, or else its transformers."""
    parts = [(name, part) for name, part in vars(pipe).items() if isinstance(part, nn.Module)]
    unets = [part for name, part in parts if name == "unet" or "UNet" in type(_unwrap_compiled(part)).__name__]
    return unets or [part for name, part in parts if "transformer" in name or _is_transformer(_unwrap_compiled(part))]


def _unwrap_compiled(part: nn.Module) -> Any:
    """The module inside a `torch.compile` wrapper, or the module itself."""
    return getattr(part, "_orig_mod", part)


def _is_transformer(part: Any) -> bool:
    """Whether a pipeline's component is a denoising transformer of diffusers, but not a ControlNet."""
    kind = type(part).__name__
    return isinstance(part, ModelMixin) and "Transformer" in kind and "ControlNet" not in kind


def has_channels_last(denoiser: nn.Module) -> bool:
    """Whether a denoiser predicts [B, F, H, W, C], as in Kandinsky 5 and 6; shapes do not show this."""
    return "out_visual_dim" in getattr(_unwrap_compiled(denoiser), "config", {})


def output_tensors(output: Any) -> tuple[Tensor, ...]:
    """A denoiser's output as a tuple of tensors, one per scheduler, usually one.

    A list that represents a batch is stacked.
    """
    if isinstance(output, Tensor):
        return (output,)
    parts = list(output.values()) if isinstance(output, Mapping) else list(output)
    found = []
    for part in parts:
        if isinstance(part, list) and part and all(isinstance(x, Tensor) and x.shape == part[0].shape for x in part):
            part = torch.stack(part)
        if not isinstance(part, Tensor):
            break
        found.append(part)
    return tuple(found)


@dataclass(frozen=True)
class Layout:
    """Layout of the predictions in a step's outputs; each output contains `copies` predictions."""

    copies: tuple[int, ...]
    interleaved: bool = False
    """Whether predictions are grouped by sample rather than by condition."""
    from_end: bool = False
    """Whether the end, rather than the beginning, of an output longer than the scheduler's sample is used."""

    def predictions(self, outputs: Sequence[Tensor], shape: Sequence[int]) -> list[Tensor]:
        """Split a step's denoiser outputs into predictions with the scheduler's shape; empty if one does not fit."""
        parts = []
        for output, copies in zip(outputs[-len(self.copies) :], self.copies, strict=True):
            size = len(output) // copies
            for i in range(copies):
                part = output[i::copies] if self.interleaved else output.narrow(0, i * size, size)
                there = _fit_to_shape(part, shape, self.from_end)
                if there is None:
                    return []
                parts.append(there)
        return parts


def possible_layouts(outputs: Sequence[Tensor], shape: Sequence[int]) -> Iterator[Layout]:
    """Possible layouts of predictions with this shape in the denoisers' outputs; layouts with only the last output
    first.
    """
    for some in dict.fromkeys((1, len(outputs))):
        copies = [divmod(len(output) * frames_per_sample(output, shape), shape[0]) for output in outputs[-some:]]
        if any(rest or not number for number, rest in copies) or sum(number for number, _ in copies) == 1:
            continue
        numbers = tuple(number for number, _ in copies)
        for from_end in (False, True):
            for interleaved in (False, True) if max(numbers) > 1 else (False,):
                yield Layout(numbers, interleaved, from_end)


def frames_per_sample(output: Tensor, shape: Sequence[int]) -> int:
    """Number of items in the scheduler's batch per sample: the frames if a video is passed as a batch, else 1."""
    return output.shape[2] if output.ndim == 5 and len(shape) == 4 else 1


def _fit_to_shape(part: Tensor, shape: Sequence[int], from_end: bool) -> Tensor | None:
    """A part of a denoiser's output narrowed to the scheduler's shape; None if it does not fit.

    Removes a predicted variance, conditioning frames, or tokens of a reference image.
    """
    if part.shape == tuple(shape):
        return part
    for view in _reshaped_views(part, shape):
        if view.ndim == len(shape) and all(have >= wanted for have, wanted in zip(view.shape, shape, strict=True)):
            for dim, size in enumerate(shape):
                view = view.narrow(dim, view.shape[dim] - size if from_end else 0, size)
            return view
    return None


def _reshaped_views(part: Tensor, shape: Sequence[int]) -> Iterator[Tensor]:
    """A prediction reshaped for the scheduler: frames as a batch, a grid as tokens, or tokens as a grid."""
    if part.ndim == 5 and len(shape) == 4:  # frames as a batch
        yield part.transpose(1, 2).flatten(0, 1)
    elif part.ndim == 5 and len(shape) == 3:  # a grid as a row of tokens
        yield part.flatten(2).transpose(1, 2)
    elif part.ndim == 3 and len(shape) == 5 and part.shape[1] % (shape[3] * shape[4]) == 0:  # and back
        yield part.transpose(1, 2).reshape(len(part), part.shape[2], -1, *shape[3:])
    else:
        yield part
