"""Command-line arguments shared by commands that generate images: a pipeline and its prompts."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any, Literal

from ..utils.command_line import CommandParser
from .arguments import CLAIMS, add_claim_options

OPTIONS = (
    *("prompts", "prompts_file", "num_images", "num_inference_steps", "guidance_scale", "guidance_rescale"),
    *("keep_low_frequencies", "batch_size", "dtype", "variant", "resolution", "lora", "start", "no_start", *CLAIMS),
)
"""What `add_arguments` adds; each is None unless given."""

CALL_OPTIONS = ("num_inference_steps", "guidance_scale", "batch_size")
NUM_IMAGES = 64
_GPU_BATCH_SIZE = 16
KEEP_HELP = (
    "number K of low frequencies per side that guidance does not change (default: recorded in the pipeline, or 0)"
)


def add_arguments(parser: CommandParser, options: Any) -> None:
    """Add the options for the images that a pipeline generates, such as --prompts, to an argument group."""
    add_prompt_options(options)
    options.add_argument(
        "--num_images",
        type=int,
        help=f"number of images in total, spread evenly over the prompts (default: {NUM_IMAGES})",
    )
    options.add_argument("--num_inference_steps", type=int, help="(default: the pipeline's)")
    add_pipeline_options(parser, options)


def add_prompt_options(options: Any) -> None:
    """Add --prompts and --prompts_file to a parser or a group of it."""
    prompts = options.add_mutually_exclusive_group()
    prompts.add_argument("--prompts", nargs="+", metavar="TEXT", help="prompts, or class labels")
    prompts.add_argument("--prompts_file", metavar="FILE", help="file with one prompt per line, UTF-8")


def add_pipeline_options(parser: CommandParser, options: Any) -> None:
    """Add the options for loading a pipeline and for its guidance to a parser or a group of it."""
    options.add_argument("--guidance_scale", type=float, help="(default: the pipeline's)")
    options.add_argument(
        "--guidance_rescale",
        type=float,
        help="phi in the paper's Algorithm 2, which uses 0.7 (default: recorded in the pipeline, or 0)",
    )
    options.add_argument("--keep_low_frequencies", type=int, metavar="K", help=KEEP_HELP)
    options.add_argument("--batch_size", type=int, help="images per batch and process (default: 16 on CUDA, else 4)")
    options.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="(default: bfloat16 for latent models on CUDA, else float32)",
    )
    options.add_argument(
        "--variant", help="variant of the weights, such as fp16 (default: none, or the only one available)"
    )
    options.add_argument("--resolution", type=int, help="pixels per side (default: the pipeline's)")
    options.add_argument("--lora", metavar="PATH_OR_ID", help="LoRA to apply, with its training schedule")
    start = options.add_mutually_exclusive_group()
    start.add_argument("--start", metavar="FILE", help="start from zsnr fit-start, for an epsilon model")
    start.add_argument(
        "--no_start", action="store_true", default=None, help="ignore the start that is saved next to the pipeline"
    )
    add_claim_options(parser, "the network", options)


def num_images(arguments: argparse.Namespace) -> int:
    """`--num_images`, or its default.

    Raises:
        ValueError: below 1.
    """
    number = NUM_IMAGES if arguments.num_images is None else int(arguments.num_images)
    if number < 1:
        raise ValueError(f"--num_images must be at least 1, got {number}")
    return number


def pipeline_call_kwargs(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the pipeline's call from the command line, such as `--guidance_scale`, for `iter_images`."""
    options = {name: value for name in CALL_OPTIONS if (value := getattr(arguments, name, None)) is not None}
    return (
        options if arguments.resolution is None else options | dict.fromkeys(("height", "width"), arguments.resolution)
    )


def check_plot_option(path: str) -> None:
    """Refuse a `--plot` that cannot be drawn, before anything is computed.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a file extension that matplotlib does not support.
    """
    from ..utils.extras import import_extra

    known = import_extra("matplotlib.backend_bases").FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"--plot {path!r}: use a file name that ends in one of .{', .'.join(sorted(known))}")


