"""The network that figures are made by, from the command line's arguments."""

from __future__ import annotations

import argparse
from typing import Any

from ..evaluation import (
    INCEPTION_SHA256,
    ClassifierFeatures,
    DinoV2Features,
    FeatureNetwork,
    InceptionFeatures,
    Processes,
    inception_file,
)

OPTIONS = ("features", "feature_weights", "feature_sha256")
"""What `add_arguments` adds; each is None unless given."""


def add_arguments(options: Any) -> None:
    """Add the options that name the network of FID, Inception Score and KID to an argument group."""
    options.add_argument(
        "--features",
        choices=("inception", "dinov2", "classifier"),
        help="network: that of FID, of 2015-12-05; DINOv2 for FD-DINOv2; or a small classifier of images of one kind, "
        "such as examples/ablation/classifier.safetensors (default: inception)",
    )
    options.add_argument(
        "--feature_weights",
        metavar="PATH_OR_ID",
        help="inception-2015-12-05.pt, a folder or Hub id of DINOv2, or the classifier's file (default: torch hub's "
        "cache, fetched if it is not there; facebook/dinov2-large; none)",
    )
    options.add_argument(
        "--feature_sha256",
        metavar="HEX",
        help="hash of the weights, to take others than the published ones; figures of other networks do not compare",
    )


def load_feature_network(arguments: argparse.Namespace, device: Any, processes: Processes) -> FeatureNetwork:
    """Load the network of `--features` onto a device, its file fetched by the main process alone.

    Raises:
        OSError: its file is not there and cannot be fetched.
        ValueError: a file of another hash or kind.
    """
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
        if weights is None and processes.is_main:  # fetched by one, before the others look for it
            inception_file()
    with processes.sync_errors():
        return InceptionFeatures(weights or inception_file(), sha256 or INCEPTION_SHA256, device)
