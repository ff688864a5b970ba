import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import tiny_unconditional

from zsnr_diffusers.evaluation import (
    CustomFeatures,
    FeatureStatistics,
    frechet_distance,
    image_features,
    image_statistics,
    inception_score,
    iter_images,
    kernel_distance,
)
from zsnr_diffusers.utils.images import ImageError


class Corners:
    """The four corners' red as features, the means of the channels as logits; remembers the batches."""

    def __init__(self):
        self.sizes = []

    def __call__(self, images):
        assert images.dtype == torch.uint8
        self.sizes.append(len(images))
        values = images.float()
        return values[:, 0, :: values.shape[2] - 1, :: values.shape[3] - 1].flatten(1), values.mean((2, 3))


def network(function=None):
    return CustomFeatures(function or Corners(), "corners", resize="none")


def random_images(n, height=6, width=4):
    return torch.randint(256, (n, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def save(images, folder):
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03d}.png")
    return folder


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_every_source_gives_the_same_features(tmp_path, batch_size):
    images = random_images(10)
    folder = save(images, tmp_path / "pictures")
    paths = sorted(folder.iterdir())
    expected, logits = Corners()(images)
    sources = [images, folder, str(folder), paths, (Image.open(path) for path in paths)]
    for source in sources:
        corners = Corners()
        found = image_features(network(corners), source, batch_size=batch_size)
        assert np.array_equal(found.features, expected)
        assert found.logits == pytest.approx(logits.numpy())
        assert corners.sizes == [batch_size] * (10 // batch_size) + ([10 % batch_size] if 10 % batch_size else [])
        assert found.origin == network().origin
        streamed = image_statistics(network(), images, batch_size=batch_size)
        assert streamed.covariance == pytest.approx(np.cov(expected.numpy(), rowvar=False), rel=1e-10)
        assert found.statistics().covariance == pytest.approx(streamed.covariance, rel=1e-10)


def test_network_without_logits():
    found = image_features(CustomFeatures(lambda images: Corners()(images)[0], "corners"), random_images(3))
    assert found.logits is None


def test_figures_of_a_pipelines_images(tmp_path):
    """The whole way: generate, measure, save the reference, compare."""
    generated = image_features(network(), iter_images(tiny_unconditional(), None, range(20), num_inference_steps=1))
    real = image_features(network(), random_images(30))
    real.statistics().save(tmp_path / "real.safetensors")
    distance = frechet_distance(generated.statistics(), FeatureStatistics.load(tmp_path / "real.safetensors"))
    assert distance > 0
    assert kernel_distance(generated.features, real.features).value > 0
    assert 1 <= inception_score(generated.logits).mean <= 2


def test_mixed_sizes_are_refused_by_name(tmp_path):
    folder = save(random_images(3), tmp_path / "pictures")
    Image.new("RGB", (5, 6)).save(folder / "001a.png")
    with pytest.raises(ValueError, match=r"001a\.png is 5x6, but .*000\.png is 4x6.*resize"):
        image_statistics(network(), folder)
    with pytest.raises(ValueError, match="image 1 is 3x2, but image 0 is 2x2"):
        image_statistics(network(), [Image.new("L", (2, 2)), Image.new("L", (3, 2))])


def test_no_images(tmp_path):
    with pytest.raises(ValueError, match=r"contains no images, at any depth"):
        image_features(network(), tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        image_features(network(), tmp_path / "none")
    for nothing in ([], iter([])):
        with pytest.raises(ValueError, match="no images"):
            image_features(network(), nothing)
        with pytest.raises(ValueError, match="no images"):
            image_statistics(network(), nothing)


def test_unreadable_file_is_named(tmp_path):
    folder = save(random_images(2), tmp_path / "pictures")
    (folder / "0.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"0\.png"):
        image_features(network(), folder)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 4, 4), r"float32 \[2, 3, 4, 4\].*quantize"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), r"\[2, 4, 4, 3\]"),
        (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), r"\[0, 3, 4, 4\]"),
    ],
)
def test_other_tensors_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        image_features(network(), images)


def test_bad_arguments_and_networks():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        image_features(network(), random_images(2), batch_size=0)
    with pytest.raises(ValueError, match=r"corners returned features of shape \[2, 3, 6, 4\] for 2 images"):
        image_features(network(lambda images: images.float()), random_images(2))
