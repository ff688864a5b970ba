"""Guidance rescale in every pipeline of diffusers that guides, checked at `scheduler.step`.

    python examples/benchmarks/guidance_pipelines.py

Each pipeline is the real class with small random components (`small_pipelines`), and what reaches `scheduler.step` is
compared with Algorithm 2 of Lin et al. 2023 (`guidance_oracle`). Prints the two tables of
`examples/guides/pipelines.md`, of pipelines with a UNet and with a transformer; 5 minutes on one CPU core.
"""

import argparse
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from guidance_oracle import build, errors, recorded
from small_pipelines import FLOW_PIPELINES, PIPELINES, TRANSFORMER_PIPELINES
from small_pipelines.parts import Small

from zsnr_diffusers import GuidanceError, disable_guidance_rescale, enable_guidance_rescale
from zsnr_diffusers.guidance.layout import find_denoisers

PHI = 0.7

# Texts that are told apart: in so few tokens as these take otherwise, their own template leaves no room for a prompt.
_TOKENS = {
    "OvisImagePipeline": 256,
    "Krea2Pipeline": 512,
    "NucleusMoEImagePipeline": 512,
    "Cosmos2_5_PredictBasePipeline": 512,
}


def _told_apart(name: str, small: Small) -> Small:
    tokens = {"max_sequence_length": _TOKENS[name]} if name in _TOKENS else {}
    return small._replace(arguments=lambda: {**small.arguments(), **tokens})


TRANSFORMERS: Mapping[str, Small] = {
    name: _told_apart(name, small)
    for name, small in {**FLOW_PIPELINES, **TRANSFORMER_PIPELINES}.items()
    if small.guidance != "none" and name not in PIPELINES
}
"""Those that guide with a transformer."""

NOT_HERE = {
    "StableDiffusionParadigmsPipeline": "steps many timesteps at once",
    "AceStepPipeline": "guides by a projection, so it has a guider of its own",
    "Cosmos2VideoToWorldPipeline": "replaces predictions by given frames before it combines them",
    "CosmosTextToWorldPipeline": "combines what two steps of its scheduler return",
    "CosmosVideoToWorldPipeline": "combines what two steps of its scheduler return",
    "DiTPipeline": "hands both halves of its batch to the scheduler",
    "SkyReelsV2DiffusionForcingPipeline": "steps every frame by a scheduler of its own",
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": "steps every frame by a scheduler of its own",
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": "steps every frame by a scheduler of its own",
}
"""Where nothing can be done, and why."""

_FIRST = 0
CONDITIONAL = {
    "StableDiffusionInstructPix2PixPipeline": _FIRST,  # [text and image, image, neither]
    "StableDiffusionXLInstructPix2PixPipeline": _FIRST,
    "StableCascadePriorPipeline": _FIRST,
    "StableCascadeDecoderPipeline": _FIRST,
    "StableCascadeCombinedPipeline": _FIRST,
    "CycleDiffusionPipeline": 3,  # [source, target] without and with text
    "StableDiffusionAttendAndExcitePipeline": 2,  # after a call with text alone, for its attention
    "StableDiffusionPix2PixZeroPipeline": 3,  # the second of two calls, likewise
    "LuminaPipeline": _FIRST,
    **dict.fromkeys([name for name in TRANSFORMERS if name.startswith("ZImage")], _FIRST),
}
"""Which of the predictions of a step classifier-free guidance leads to; unless said here the second of those that are
stacked, and the first of separate calls."""


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
    same_calls: bool = True
    """Whether the denoisers were called as often as without rescale."""


def examine(name: str) -> Finding:
    """Run a pipeline with and without rescale and compare."""
    small = PIPELINES[name] if name in PIPELINES else TRANSFORMERS[name]
    finding = Finding(name, "guidance_rescale" in inspect.signature(getattr(diffusers, name).__call__).parameters)
    untouched = build(small)
    attributes = set(vars(untouched))
    with recorded(untouched) as plain:
        stock = called(untouched, small)

    pipe = enable_guidance_rescale(build(small), PHI, strict=True)
    try:
        with recorded(pipe) as run:
            rescaled = called(pipe, small)
    except GuidanceError as error:
        finding.reason = str(error).split(": ", 1)[1].rstrip(".")
    else:
        finding.error, finding.change = errors(small, run, PHI, CONDITIONAL.get(name))
        finding.change *= not torch.equal(rescaled, stock)
        finding.same_calls = len(run.outputs) == len(plain.outputs)
    enable_guidance_rescale(pipe, 0.0)
    finding.same_at_zero = torch.equal(called(pipe, small), stock)
    enable_guidance_rescale(pipe, PHI)
    disable_guidance_rescale(pipe)
    schedulers = [part for part in vars(pipe).values() if isinstance(part, diffusers.SchedulerMixin)]
    restored = type(pipe) is type(untouched) and set(vars(pipe)) <= attributes | set(vars(untouched))
    restored &= not any("step" in vars(scheduler) for scheduler in schedulers)
    restored &= not any(denoiser._forward_hooks for denoiser in find_denoisers(pipe))
    finding.same_after_disable = restored and torch.equal(called(pipe, small), stock)
    return finding


def called(pipe: Any, small: Small) -> Tensor:
    """What a call makes; some draw noise from torch's own generator as well."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return result(pipe(**small.arguments()))


def result(output: Any) -> Tensor:
    """What a pipeline made: images, frames, sound or embeddings."""
    fields = ("images", "frames", "audios", "image_embeddings", "rgb", "videos", "video")
    value = next((getattr(output, name) for name in fields if hasattr(output, name)), None)
    value = output[0] if value is None else value
    return torch.as_tensor(value if not isinstance(value, list) or not value else value[0])


def finding_row(found: Finding) -> str:
    """A row of the table."""
    ours = "yes" if found.reason is None else f"no: {NOT_HERE.get(found.name, found.reason)}"
    return f"| `{found.name}` | {'yes' if found.in_stock else 'no'} | {ours} |"


def main() -> None:
    """Print the tables."""
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=formatter).parse_args()
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for names in (PIPELINES, TRANSFORMERS):
        findings = [examine(name) for name in sorted(names)]
        print("| pipeline | diffusers | here |")
        print("|---|---|---|")
        for found in findings:
            print(finding_row(found))
        acting = [found for found in findings if found.reason is None]
        worst = max(found.error for found in acting)
        same = [f"{sum(getattr(f, name) for f in findings)}" for name in ("same_at_zero", "same_after_disable")]
        print(
            f"\ndiffusers {diffusers.__version__}: {len(findings)} pipelines, {sum(f.in_stock for f in findings)} "
            f"with guidance_rescale in stock, {len(acting)} here, the largest error {worst:.0e}; "
            f"as before at 0: {same[0]}, after disable: {same[1]}.\n"
        )


if __name__ == "__main__":
    main()