def default_device() -> str:
    """The best torch device of this machine: cuda, mps or cpu."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def set_gpu_defaults(arguments: argparse.Namespace, device: Any) -> None:
    """Set missing `--batch_size` and `--dtype` to fast values for a GPU; unchanged on other devices.

    Pixel-space models stay in float32, as in papers, because no decoder hides the rounding of bfloat16.
    """
    import torch

    from ..hub.header import is_single_file
    from ..hub.saved_model import SavedModel

    if torch.device(device).type != "cuda":
        return
    arguments.batch_size = arguments.batch_size or _GPU_BATCH_SIZE
    if arguments.dtype is None:
        latents = is_single_file(arguments.pipeline) or "vae" in SavedModel.open(arguments.pipeline).index
        arguments.dtype = "bfloat16" if latents else "float32"


def load_pipeline(arguments: argparse.Namespace, device: Any) -> Any:
    """Load the pipeline of `--pipeline` in `--dtype`, with `--lora`, `--start` and guidance options, onto a device.

    Raises:
        OSError: the pipeline or start does not exist.
        ValueError: guidance settings that the pipeline does not support, or a start for another base.
    """
    import torch

    from .. import schedulers  # noqa: F401  # a saved pipeline may name its classes, which diffusers only looks up
    from ..hub.load import load_pipeline as load
    from ..hub.lora import load_lora
    from ..start import Start, enable_start

    guidance, start = guidance_options(arguments), getattr(arguments, "start", None)
    start = None if start is None else Start.load(start)  # before loading gigabytes of weights
    recorded: Literal[False] | None = False if start is not None or getattr(arguments, "no_start", None) else None
    try:
        pipe = load(
            arguments.pipeline,
            dtype=getattr(torch, arguments.dtype or "float32"),
            start=recorded,
            **{name: value for name in ("variant", *CLAIMS) if (value := getattr(arguments, name)) is not None},
            **guidance if arguments.lora is None else {},
        )
        if arguments.lora is not None:
            load_lora(pipe, arguments.lora, **guidance)
    except TypeError as error:
        refuse_guidance_options(error, guidance)
        raise
    if start is not None:
        try:
            enable_start(pipe, start)
        except TypeError as error:
            raise ValueError(f"--start {arguments.start}: {error}") from error
    return pipe.to(device)


def guidance_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """`--guidance_rescale` and `--keep_low_frequencies` as given, as arguments of `load_pipeline` and `load_lora`."""
    options = {name: getattr(arguments, name) for name in ("guidance_rescale", "keep_low_frequencies")}
    return {name: value for name, value in options.items() if value is not None}


def refuse_guidance_options(error: TypeError, guidance: dict[str, Any]) -> None:
    """Convert the error of a pipeline without guidance to command-line options, if any were given.

    Raises:
        ValueError: options were given.
    """
    if guidance:
        options = " ".join(f"--{name} {value}" for name, value in guidance.items())
        raise ValueError(f"{options}: {error} Leave it out.") from error


def read_prompts(arguments: argparse.Namespace) -> list[str] | None:
    """The texts of `--prompts` or `--prompts_file`; None without either.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty.
    """
    if arguments.prompts_file is None:
        prompts: list[str] | None = arguments.prompts
        return prompts
    if not Path(arguments.prompts_file).is_file():
        raise OSError(f"--prompts_file {arguments.prompts_file!r}: no such file")
    lines = Path(arguments.prompts_file).read_text(encoding="utf-8-sig").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts_file {arguments.prompts_file!r} contains no prompts; write one per line")
    return prompts


def distinct_conditions(pipe: Any, prompts: list[str] | None) -> list[Any] | None:
    """The distinct prompts, as class labels if the pipeline takes these; None for None.

    Raises:
        ValueError: words for a class-conditional pipeline, or no prompts or labels where they are required.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    if prompts is None:
        if {"prompt", "class_labels"} & {*parameters}:
            raise ValueError(f"{type(pipe).__name__} needs --prompts or --prompts_file")
        return None
    distinct = list(dict.fromkeys(prompts))
    if "class_labels" not in parameters:
        return distinct
    wrong = [prompt for prompt in distinct if not prompt.isdecimal()]
    if wrong:
        raise ValueError(f"{type(pipe).__name__} takes class labels as --prompts, such as 0 7; got {wrong[0]!r}")
    return [int(prompt) for prompt in distinct]
