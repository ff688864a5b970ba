"""`zsnr compare`: images by several schedulers from the same noise, at several step counts."""

from __future__ import annotations

import argparse

from ..utils.command_line import CommandParser
from ..utils.extras import import_extra
from ..utils.tables import Text
from ..utils.terminal import show
from . import generation
from .arguments import command_parser

DESCRIPTION = """\
Compares schedulers and step counts. Samples the same prompts from the same noise with each scheduler at each step
count, and shows the images side by side, each with its distance to a many-step reference, in latents and in pixels,
and its time in seconds. Schedulers have short names, such as zsnr, ddim, dpmpp_2m, dpmpp_2m_karras, unipc, euler,
euler_a and heun, or class names, such as UniPCMultistepScheduler; zsnr is ZeroSNRMultistepScheduler, or
FlowMatchMultistepScheduler for a flow-matching model. All start at the last timestep, and end in zero SNR where the
model does. If one fails, its cell shows the reason, and the others continue.

Writes comparison.png, comparison.html (one file with all images) and comparison.json after each scheduler."""

EXAMPLES = """\
examples:
  a folder, two prompts:
    zsnr compare sd21-zsnr --prompts "a night sky" "a polar bear in snow" --guidance_scale 5 --output_dir compared

  SDXL on a GPU in half precision, with selected schedulers:
    zsnr compare me/sdxl-zsnr --schedulers zsnr unipc EulerAncestralDiscreteScheduler --steps 6 12 25 \\
      --prompts_file prompts.txt --dtype float16 --output_dir compared

exit status: 0 success, 1 every scheduler failed, 2 wrong arguments or data
"""

SCHEDULERS = ("zsnr", "ddim", "dpmpp_2m", "unipc", "euler")
STEPS = (5, 10, 20)


def new_parser() -> CommandParser:
    """The parser of `zsnr compare`."""
    parser = command_parser("compare", DESCRIPTION, EXAMPLES)
    parser.add_argument("pipeline", metavar="MODEL", help="folder, Hub id or .safetensors file of a pipeline")
    parser.add_argument(
        "--schedulers", nargs="+", default=SCHEDULERS, metavar="NAME", help=f"(default: {' '.join(SCHEDULERS)})"
    )
    parser.add_argument(
        "--steps", type=int, nargs="+", default=STEPS, metavar="N", help=f"(default: {' '.join(map(str, STEPS))})"
    )
    generation.add_prompt_options(parser)
    parser.add_argument("--output_dir", metavar="FOLDER", required=True, help="output folder")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first prompt, incremented for each further one (default: 0)"
    )
    parser.add_argument(
        "--reference_steps", type=int, default=100, metavar="N", help="step count of the reference (default: 100)"
    )
    generation.add_pipeline_options(parser, parser)
    parser.add_argument("--device", help="device for the network (default: cuda or mps if available, else cpu)")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run `zsnr compare`, and write its results; returns 1 if every scheduler failed."""
    from ..evaluation import compare_schedulers
    from ..schedulers.by_name import check_scheduler_names

    check_scheduler_names(arguments.schedulers)  # before loading gigabytes of weights
    prompts = generation.read_prompts(arguments)
    import_extra("tqdm")
    pipe = generation.load_pipeline(arguments, arguments.device or generation.default_device())
    comparison = compare_schedulers(
        pipe,
        arguments.schedulers,
        arguments.steps,
        generation.distinct_conditions(pipe, prompts),
        seed=arguments.seed,
        reference_steps=arguments.reference_steps,
        output_dir=arguments.output_dir,
        **generation.pipeline_call_kwargs(arguments),
    )
    show(comparison)
    show(Text(f"written: comparison.html, .png and .json in {arguments.output_dir}"))
    return 1 if all(cell.error for cell in comparison.cells) else 0
