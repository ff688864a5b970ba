"""`zsnr calibrate`: fit a few-step sampler to a model, using its own many-step samples."""

from __future__ import annotations

import argparse
import inspect
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..utils.command_line import CommandParser
from ..utils.extras import import_extra
from ..utils.files import atomic_path, write_text
from ..utils.tables import Text
from ..utils.terminal import show
from . import generation
from .arguments import add_claim_options, command_parser

DESCRIPTION = """\
Fits the sampler to a model: for few steps, optimizes timesteps and weights of ZeroSNRMultistepScheduler so that
samples match what the same model generates in many steps, with the same prompts, seeds and guidance. The network is
not trained, and no more memory is needed than for sampling. A quarter of the prompts is held out, and a step count is
kept only if it improves on them.

Writes scheduler/scheduler_config.json, report.json and calibration.png, the first two after each step count, so an
interrupted run keeps its results."""

EXAMPLES = """\
examples:
  a folder, with the guidance scale that will be used:
    zsnr calibrate sd21-zsnr --prompts_file prompts.txt --guidance_scale 5 --output_dir sd21-fast

  how long that would take on this machine:
    zsnr calibrate sd21-zsnr --prompts_file prompts.txt --guidance_scale 5 --output_dir sd21-fast --dry_run

  SDXL from the Hub in half precision on a GPU, at 5 and 8 steps:
    zsnr calibrate me/sdxl-zsnr --prompts_file prompts.txt --steps 5 8 --guidance_scale 5 --guidance_rescale 0.7 \\
      --dtype float16 --batch_size 8 --output_dir sdxl-fast

prompts.txt has one typical prompt per line; at least 8, better 64.

exit status: 0 success, 1 no improvement, 2 wrong arguments or data
"""

_TIMED_CALLS = 5


