"""What is measured of images, in the features of a small classifier of real ones."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fashion_mnist import Clothes
from PIL import Image

from zsnr_diffusers.evaluation import (
    ClassifierFeatures,
    FeatureStatistics,
    ImageFeatures,
    check_reference,
    frechet_distance,
    image_features,
    kernel_distance,
    load_reference,
    luminance_coverage,
    mean_luminance,
    precision_recall,
    train_classifier,
)

HERE = Path(__file__).parent
CLASSIFIER = HERE / "classifier.safetensors"
REFERENCE = HERE / "reference.safetensors"
CLASSIFIER_SHA256 = "feef864b862364d6047a3d2d51d707f78f092195efb3252a88f299d212cfd2a7"
"""Of the file in this folder; figures by another classifier do not compare."""

NEIGHBORS = 2000
"""Real images of the kernel distance, precision and recall."""


@dataclass
class Row:
    """Figures of n images; `w1` beside its `floor`, what as many real images have on average."""

    n: int
    frechet_distance: float
    kernel_distance: float
    precision: float
    recall: float
    accuracy: float
    w1: float
    floor: float
    luminance_mean: float
    luminance_std: float


class Judge:
    """The classifier of this folder, and real images that neither it nor a network was trained on.

    Args:
        test: all real images of the test part.
        path: of the classifier.
        sha256: that it must have.

    Raises:
        ValueError: a classifier of another hash, or reference statistics of another classifier.
    """

    def __init__(self, test: Clothes, path: Path = CLASSIFIER, sha256: str | None = CLASSIFIER_SHA256) -> None:
        self.network = ClassifierFeatures(path, sha256)
        self.reference = load_reference(reference_of(path))
        check_reference(self.reference, self.network)
        self._some = self._features(test.first(NEIGHBORS).pictures()).features
        self._luminance, self._labels = mean_luminance(test.pictures()), test.labels.tolist()

    def __call__(self, images: list[Image.Image], labels: list[int]) -> Row:
        """Compare images that are asked to be of the classes `labels` with real ones."""
        found = self._features(images)
        assert found.logits is not None
        near = precision_recall(found.features, self._some)
        coverage = luminance_coverage(
            mean_luminance(images), self._luminance, num_bootstraps=100, groups=(labels, self._labels)
        )
        return Row(
            n=len(images),
            frechet_distance=frechet_distance(found.statistics(), self.reference.statistics),
            kernel_distance=kernel_distance(found.features, self._some).value,
            precision=near.precision,
            recall=near.recall,
            accuracy=float((found.logits.argmax(1) == labels).mean()),
            w1=coverage.w1,
            floor=coverage.floor,
            luminance_mean=coverage.generated.mean,
            luminance_std=coverage.generated.std,
        )

    def _features(self, images: list[Image.Image]) -> ImageFeatures:
        return image_features(self.network, images, batch_size=500, progress=False)


def reference_of(classifier: Path) -> Path:
    """Where the statistics of the test part in the features of a classifier lie."""
    return classifier.with_name(REFERENCE.name)


def make_classifier(train: Clothes, test: Clothes, path: Path, epochs: int, seed: int = 0) -> dict[str, Any]:
    """Train the classifier, and write it and the statistics of the test part by it.

    Returns:
        The hash of the file, and its accuracy on the test part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    images, labels = torch.from_numpy(train.images)[:, None], torch.from_numpy(train.labels)
    sha256 = train_classifier(images, labels, path, f"Fashion-MNIST {images.shape[-1]}", epochs=epochs, seed=seed)
    network = ClassifierFeatures(path, sha256)
    found = image_features(network, test.pictures(), batch_size=500, progress=False)
    statistics: FeatureStatistics = found.statistics()
    statistics.save(reference_of(path))
    assert found.logits is not None
    return {"sha256": sha256, "accuracy": float((found.logits.argmax(1) == test.labels).mean())}
