"""The work of `zsnr evaluate` after its arguments are checked: measure, report, write."""

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
    PromptSuite,
    Reference,
    brightness_score,
    check_reference,
    frechet_figure,
    inception_score_figure,
    iter_images,
    kernel_figure,
    load_reference,
    luminance_coverage,
    measure_folder,
    measure_pipeline,
    plot_luminance,
    prompt_share,
    terminal_invariance,
)
from ..evaluation.image_stream import check_save_folder, list_images
from ..evaluation.metrics import Figures
from ..utils.tables import Text
from ..utils.terminal import show
from . import feature_networks
from . import generation as pipelines
from .feature_networks import IS_SPLITS, check_image_count, needs_feature_network


def evaluate(arguments: argparse.Namespace, processes: Processes, suite: PromptSuite | None) -> None:
    """Check, load, measure and report, cheap steps first so that errors are found early."""
    with processes.sync_errors():
        reference = _check_files_and_load_reference(arguments, processes)
    device = arguments.device or processes.device or pipelines.default_device()
    network = (
        feature_networks.load_feature_network(arguments, device, processes)
        if needs_feature_network(arguments)
        else None
    )
    with processes.sync_errors():
        if reference is not None and network is not None:
            check_reference(reference, network)
        pipe, prompts = _load_pipeline_and_prompts(arguments, device, suite)
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
        result = _print_report(arguments, suite, generated, groups, real, reference)
        if arguments.invariance:
            invariance = terminal_invariance(pipe, prompts, seed=arguments.seed)
            show(invariance)
            result["terminal_invariance"] = asdict(invariance)
        _write_json_and_plot(arguments, generated, real, result)


def _check_files_and_load_reference(arguments: argparse.Namespace, processes: Processes) -> Reference | None:
    """Refuse image folders without images and non-empty output folders, and read the statistics of `--reference`."""
    for folder in (arguments.real, arguments.generated):
        if folder is not None:
            list_images(folder, arguments.on_bad_image)
    if processes.is_main:
        check_save_folder(arguments.save_images)
    return None if arguments.reference is None else load_reference(arguments.reference)


def _load_pipeline_and_prompts(
    arguments: argparse.Namespace, device: Any, suite: PromptSuite | None
) -> tuple[Any, list[Any] | None]:
    """The pipeline of `--pipeline` and its distinct prompts; None and None without it."""
    if arguments.pipeline is None:
        return None, None
    texts = pipelines.read_prompts(arguments) if suite is None else list(suite.prompts)
    pipelines.set_gpu_defaults(arguments, device)
    pipe = pipelines.load_pipeline(arguments, device)
    prompts = pipelines.distinct_conditions(pipe, texts)
    # Errors of the call are raised now; images are generated lazily.
    iter_images(pipe, prompts and prompts[:1], [arguments.seed], **pipelines.pipeline_call_kwargs(arguments))
    return pipe, prompts


def _measure_real_images(
    arguments: argparse.Namespace, network: FeatureNetwork | None, reference: Reference | None, processes: Processes
) -> tuple[Measurements | None, Reference | None]:
    """Measure the images of `--real`; also returns the reference of the Fréchet distance."""
    if arguments.real is None:
        return None, reference
    needed = arguments.kid or (arguments.fid and reference is None)
    real = measure_folder(arguments.real, network if needed else None, arguments.on_bad_image, processes)
    with processes.sync_errors():
        check_image_count(len(real.luminance), "real", arguments)
        if arguments.fid and reference is None and processes.is_main:
            reference = _compute_reference(arguments, real.features)
    return real, reference


def _compute_reference(arguments: argparse.Namespace, features: Any) -> Reference:
    """Mean and covariance of the real images' features, saved at once if `--save_reference` is given."""
    statistics: FeatureStatistics = features.statistics()
    if arguments.save_reference is not None:  # now, so that a failure of the generation does not lose them
        Path(arguments.save_reference).parent.mkdir(parents=True, exist_ok=True)
        statistics.save(arguments.save_reference)
    return Reference(str(Path(arguments.real)), statistics, statistics.count)


def _print_report(
    arguments: argparse.Namespace,
    suite: PromptSuite | None,
    generated: Measurements,
    groups: list[Any] | None,
    real: Measurements | None,
    reference: Reference | None,
) -> dict[str, Any]:
    """Print luminance coverage, the metrics, and the variance explained by prompts; returns them for `--json`."""
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
    if suite is not None and groups is not None:
        score = brightness_score(suite, groups, generated.luminance, generated.clipped)
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
    """The requested metrics among FID, Inception Score and KID, by the name of their option."""
    features: Any = generated.features  # the arguments were checked, so inputs exist
    figures = {}
    if arguments.fid:
        figures["fid"] = frechet_figure(features, reference)
    if arguments.inception_score:
        figures["is"] = inception_score_figure(features, arguments.is_splits or IS_SPLITS, arguments.seed)
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
        settings = {name: value for name, value in vars(arguments).items() if value is not None}
        skipped = [*(real.skipped if real else ()), *generated.skipped]
        result = {**result, "skipped": skipped, "settings": settings}
        text = json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False)
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.json).write_text(text + "\n", encoding="utf-8")
