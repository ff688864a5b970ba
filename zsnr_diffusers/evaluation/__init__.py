"""Evaluation: brightness of generated images compared with real ones, and invariance to the terminal noise.

Also distances in the features of a network (Fréchet distance, Inception Score, KID), the likelihood bound of
pixel-space models in bits/dim, and plots of the Markov chains.

Importing this package loads no libraries; each function imports what it needs.
"""

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from ..utils.distributed import Processes, launched_processes
    from .brightness import BrightnessScore, PromptSuite, brightness_score, load_suite
    from .classifier import ClassifierFeatures, train_classifier
    from .comparison_report import ComparedSamples, SchedulerComparison
    from .distances import (
        InceptionScore,
        KernelDistance,
        frechet_distance,
        inception_score,
        kernel_distance,
        kernel_distance_of_subsets,
    )
    from .extraction import ImageFeatures, image_features, image_statistics
    from .feature_statistics import FeatureOrigin, FeatureStatistics
    from .features import INCEPTION_SHA256, CustomFeatures, DinoV2Features, FeatureNetwork, InceptionFeatures
    from .generation import generate_images, iter_images
    from .inception_weights import inception_file
    from .invariance import TerminalInvariance, terminal_invariance
    from .likelihood import BitsPerDim, bits_per_dim
    from .luminance import (
        LuminanceCoverage,
        LuminanceSummary,
        clipped_share,
        luminance_coverage,
        mean_luminance,
        prompt_share,
    )
    from .manifolds import PrecisionRecall, precision_recall
    from .markov_chains import Chain, chain_picture, denoising_chain, noising_chain
    from .measure import Measurements, measure_folder, measure_images, measure_pipeline
    from .metrics import Figure, frechet_figure, inception_score_figure, kernel_figure
    from .plots import (
        luminance_picture,
        plot_bits_per_dim,
        plot_luminance,
        plot_luminance_over_steps,
        plot_schedule,
        sample_grid,
    )
    from .reference import Reference, check_reference, load_reference
    from .resize import quantize, resize_like_tensorflow1
    from .scheduler_comparison import compare_schedulers

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        ".utils.distributed": "Processes launched_processes",
        "brightness": "BrightnessScore PromptSuite brightness_score load_suite",
        "classifier": "ClassifierFeatures train_classifier",
        "comparison_report": "ComparedSamples SchedulerComparison",
        "distances": (
            "InceptionScore KernelDistance frechet_distance inception_score kernel_distance kernel_distance_of_subsets"
        ),
        "extraction": "ImageFeatures image_features image_statistics",
        "feature_statistics": "FeatureOrigin FeatureStatistics",
        "features": "INCEPTION_SHA256 CustomFeatures DinoV2Features FeatureNetwork InceptionFeatures",
        "generation": "generate_images iter_images",
        "inception_weights": "inception_file",
        "invariance": "TerminalInvariance terminal_invariance",
        "likelihood": "BitsPerDim bits_per_dim",
        "luminance": (
            "LuminanceCoverage LuminanceSummary clipped_share luminance_coverage mean_luminance prompt_share"
        ),
        "manifolds": "PrecisionRecall precision_recall",
        "markov_chains": "Chain chain_picture denoising_chain noising_chain",
        "measure": "Measurements measure_folder measure_images measure_pipeline",
        "metrics": "Figure frechet_figure inception_score_figure kernel_figure",
        "plots": (
            "luminance_picture plot_bits_per_dim plot_luminance plot_luminance_over_steps plot_schedule sample_grid"
        ),
        "reference": "Reference check_reference load_reference",
        "resize": "quantize resize_like_tensorflow1",
        "scheduler_comparison": "compare_schedulers",
    },
)

__all__ = [
    "INCEPTION_SHA256",
    "BitsPerDim",
    "BrightnessScore",
    "Chain",
    "ClassifierFeatures",
    "ComparedSamples",
    "CustomFeatures",
    "DinoV2Features",
    "FeatureNetwork",
    "FeatureOrigin",
    "FeatureStatistics",
    "Figure",
    "ImageFeatures",
    "InceptionFeatures",
    "InceptionScore",
    "KernelDistance",
    "LuminanceCoverage",
    "LuminanceSummary",
    "Measurements",
    "PrecisionRecall",
    "Processes",
    "PromptSuite",
    "Reference",
    "SchedulerComparison",
    "TerminalInvariance",
    "bits_per_dim",
    "brightness_score",
    "chain_picture",
    "check_reference",
    "clipped_share",
    "compare_schedulers",
    "denoising_chain",
    "frechet_distance",
    "frechet_figure",
    "generate_images",
    "image_features",
    "image_statistics",
    "inception_file",
    "inception_score",
    "inception_score_figure",
    "iter_images",
    "kernel_distance",
    "kernel_distance_of_subsets",
    "kernel_figure",
    "launched_processes",
    "load_reference",
    "load_suite",
    "luminance_coverage",
    "luminance_picture",
    "mean_luminance",
    "measure_folder",
    "measure_images",
    "measure_pipeline",
    "noising_chain",
    "plot_bits_per_dim",
    "plot_luminance",
    "plot_luminance_over_steps",
    "plot_schedule",
    "precision_recall",
    "prompt_share",
    "quantize",
    "resize_like_tensorflow1",
    "sample_grid",
    "terminal_invariance",
    "train_classifier",
]
