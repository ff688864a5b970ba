"""The console script `zsnr`. It imports torch, diffusers and scipy only once a command needs them."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluation.luminance import Floats

DESCRIPTION = "Zero-terminal-SNR diffusion (Lin et al. 2023, arXiv:2305.08891) for diffusers."

EVALUATE = """\
Does a model cover the brightness of real images? Compares the mean luminance of generated and of real images:
percentiles, range and the Wasserstein distance, beside the distance that a perfect generator would show with as
many images."""

EVALUATE_EXAMPLES = """\
examples:
  two folders of images, at any depth, and a picture of both histograms:
    zsnr evaluate --real photos/ --generated samples/ --plot luminance.png

  a text-to-image pipeline, 16 seeds for each of 4 prompts, and how much the terminal noise decides:
    zsnr evaluate --real photos/ --pipeline stabilityai/stable-diffusion-2-1-base --num_images 64 \\
      --prompts "a black cat at night" "a polar bear in snow" "a white page" "a coal mine" \\
      --num_inference_steps 25 --guidance_scale 7.5 --guidance_rescale 0.7 --invariance --json result.json

  an unconditional pipeline from a local folder, keeping its images:
    zsnr evaluate --real photos/ --pipeline out/my-model --num_images 256 --save_images samples/

exit status: 0 done, 2 wrong arguments or data
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (by default that of the process) and return its exit status, 0 or 2.

    Raises:
        SystemExit: from argparse, with status 2 for arguments that it cannot parse and 0 after `--help`.
    """
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (OSError, ValueError, ImportError) as error:  # a value or a file of the user's; what is left is a bug
        print(f"zsnr {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of `zsnr`; each command stores its function as `run`."""
    parser = argparse.ArgumentParser(
        "zsnr",
        description=DESCRIPTION,
        epilog="example: zsnr evaluate --real photos/ --generated samples/ --plot luminance.png",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    evaluate = commands.add_parser(
        "evaluate",
        help="compare the brightness of generated and real images",
        description=EVALUATE,
        epilog=EVALUATE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_evaluate_arguments(evaluate)
    evaluate.set_defaults(run=run_evaluate)
    return parser


def _add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--real", required=True, metavar="FOLDER", help="folder of real images")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--generated", metavar="FOLDER", help="folder of generated images")
    source.add_argument("--pipeline", metavar="PATH_OR_ID", help="diffusers pipeline to generate with")
    parser.add_argument("--plot", metavar="FILE", help="write the histograms here (png, pdf, svg)")
    parser.add_argument("--json", metavar="FILE", help="write every number here")
    parser.add_argument(
        "--on_bad_image", choices=("fail", "skip"), default="fail", help="skipped images are named (default: fail)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first image and of the bootstrap (default: 0)")

    # Their default is None, so that one of them beside --generated is noticed.
    options = parser.add_argument_group("with --pipeline")
    prompts = options.add_mutually_exclusive_group()
    prompts.add_argument("--prompts", nargs="+", metavar="TEXT", help="prompts, or class labels")
    prompts.add_argument("--prompts_file", metavar="FILE", help="one prompt per line, UTF-8")
    options.add_argument("--num_images", type=int, help="spread evenly over the prompts (default: 64)")
    options.add_argument("--num_inference_steps", type=int, help="(default: the pipeline's)")
    options.add_argument("--guidance_scale", type=float, help="(default: the pipeline's)")
    options.add_argument(
        "--guidance_rescale",
        type=float,
        help="phi of the paper's Algorithm 2, 0.7 there (default: what is recorded in the pipeline, or 0)",
    )
    options.add_argument("--batch_size", type=int, help="(default: 4)")
    options.add_argument("--device", help="(default: cuda or mps if there is one, else cpu)")
    options.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="(default: float32)")
    options.add_argument("--save_images", metavar="FOLDER", help="keep the images here, with a metadata.jsonl")
    options.add_argument("--grid", metavar="FILE", help="write samples here, a row per prompt and a column per seed")
    options.add_argument(
        "--invariance", action="store_true", default=None, help="also run the terminal-invariance check, section 5.2"
    )


_PIPELINE_OPTIONS = (
    *("prompts", "prompts_file", "num_images", "num_inference_steps", "guidance_scale", "guidance_rescale"),
    *("batch_size", "device", "dtype", "save_images", "grid", "invariance"),
)


