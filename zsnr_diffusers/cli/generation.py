"""What commands have in common that make images: a pipeline and its prompts, from the command line's arguments."""

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
KEEP_HELP = "lowest K x K frequencies that guidance leaves alone (default: what is recorded in the pipeline, or 0)"


def add_arguments(parser: CommandParser, options: Any) -> None:
    """Add the options that say which images a pipeline generates, such as --prompts, to an argument group."""
    add_prompt_options(options)
    options.add_argument("--num_images", type=int, help=f"in all, evenly over the prompts (default: {NUM_IMAGES})")
    options.add_argument("--num_inference_steps", type=int, help="(default: the pipeline's)")
    add_pipeline_options(parser, options)


def add_prompt_options(options: Any) -> None:
    """Add --prompts and --prompts_file to a parser or a group of it."""
    prompts = options.add_mutually_exclusive_group()
    prompts.add_argument("--prompts", nargs="+", metavar="TEXT", help="prompts, or class labels")
    prompts.add_argument("--prompts_file", metavar="FILE", help="one prompt per line, UTF-8")


def add_pipeline_options(parser: CommandParser, options: Any) -> None:
    """Add the options of how a pipeline is loaded and guides, to the parser or to a group of it."""
    options.add_argument("--guidance_scale", type=float, help="(default: the pipeline's)")
    options.add_argument(
        "--guidance_rescale",
        type=float,
        help="phi of the paper's Algorithm 2, 0.7 there (default: what is recorded in the pipeline, or 0)",
    )
    options.add_argument("--keep_low_frequencies", type=int, metavar="K", help=KEEP_HELP)
    options.add_argument("--batch_size", type=int, help="per process (default: 16 on CUDA, else 4)")
    options.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="(default: on CUDA bfloat16 for models of latents, else float32)",
    )
    options.add_argument("--variant", help="of the weights, such as fp16 (default: none, or the only one there is)")
    options.add_argument("--resolution", type=int, help="pixels per side (default: the pipeline's)")
    options.add_argument("--lora", metavar="PATH_OR_ID", help="LoRA to apply, with the schedule it was trained on")
    start = options.add_mutually_exclusive_group()
    start.add_argument("--start", metavar="FILE", help="start of zsnr fit-start, for a model of epsilon")
    start.add_argument(
        "--no_start", action="store_true", default=None, help="without the start that is saved beside the pipeline"
    )
    add_claim_options(parser, "the network", options)


def num_images(arguments: argparse.Namespace) -> int:
    """`--num_images`, how many images to generate, or its default.

    Raises:
        ValueError: none.
    """
    number = NUM_IMAGES if arguments.num_images is None else int(arguments.num_images)
    if number < 1:
        raise ValueError(f"--num_images must be at least 1, got {number}")
    return number


def pipeline_call_kwargs(arguments: argparse.Namespace) -> dict[str, Any]:
    """The command line's arguments of the pipeline's call, such as `--guidance_scale`, as `iter_images` takes them."""
    options = {name: value for name in CALL_OPTIONS if (value := getattr(arguments, name, None)) is not None}
    return (
        options if arguments.resolution is None else options | dict.fromkeys(("height", "width"), arguments.resolution)
    )


def check_plot_option(path: str) -> None:
    """Refuse a `--plot` that cannot be drawn, before anything is computed for it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a file name with another ending than matplotlib writes.
    """
    from ..utils.extras import import_extra

    known = import_extra("matplotlib.backend_bases").FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"--plot {path!r}: name a file that ends in one of .{', .'.join(sorted(known))}")


def default_device() -> str:
    """The best torch device of this machine: cuda, mps or cpu."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def set_gpu_defaults(arguments: argparse.Namespace, device: Any) -> None:
    """Set `--batch_size` and `--dtype` that were not given to what a GPU is fast with; nothing on other devices.

    Pixel-space models stay in float32: figures of papers are of that, and no decoder hides what 8 bits of mantissa do.
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
        OSError: there is no such pipeline, or no such start.
        ValueError: a guidance rescale or low frequencies that it cannot take, or a start of another base.
    """
    import torch

    from .. import schedulers  # noqa: F401  # a saved pipeline may name its classes; diffusers only looks them up
    from ..hub.load import load_pipeline as load
    from ..hub.lora import load_lora
    from ..start import Start, enable_start

    guidance, start = guidance_options(arguments), getattr(arguments, "start", None)
    start = None if start is None else Start.load(start)  # before gigabytes of weights
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
    """Say the error of a pipeline without guidance in words of the command line, if such options were given.

    Raises:
        ValueError: they were.
    """
    if guidance:
        options = " ".join(f"--{name} {value}" for name, value in guidance.items())
        raise ValueError(f"{options}: {error} Leave it out.") from error


def read_prompts(arguments: argparse.Namespace) -> list[str] | None:
    """The texts of `--prompts` or `--prompts_file`, None without either.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty.
    """
    if arguments.prompts_file is None:
        prompts: list[str] | None = arguments.prompts
        return prompts
    if not Path(arguments.prompts_file).is_file():
        raise OSError(f"--prompts_file {arguments.prompts_file!r}: there is no such file")
    lines = Path(arguments.prompts_file).read_text(encoding="utf-8-sig").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts_file {arguments.prompts_file!r} holds no prompts; write one per line")
    return prompts


def distinct_conditions(pipe: Any, prompts: list[str] | None) -> list[Any] | None:
    """The distinct prompts, as class labels if the pipeline takes these; None for None.

    Raises:
        ValueError: words for a pipeline of class labels, or nothing for one that needs prompts or labels.
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
