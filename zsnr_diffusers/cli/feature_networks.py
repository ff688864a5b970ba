"""Command-line arguments for the metrics of papers and their feature network."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..evaluation.subset_sizes import SUBSET_SIZE

if TYPE_CHECKING:
    from ..evaluation import FeatureNetwork, Processes

IS_SPLITS = 10
"""Default number of splits for the Inception Score."""

OPTIONS = ("features", "feature_weights", "feature_sha256")
"""What `add_arguments` adds; each is None unless given."""


def add_arguments(options: Any) -> None:
    """Add the options for the feature network of FID, Inception Score and KID to an argument group."""
    options.add_argument(
        "--features",
        choices=("inception", "dinov2", "classifier"),
        help="network: inception, the one of FID (2015-12-05); dinov2, for FD-DINOv2; classifier, a small one for a "
        "specific kind of images, such as examples/ablation/classifier.safetensors (default: inception)",
    )
    options.add_argument(
        "--feature_weights",
        metavar="PATH_OR_ID",
        help="inception-2015-12-05.pt, a folder or Hub id of DINOv2, or the classifier's file (default: torch hub's "
        "cache, downloaded if missing; facebook/dinov2-large; none)",
    )
    options.add_argument(
        "--feature_sha256",
        metavar="HEX",
        help="hash of the weights, to use others than the published ones; metrics of different networks are not "
        "comparable",
    )


def load_feature_network(arguments: argparse.Namespace, device: Any, processes: Processes) -> FeatureNetwork:
    """Load the network of `--features` onto a device; only the main process downloads its file.

    Raises:
        OSError: its file is missing and cannot be downloaded.
        ValueError: a file with another hash or format.
    """
    from ..evaluation import INCEPTION_SHA256, ClassifierFeatures, DinoV2Features, InceptionFeatures, inception_file

    weights, sha256 = arguments.feature_weights, arguments.feature_sha256
    if arguments.features == "classifier":
        with processes.sync_errors():
            if weights is None:
                raise ValueError("--features classifier needs its file: --feature_weights FILE")
            return ClassifierFeatures(weights, sha256, device)
    if arguments.features == "dinov2":
        with processes.sync_errors():
            return DinoV2Features(weights or "facebook/dinov2-large", sha256, device=device)
    with processes.sync_errors():
        if weights is None and processes.is_main:  # one process downloads it before the others look for it
            inception_file()
    with processes.sync_errors():
        return InceptionFeatures(weights or inception_file(), sha256 or INCEPTION_SHA256, device)


def needs_feature_network(arguments: argparse.Namespace) -> bool:
    """Whether `--fid`, `--is` or `--kid`, which need a feature network, is given."""
    return bool(arguments.fid or arguments.inception_score or arguments.kid)


def check_image_count(number: int, kind: str, arguments: argparse.Namespace) -> None:
    """Refuse fewer `generated` or `real` images (`kind`) than FID, KID or Inception Score require."""
    for option, asked, least in (
        ("--fid", arguments.fid and not (kind == "real" and arguments.reference), 2),
        ("--kid", arguments.kid, 3),
        ("--kid_subsets", arguments.kid_subsets, SUBSET_SIZE),
        ("--is_splits", arguments.inception_score and kind == "generated", arguments.is_splits or IS_SPLITS),
    ):
        if asked and number < least:
            raise ValueError(f"{option} needs at least {least} {kind} images, got {number}")