def run_evaluate(arguments: argparse.Namespace) -> None:
    """`zsnr evaluate`: print the report, and write the files that were asked for."""
    from .evaluation import folder_luminance, luminance_coverage, plot_luminance

    _check_evaluate(arguments)
    real, skipped = folder_luminance(arguments.real, arguments.on_bad_image)
    result: dict[str, Any] = {}
    if arguments.generated:
        generated, more = folder_luminance(arguments.generated, arguments.on_bad_image)
        skipped += more
    else:
        generated, result = _evaluate_pipeline(arguments)
    coverage = luminance_coverage(generated, real, seed=arguments.seed)
    print(coverage)
    if "prompt_share" in result:
        print(
            "prompt share {share:.4f} of the variance; noise alone: {noise_alone:.4f}".format(**result["prompt_share"])
        )
    if "terminal_invariance" in result:
        print(result["terminal_invariance"])
        result["terminal_invariance"] = asdict(result["terminal_invariance"])
    if arguments.plot:
        plot_luminance(arguments.plot, {"generated": generated}, real)
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name != "run" and value is not None}
        result = {"luminance": asdict(coverage), **result, "skipped": skipped, "settings": settings}
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.json).write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _check_evaluate(arguments: argparse.Namespace) -> None:
    """Find what would fail after hours of generation before it begins."""
    from .evaluation._extras import import_extra
    from .evaluation.sources import check_save_folder

    misplaced = [f"--{name}" for name in _PIPELINE_OPTIONS if getattr(arguments, name) is not None]
    if arguments.generated and misplaced:
        raise ValueError(f"{', '.join(misplaced)}: only with --pipeline; leave out, or replace --generated")
    for module in ("scipy.stats", "tqdm", *(["matplotlib.figure"] if arguments.plot else [])):
        import_extra(module)
    check_save_folder(arguments.save_images)


def _evaluate_pipeline(arguments: argparse.Namespace) -> tuple[Floats, dict[str, Any]]:
    from .evaluation import pipeline_luminance, prompt_share, terminal_invariance

    texts = _read_prompts(arguments)
    pipe = _load_pipeline(arguments)
    prompts = _conditions(pipe, texts)
    options = ("num_inference_steps", "guidance_scale", "batch_size", "save_images", "grid")
    given = {name: getattr(arguments, name) for name in options if getattr(arguments, name) is not None}
    num_images = 64 if arguments.num_images is None else arguments.num_images
    luminance, groups = pipeline_luminance(pipe, prompts, num_images, arguments.seed, **given)
    result: dict[str, Any] = {}
    k, n = len(set(groups)), len(groups)
    if n > k > 1:
        result["prompt_share"] = {"share": prompt_share(luminance, groups), "noise_alone": (k - 1) / (n - 1)}
    if arguments.invariance:
        result["terminal_invariance"] = terminal_invariance(pipe, prompts, seed=arguments.seed)
    return luminance, result


def _read_prompts(arguments: argparse.Namespace) -> list[str] | None:
    if arguments.prompts_file is None:
        prompts: list[str] | None = arguments.prompts
        return prompts
    lines = Path(arguments.prompts_file).read_text(encoding="utf-8-sig").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts_file {arguments.prompts_file!r} holds no prompts; write one per line")
    return prompts


def _load_pipeline(arguments: argparse.Namespace) -> Any:
    import torch

    from . import schedulers  # noqa: F401  # a saved pipeline may name its classes; diffusers only looks them up
    from .hub import load_pipeline

    device = arguments.device
    if device is None:
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        pipe = load_pipeline(arguments.pipeline, guidance_rescale=arguments.guidance_rescale)
    except TypeError as error:
        if arguments.guidance_rescale is None:
            raise
        raise ValueError(f"--guidance_rescale {arguments.guidance_rescale}: {error} Leave it out.") from error
    # Cast afterwards: what from_pretrained calls the dtype changes between versions of diffusers.
    return pipe.to(device, getattr(torch, arguments.dtype or "float32"))


def _conditions(pipe: Any, prompts: list[str] | None) -> list[Any] | None:
    """The prompts in the type that the pipeline takes, once each."""
    if prompts is None:
        return None
    distinct = list(dict.fromkeys(prompts))
    if "class_labels" not in inspect.signature(pipe.__call__).parameters:
        return distinct
    wrong = [prompt for prompt in distinct if not prompt.isdecimal()]
    if wrong:
        raise ValueError(f"{type(pipe).__name__} takes class labels as --prompts, such as 0 7; got {wrong[0]!r}")
    return [int(prompt) for prompt in distinct]


if __name__ == "__main__":
    sys.exit(main())
