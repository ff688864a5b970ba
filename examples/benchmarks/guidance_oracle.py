"""What ought to reach a pipeline's scheduler under guidance rescale, found by nothing of ours.

A run with our rescale is written down: what its denoisers returned, and what its scheduler got and gave. Then an
untouched pipeline runs twice on the same predictions and the same samples. Once it shows how stock combines them. Once
all predictions of a step are the conditional one, and it shows what stock makes of that: the conditional prediction,
negated, cut and turned as the pipeline does it. Algorithm 2 of Lin et al. 2023 on the two is what ought to have been,
and where low frequencies are kept, the conditional one's share of those, wave by wave.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from small_pipelines.parts import Small
from torch import Tensor

from zsnr_diffusers.guidance.layout import find_denoisers


@dataclass
class Step:
    """What a scheduler got and gave, and what denoisers returned since the step before."""

    outputs: list[Any]
    got: Tensor
    sample: Tensor
    given: Any


@dataclass
class Run:
    """What went through the two doors."""

    steps: list[Step] = field(default_factory=list)
    waiting: list[Any] = field(default_factory=list)

    @property
    def outputs(self) -> list[Any]:
        """Of every call of a denoiser."""
        return [output for step in self.steps for output in step.outputs] + self.waiting


def build(small: Small) -> Any:
    """A pipeline whose denoisers do not return the same for all prompts, as those do whose last layers are zero."""
    pipe = small.build()
    generator = torch.Generator().manual_seed(1)
    for denoiser in find_denoisers(pipe):
        for weights in denoiser.parameters():
            if weights.is_floating_point() and not weights.any():
                weights.data.normal_(std=0.1, generator=generator)
    return pipe


@contextmanager
def recorded(pipe: Any, replay: list[Any] | None = None, steps: list[Step] | None = None) -> Iterator[Run]:
    """Write down a run; with `replay`, denoisers return that, and schedulers what they gave in `steps`."""
    run, outputs, given = Run(), iter(replay or ()), iter(steps or ())

    def returned(module: Any, inputs: Any, output: Any) -> Any:
        value = _mapped(output, lambda x: x.detach()) if replay is None else next(outputs)
        run.waiting.append(value)
        return None if replay is None else value

    with ExitStack() as stack:
        for denoiser in find_denoisers(pipe):
            stack.callback(denoiser.register_forward_hook(returned).remove)
        classes = {type(part) for part in vars(pipe).values() if isinstance(part, diffusers.SchedulerMixin)}
        for kind in classes:  # on the class, since some pipelines step with a copy of their scheduler
            stack.enter_context(patch.object(kind, "step", _noting(kind.step, run, given if steps else None)))
        yield run


def _noting(original: Callable[..., Any], run: Run, given: Iterator[Step] | None) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        got, sample = bound["model_output"].detach().clone(), bound["sample"].detach().clone()
        result = original(*args, **kwargs)  # a scheduler counts its steps
        result = result if given is None else next(given).given
        run.steps.append(Step(run.waiting, got, sample, _mapped(result, torch.clone)))
        run.waiting = []
        return result

    return step


def errors(
    small: Small, run: Run, phi: float, conditional: int | None = None, k: int = 0, channels_last: bool = False
) -> tuple[float, float]:
    """The largest error and the largest change over a run's steps, relative to the largest value there, or 1.

    Args:
        small: the pipeline.
        run: of it, with guidance rescale `phi` and the lowest k x k frequencies kept.
        phi: guidance rescale.
        conditional: which of a step's predictions is the conditional one, where it is not the usual one.
        k: how many frequencies were kept.
        channels_last: whether predictions are [B, F, H, W, C].
    """
    which = (0 if small.guidance == "separate" else 1) if conditional is None else conditional
    guided = _again(small, run, run.outputs)
    alone = _again(small, run, [output for step in run.steps for output in _all_conditional(step, which)])
    error = change = 0.0
    outputs: list[Any] = []
    for step, combined, single in zip(run.steps, guided.steps, alone.steps, strict=True):
        outputs = step.outputs or outputs
        if len(_parts(outputs, step.sample)) < 2:  # a prior, or a second stage that does not guide
            continue
        channels = step.sample.shape[1]
        frames = _frames(_tensors(outputs[0])[0], step.sample)
        expected = combined.got.double()
        rescaled = algorithm_2(combined.got[:, :channels], single.got[:, :channels], phi, frames)
        expected[:, :channels] = kept(rescaled, single.got[:, :channels].double(), k, channels_last)
        scale = max(1.0, expected.abs().max().item())
        error = max(error, (step.got - expected).abs().max().item() / scale)
        change = max(change, (step.got - combined.got).abs().max().item() / scale)
    return error, change


def _again(small: Small, run: Run, outputs: list[Any]) -> Run:
    pipe = build(small)
    stock_rescales = [
        name for name in inspect.signature(pipe.__call__).parameters if name.endswith("guidance_rescale")
    ]
    with recorded(pipe, replay=outputs, steps=run.steps) as again:
        pipe(**small.arguments(), **dict.fromkeys(stock_rescales, 0.0))
    return again


def _all_conditional(step: Step, which: int) -> list[Any]:
    """What denoisers returned for a step, with the conditional prediction in all places."""
    parts = _parts(step.outputs, step.sample)
    if len(parts) < 2:
        return step.outputs
    call, place, copies = parts[which % len(parts)]
    source = step.outputs[call]
    made = []
    for i, output in enumerate(step.outputs):
        number = sum(part[0] == i for part in parts)
        flat, chosen = _tensors(output), [x.chunk(copies)[place] for x in _tensors(source)]
        made.append(_mapped(output, iter([_filled(x, c, number) for x, c in zip(flat, chosen, strict=True)])))
    return made


def _filled(output: Tensor, part: Tensor, copies: int) -> Tensor:
    """A part as often as an output has parts; where it is shorter or longer, their ends."""
    result = torch.cat([part] * copies) if part.shape[1:] == output.shape[1:] else output.clone()
    if part.shape[1:] != output.shape[1:]:
        n = min(part.shape[1], output.shape[1])
        result[:, -n:] = part[:, -n:]
    return result


def _parts(outputs: list[Any], sample: Tensor) -> list[tuple[int, int, int]]:
    """(call, place in its batch, how many the batch has) of each prediction."""
    found = []
    for call, output in enumerate(outputs):
        first = _tensors(output)[0]
        copies = len(first) * _frames(first, sample) // len(sample)
        found += [(call, place, copies) for place in range(copies)]
    return found


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, list):
        return [torch.stack(output)]
    values = output.values() if hasattr(output, "to_tuple") else output if isinstance(output, tuple) else ()
    return [x for value in values if isinstance(value, Tensor | list | tuple) for x in _tensors(value)]


def _mapped(output: Any, change: Any) -> Any:
    """The same structure with other tensors: changed, or the next ones of an iterator."""
    if isinstance(output, Tensor):
        return next(change) if isinstance(change, Iterator) else change(output)
    if isinstance(output, list):
        return list(next(change)) if isinstance(change, Iterator) else [change(x) for x in output]
    if isinstance(output, dict) and hasattr(output, "to_tuple"):
        made = {key: _mapped(value, change) for key, value in output.items()}
        return type(output)(**made)
    return tuple(_mapped(value, change) for value in output) if isinstance(output, tuple) else output


def _frames(output: Tensor, sample: Tensor) -> int:
    return output.shape[2] if output.ndim == 5 and sample.ndim == 4 else 1  # which reach the scheduler as a batch


def algorithm_2(guided: Tensor, conditional: Tensor, phi: float, frames: int = 1) -> Tensor:
    """Listing 2 of the paper, per image or video of so many frames, in float64."""
    g, c = (x.double().unflatten(0, (-1, frames)) for x in (guided, conditional))
    dims = tuple(range(1, c.ndim))
    rescaled = g * (c.std(dims, keepdim=True) / g.std(dims, keepdim=True))
    return (phi * rescaled + (1 - phi) * g).flatten(0, 1)


def kept(guided: Tensor, conditional: Tensor, k: int, channels_last: bool = False) -> Tensor:
    """The guided prediction with the conditional one's share of each of the lowest k x k cosine waves, in float64."""
    if guided.ndim < 4:  # sound beside a video
        return guided
    g, c = (x.movedim(-1, -3) if channels_last else x for x in (guided.double(), conditional.double()))
    height, width = g.shape[-2:]
    difference, result = g - c, g
    for i, j in product(range(min(k, height)), range(min(k, width))):
        rows, columns = (torch.arange(n, dtype=torch.float64) + 0.5 for n in (height, width))
        wave = torch.outer((torch.pi * i * rows / height).cos(), (torch.pi * j * columns / width).cos())
        wave = wave / wave.norm()
        result = result - (difference * wave).sum((-2, -1), keepdim=True) * wave
    return result.movedim(-3, -1) if channels_last else result
