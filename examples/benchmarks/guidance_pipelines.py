"""Guidance rescale in every UNet pipeline of diffusers, checked at the scheduler's door.

    python examples/benchmarks/guidance_pipelines.py

Each pipeline is the real class with small random components (`small_pipelines`). It runs with our rescale while what
its denoiser returns and what reaches `scheduler.step` is written down. A second, untouched pipeline is then fed the
same predictions, which tells how stock combines them; Algorithm 2 of Lin et al. 2023 on that, in float64 and by
nothing of ours, is what ought to have reached the scheduler. Prints the README's table; 40 seconds on one CPU core.
"""

import argparse
import functools
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_pipelines import PIPELINES

from zsnr_diffusers import GuidanceError, disable_guidance_rescale, enable_guidance_rescale
from zsnr_diffusers.guidance.intercept import denoisers

PHI = 0.7
CONDITIONAL = {
    "StableDiffusionInstructPix2PixPipeline": 0,  # [text and image, image, neither]
    "StableDiffusionXLInstructPix2PixPipeline": 0,
    "StableCascadePriorPipeline": 0,
    "StableCascadeDecoderPipeline": 0,
    "StableCascadeCombinedPipeline": 0,
    "CycleDiffusionPipeline": 3,  # [source, target] without and with text
}
"""Which of its stacked predictions a pipeline's classifier-free guidance leads to; the second unless said here."""


@dataclass
class Finding:
    """What was found of a pipeline."""

    name: str
    in_stock: bool
    """Whether stock's call has guidance_rescale."""
    reason: str | None = None
    """Why nothing is done to it, None if something is."""
    error: float = 0.0
    """The largest difference to Algorithm 2 at the scheduler's door, over the largest value there, or 1."""
    change: float = 0.0
    """The largest change that the rescale makes there, likewise."""
    same_at_zero: bool = False
    same_after_disable: bool = False


def examine(name: str) -> Finding:
    """Run a pipeline with and without rescale and compare."""
    small = PIPELINES[name]
    finding = Finding(name, "guidance_rescale" in inspect.signature(getattr(diffusers, name).__call__).parameters)
    untouched = small.build()
    stock = result(untouched(**small.arguments()))

    pipe = enable_guidance_rescale(small.build(), PHI, strict=True)
    try:
        with _watched(pipe) as seen:
            rescaled = result(pipe(**small.arguments()))
    except GuidanceError as error:
        finding.reason = str(error).split(": ", 1)[1].rstrip(".")
    else:
        finding.error, finding.change = _compare(name, seen)
        finding.change *= not torch.equal(rescaled, stock)
    enable_guidance_rescale(pipe, 0.0)
    finding.same_at_zero = torch.equal(result(pipe(**small.arguments())), stock)
    enable_guidance_rescale(pipe, PHI)
    disable_guidance_rescale(pipe)
    schedulers = [part for part in vars(pipe).values() if isinstance(part, diffusers.SchedulerMixin)]
    restored = type(pipe) is type(untouched) and set(vars(pipe)) == set(vars(untouched))
    restored &= not any("step" in vars(scheduler) for scheduler in schedulers)
    restored &= not any(denoiser._forward_hooks for denoiser in denoisers(pipe))
    finding.same_after_disable = restored and torch.equal(result(pipe(**small.arguments())), stock)
    return finding


@dataclass
class Seen:
    """What went through the two doors in a run."""

    outputs: list[Tensor]
    """Of every call of a denoiser."""
    steps: list[tuple[Tensor | None, Tensor, Tensor]]
    """At every step: the denoiser's last output since the step before, what the scheduler got, and its sample."""


