"""`zsnr calibrate`: few-step sampling fitted to a model, by what the model itself generates in many steps."""

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
Fits the sampler to a model: at few steps, timesteps and weights of ZeroSNRMultistepScheduler are chosen so that it
comes nearest to what the same model generates in many steps, from the same prompts and seeds, under the same guidance.
The network is only called, not trained; it needs no more memory than sampling. A quarter of the prompts is held out,
and a step count is kept only where it is nearer to the many steps on these.

Written are scheduler/scheduler_config.json, report.json and calibration.png, the first two after each step count,
so an interrupted run keeps what it has."""

EXAMPLES = """\
examples:
  a folder, at the guidance that it is used with:
    zsnr calibrate sd21-zsnr --prompts_file prompts.txt --guidance_scale 5 --output_dir sd21-fast

  how long that would take on this machine:
    zsnr calibrate sd21-zsnr --prompts_file prompts.txt --guidance_scale 5 --output_dir sd21-fast --dry_run

  SDXL from the Hub in half precision on a GPU, at 5 and 8 steps:
    zsnr calibrate me/sdxl-zsnr --prompts_file prompts.txt --steps 5 8 --guidance_scale 5 --guidance_rescale 0.7 \\
      --dtype float16 --batch_size 8 --output_dir sdxl-fast

prompts.txt has a prompt per line, such as the model will be used with; 8 at least, 64 are better.

exit status: 0 done, 1 nothing got better, 2 wrong arguments or data
"""

_TIMED_CALLS = 5


def new_parser() -> CommandParser:
    """The parser of `zsnr calibrate`."""
    parser = command_parser("calibrate", DESCRIPTION, EXAMPLES)
    parser.add_argument("pipeline", metavar="MODEL", help="folder, Hub id or .safetensors file of a pipeline")
    parser.add_argument("--prompts_file", metavar="FILE", required=True, help="one prompt or class label per line")
    parser.add_argument("--output_dir", metavar="FOLDER", required=True, help="where to write the results")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[4, 5, 6, 8], metavar="N", help="to calibrate (default: 4 5 6 8)"
    )
    parser.add_argument("--guidance_scale", type=float, help="to calibrate for (default: the pipeline's)")
    parser.add_argument(
        "--guidance_rescale", type=float, help="phi, 0 to 1 (default: what is recorded in the pipeline, or 0)"
    )
    parser.add_argument("--keep_low_frequencies", type=int, metavar="K", help=generation.KEEP_HELP)
    parser.add_argument("--negative_prompt", metavar="TEXT", help="for all prompts (default: none)")
    parser.add_argument(
        "--num_prompts", type=int, default=64, help="images, each of its own seed; prompts are repeated (default: 64)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first image (default: 0)")
    parser.add_argument("--teacher_steps", type=int, default=100, help="to be near to (default: 100)")
    parser.add_argument("--resolution", type=int, help="pixels per side (default: the pipeline's)")
    parser.add_argument("--batch_size", type=int, default=4, help="images per network call (default: 4)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="(default: float32)")
    parser.add_argument("--variant", help="of the weights, such as fp16 (default: none, or the only one there is)")
    parser.add_argument("--lora", metavar="PATH_OR_ID", help="LoRA to apply, with the schedule it was trained on")
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
    """Run `zsnr calibrate` and write its results; 0 if any step count got better, 1 if none."""
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
    """The prompts as text or class labels, whichever the pipeline takes, repeated ones too."""
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
    show(Text(f"at most {calibrator.network_calls} network calls, of a batch each"))
    numbers: list[Any] = []
    with _progress_bar(calibrator):
        for number in calibrator.numbers():
            numbers.append(number)
            _save_calibration(calibrator, numbers, folder)
    calibrator.picture(numbers).save(folder / "calibration.png")
    report = calibrator.report(numbers)
    show(report)
    if not report.config():
        show(Text("nothing got better, so the scheduler that was written is the default"))
        return 1
    used = f'pipe.scheduler = ZeroSNRMultistepScheduler.from_pretrained("{(folder / "scheduler").as_posix()}")'
    show(Text(f"use it:\n{used}"))
    return 0


def _progress_bar(calibrator: Any) -> Any:
    """A bar of network calls on a terminal, which prints after the first ones how long all will take."""
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
    """Write the scheduler's folder and report.json with the step counts that are done so far."""
    report = calibrator.report(numbers)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "scheduler") as scheduler:
        calibrator.calibrated(report.config()).save_pretrained(scheduler)
    text = json.dumps(report.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)  # prompts stay readable
    write_text(folder / "report.json", text + "\n")
