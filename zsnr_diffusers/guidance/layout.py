"""Where the predictions that a pipeline combines lie in what its denoisers returned for a step.

Some stack them in one batch, others call a denoiser for each; some hand all of an output to the scheduler, others the
part that is being denoised, or the same numbers as frames, as a grid or as a row of tokens. What a pipeline does is
one of the layouts here; which of them, its result tells.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn


def denoisers(pipe: Any) -> list[nn.Module]:
    """The UNets among a pipeline's components, compiled or not; where there are none, its transformers."""
    parts = [(name, part) for name, part in vars(pipe).items() if isinstance(part, nn.Module)]
    unets = [part for name, part in parts if name == "unet" or "UNet" in type(_uncompiled(part)).__name__]
    return unets or [part for name, part in parts if "transformer" in name or _is_transformer(_uncompiled(part))]


def _uncompiled(part: nn.Module) -> Any:
    return getattr(part, "_orig_mod", part)


def _is_transformer(part: Any) -> bool:
    kind = type(part).__name__
    return isinstance(part, ModelMixin) and "Transformer" in kind and "ControlNet" not in kind


def tensors(output: Any) -> tuple[Tensor, ...]:
    """What a denoiser returned: a tensor for each scheduler that it is made for, most often one.

    A list that stands for a batch becomes one.
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
    """How the outputs of a step hold predictions; those are as many as `copies` says, of each output."""

    copies: tuple[int, ...]
    interleaved: bool = False
    """Whether the predictions of a sample follow each other, rather than those of a kind."""
    from_end: bool = False
    """Whether the end of what is longer than the scheduler's sample is used, rather than the beginning."""

    def predictions(self, outputs: Sequence[Tensor], shape: Sequence[int]) -> list[Tensor]:
        """The predictions, in the shape that the scheduler sees; none if an output cannot be brought to it."""
        parts = []
        for output, copies in zip(outputs[-len(self.copies) :], self.copies, strict=True):
            size = len(output) // copies
            for i in range(copies):
                part = output[i::copies] if self.interleaved else output.narrow(0, i * size, size)
                there = _in_shape(part, shape, self.from_end)
                if there is None:
                    return []
                parts.append(there)
        return parts


def layouts(outputs: Sequence[Tensor], shape: Sequence[int]) -> Iterator[Layout]:
    """Those that are possible where something of this shape is made of the outputs; the last alone comes first."""
    for some in dict.fromkeys((1, len(outputs))):
        copies = [divmod(len(output) * frames(output, shape), shape[0]) for output in outputs[-some:]]
        if any(rest or not number for number, rest in copies) or sum(number for number, _ in copies) == 1:
            continue
        numbers = tuple(number for number, _ in copies)
        for from_end in (False, True):
            for interleaved in (False, True) if max(numbers) > 1 else (False,):
                yield Layout(numbers, interleaved, from_end)


def frames(output: Tensor, shape: Sequence[int]) -> int:
    """How many items of the scheduler's batch a sample is: its frames, where a video is handed on as a batch."""
    return output.shape[2] if output.ndim == 5 and len(shape) == 4 else 1


def _in_shape(part: Tensor, shape: Sequence[int], from_end: bool) -> Tensor | None:
    """A part of an output in the shape that the scheduler sees, which leaves out what it does not.

    That is a predicted variance, given frames, or tokens of an image that is only looked at.
    """
    if part.shape == tuple(shape):
        return part
    for view in _views(part, shape):
        if view.ndim == len(shape) and all(have >= wanted for have, wanted in zip(view.shape, shape, strict=True)):
            for dim, size in enumerate(shape):
                view = view.narrow(dim, view.shape[dim] - size if from_end else 0, size)
            return view
    return None


def _views(part: Tensor, shape: Sequence[int]) -> Iterator[Tensor]:
    if part.ndim == 5 and len(shape) == 4:  # frames as a batch
        yield part.transpose(1, 2).flatten(0, 1)
    elif part.ndim == 5 and len(shape) == 3:  # a grid as a row of tokens
        yield part.flatten(2).transpose(1, 2)
    elif part.ndim == 3 and len(shape) == 5 and part.shape[1] % (shape[3] * shape[4]) == 0:  # and back
        yield part.transpose(1, 2).reshape(len(part), part.shape[2], -1, *shape[3:])
    else:
        yield part