def new_parser() -> CommandParser:
    """The parser of `zsnr calibrate`."""
    parser = command_parser("calibrate", DESCRIPTION, EXAMPLES)
    parser.add_argument("pipeline", metavar="MODEL", help="folder, Hub id or .safetensors file of a pipeline")
    parser.add_argument("--prompts_file", metavar="FILE", required=True, help="one prompt or class label per line")
    parser.add_argument("--output_dir", metavar="FOLDER", required=True, help="output folder")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=[4, 5, 6, 8],
        metavar="N",
        help="step counts to calibrate (default: 4 5 6 8)",
    )
    parser.add_argument(
        "--guidance_scale", type=float, help="guidance scale to calibrate for (default: the pipeline's)"
    )
    parser.add_argument(
        "--guidance_rescale",
        type=float,
        help="guidance rescale (phi), 0 to 1 (default: recorded in the pipeline, or 0)",
    )
    parser.add_argument("--keep_low_frequencies", type=int, metavar="K", help=generation.KEEP_HELP)
    parser.add_argument("--negative_prompt", metavar="TEXT", help="negative prompt for all prompts (default: none)")
    parser.add_argument(
        "--num_prompts",
        type=int,
        default=64,
        help="number of images, each with its own seed; prompts are repeated (default: 64)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image (default: 0)")
    parser.add_argument("--teacher_steps", type=int, default=100, help="step count of the reference (default: 100)")
    parser.add_argument("--resolution", type=int, help="pixels per side (default: the pipeline's)")
    parser.add_argument("--batch_size", type=int, default=4, help="images per network call (default: 4)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="(default: float32)")
    parser.add_argument(
        "--variant", help="variant of the weights, such as fp16 (default: none, or the only one available)"
    )
    parser.add_argument("--lora", metavar="PATH_OR_ID", help="LoRA to apply, with its training schedule")
    add_claim_options(parser, "the network")
    parser.add_argument("--device", help="where the network runs (default: cuda or mps if there is one, else cpu)")
    parser.add_argument(
        "--dry_run", action="store_true", help="time one network call, print how long it would take, and write nothing"
    )
    parser.set_defaults(prompts=None)
    return parser


_CALIBRATOR_OPTIONS = (
    "steps",
    "guidance_rescale",
    "keep_low_frequencies",
    "num_prompts",
    "seed",
    "teacher_steps",
    "batch_size",
)


def run(arguments: argparse.Namespace) -> int:
    """Run `zsnr calibrate` and write its results; returns 0 if any step count improved, else 1."""
    from ..calibration.calibrator import Calibrator, split_prompts

    prompts = generation.read_prompts(arguments) or []
    split_prompts(prompts, arguments.num_prompts, arguments.seed)  # refused before anything is loaded
    import_extra("tqdm")
    pipe = generation.load_pipeline(arguments, arguments.device or generation.default_device())
    calibrator = Calibrator(
        pipe,
        _prompts_for_pipeline(pipe, prompts),
        guidance_scale=_resolve_guidance_scale(pipe, arguments),
        **{name: getattr(arguments, name) for name in _CALIBRATOR_OPTIONS},
        **_pipeline_call_kwargs(arguments),
    )
    if arguments.dry_run:
        return _show_cost(calibrator)
    return _calibrate_and_save(calibrator, Path(arguments.output_dir))


def _prompts_for_pipeline(pipe: Any, prompts: Sequence[str]) -> list[Any]:
    """The prompts as text or class labels, whichever the pipeline takes, including repeated ones."""
    distinct = generation.distinct_conditions(pipe, [*prompts]) or []
    types = dict(zip(dict.fromkeys(prompts), distinct, strict=True))
    return [types[prompt] for prompt in prompts]


def _resolve_guidance_scale(pipe: Any, arguments: argparse.Namespace) -> float:
    """`--guidance_scale`, or else the default of the pipeline's call."""
    default = inspect.signature(pipe.__call__).parameters["guidance_scale"].default
    return float(default if arguments.guidance_scale is None else arguments.guidance_scale)


def _pipeline_call_kwargs(arguments: argparse.Namespace) -> dict[str, Any]:
    """`--resolution` and `--negative_prompt` as arguments of the pipeline's call."""
    sizes = {} if arguments.resolution is None else dict.fromkeys(("height", "width"), arguments.resolution)
    return sizes if arguments.negative_prompt is None else sizes | {"negative_prompt": arguments.negative_prompt}


def _show_cost(calibrator: Any) -> int:
    """Print what `--dry_run` is for; returns the exit status."""
    calls, seconds = calibrator.network_calls, calibrator.seconds_per_call()
    show(Text(f"at most {calls} network calls, of a batch each\n{seconds:.3g} s a call"))
    show(Text(f"about {_format_duration(seconds * calls)} at most"))
    return 0


def _calibrate_and_save(calibrator: Any, folder: Path) -> int:
    """Calibrate each step count, save after each, and print the report; returns the exit status."""
    show(Text(f"at most {calibrator.network_calls} network calls, one batch each"))
    numbers: list[Any] = []
    with _progress_bar(calibrator):
        for number in calibrator.numbers():
            numbers.append(number)
            _save_calibration(calibrator, numbers, folder)
    calibrator.picture(numbers).save(folder / "calibration.png")
    report = calibrator.report(numbers)
    show(report)
    if not report.config():
        show(Text("no step count improved, so the saved scheduler is the default"))
        return 1
    used = f'pipe.scheduler = ZeroSNRMultistepScheduler.from_pretrained("{(folder / "scheduler").as_posix()}")'
    show(Text(f"use it:\n{used}"))
    return 0


def _progress_bar(calibrator: Any) -> Any:
    """A progress bar of network calls, which prints an estimate of the total time after the first calls."""
    total, started = calibrator.network_calls, time.monotonic()
    bar = import_extra("tqdm").tqdm(total=total, unit="call", disable=None)
    calls = 0

    def called() -> None:
        nonlocal calls
        calls += 1
        bar.update()
        if calls == _TIMED_CALLS:
            bar.write(f"about {_format_duration((time.monotonic() - started) / calls * total)} at most")

    calibrator.on_call = called
    return bar


def _format_duration(seconds: float) -> str:
    """Hours and minutes, as `zsnr calibrate` prints how long it will take."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{max(minutes, 1)} min"


def _save_calibration(calibrator: Any, numbers: Sequence[Any], folder: Path) -> None:
    """Write the scheduler's folder and report.json with the step counts finished so far."""
    report = calibrator.report(numbers)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "scheduler") as scheduler:
        calibrator.calibrated(report.config()).save_pretrained(scheduler)
    text = json.dumps(report.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)  # keep prompts readable
    write_text(folder / "report.json", text + "\n")