@contextmanager
def _watched(pipe: Any, replay: list[Tensor] | None = None) -> Iterator[Seen]:
    """Write down what goes through; with `replay`, denoisers return those tensors one after another."""
    seen, last, given = Seen([], []), [None], iter(replay or ())

    def returned(module: Any, inputs: Any, output: Any) -> Any:
        value = next(given) if replay is not None else (output if isinstance(output, Tensor) else output[0]).detach()
        seen.outputs.append(value)
        last[0] = value
        if replay is None or isinstance(output, Tensor):
            return value if replay is not None else None
        return (value, *output[1:]) if isinstance(output, tuple) else type(output)(value)

    handles = [denoiser.register_forward_hook(returned) for denoiser in denoisers(pipe)]
    schedulers = [part for part in vars(pipe).values() if isinstance(part, diffusers.SchedulerMixin)]
    for scheduler in schedulers:
        _note_steps(scheduler, seen, last)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for scheduler in schedulers:
            del scheduler.step


def _note_steps(scheduler: Any, seen: Seen, last: list[Any]) -> None:
    original = scheduler.step

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        seen.steps.append((last[0], given["model_output"].detach().clone(), given["sample"].detach()))
        last[0] = None
        return original(*args, **kwargs)

    scheduler.step = step


def _compare(name: str, seen: Seen) -> tuple[float, float]:
    """Largest error and largest change over the steps whose denoiser guided."""
    small = PIPELINES[name]
    pipe = small.build()
    with _watched(pipe, replay=seen.outputs) as stock:
        pipe(**small.arguments())
    error = change = 0.0
    for (stacked, got, sample), (_, guided, _) in zip(seen.steps, stock.steps, strict=True):
        if stacked is None or len(stacked) == len(sample):  # a prior, or a second stage that does not guide
            continue
        channels = sample.shape[1]
        expected = guided.double()
        expected[:, :channels] = _algorithm_2(guided[:, :channels], _conditional(name, stacked, guided, channels))
        scale = max(1.0, expected.abs().max().item())
        error = max(error, (got - expected).abs().max().item() / scale)
        change = max(change, (got - guided).abs().max().item() / scale)
    return error, change


def _conditional(name: str, stacked: Tensor, guided: Tensor, channels: int) -> Tensor:
    video = stacked.ndim == 5 and guided.ndim == 4  # frames reach the scheduler as a batch
    copies = len(stacked) * (stacked.shape[2] if video else 1) // len(guided)
    part = stacked.chunk(copies)[CONDITIONAL.get(name, 1)]
    return part.transpose(1, 2)[:, :, :channels] if video else part[:, :channels]


def _algorithm_2(guided: Tensor, conditional: Tensor) -> Tensor:
    """Listing 2 of the paper, per image or video, in float64."""
    g, c = guided.double().reshape(conditional.shape), conditional.double()
    dims = tuple(range(1, c.ndim))
    rescaled = g * (c.std(dims, keepdim=True) / g.std(dims, keepdim=True))
    return (PHI * rescaled + (1 - PHI) * g).reshape(guided.shape)


def result(output: Any) -> Tensor:
    """What a pipeline made: images, frames, sound or embeddings."""
    fields = ("images", "frames", "audios", "image_embeddings", "rgb")
    value = next((getattr(output, name) for name in fields if hasattr(output, name)), None)
    value = output[0] if value is None else value
    return torch.as_tensor(value if not isinstance(value, list) or not value else value[0])


def finding_row(found: Finding) -> str:
    """A row of the table."""
    ours = "yes" if found.reason is None else f"no: {found.reason}"
    return f"| `{found.name}` | {'yes' if found.in_stock else 'no'} | {ours} |"


def main() -> None:
    """Print the table."""
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=formatter).parse_args()
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    findings = [examine(name) for name in sorted(PIPELINES)]
    print("| pipeline | stock | here |")
    print("|---|---|---|")
    for found in findings:
        print(finding_row(found))
    acting = [found for found in findings if found.reason is None]
    print(
        f"\ndiffusers {diffusers.__version__}: {len(findings)} pipelines, {sum(f.in_stock for f in findings)} with "
        f"guidance_rescale in stock, {len(acting)} here, the largest error {max(f.error for f in acting):.0e}; as "
        f"before at 0: {sum(f.same_at_zero for f in findings)}, after disable: "
        f"{sum(f.same_after_disable for f in findings)}."
    )


if __name__ == "__main__":
    main()
