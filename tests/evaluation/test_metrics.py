import numpy as np
import pytest

from zsnr_diffusers.evaluation import (
    FeatureOrigin,
    FeatureStatistics,
    ImageFeatures,
    Reference,
    frechet_distance,
    frechet_figure,
    inception_score,
    inception_score_figure,
    kernel_distance,
    kernel_distance_of_subsets,
    kernel_figure,
    metrics,
)
from zsnr_diffusers.evaluation.features import INCEPTION_2015

DINOV2 = FeatureOrigin("dinov2 dinov2-large", "Pillow bicubic to 224", "34" * 32)
OTHER = FeatureOrigin("other inception", INCEPTION_2015.resize, "12" * 32)


def features(seed, n, origin=INCEPTION_2015, classes=4):
    rng = np.random.default_rng(seed)
    return ImageFeatures(rng.normal(size=(n, 6)), rng.normal(size=(n, classes)), origin)


def reference(seed, n, origin=INCEPTION_2015):
    return Reference("cifar10-train", features(seed, n, origin).statistics(), n)


def test_fid_line():
    figure = frechet_figure(features(0, 50), reference(1, 70))
    value = frechet_distance(features(0, 50).statistics(), features(1, 70).statistics())
    assert figure.value == value
    assert str(figure) == (
        f"FID {value:.4g}  (50 generated, reference cifar10-train: 70; "
        "inception-2015-12-05, TensorFlow 1 bilinear to 299, sha256 f58cb9b6ec32)"
    )
    assert figure.warnings == ()


def test_reference_that_does_not_say_what_it_is():
    statistics = FeatureStatistics.of(features(1, 70).features)
    figure = frechet_figure(features(0, 50), Reference("a.npz", statistics, None))
    assert "reference a.npz: unknown number by an unknown network;" in str(figure)


def test_few_images_are_warned_of_once_and_not_by_the_warnings_module():
    figure = frechet_figure(features(0, 5), reference(1, 6))
    (warning,) = figure.warnings
    assert warning.startswith("5 images for 6 features")


def test_inception_score_of_images_sorted_by_class():
    """Ten classes, sorted as in folders: ten splits in this order have one class each, and a score of 1."""
    logits = np.repeat(np.eye(10) * 20, 100, axis=0)
    assert inception_score(logits).mean == pytest.approx(1)
    figure = inception_score_figure(ImageFeatures(logits[:, :2], logits, INCEPTION_2015))
    assert figure.value > 9
    assert (figure.name, figure.generated, figure.reference) == ("Inception Score", 1000, None)
    assert str(figure).startswith(f"Inception Score {figure.value:.4g} ± {figure.error:.2g}  (1000 generated; mean")
    assert "over 10 splits" in figure.method


def test_inception_score_in_the_order_of_the_seed():
    images = features(0, 40)
    order = np.random.default_rng(3).permutation(40)
    expected = inception_score(images.logits[order], splits=4)
    figure = inception_score_figure(images, splits=4, seed=3)
    assert (figure.value, figure.error) == (expected.mean, expected.std)
    with pytest.raises(ValueError, match="dinov2-large has no logits"):
        inception_score_figure(ImageFeatures(images.features, None, DINOV2))


def test_kid_of_all_images_or_of_subsets(monkeypatch):
    monkeypatch.setattr(metrics, "SUBSET_SIZE", 10)
    x, y = features(0, 20), features(1, 30)
    whole = kernel_distance(x.features, y.features)
    subsets = kernel_distance_of_subsets(x.features, y.features, 7, 10, seed=2)
    figure = kernel_figure(x, y, "test")
    assert (figure.value, figure.error) == (whole.value, whole.error)
    assert "KID" in str(figure)
    assert "(20 generated, reference test: 30; unbiased over all images, jackknife standard error;" in str(figure)
    figure = kernel_figure(x, y, "test", num_subsets=7, seed=2)
    assert (figure.value, figure.error) == (subsets.value, subsets.error)
    assert "standard deviation over 7 subsets of 10;" in str(figure)


@pytest.mark.parametrize(("n", "m", "whole"), [(20, 20, True), (20, 21, False), (9, 100, True)])
def test_kid_takes_subsets_where_all_images_would_take_longer(monkeypatch, n, m, whole):
    monkeypatch.setattr(metrics, "SUBSET_SIZE", 10)
    monkeypatch.setattr(metrics, "MAX_FULL_KID", 40)
    figure = kernel_figure(features(0, n), features(1, m), "test")
    assert ("all images" in figure.method) == whole
    assert kernel_figure(features(0, n), features(1, m), "test", num_subsets=0).method.startswith("unbiased over all")


def test_only_the_published_network_has_the_published_names():
    for origin, names in (
        (INCEPTION_2015, ("FID", "KID")),
        (DINOV2, ("FD-DINOv2", "KD-DINOv2")),
        (OTHER, ("Fréchet distance", "Kernel distance")),
        (
            FeatureOrigin(INCEPTION_2015.network, "bicubic", INCEPTION_2015.sha256),
            ("Fréchet distance", "Kernel distance"),
        ),
    ):
        x = features(0, 20, origin)
        assert frechet_figure(x, reference(1, 20, origin)).name == names[0]
        assert kernel_figure(x, features(1, 20, origin), "a").name == names[1]
    assert inception_score_figure(features(0, 20, OTHER)).name == "Inception Score with another network"


def test_figures_of_different_networks_are_refused():
    with pytest.raises(ValueError, match="same network"):
        frechet_figure(features(0, 20), reference(1, 20, OTHER))
    with pytest.raises(ValueError, match="same network"):
        kernel_figure(features(0, 20), features(1, 20, OTHER), "a")
