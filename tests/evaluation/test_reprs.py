import numpy as np
import torch
from PIL import Image

from zsnr_diffusers.evaluation import (
    BitsPerDim,
    Chain,
    FeatureOrigin,
    FeatureStatistics,
    ImageFeatures,
    InceptionScore,
    KernelDistance,
    Measurements,
    measure_images,
)

ORIGIN = FeatureOrigin("tiny", "none", "0" * 64)


def test_objects_with_arrays_are_short_in_a_console():
    features = ImageFeatures(np.zeros((3, 2), np.float32), None, ORIGIN)
    shown = {
        repr(features): "ImageFeatures [3 x 2] of tiny",
        repr(FeatureStatistics.of(features.features, ORIGIN)): "FeatureStatistics of 3 images by tiny",
        repr(Measurements(np.zeros(3), np.zeros(3), features, [], None)): "Measurements of 3 images, features of tiny",
        repr(Chain((0, 5), torch.zeros(2, 1, 3, 4, 4))): "Chain of 2 frames of [1, 3, 4, 4], t = 0 to 5",
        repr(BitsPerDim(3.0, 0.1, 0.0, np.ones(1000), 4, "fixed_small")): "bits/dim: at most 3.0000",
    }
    assert all(text.startswith(start) for text, start in shown.items())
    assert max(map(len, shown)) < 160


def test_measurements_are_tables_in_a_notebook():
    measured = measure_images([Image.new("L", (4, 4), grey) for grey in (0, 255)])
    assert "<th" in measured._repr_html_()
    assert "1.0000" in measured._repr_html_()
    assert str(InceptionScore(9.5, 0.1, 50000, 10)) == "Inception Score 9.5 ± 0.1 (10 splits of 50000 images)"
    assert "0.25 ± 0.01 (8 and 9 images)" in KernelDistance(0.25, 0.01, 8, 9)._repr_html_()


def test_skipped_files_are_named():
    measured = Measurements(np.zeros(0), np.zeros(0), None, ["<a>.png"], None)
    assert "skipped: &lt;a&gt;.png" in measured._repr_html_()
